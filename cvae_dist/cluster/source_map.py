"""The files of a source over the shards of a store: the tasks of ``ingest``."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cvae_dist.cluster.plan import Made, Span, Staging
from cvae_dist.cluster.process import reused_block
from cvae_dist.errors import InvalidInput
from cvae_dist.sources import Batch, Interval, Pieces, Reader, StagedBatch, file_name
from cvae_dist.store import Layout, Location, Moments, RowStore
from cvae_dist.store.layout import Block


@dataclass(frozen=True)
class SourceMap:
    """Turns the spans of a store into the tasks that make their shards.

    Attributes
    ----------
    reader, batch, start : Reader, Batch, int
        What reads files; those that are behind the first shard and all others, in the order of their rows; the number
        of their first row.
    url : str
        Where they are, for messages.
    journal : Location
        Below it tasks find the batch.
    labelled : bool
        The name of each file's folder is the column ``label``.
    grown : RowStore or None
        The published store, whose rows come first.
    layout, rows, first_shard : Layout, int, int
        The shard grid, the rows of the whole store, and the first shard that may have new rows.
    """

    reader: Reader
    batch: Batch
    start: int
    url: str
    journal: Location
    labelled: bool
    grown: RowStore | None
    layout: Layout
    rows: int
    first_shard: int

    @property
    def task_bytes(self) -> int:
        """Memory that a task needs beside its shard."""
        return 16_000_000 + self.text_bytes(self.layout.rows_per_shard)

    def text_bytes(self, rows: int) -> int:
        """Memory that long texts of so many rows need, or of all rows of the store where it has fewer."""
        return min(rows, self.rows) * self.reader.schema.text_bytes

    def stage(self, staging: Staging) -> None:
        """Write what the tasks read."""
        self.batch.stage(self._folder)

    @cached_property
    def staged(self) -> StagedBatch:
        """The batch as tasks find it."""
        return self.batch.staged(self._folder)

    @property
    def _folder(self) -> Location:
        return self.journal / "files"

    @cached_property
    def _intervals(self) -> list[Interval]:
        edges = np.arange(self.first_shard, self.layout.shards(self.rows) + 1, dtype=np.int64)
        return self.batch.cut(np.minimum(edges * self.layout.rows_per_shard, self.rows) - self.start)

    def task(self, span: Span) -> "_CopyShard":
        """Return what makes a shard; its first rows may be published already, and come from the store itself."""
        return _CopyShard(
            self.reader,
            self.staged,
            self._interval(span),
            self.url,
            self.labelled,
            self.layout.rows_per_step,
            self.carried(span),
        )

    def carried(self, span: Span) -> "Carried":
        """Return the rows of a shard that are published already."""
        return Carried(self.grown.location if self.grown is not None and span.new > span.start else None, span)

    def identity(self, span: Span) -> bytes:
        """Return what tells the rows of a span from others."""
        return self._interval(span).identity

    def _interval(self, span: Span) -> Interval:
        return self._intervals[span.shard - self.first_shard]


@dataclass(frozen=True)
class Carried:
    """The rows of a shard that are published already, which come first: they are taken from the store."""

    store: Location | None
    span: Span

    def __len__(self) -> int:
        return self.span.new - self.span.start

    def read(self, name: str) -> Block:
        """Return the rows of an array."""
        if self.store is None:
            return np.zeros(0)
        return RowStore.open(self.store).read(name, self.span.start, self.span.new)

    def before(self, name: str, new: Block) -> Block:
        """Return all rows of an array of one value a row: the published ones, then new ones."""
        return np.concatenate([self.read(name).astype(new.dtype), new])


@dataclass(frozen=True)
class _CopyShard:
    """Read the rows of one shard straight into its block."""

    reader: Reader
    batch: StagedBatch
    interval: Interval
    url: str
    labelled: bool
    step: int
    carried: Carried

    def __call__(self) -> Made:
        pieces = self.batch.pieces(self.interval).cut(len(self.carried), len(self.carried.span))
        columns: dict[str, Block] = {}
        step = self.step if self.reader.streams else len(self.carried.span)
        return Made(columns, self._blocks(pieces, step, columns), lambda moments: self._check(moments, pieces))

    def _blocks(self, pieces: Pieces, step: int, columns: dict[str, Block]) -> Iterator[Block]:
        """Yield all rows, so many at a time, and collect their columns."""
        schema = self.reader.schema
        memory = reused_block((min(step, len(self.carried.span)), schema.n_features), schema.dtype)
        before = self.carried.read("x")
        parts: list[Mapping[str, Block]] = []
        for start in range(0, len(self.carried.span), step):
            block = memory[: min(step, len(self.carried.span) - start)]
            known = min(max(0, len(self.carried) - start), len(block))
            if known:
                block[:known] = before[start : start + known]
            if known < len(block):
                new = pieces.cut(*(at - len(self.carried) for at in (start + known, start + len(block))))
                parts.append(self.reader.read(new, block[known:]))
            yield block
        for column in schema.columns:
            joined = np.concatenate([part[column.name] for part in parts])
            columns[column.name] = self.carried.before(column.name, joined)
        if self.labelled:
            columns["label"] = self.carried.before("label", folder_names(pieces))

    def _check(self, moments: Moments, pieces: Pieces) -> None:
        """Refuse rows that are not finite."""
        if not moments.is_finite:
            block = np.empty((pieces.total, self.reader.schema.n_features), self.reader.schema.dtype)
            self.reader.read(pieces, block)
            refuse_nonfinite(self.url, block, pieces)


def folder_names(pieces: Pieces) -> Block:
    """Return the name of the folder that each row's file lies in."""
    folders = [path.rpartition("/")[0].rpartition("/")[2] for path in pieces.path]
    return np.repeat(np.array(folders, dtype=object), pieces.rows)


def refuse_nonfinite(url: str, block: Block, pieces: Pieces) -> None:
    """Say which row of a source is not finite, or that values are too large."""
    bad = np.flatnonzero(~np.isfinite(block).all(axis=1))
    if not len(bad):
        raise InvalidInput(
            f"{file_name(url, pieces.path[0])} or one of the {len(pieces) - 1:,} files after it "
            f"holds values as large as {np.abs(block).max():.3g}, whose variance exceeds float64. Its shard was "
            "not written and rows recorded before are kept; scale the values and run the same command again"
        )
    path, row = pieces.locate(int(bad[0]))
    raise InvalidInput(
        f"{file_name(url, path)}, row {row}, holds NaN or infinity. Its shard was not "
        "written and rows recorded before are kept; mend the file, or leave such rows out with --nonfinite drop "
        "--overwrite, which makes the store anew"
    )
