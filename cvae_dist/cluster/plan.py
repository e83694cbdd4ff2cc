"""What a verb wants written, and what that takes, before anything is done."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cvae_dist.errors import InvalidInput
from cvae_dist.store import Layout, Moments
from cvae_dist.store.layout import Block
from cvae_dist.store.lineage import digest_json

if TYPE_CHECKING:
    from distributed import Client

_MOST_SHARDS_PER_TASK = 16
_TASKS_PER_SLOT = 4
_WORKER_BYTES = 300_000_000  # an interpreter with NumPy, Zarr and torch imported


@dataclass(frozen=True)
class Span:
    """The rows ``start:stop`` that one shard of the output holds."""

    shard: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Made:
    """The rows of one shard, by array name, and how many rows of the source were left out of it.

    ``moments`` are those of the main array, where ``make`` knows them already.
    """

    blocks: Mapping[str, Block]
    dropped: int = 0
    moments: Moments | None = None


@dataclass(frozen=True)
class Job:
    """What a verb wants written.

    Attributes
    ----------
    kind, layout, rows : str, Layout, int
        What the output is.
    settings : Mapping
        What made it, as JSON: a later run with other settings is refused.
    lineage : Mapping
        What is recorded with it, as JSON, and not compared.
    make : callable
        ``make(span, inputs) -> Made``: a picklable, pure function; it may run 0, 1 or 5 times for a shard.
    inputs : callable
        ``inputs(span)``: what ``make`` needs, small and picklable. Called in the driver, when the task is sent.
    identity : callable
        ``identity(span) -> str``: digest of what the rows of the span are made from, beside the settings.
    task_bytes : int
        Memory ``make`` needs beside the blocks it returns.
    first_shard : int
        Shards before it are published already and stay as they are.
    threads : int
        Threads to use when there is no cluster.
    manifest : Mapping
        Arrays over ``piece`` that say where the rows came from.
    """

    kind: str
    layout: Layout
    rows: int
    settings: Mapping[str, Any]
    make: Callable[[Span, Any], Made]
    inputs: Callable[[Span], Any]
    identity: Callable[[Span], str]
    lineage: Mapping[str, Any] = field(default_factory=dict)
    task_bytes: int = 0
    first_shard: int = 0
    threads: int = 1
    manifest: Mapping[str, Block] = field(default_factory=dict)

    def spans(self) -> Iterator[Span]:
        """Yield the span of every shard, in order."""
        size = self.layout.rows_per_shard
        for shard in range(self.layout.shards(self.rows)):
            yield Span(shard, shard * size, min((shard + 1) * size, self.rows))

    def fingerprint(self, span: Span) -> int:
        """Return the 64-bit digest of everything the shard is made from."""
        text = f"{digest_json(self.settings)} {span.shard} {span.start} {span.stop} {self.identity(span)}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Plan:
    """What a run will do: shards, tasks, bytes and memory, known before it starts.

    Attributes
    ----------
    job : Job
        What is wanted.
    pending : tuple of (Span, int)
        The shards to write and their fingerprints; the others are recorded.
    slots : int
        Threads of the cluster, 0 without one.
    """

    job: Job
    pending: tuple[tuple[Span, int], ...]
    slots: int

    @property
    def rows(self) -> int:
        """Rows to write."""
        return sum(len(span) for span, _ in self.pending)

    @property
    def task_bytes(self) -> int:
        """Projected memory of one task; it holds one shard at a time."""
        return self.job.layout.shard_bytes + self.job.task_bytes

    @property
    def shards_per_task(self) -> int:
        """Whole shards of one task: enough work for a scheduler, few enough that every slot has some tasks."""
        if not self.slots:
            return 1
        return max(1, min(_MOST_SHARDS_PER_TASK, len(self.pending) // (_TASKS_PER_SLOT * self.slots)))

    def tasks(self) -> Iterator[tuple[tuple[Span, int], ...]]:
        """Yield the pending shards of every task."""
        for first in range(0, len(self.pending), self.shards_per_task):
            yield self.pending[first : first + self.shards_per_task]

    def require_memory(self, client: "Client | None") -> None:
        """Refuse, with the figures, when a worker is too small for its tasks."""
        if client is None:
            return
        for address, worker in client.scheduler_info(n_workers=-1)["workers"].items():
            projected = worker["nthreads"] * self.task_bytes + _WORKER_BYTES
            if 0 < worker["memory_limit"] < projected:
                raise InvalidInput(
                    f"worker {address} may use {worker['memory_limit'] / 1e6:,.0f} MB, but its {worker['nthreads']} "
                    f"threads need {projected / 1e6:,.0f} MB ({self.task_bytes / 1e6:,.0f} MB a task). Nothing was "
                    "written; give the workers more memory or fewer threads"
                )

    def __str__(self) -> str:
        if not self.pending:
            return ""
        layout = self.job.layout
        row_bytes = sum(array.row_bytes for array in layout.arrays)
        return (
            f"{len(self.pending):,} of {layout.shards(self.job.rows):,} shards to write, "
            f"about {self.rows * row_bytes / 1e6:,.1f} MB, {self.task_bytes / 1e6:,.0f} MB of memory a task"
        )
