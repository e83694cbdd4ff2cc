"""What a verb wants written, and what that takes, before anything is done."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from cvae_dist.errors import InvalidInput
from cvae_dist.store import Layout, Moments
from cvae_dist.store.layout import Block
from cvae_dist.store.lineage import digest_json

if TYPE_CHECKING:
    from distributed import Client

_MOST_SHARDS_PER_REGION = 16
_REGIONS_PER_SLOT = 4
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
    """The rows of one shard, by array name; how many rows of the source were left out of it (``dropped``).

    ``moments`` are those of the main array, where they are known already.
    """

    blocks: Mapping[str, Block]
    dropped: int = 0
    moments: Moments | None = None


class Task(Protocol):
    """Makes the rows of one shard: picklable, small and pure, as it may run 0, 1 or 5 times."""

    @property
    def identity(self) -> str:
        """Digest of what the rows are made from, beside the settings."""

    def __call__(self) -> Made:
        """Return the rows."""


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
        ``task(span)`` is what makes the rows of a shard. Called in the driver, at most once for a shard and run.
    lineage : Mapping
        What is recorded with it, as JSON, and not compared.
    task_bytes : int
        Memory a task needs beside the blocks it returns.
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
    task: Callable[[Span], Task]
    lineage: Mapping[str, Any] = field(default_factory=dict)
    task_bytes: int = 0
    first_shard: int = 0
    threads: int = 1
    manifest: Mapping[str, Block] = field(default_factory=dict)

    @property
    def shards(self) -> int:
        """Shards of the whole output."""
        return self.layout.shards(self.rows)

    def spans(self) -> Iterator[Span]:
        """Yield the span of every shard that may have to be written, in order."""
        size = self.layout.rows_per_shard
        for shard in range(self.first_shard, self.shards):
            yield Span(shard, shard * size, min((shard + 1) * size, self.rows))

    def fingerprint(self, span: Span, task: Task) -> int:
        """Return the 64-bit digest of everything the shard is made from."""
        text = f"{self._settings_digest} {span.shard} {span.start} {span.stop} {task.identity}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")

    @cached_property
    def _settings_digest(self) -> str:
        return digest_json(self.settings)

    @property
    def memory(self) -> int:
        """Bytes that one task is projected to need; it holds one shard at a time."""
        return self.layout.shard_bytes + self.task_bytes

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
    """What a run will do, known before it starts: write the ``pending`` shards, as the others are recorded.

    ``slots`` is the number of threads of the cluster, 0 without one.
    """

    job: Job
    pending: tuple[Span, ...]
    slots: int

    @property
    def rows(self) -> int:
        """Rows to write."""
        return sum(map(len, self.pending))

    @property
    def shards_per_region(self) -> int:
        """Whole shards of one region: enough work for a scheduler, few enough that every slot has some regions."""
        if not self.slots:
            return 1
        return max(1, min(_MOST_SHARDS_PER_REGION, len(self.pending) // (_REGIONS_PER_SLOT * self.slots)))

    def regions(self) -> Iterator[tuple[Span, ...]]:
        """Yield the pending shards of every region."""
        for first in range(0, len(self.pending), self.shards_per_region):
            yield self.pending[first : first + self.shards_per_region]

    def __str__(self) -> str:
        if not self.pending:
            return ""
        row_bytes = sum(array.row_bytes for array in self.job.layout.arrays)
        return (
            f"{len(self.pending):,} of {self.job.shards:,} shards to write, "
            f"about {self.rows * row_bytes / 1e6:,.1f} MB, {self.job.memory / 1e6:,.0f} MB of memory a task"
        )
