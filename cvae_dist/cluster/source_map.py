"""The files of a source over the shards of a store: the tasks of ``ingest``."""

import threading
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cvae_dist.cluster.plan import Made, Span
from cvae_dist.cluster.process import reused_block
from cvae_dist.errors import InvalidInput
from cvae_dist.sources import Batch, Interval, Pieces, Reader, StagedBatch, file_name
from cvae_dist.store import Layout, Location, Moments, RowStore
from cvae_dist.store.layout import Block

# Two threads of short NumPy calls only fight for the interpreter: one computes while the others read and write.
_ARITHMETIC = threading.Lock()


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
        return _CopyShard(self.reader, self._staged, self._interval(span), self.url, self.labelled, span, carried_from)

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
    carried_from: Location | None

    @property
    def carried(self) -> int:
        """Published rows at the start of the shard."""
        return self.span.new - self.span.start

    def __call__(self) -> Made:
        schema, pieces = self.reader.schema, self.batch.pieces(self.interval).cut(self.carried, len(self.span))
        block = reused_block((len(self.span), schema.n_features), schema.dtype)
        columns = dict(self.reader.read(pieces, block[self.carried :]))
        if self.labelled:
            folders = [path.rpartition("/")[0].rpartition("/")[2] for path in pieces.path]
            columns["label"] = np.repeat(np.array(folders, dtype=object), pieces.rows)
        blocks = {"x": block, **columns}
        if self.carried_from is not None:
            self._carry(RowStore.open(self.carried_from), blocks)
        with _ARITHMETIC:
            moments = Moments.of(block[self.carried :])
        if not moments.is_finite:
            self._refuse_nonfinite(block, pieces)
        return Made(blocks, moments)

    def _carry(self, store: RowStore, blocks: dict[str, Block]) -> None:
        """Put the rows that were published before in front of the new ones."""
        for name, block in blocks.items():
            old = store.read(name, self.span.start, self.span.start + self.carried)
            if name == "x":
                block[: self.carried] = old
            else:
                blocks[name] = np.concatenate([old.astype(block.dtype), block])

    def _refuse_nonfinite(self, block: Block, pieces: Pieces) -> None:
        bad = np.flatnonzero(~np.isfinite(block).all(axis=1))
        if not len(bad):
            raise InvalidInput(
                f"{file_name(self.url, pieces.path[0])} or one of the {len(pieces) - 1:,} files after it "
                f"holds values as large as {np.abs(block).max():.3g}, whose variance exceeds float64. Its shard was "
                "not written and rows recorded before are kept; scale the values and run the same command again"
            )
        path, row = pieces.locate(int(bad[0]) - self.carried)
        raise InvalidInput(
            f"{file_name(self.url, path)}, row {row}, holds NaN or infinity. Its shard was not "
            "written and rows recorded before are kept; mend the file, or leave such rows out with --nonfinite drop "
            "--overwrite, which makes the store anew"
        )
