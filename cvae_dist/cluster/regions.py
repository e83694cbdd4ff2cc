"""Run one function over many regions, in this process or on Dask, with a bounded number in flight."""

import itertools
import logging
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, TypeVar

from cvae_dist.errors import CvaeDistError, StorageFailed

if TYPE_CHECKING:
    from distributed import Client

Input = TypeVar("Input")
Result = TypeVar("Result")

_IN_FLIGHT_PER_SLOT = 3
_DRAIN_SECONDS = 60
_LOGGER = logging.getLogger(__name__)


def map_regions(
    function: Callable[[Input], Result],
    tasks: Iterable[Input],
    *,
    client: "Client | None" = None,
    threads: int = 1,
    stopping: Callable[[], None] = lambda: None,
) -> Generator[Result, None, None]:
    """Yield ``function(task)`` of every task, as they finish, made by ``client`` or else by threads of this process.

    Only a few tasks per slot are in flight and every result is drained and released at once, so a dead worker can
    cost no more than what it was doing: finished work is never asked for again. Tasks are taken lazily. A client needs
    picklable ones and a function that can be imported, and may run it more than once per task.

    Whatever ends it early, it waits for tasks that run. ``stopping`` is called before, and may tell them to end.
    """
    if client is not None:
        yield from _map_dask(function, tasks, client, stopping)
    elif threads == 1:
        yield from map(function, tasks)
    else:
        yield from _map_threads(function, tasks, threads, stopping)


def _map_threads(
    function: Callable[[Input], Result], tasks: Iterable[Input], threads: int, stopping: Callable[[], None]
) -> Generator[Result, None, None]:
    queue = iter(tasks)
    with ThreadPoolExecutor(threads, thread_name_prefix="region") as pool:
        pending: set[Future[Result]] = set()
        try:
            while True:
                room = 2 * threads - len(pending)
                pending |= {pool.submit(function, task) for task in itertools.islice(queue, room)}
                if not pending:
                    return
                finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
        finally:
            for future in pending:
                future.cancel()
            if pending:
                stopping()


def _map_dask(
    function: Callable[[Input], Result], tasks: Iterable[Input], client: "Client", stopping: Callable[[], None]
) -> Generator[Result, None, None]:
    from distributed import as_completed

    queue = iter(tasks)
    finished = as_completed(loop=client.loop, with_results=False)  # no default client is set
    window = _Window(client)
    pending: dict[Any, Any] = {}

    def submit(count: int) -> None:
        for task in itertools.islice(queue, count):
            # pure=False: a task is defined by what is on disk, never by Dask's memory of an equal call
            future = client.submit(function, task, pure=False)
            pending[future.key] = future
            finished.add(future)

    try:
        submit(window.size())
        for future in finished:
            result = _result(future)
            pending.pop(future.key).release()
            submit(max(0, window.size() - len(pending)))  # the window shrinks when a worker dies
            yield result
    finally:
        # A task that runs cannot be cancelled, and must not write after its driver has let go of the output.
        if pending:
            stopping()
        if pending and client.status == "running":
            _drain(client, list(pending.values()))


def _drain(client: "Client", futures: "list[Any]") -> None:
    """Wait for tasks that run, and give the others up."""
    from distributed import as_completed

    processing = {key for keys in client.processing().values() for key in keys}
    client.cancel([future for future in futures if future.key not in processing])
    running = [future for future in futures if future.key in processing]
    try:
        list(as_completed(running, loop=client.loop, timeout=_DRAIN_SECONDS))
    except TimeoutError:
        _LOGGER.warning(
            "%d tasks still run after %d s; they stop before their next shard", len(running), _DRAIN_SECONDS
        )
    client.cancel(running)  # whoever started the cluster gets it back as it was


def _result(future: "Future[Result]") -> Result:
    from distributed import KilledWorker

    try:
        return future.result()
    except KilledWorker as error:
        raise StorageFailed(
            f"a task ended with its worker too often ({error}). What was recorded is kept; look for memory limits or "
            "crashes in the workers' logs and run the same command again to go on"
        ) from error
    except CancelledError as error:
        raise StorageFailed(
            f"the Dask scheduler was lost, or somebody cancelled a task of this run ({error}). What was recorded is "
            "kept; run the same command again to go on"
        ) from error
    except CvaeDistError as error:
        raise error from None  # the remote traceback explains nothing to the user that the message does not


def slots(client: "Client | None") -> int:
    """Return the number of threads of a cluster, 0 without one."""
    return 0 if client is None else sum(client.nthreads().values())


class _Window:
    """How many tasks may be in flight; follows a cluster that grows and shrinks."""

    def __init__(self, client: "Client") -> None:
        self._client = client
        self._read = 0.0
        self._slots = 1

    def size(self) -> int:
        if time.monotonic() - self._read > 1.0:
            self._slots = max(1, slots(self._client))
            self._read = time.monotonic()
        return _IN_FLIGHT_PER_SLOT * self._slots
