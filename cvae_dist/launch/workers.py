"""Ranks on the workers of a Dask cluster: on each an agent, a task that starts a rank and stays with it.

The future of an agent is its lease. Where the client cancels it, or is gone, the agent sees that its task is cancelled.
Then it lets its rank write a checkpoint and end. Where the worker dies, Linux tells the rank, see
:func:`~cvae_dist.launch.rank.end_with_parent`.
"""

import queue
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from cvae_dist.errors import InvalidInput, RankLost
from cvae_dist.events import Event, OnEvent
from cvae_dist.launch.process import Message, RankProcess
from cvae_dist.launch.rank import Task

if TYPE_CHECKING:
    from distributed import Client, Future

_LOCK = "cvae-dist train"  # of a cluster: its workers are the ranks of one training at a time
_LOOK = 0.1  # seconds between looks of an agent
_ROLL_CALL = 1.0  # seconds between looks whether all workers are there
_FIRST_WORKER = 60.0  # seconds to wait for a worker
_MISSING_WORKERS = 5.0  # seconds to wait for those that an earlier generation had
_GRACE = 30.0  # seconds that a rank has for its checkpoint
_LEAVE = 5.0  # seconds more until an agent has killed it
_KILLED = -9
_CLOSING = ("closing", "closing_gracefully", "closed", "failed")


class Worker(NamedTuple):
    """A worker process: its address, and its id, which no other ever has."""

    address: str
    id: str

    @property
    def host(self) -> str:
        """Name or number of its machine."""
        return urlsplit(self.address).hostname or ""


class WorkerRanks:
    """The ranks of one generation, one on each of some workers. They meet at the first one."""

    def __init__(self, client: "Client", task: Task, workers: list[Worker]) -> None:
        self.size = len(workers)
        self.messages: queue.SimpleQueue[tuple[int, Message]] = queue.SimpleQueue()
        self._client, self._task, self._workers = client, task, workers
        self._topic = f"cvae-dist-{uuid.uuid4().hex}"
        self._started: set[int] = set()
        self._ended: set[int] = set()
        self._address: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
        self._futures: dict[int, Future[Any]] = {}
        self._closed = threading.Event()
        client.subscribe_topic(self._topic, self._hear)
        self._watches = threading.Thread(target=self._watch, name="roll call", daemon=True)
        self._watches.start()
        self._submit(0, None)

    def stop(self) -> None:
        """Ask all to write a checkpoint, together, and end."""
        self._client.cancel(list(self._futures.values()), force=True)

    def close(self) -> None:
        """End those that are still there, at once."""
        self.stop()
        until = time.monotonic() + _GRACE + _LEAVE
        while self._started - self._ended and time.monotonic() < until:
            time.sleep(_LOOK)
        self._closed.set()
        self._watches.join()
        self._client.unsubscribe_topic(self._topic)

    def _submit(self, rank: int, address: tuple[str, int] | None) -> None:
        worker = self._workers[rank]
        hosts = [other.host for other in self._workers]
        place = {
            "RANK": rank, "WORLD_SIZE": self.size,
            "LOCAL_RANK": hosts[:rank].count(worker.host), "LOCAL_WORLD_SIZE": hosts.count(worker.host),
        }  # fmt: skip
        environment = {name: str(value) for name, value in place.items()}
        self._futures[rank] = self._client.submit(
            _attend, self._task, rank, environment, worker.id, self._topic, address,
            key=f"{self._topic}-{rank}", workers=[worker.address], allow_other_workers=True, pure=False, retries=0,
        )  # fmt: skip

    def _hear(self, event: tuple[float, Mapping[str, Any]]) -> None:
        """Take a message of an agent; called by the client's own thread."""
        rank, message = event[1]["rank"], event[1]["message"]
        if "started" in message:
            self._started.add(rank)
            if rank == 0:
                self._address.put(tuple(message["started"]))
            return
        if "exit" in message:
            if rank in self._ended:
                return
            self._ended.add(rank)
        self.messages.put((rank, message))

    def _watch(self) -> None:
        """Start the other ranks when the first one is there; notice agents that will never speak again."""
        called = 0.0
        while not self._closed.wait(_LOOK):
            with suppress(queue.Empty):
                address = self._address.get_nowait()
                for rank in range(1, self.size):
                    self._submit(rank, address)
            if time.monotonic() - called > _ROLL_CALL:
                called = time.monotonic()
                self._call_roll()

    def _call_roll(self) -> None:
        present = {worker.id for worker in workers_of(self._client)}
        for rank, future in list(self._futures.items()):
            worker = self._workers[rank]
            if worker.id not in present:
                self._give_up(rank, f"its worker {worker.address} has left the cluster")
            elif future.status == "error":
                self._give_up(rank, f"its agent failed: {future.exception()}")

    def _give_up(self, rank: int, why: str) -> None:
        self._hear((0.0, {"rank": rank, "message": {"exit": {"code": _KILLED, "tail": [why]}}}))


def workers_of(client: "Client") -> list[Worker]:
    """Return the workers of a cluster, ordered by address."""
    found: dict[str, str] = client.run_on_scheduler(_ids)
    return [Worker(address, found[address]) for address in sorted(found)]


def _ids(dask_scheduler: Any) -> dict[str, str]:
    return {address: worker.server_id for address, worker in dask_scheduler.workers.items()}


class Cluster:
    """Where the generations of one training are started: on all workers that are there at that time."""

    def __init__(self, client: "Client | None", on_event: OnEvent) -> None:
        if client is None:
            raise InvalidInput(
                "launcher='dask' needs a cluster, and none was given. Nothing was trained; name its scheduler "
                "(--scheduler tcp://host:8786, or client= in Python)"
            )
        self._client, self._on_event = client, on_event
        self._size = 1

    def start(self, task: Task) -> WorkerRanks:
        """Start a generation."""
        workers = self._workers()
        self._size = len(workers)
        return WorkerRanks(self._client, task, workers)

    def _workers(self) -> list[Worker]:
        """Return the workers that are there, having waited for one, and a moment for those that were there before."""
        began = time.monotonic()
        while True:
            found, waited = workers_of(self._client), time.monotonic() - began
            if len(found) >= self._size or (found and waited > _MISSING_WORKERS):
                return found
            if waited > _FIRST_WORKER:
                raise RankLost(
                    f"the cluster has no worker, and none came within {_FIRST_WORKER:.0f} s. What the last checkpoint "
                    "holds is kept; start workers and run the same command again"
                )
            time.sleep(_LOOK)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait for other trainings of this cluster to end: two could each wait for workers that the other has."""
        from distributed import Lock

        with self._client.as_current():
            lock = Lock(_LOCK)
        if not lock.acquire(timeout=0.5):
            self._on_event(Event("train", "note", message="another training has this cluster; waiting for its end"))
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


def _attend(
    task: Task, rank: int, environment: Mapping[str, str], worker_id: str, topic: str, address: tuple[str, int] | None
) -> None:
    """Start a rank and stay with it until it has ended, or this task is cancelled."""
    from distributed import get_worker
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    worker = get_worker()
    if worker.id != worker_id:
        raise RankLost(f"the worker of rank {rank} is gone, and its task came to another one")

    def tell(number: int, message: Message) -> None:
        worker.log_event(topic, {"rank": number, "message": message})
        if "exit" in message:
            ended.set()

    ended, key = threading.Event(), worker.get_current_task()
    store = None
    if address is None:
        host = Worker(worker.address, worker_id).host
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
        address = host, store.port
    process = RankProcess(task, rank, {**environment, **_meeting(address, worker.state.nthreads)}, tell)
    tell(rank, {"started": list(address)})
    try:
        while not ended.wait(_LOOK):
            known = worker.state.tasks.get(key)
            if known is None or known.state == "cancelled" or worker.status.name in _CLOSING:
                process.stop()
                ended.wait(_GRACE)
                break
    finally:
        process.kill()


def _meeting(address: tuple[str, int], threads: int) -> dict[str, str]:
    return {
        "MASTER_ADDR": address[0],
        "MASTER_PORT": str(address[1]),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": str(threads),
    }
