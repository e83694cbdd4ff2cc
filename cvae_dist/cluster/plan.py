"""What a verb wants written, and what that takes, before anything is done."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from cvae_dist.errors import InvalidInput
from cvae_dist.store import Drift, Layout, Lease, Moments
from cvae_dist.store.layout import Block
from cvae_dist.store.lineage import digest_json
from cvae_dist.store.manifest import Batches

if TYPE_CHECKING:
    from distributed import Client

_MOST_SHARDS_PER_REGION = 16
_REGIONS_PER_SLOT = 4
_WORKER_BYTES = 300_000_000  # an interpreter with NumPy, Zarr and torch imported


@dataclass(frozen=True)
class Span:
    """The rows ``start:stop`` that one shard of the output holds, those before ``new`` published already."""

    shard: int
    start: int
    stop: int
    new: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Made:
    """The rows of one shard.

    Attributes
    ----------
    blocks : Mapping
        Rows by array name. Where there is ``main``, they are complete once that is used up.
    main : iterator of Block, optional
        Rows of the first array, some whole chunks at a time, where they are not among ``blocks``. Each block is used up
        before the next one is taken, so all of them may be the same memory.
    check : callable
        Called with the moments of the new rows of the first array before it is written. It raises to refuse them.
    """

    blocks: Mapping[str, Block]
    main: Iterator[Block] | None = None
    check: Callable[[Moments], None] = lambda moments: None


class Task(Protocol):
    """Makes the rows of one shard: picklable, small and pure, as it may run 0, 1 or 5 times."""

    def __call__(self) -> Made:
        """Return the rows."""


class Staging(NamedTuple):
    """What :attr:`Job.stage` may use to write what tasks read.

    Attributes
    ----------
    client, threads : distributed.Client or None, int
        The cluster, or how many threads there are without one.
    lease : Lease
        Whatever is written under it is written only while it stands.
    tell : callable
        Takes figures by name, for those who watch the progress.
    """

    client: "Client | None"
    threads: int
    lease: Lease
    tell: Callable[..., None]


@dataclass(frozen=True)
class Job:
    """What a verb wants written.

    Attributes
    ----------
    kind, layout, rows : str, Layout, int
        What the output is.
    settings : Mapping
        What made it, as JSON: a later run with other settings is refused.
    task : callable
        ``task(span)`` is what makes the rows of a shard. Called in the driver, for shards that are to be written.
    identity : callable
        ``identity(span)`` is what all rows of a shard are made from, beside the settings. Called once for a shard and
        run, in the driver, and cheap: there may be hundreds of thousands.
    stage : callable
        Called before the first task runs, once there are some: it writes what tasks read, below the journal.
    confirm : callable
        Called before anything is published. It raises when what the rows were made from was replaced meanwhile.
    lineage : Mapping
        What is recorded with it, as JSON, and not compared.
    task_bytes : int
        Memory a task needs beside the blocks it returns and their moments.
    dropped : int
        Rows of the source that are left out.
    first_shard : int
        Shards before it are published already and stay as they are.
    threads : int
        Threads to use when there is no cluster.
    manifest : callable, optional
        Yields the files that the rows came from, sorted by path, whenever it is called.
    news : bool
        The manifest is to be published though there may be no new rows.
    sampled : bool
        A sample of the rows is kept, and new rows are compared with those that were published before.
    review : callable
        Called with the outcome of that, before anything is published. It may raise; what was recorded is kept then.
    rewrites : bool
        Published rows that are made from something else by now are made again, and rows may be taken away. Otherwise
        both is refused.
    keeps_tail : bool
        Where the output grows, the published rows of a last shard that was not full are still those asked for.
    """

    kind: str
    layout: Layout
    rows: int
    settings: Mapping[str, Any]
    task: Callable[[Span], Task]
    identity: Callable[[Span], bytes] = lambda span: b""
    stage: Callable[[Staging], None] = lambda staging: None
    confirm: Callable[[], None] = lambda: None
    lineage: Mapping[str, Any] = field(default_factory=dict)
    task_bytes: int = 0
    dropped: int = 0
    first_shard: int = 0
    threads: int = 1
    manifest: Batches | None = None
    news: bool = False
    sampled: bool = False
    review: Callable[[Drift], None] = lambda drift: None
    rewrites: bool = False
    keeps_tail: bool = True

    @property
    def shards(self) -> int:
        """Shards of the whole output."""
        return self.layout.shards(self.rows)

    def span(self, shard: int, published: int) -> Span:
        """Return the rows of a shard, of an output whose first rows are published."""
        size = self.layout.rows_per_shard
        start, stop = shard * size, min((shard + 1) * size, self.rows)
        return Span(shard, start, stop, min(max(start, published), stop))

    def fingerprints(self, shards: Iterable[int], published: int) -> npt.NDArray[np.uint64]:
        """Return 64-bit digests of everything that shards are made from, shape (n_shards,)."""
        settings = digest_json(self.settings)
        digests = (self._fingerprint(settings, self.span(shard, published)) for shard in shards)
        return np.frombuffer(b"".join(digests), "<u8")

    def _fingerprint(self, settings: str, span: Span) -> bytes:
        text = f"{settings} {span.shard} {span.start} {span.stop} "
        return hashlib.blake2b(text.encode() + self.identity(span), digest_size=8).digest()

    @property
    def memory(self) -> int:
        """Bytes that one task is projected to need; it holds one shard at a time."""
        sums = 3 * self.layout.moments_bytes  # while they are added up
        return self.layout.shard_bytes + sums + self.task_bytes

    def require_memory(self, client: "Client | None") -> None:
        """Refuse, with the figures, when a worker is too small for its tasks."""
        if client is None:
            return
        for address, worker in client.scheduler_info(n_workers=-1)["workers"].items():
            projected = worker["nthreads"] * self.memory + _WORKER_BYTES
            if 0 < worker["memory_limit"] < projected:
                raise InvalidInput(
                    f"worker {address} may use {worker['memory_limit'] / 1e6:,.0f} MB, but its {worker['nthreads']} "
                    f"threads need {projected / 1e6:,.0f} MB ({self.memory / 1e6:,.0f} MB a task). Nothing was "
                    "written; give the workers more memory or fewer threads"
                )


@dataclass(frozen=True)
class Plan:
    """What a run will do, known before it starts: write the shards of ``pending``, as the others are recorded.

    Each range of ``pending`` lies in one pack of the ledger. The first ``published`` rows are. ``slots`` is the number
    of threads of the cluster, 0 without one.
    """

    job: Job
    pending: tuple[range, ...]
    published: int
    slots: int

    @cached_property
    def shards(self) -> int:
        """Shards to write."""
        return sum(map(len, self.pending))

    @cached_property
    def rows(self) -> int:
        """Rows to write."""
        size = self.job.layout.rows_per_shard
        return sum(min(part.stop * size, self.job.rows) - part.start * size for part in self.pending)

    @property
    def shards_per_region(self) -> int:
        """Whole shards of one region: enough work for a scheduler, few enough that every slot has some regions."""
        tile = self.job.layout.shards_per_tile
        if not self.slots:
            return tile
        fair = max(1, min(_MOST_SHARDS_PER_REGION, self.shards // (_REGIONS_PER_SLOT * self.slots)))
        return -(-fair // tile) * tile

    def regions(self) -> Iterator[range]:
        """Yield the pending shards of every region. A region keeps to one pack, and cuts no tile."""
        size = self.shards_per_region
        for part in self.pending:
            first = part.start
            while first < part.stop:
                stop = min(part.stop, (first // size + 1) * size)
                yield range(first, stop)
                first = stop

    def __str__(self) -> str:
        if not self.pending:
            return ""
        row_bytes = sum(array.row_bytes for array in self.job.layout.arrays)
        return (
            f"{self.shards:,} of {self.job.shards:,} shards to write, "
            f"about {self.rows * row_bytes / 1e6:,.1f} MB, {self.job.memory / 1e6:,.0f} MB of memory a task"
        )
