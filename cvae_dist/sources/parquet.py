"""Rows of Parquet files: a column of lists of numbers, or columns of numbers."""

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cvae_dist.sources.arrow import ArrowStream, arrow_errors, require_full, with_widths
from cvae_dist.sources.chosen import Chosen, choose, choose_carried
from cvae_dist.sources.files import BadFile, File, Integers
from cvae_dist.sources.options import TableOptions
from cvae_dist.sources.source import Schema
from cvae_dist.sources.table import TableReader
from cvae_dist.store.layout import STRING
from cvae_dist.store.urls import Location

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_MAGIC, _ENCRYPTED = b"PAR1", b"PARE"
_TAIL = 65_536  # bytes of the first request: most footers are smaller
_FOOTERS = 8  # parsed ones that a process keeps
_GROUP_BYTES = 128_000_000  # of a row group that is fetched at once; what is larger is fetched while it is decoded
_BUFFER_BYTES, _LEAST_BUFFER = 64_000_000, 65_536  # of all columns of such a one, and of each
_DISK_BUFFER = 1_000_000  # of a column on a disk, which costs nothing to ask again; fresh memory costs page faults
_BATCH_BYTES, _BATCH_ROWS = 32_000_000, 65_536  # that are decoded at a time
_MEASURED = 1000  # texts that tell how long all are
_MOST_EXPANSION = 100_000  # bytes of rows for a byte of the file: equal values take next to nothing


class Footer(NamedTuple):
    """What the end of a Parquet file says.

    Attributes
    ----------
    metadata : pyarrow.parquet.FileMetaData
    schema : pyarrow.Schema
    starts : numpy.ndarray, shape (n_row_groups + 1,), int64
        First row of every row group; the last number is that of all rows.
    """

    metadata: "pq.FileMetaData"
    schema: "pa.Schema"
    starts: Integers


class ParquetReader(TableReader):
    """Reads Parquet files of the same columns.

    Counting fetches the footer alone, and uses numbers of rows and types. What the footer says of the columns of a row
    group is not looked at: where that is damaged, pyarrow ends the process. So missing values and lists of other
    lengths are found while rows are read.

    Reading begins with a row group, as nothing smaller can be found without decoding;
    :func:`~cvae_dist.sources.cursor.rows_at` says what that costs. From an object store a row group of up to 128 MB
    is fetched at once. A larger one, and any on a disk, is fetched bit by bit. Either is decoded in batches of 32 MB.
    """

    def count_file(self, file: File) -> int:
        """Return the rows of a file; see :class:`~cvae_dist.sources.source.FileReader`."""
        with arrow_errors(file, "header", "has a footer that cannot be read"):
            footer = read_footer(file)
            self.chosen.require(_choose(footer, self.options, file.path, bool(self.chosen.features)), file.path)
            rows = int(footer.starts[-1])
            width = _fixed_width(footer, self.chosen) if self.chosen.lists else None
            if width is not None and width != self.schema.n_features:
                detail = f"has lists of {width:,} values, the first file has {self.schema.n_features:,}"
                raise BadFile(file.path, "shape", detail)
            if rows * max(1, self.schema.row_bytes) > file.size * _MOST_EXPANSION:
                raise BadFile(file.path, "header", f"claims {rows:,} rows, which {file.size:,} bytes cannot hold")
        return rows

    def start_of(self, file: File, row: int) -> int:
        """Return the first row of a row group."""
        starts = read_footer(file).starts
        return int(starts[np.searchsorted(starts, row, side="right") - 1])

    def batches(self, file: File, start: int) -> "Iterator[pa.RecordBatch]":
        """Yield batches from the beginning of a row group on."""
        import pyarrow.parquet as pq

        metadata, _, starts = read_footer(file)
        groups = range(len(starts) - 1)
        largest = max((metadata.row_group(group).total_byte_size for group in groups), default=0)
        at_once = largest <= _GROUP_BYTES and not self.root.is_local
        buffer = max(_LEAST_BUFFER, _BUFFER_BYTES // len(self.chosen.names))
        stream = pq.ParquetFile(
            ArrowStream(file),
            metadata=metadata,
            pre_buffer=at_once,
            buffer_size=0 if at_once else min(buffer, _DISK_BUFFER) if self.root.is_local else buffer,
            read_dictionary=[name for name, column in self.chosen.carried if column.dtype == STRING],
            page_checksum_verification=True,
        )
        rows = min(_BATCH_ROWS, max(1, _BATCH_BYTES // max(1, self.schema.row_bytes)))
        for group in groups[int(np.searchsorted(starts[:-1], start)) :]:
            yield from stream.iter_batches(rows, row_groups=[group], columns=self.chosen.names, use_threads=False)


def parquet_reader(root: Location, model: File, options: TableOptions) -> ParquetReader:
    """Return what reads files that are like ``model``.

    Raises
    ------
    BadFile
        It is no Parquet file, or its columns cannot be used as ``options`` say.
    """
    with arrow_errors(model, "header", "has a footer that cannot be read"):
        footer = read_footer(model)
        chosen = _measured(model, footer, choose(footer.schema, options, model.path))
        width = _list_width(model, footer, chosen) if chosen.lists else len(chosen.features)
    names = () if chosen.lists else chosen.features
    return ParquetReader(root, Schema((width,), chosen.dtype, False, chosen.columns, names), chosen, options)


def metadata_reader(root: Location, model: File, options: TableOptions) -> ParquetReader:
    """Return what reads only the carried columns of files that are like ``model``."""
    with arrow_errors(model, "header", "has a footer that cannot be read"):
        footer = read_footer(model)
        chosen = _measured(model, footer, _choose(footer, options, model.path, features=False))
    return ParquetReader(root, Schema((0,), np.dtype(np.uint8), False, chosen.columns), chosen, options)


@functools.lru_cache(_FOOTERS)
def read_footer(file: File) -> Footer:
    """Return the footer of a file, by one request, or two where it is large."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tail = file.read(max(0, file.size - _TAIL))
    length = _footer_bytes(file, bytes(tail[-8:]))
    if length + 8 > len(tail):
        tail = file.read(file.size - length - 8)
    metadata = pq.read_metadata(pa.BufferReader(pa.py_buffer(tail)))
    rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    if sum(rows) != metadata.num_rows or min(rows, default=0) < 0:
        raise BadFile(file.path, "header", f"claims {metadata.num_rows:,} rows, its row groups {sum(rows):,}")
    return Footer(metadata, metadata.schema.to_arrow_schema(), np.cumsum([0, *rows], dtype=np.int64))


def _list_width(file: File, footer: Footer, chosen: Chosen) -> int:
    """Return how many values each list has, as its type or else the first row says."""
    width = _fixed_width(footer, chosen) or _first_width(file, footer, chosen.features[0])
    if not width:
        what = f"has no values in the lists of {chosen.features[0]!r}, so it does not say how long rows are"
        raise BadFile(file.path, "shape", what)
    return width


def _fixed_width(footer: Footer, chosen: Chosen) -> int | None:
    """Return how many values each list has, where the type of the column says so."""
    kind = footer.schema.field(chosen.features[0]).type
    fixed: int | None = getattr(getattr(kind, "storage_type", kind), "list_size", None)
    return fixed


def _measured(file: File, footer: Footer, chosen: Chosen) -> Chosen:
    """Return the columns with the mean length of the first texts that are carried."""
    texts = [name for name, column in chosen.carried if column.dtype == STRING]
    if not texts or not footer.starts[-1]:
        return chosen
    return with_widths(chosen, _first_rows(file, footer, texts, _MEASURED, texts))


def _first_rows(file: File, footer: Footer, names: list[str], rows: int, texts: Sequence[str] = ()) -> "pa.RecordBatch":
    import pyarrow.parquet as pq

    stream = pq.ParquetFile(
        ArrowStream(file), metadata=footer.metadata, buffer_size=_LEAST_BUFFER, read_dictionary=texts
    )
    return next(stream.iter_batches(rows, columns=names, use_threads=False))


def _first_width(file: File, footer: Footer, name: str) -> int:
    """Return how many values the first list has; 0 where there is none."""
    if not footer.starts[-1]:
        return 0
    lists = _first_rows(file, footer, [name], 1).column(name)
    require_full(lists, file.path, name, 0)
    return len(lists.flatten())


def _choose(footer: Footer, options: TableOptions, path: str, features: bool) -> Chosen:
    if features:
        return choose(footer.schema, options, path)
    return Chosen((), (), False, choose_carried(footer.schema, options, path))


def _footer_bytes(file: File, end: bytes) -> int:
    """Return the length of the footer, by the last 8 bytes of a file."""
    if end.endswith(_ENCRYPTED):
        raise BadFile(file.path, "header", "is encrypted: write it without encryption")
    if not end.endswith(_MAGIC):
        if file.size >= len(_MAGIC) and bytes(file.read(0, len(_MAGIC))) == _MAGIC:
            raise BadFile(file.path, "truncated", "begins as a Parquet file, and has no footer at its end")
        raise BadFile(file.path, "header", "is no Parquet file" if file.size else "is empty")
    length = int.from_bytes(end[:4], "little")
    if len(end) < 8 or length + 12 > file.size:
        raise BadFile(file.path, "truncated", f"has a footer of {length:,} bytes, the file has {file.size:,}")
    return length
