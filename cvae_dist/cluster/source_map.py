"""The files of a source over the shards of a store: the tasks of ``ingest``."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cvae_dist.cluster.plan import Made, Span
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
    folder : Location
        Where tasks find the batch.
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
    folder: Location
    labelled: bool
    grown: RowStore | None
    layout: Layout
    rows: int
    first_shard: int

    def stage(self) -> None:
        """Write what the tasks read."""
        self.batch.stage(self.folder)

    @cached_property
    def _staged(self) -> StagedBatch:
        return self.batch.staged(self.folder)

    @cached_property
    def _intervals(self) -> list[Interval]:
        edges = np.arange(self.first_shard, self.layout.shards(self.rows) + 1, dtype=np.int64)
        return self.batch.cut(np.minimum(edges * self.layout.rows_per_shard, self.rows) - self.start)

    def task(self, span: Span) -> "_CopyShard":
        """Return what makes a shard; its first rows may be published already, and come from the store itself."""
        carried_from = self.grown.location if self.grown is not None and span.new > span.start else None
        return _CopyShard(
            self.reader,
            self._staged,
            self._interval(span),
            self.url,
            self.labelled,
            span,
            self.layout.rows_per_step,
            carried_from,
        )

    def identity(self, span: Span) -> bytes:
        """Return what tells the rows of a span from others."""
        return self._interval(span).identity

    def _interval(self, span: Span) -> Interval:
        return self._intervals[span.shard - self.first_shard]


@dataclass(frozen=True)
class _CopyShard:
    """Read the rows of one shard straight into its block."""

    reader: Reader
    batch: StagedBatch
    interval: Interval
    url: str
    labelled: bool
    span: Span
    step: int
    carried_from: Location | None

    @property
    def carried(self) -> int:
        """Published rows at the start of the shard."""
        return self.span.new - self.span.start

    def __call__(self) -> Made:
        pieces = self.batch.pieces(self.interval).cut(self.carried, len(self.span))
        columns: dict[str, Block] = {}
        step = self.step if self.reader.streams else len(self.span)
        return Made(columns, self._blocks(pieces, step, columns), lambda moments: self._check(moments, pieces))

    def _blocks(self, pieces: Pieces, step: int, columns: dict[str, Block]) -> Iterator[Block]:
        """Yield all rows, so many at a time, and collect their columns."""
        schema = self.reader.schema
        memory = reused_block((min(step, len(self.span)), schema.n_features), schema.dtype)
        before = self._published("x")
        parts: list[Mapping[str, Block]] = []
        for start in range(0, len(self.span), step):
            block = memory[: min(step, len(self.span) - start)]
            known = min(max(0, self.carried - start), len(block))
            if known:
                block[:known] = before[start : start + known]
            if known < len(block):
                new = pieces.cut(start + known - self.carried, start + len(block) - self.carried)
                parts.append(self.reader.read(new, block[known:]))
            yield block
        for column in schema.columns:
            joined = np.concatenate([part[column.name] for part in parts])
            columns[column.name] = np.concatenate([self._published(column.name).astype(joined.dtype), joined])
        if self.labelled:
            folders = [path.rpartition("/")[0].rpartition("/")[2] for path in pieces.path]
            labels = np.repeat(np.array(folders, dtype=object), pieces.rows)
            columns["label"] = np.concatenate([self._published("label").astype(object), labels])

    def _published(self, name: str) -> Block:
        """Return the rows of an array that were published before, which come first."""
        if self.carried_from is None:
            return np.zeros(0)
        return RowStore.open(self.carried_from).read(name, self.span.start, self.span.new)

    def _check(self, moments: Moments, pieces: Pieces) -> None:
        """Refuse rows that are not finite."""
        if not moments.is_finite:
            block = np.empty((pieces.total, self.reader.schema.n_features), self.reader.schema.dtype)
            self.reader.read(pieces, block)
            self._refuse_nonfinite(block, pieces)

    def _refuse_nonfinite(self, block: Block, pieces: Pieces) -> None:
        bad = np.flatnonzero(~np.isfinite(block).all(axis=1))
        if not len(bad):
            raise InvalidInput(
                f"{file_name(self.url, pieces.path[0])} or one of the {len(pieces) - 1:,} files after it "
                f"holds values as large as {np.abs(block).max():.3g}, whose variance exceeds float64. Its shard was "
                "not written and rows recorded before are kept; scale the values and run the same command again"
            )
        path, row = pieces.locate(int(bad[0]))
        raise InvalidInput(
            f"{file_name(self.url, path)}, row {row}, holds NaN or infinity. Its shard was not "
            "written and rows recorded before are kept; mend the file, or leave such rows out with --nonfinite drop "
            "--overwrite, which makes the store anew"
        )
