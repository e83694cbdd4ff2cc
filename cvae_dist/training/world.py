"""The ranks of one training: which of them this process is, and how they agree.

A rank is a process. Rank 0 decides, and holds the lease; all ranks do every step on their share of a batch. They meet
at a key-value store of torch, whose address is in the environment, as torchrun and its like leave it there.
"""

import contextlib
import io
import json
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from cvae_dist.errors import InvalidInput, RankLost
from cvae_dist.training.device import CPU, identity, require_one_each

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

TIMEOUT = 60.0  # seconds: a rank that does not answer for so long counts as lost
_ARRIVAL = 600.0  # seconds until all ranks must have come: machines are given, and images pulled, one after another
_PAUSE = 0.02  # seconds between looks at the store
_ADDRESS_OF_INTERFACE = 0x8915  # SIOCGIFADDR
_SLURM = {
    "RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID",
    "LOCAL_WORLD_SIZE": "SLURM_STEP_TASKS_PER_NODE", "MASTER_ADDR": "SLURM_STEP_NODELIST",
}  # fmt: skip


@dataclass(frozen=True)
class Membership:
    """Which rank this process is, as its environment says.

    ``local_rank`` of ``local_size`` counts those of one machine. ``attempt`` counts how often torchrun started all
    ranks again.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str
    port: int
    hosted: bool = False
    attempt: int = 0

    @property
    def hosts(self) -> bool:
        """Whether this rank hosts the store at which all meet."""
        return self.rank == 0 and not self.hosted

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Self | None:
        """Return what torchrun, a PyTorchJob or srun says in the environment; None where nobody started ranks.

        Raises
        ------
        InvalidInput
            A part of it is missing or no number.
        """
        found = dict(environment)
        if "WORLD_SIZE" not in found and "SLURM_STEP_NUM_TASKS" in found:
            found = {**found, **_of_slurm(found)}
        if "WORLD_SIZE" not in found:
            return None
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not found.get(name)]
        if missing and found["WORLD_SIZE"] != "1":
            raise InvalidInput(
                f"the environment names a world of {found['WORLD_SIZE']} ranks (WORLD_SIZE), but not "
                f"{', '.join(missing)}. Nothing was trained; start ranks by torchrun, srun or a PyTorchJob, or set all "
                "of them"
            )
        try:
            names = ("RANK", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
            rank, local_rank, port, attempt = (int(found.get(name) or 0) for name in names)
            size, local_size = int(found["WORLD_SIZE"]), int(found.get("LOCAL_WORLD_SIZE") or 1)
        except ValueError as error:
            raise InvalidInput(f"the environment does not number the ranks of a training: {error}") from None
        hosted = found.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return cls(rank, size, local_rank, local_size, found.get("MASTER_ADDR", ""), port, hosted, attempt)


def require_no_ranks() -> None:
    """Refuse to train rows in memory, or an estimator, in a process that is one of several ranks.

    Raises
    ------
    InvalidInput
        It is one, as its environment says.
    """
    membership = Membership.of(os.environ)
    if membership and membership.size > 1:
        raise InvalidInput(
            f"this process is rank {membership.rank} of {membership.size} (WORLD_SIZE or SLURM_STEP_NUM_TASKS in its "
            "environment), and each of them would train a model of its own here. Nothing was trained. To train one "
            "together, write the rows to a store once (cvae_dist.ingest) and call cvae_dist.train(store, model) in "
            "every rank; to train one in each process, unset these variables"
        )


def _of_slurm(found: Mapping[str, str]) -> dict[str, str]:
    """Return the words of torchrun for those of srun; what is set already stays."""
    words = {name: found[theirs] for name, theirs in _SLURM.items() if theirs in found and name not in found}
    if "LOCAL_WORLD_SIZE" in words:  # such as 2(x3),1
        words["LOCAL_WORLD_SIZE"] = words["LOCAL_WORLD_SIZE"].partition("(")[0].partition(",")[0]
    if "MASTER_ADDR" in words:  # such as node[03-05,9],other
        head, bracket, numbers = words["MASTER_ADDR"].partition(",")[0].partition("[")
        words["MASTER_ADDR"] = head + numbers.rstrip("]").partition("-")[0] if bracket else head
    if "SLURM_JOB_ID" in found and "MASTER_PORT" not in found:
        words["MASTER_PORT"] = str(20_000 + int(found["SLURM_JOB_ID"]) % 20_000)
    return words


class World:
    """All ranks, as one of them sees them.

    Alone it has no group, and nothing costs anything. Else a group is made by :meth:`join`, once rank 0 has decided
    that there is something to do.

    Attributes
    ----------
    rank, size : int
        This rank, counted from 0, and how many there are.
    local_rank, local_size : int
        The same on this machine.
    device : torch.device
        Where this rank computes; by default the CPU.
    """

    def __init__(
        self, membership: Membership | None = None, timeout: float = TIMEOUT, device: torch.device | None = None
    ) -> None:
        self.device = device or CPU
        self.rank = membership.rank if membership else 0
        self.size = membership.size if membership else 1
        self.local_rank = membership.local_rank if membership else 0
        self.local_size = membership.local_size if membership else 1
        self._timeout = timeout
        self._store: Store | None = _meet(membership) if membership and membership.size > 1 else None
        self._hosts = membership is not None and membership.hosts
        self._joined = self._told = False

    @property
    def is_alone(self) -> bool:
        """Whether this is the only rank."""
        return self.size == 1

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which decides, and writes."""
        return self.rank == 0

    def tell(self, decision: Mapping[str, Any]) -> None:
        """Tell all other ranks, as rank 0, what was decided, once: JSON."""
        if self._store is not None and not self._told:
            self._told = True
            self._store.set("decision", json.dumps(decision))

    def hear(self) -> dict[str, Any]:
        """Return what rank 0 has decided, however long it takes to.

        Raises
        ------
        RankLost
            Rank 0 has ended without a word.
        """
        with self._lost_if_it_fails("waiting for rank 0 to begin"):
            assert self._store is not None
            while not self._store.check(["decision"]):
                time.sleep(_PAUSE)
            decision: dict[str, Any] = json.loads(self._store.get("decision"))
            self._store.add("heard", 1)
            return decision

    @contextlib.contextmanager
    def informed(self) -> Iterator[None]:
        """Let the other ranks hear, whatever ends rank 0 before it has told them what to do."""
        try:
            yield
            self.tell({"error": ""})
        except BaseException as error:
            self.tell({"error": f"{type(error).__name__}: {error}"})
            raise
        finally:
            self.close()

    def join(self) -> None:
        """Wait for all ranks, and make the group in which they compute.

        Raises
        ------
        InvalidInput
            Ranks share a card, or some have none.
        RankLost
            Some did not come.
        """
        if self._store is None:
            return
        import torch.distributed as dist

        with self._lost_if_it_fails("forming the group"):
            self._wait_for_all()
            self._require_cards()
            on_card = self.device.type == "cuda"
            if on_card:
                torch.cuda.set_device(self.device)
                # without it nccl ends the process when another rank is lost, instead of the wait
                os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if on_card else "gloo",
                store=dist.PrefixStore("group", self._store),  # type: ignore[attr-defined]
                rank=self.rank,
                world_size=self.size,
                timeout=timedelta(seconds=self._timeout),
                device_id=self.device if on_card else None,
            )
            self._joined = True

    def sum(self, values: Tensor) -> None:
        """Replace ``values``, the same shape in every rank, by their sum over all ranks; the same bits in each.

        Raises
        ------
        RankLost
            Another rank ended, or did not answer in time.
        """
        if self._joined:
            import torch.distributed as dist

            with self._lost_if_it_fails("adding up"):
                dist.all_reduce(values)

    def broadcast(self, data: bytes = b"") -> bytes:
        """Return the bytes that rank 0 gives, in every rank."""
        if not self._joined:
            return data
        import torch.distributed as dist

        with self._lost_if_it_fails("receiving what rank 0 decided"):
            size = torch.tensor([len(data)])
            dist.broadcast(size, src=0)
            buffer = bytearray(data or int(size))
            dist.broadcast(torch.frombuffer(buffer, dtype=torch.uint8), src=0)
            return bytes(buffer)

    def close(self) -> None:
        """Leave the group, whatever state it is in."""
        if self._joined:
            import torch.distributed as dist

            self._joined = False
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()
        if self._store is not None and self._hosts and self._told:
            self._wait(lambda store: store.add("heard", 0) >= self.size - 1)
        self._store = None

    def _wait_for_all(self) -> None:
        assert self._store is not None
        self._store.set(f"card of {self.rank}", identity(self.device))
        self._store.add("arrived", 1)
        if not self._wait(lambda store: store.add("arrived", 0) >= self.size):
            arrived = self._store.add("arrived", 0)
            raise RankLost(
                f"only {arrived} of {self.size} ranks came within {_ARRIVAL:.0f} s. Nothing was trained; "
                "start all of them, or a smaller world"
            )

    def _require_cards(self) -> None:
        """Refuse what :func:`require_one_each` does; rank 0 stays until all know it."""
        assert self._store is not None
        cards = self._store.multi_get([f"card of {rank}" for rank in range(self.size)])
        try:
            require_one_each([card.decode() for card in cards])
        except InvalidInput:
            self._store.add("refused", 1)
            if self._hosts:
                self._wait(lambda store: store.add("refused", 0) >= self.size)
            raise

    def _wait(self, condition: "Callable[[Store], bool]") -> bool:
        """Wait until the store says something; return whether it did in time."""
        assert self._store is not None
        until = time.monotonic() + _ARRIVAL
        while not condition(self._store):
            if time.monotonic() > until:
                return False
            time.sleep(_PAUSE)
        return True

    @contextlib.contextmanager
    def _lost_if_it_fails(self, doing: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        except RuntimeError as error:  # of torch: also DistError, DistStoreError, DistBackendError
            waited = time.monotonic() - began
            silent = waited >= 0.9 * self._timeout
            how = (
                f"another rank did not answer for {waited:.0f} s (timeout={self._timeout:g})"
                if silent
                else (f"another rank has ended ({str(error).splitlines()[0]})")
            )
            raise RankLost(
                f"rank {self.rank} of {self.size}, {doing}: {how}. What the last checkpoint holds is kept; the same "
                "command goes on from there, with as many ranks as there are"
            ) from error


def _meet(membership: Membership) -> "Store":
    """Connect to the store, which rank 0 hosts unless who started the ranks does."""
    import torch.distributed as dist

    if "GLOO_SOCKET_IFNAME" not in os.environ and (interface := interface_to(membership.host)):
        os.environ["GLOO_SOCKET_IFNAME"] = interface
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            membership.host, membership.port, is_master=membership.hosts, timeout=timedelta(seconds=_ARRIVAL),
            wait_for_workers=False, multi_tenant=True,
        )  # fmt: skip
        # torchrun keeps its store when it starts the ranks again, and what those before have said there
        return dist.PrefixStore(f"attempt {membership.attempt}", store)  # type: ignore[attr-defined]
    except RuntimeError as error:
        how = "could not listen" if membership.hosts else "met nobody"
        raise RankLost(
            f"rank {membership.rank} of {membership.size} {how} at {membership.host}:{membership.port} "
            f"({str(error).splitlines()[0]}). Nothing was trained; name an address of rank 0 that all ranks reach, "
            "and a port that is free there (MASTER_ADDR, MASTER_PORT)"
        ) from error


def interface_to(host: str) -> str:
    """Return the network interface by which a host is reached; empty where that cannot be known.

    Gloo would take the one that this machine's own name leads to. That is often the loopback, which no other machine
    reaches.
    """
    import fcntl  # not on Windows

    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing
            mine = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                with contextlib.suppress(OSError):  # it has no address
                    request = struct.pack("256s", name.encode())
                    answer = fcntl.ioctl(probe.fileno(), _ADDRESS_OF_INTERFACE, request)
                    if socket.inet_ntoa(answer[20:24]) == mine:
                        return name
    except OSError:
        pass
    return ""


def as_bytes(state: Mapping[str, Any]) -> bytes:
    """Return tensors of any device, numbers, strings and containers of them as bytes."""
    file = io.BytesIO()
    torch.save(to_cpu(state), file)
    return file.getvalue()


def to_cpu(state: Any, *, copy: bool = False) -> Any:
    """Return a state with its tensors on the CPU. Those that are there already are shared, unless ``copy`` is true."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=copy)
    if isinstance(state, Mapping):
        return {name: to_cpu(value, copy=copy) for name, value in state.items()}
    return [to_cpu(value, copy=copy) for value in state] if isinstance(state, list) else state


def from_bytes(data: bytes) -> dict[str, Any]:
    """Return what :func:`as_bytes` was given; nothing else is unpickled."""
    state: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=True)
    return state
