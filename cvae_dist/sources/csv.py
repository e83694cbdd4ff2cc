"""Rows of CSV and TSV files, whose first line names the columns."""

import contextlib
import functools
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from cvae_dist.sources.arrow import ArrowStream, arrow_errors, require_full, with_widths
from cvae_dist.sources.chosen import Chosen, choose
from cvae_dist.sources.files import BadFile, File
from cvae_dist.sources.options import TableOptions
from cvae_dist.sources.source import Schema
from cvae_dist.sources.table import TableReader
from cvae_dist.store.layout import STRING
from cvae_dist.store.urls import Location

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.csv as pa_csv

_BLOCK_BYTES = 8_000_000  # that are parsed at a time; a line has to fit
_HEADERS = 8  # that a process keeps
_MISSING = ["", "NA", "N/A", "n/a", "#N/A", "NULL", "null", "None"]  # NaN is a value
_VALUE = re.compile(r"In CSV column #(\d+): Row #(\d+): .* to (\w+): invalid value '(.*)'", re.DOTALL)
_LENGTH = re.compile(r"Row #(\d+): Expected (\d+) columns, got (\d+)")


class CsvReader(TableReader):
    """Reads CSV and TSV files of the same columns.

    Features are int64 where all that the first 8 MB of the first file have are, and otherwise float64. Ids are text,
    as written; carried columns are numbers where those 8 MB have numbers, and otherwise text, as written. Counting
    reads the whole file and so finds every value that is none.
    """

    def count_file(self, file: File) -> int:
        """Return the rows of a file; see :class:`~cvae_dist.sources.source.FileReader`."""
        rows, stream = 0, _QuoteStream(file)
        for batch in self._batches(file, stream):
            for name in self.chosen.full:
                require_full(batch.column(name), file.path, name, rows)
            rows += len(batch)
        if stream.quotes % 2:
            raise BadFile(file.path, "values", 'has a quote (") that is not closed, so rows after it would be lost')
        return rows

    def start_of(self, file: File, row: int) -> int:
        """Return 0: where a row begins is only known from those before it."""
        return 0

    def batches(self, file: File, start: int) -> "Iterator[pa.RecordBatch]":
        """Yield all batches of a file."""
        return self._batches(file, ArrowStream(file))

    def _batches(self, file: File, stream: ArrowStream) -> "Iterator[pa.RecordBatch]":
        import pyarrow as pa
        import pyarrow.csv as pa_csv

        names = _first_block(file).names
        known = _types(self.chosen)
        schema = pa.schema([(name, known.get(name, pa.string())) for name in names])
        self.chosen.require(choose(schema, self.options, file.path), file.path)
        options = pa_csv.ConvertOptions(column_types=known, include_columns=list(known), null_values=_MISSING)
        with _csv_errors(file, names):
            yield from _open(file, stream, options)


def csv_reader(root: Location, model: File, options: TableOptions) -> CsvReader:
    """Return what reads files that are like ``model``.

    Raises
    ------
    BadFile
        It is no CSV file with a header, or its columns cannot be used as ``options`` say.
    """
    import pyarrow as pa

    found = _first_block(model)
    if all(pa.types.is_null(kind) for kind in found.types):
        raise BadFile(model.path, "header", "has no values below its header, so it does not say what its columns hold")
    schema = pa.schema([(field.name, _declared(field, options)) for field in found])
    chosen = choose(schema, options, model.path)
    chosen = with_widths(replace(chosen, kinds=(chosen.dtype.str,) * len(chosen.kinds)), _first_rows(model))
    shape = (len(chosen.features),)
    return CsvReader(root, Schema(shape, chosen.dtype, False, chosen.columns, chosen.features), chosen, options)


class _QuoteStream(ArrowStream):
    """Counts quotes on their way."""

    def __init__(self, file: File) -> None:
        super().__init__(file)
        self.quotes = 0

    def readinto(self, out: memoryview) -> int:  # type: ignore[override] # the base class says Buffer
        count = super().readinto(out)
        self.quotes += int(np.count_nonzero(np.frombuffer(out, np.uint8)[:count] == ord('"')))
        return count


@functools.lru_cache(_HEADERS)
def _first_block(file: File) -> "pa.Schema":
    """Return names and types of the columns, as the beginning of a file has them."""
    import pyarrow.csv as pa_csv

    with _csv_errors(file, []):
        schema = _open(file, ArrowStream(file), pa_csv.ConvertOptions(null_values=_MISSING)).schema
        names = schema.names
    if all(map(_is_number, names)):
        shown = ", ".join(names[:5])
        raise BadFile(file.path, "header", f"has numbers ({shown}) for names of columns: put a line of names before it")
    return schema


def _first_rows(file: File) -> "pa.RecordBatch":
    import pyarrow.csv as pa_csv

    with _csv_errors(file, []):
        return _open(file, ArrowStream(file), pa_csv.ConvertOptions(null_values=_MISSING)).read_next_batch()


def _open(file: File, stream: ArrowStream, options: "pa_csv.ConvertOptions") -> "pa_csv.CSVStreamingReader":
    import pyarrow.csv as pa_csv

    return pa_csv.open_csv(
        stream,
        pa_csv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES),
        pa_csv.ParseOptions(delimiter="\t" if file.path.lower().endswith(".tsv") else ",", newlines_in_values=True),
        options,
    )


def _declared(field: "pa.Field", options: TableOptions) -> "pa.DataType":
    """Return the type by which a column is read, from what the first block looks like."""
    import pyarrow as pa

    if field.name == options.id:
        return pa.string()
    if pa.types.is_integer(field.type):
        return pa.int64()
    if field.name in options.columns or pa.types.is_floating(field.type) or pa.types.is_null(field.type):
        return pa.float64()
    return pa.string()


def _types(chosen: Chosen) -> "dict[str, pa.DataType]":
    """Return the Arrow types of the chosen columns."""
    import pyarrow as pa

    codes = {name: column.dtype for name, column in chosen.carried} | dict(
        zip(chosen.features, chosen.kinds, strict=True)
    )
    return {
        name: pa.string() if code == STRING else pa.from_numpy_dtype(np.dtype(code)) for name, code in codes.items()
    }


@contextlib.contextmanager
def _csv_errors(file: File, names: list[str]) -> Iterator[None]:
    """Say of pyarrow's errors in which column and row they are; row 1 is the header."""
    import pyarrow as pa

    with arrow_errors(file, "values", "cannot be parsed"):
        try:
            yield
        except pa.ArrowInvalid as error:
            if found := _VALUE.search(str(error)):
                column, row, kind, value = found.groups()
                wanted = {"double": "number", "int64": "whole number"}.get(kind, kind)
                what = f"has {value!r} in column {names[int(column)]!r} of row {row} (1 is the header): no {wanted}"
                raise BadFile(file.path, "values", what) from error
            if found := _LENGTH.search(str(error)):
                row, expected, count = found.groups()
                what = f"has {count} values in row {row} (1 is the header), where {expected} are needed"
                raise BadFile(file.path, "ragged", what) from error
            if "straddl" in str(error):
                raise BadFile(file.path, "values", f"has a row of more than {_BLOCK_BYTES:,} bytes") from error
            raise


def _is_number(text: str) -> bool:
    with contextlib.suppress(ValueError):
        float(text)
        return True
    return False
