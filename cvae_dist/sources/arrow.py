"""Batches of a table as NumPy arrays, and pyarrow's errors as those of a file."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cvae_dist.errors import CvaeDistError
from cvae_dist.sources.chosen import Chosen, is_text
from cvae_dist.sources.files import BadFile, File, FileStream, Integers
from cvae_dist.sources.source import Column
from cvae_dist.store.layout import STRING, Block

if TYPE_CHECKING:
    import pyarrow as pa

_TILE_ROWS = 1024  # whose columns fit the cache while they become rows
_MOST_TEXT_BYTES = 1_000_000_000  # of a column in one batch: a few bytes in a file may stand for any number


@contextlib.contextmanager
def arrow_errors(file: File, code: str, what: str) -> Iterator[None]:
    """Turn whatever pyarrow raises about a file into :class:`BadFile`; failures of the storage stay what they are."""
    import pyarrow as pa

    try:
        yield
    except CvaeDistError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise BadFile(file.path, code, f"{what}: {said}") from error


class ArrowStream(FileStream):
    """A file as pyarrow reads it: into buffers of its own, without copies."""

    _BLOCK = 65_536  # pyarrow asks for more wherever it knows what it needs

    def __init__(self, file: File) -> None:
        super().__init__(file)
        self._bytes = file.size

    def read_buffer(self, count: int = -1) -> "pa.Buffer":
        """Return the next bytes."""
        import pyarrow as pa

        left = max(0, self._bytes - self.tell())
        buffer = pa.allocate_buffer(left if count < 0 else min(count, left))
        self.readinto(memoryview(buffer))
        return buffer

    def read(self, count: int = -1) -> Any:
        """Return the next bytes, too: pyarrow asks in both ways."""
        return self.read_buffer(count)


def fill(batch: "pa.RecordBatch", chosen: Chosen, path: str, first: int, out: Block) -> None:
    """Copy the features of a batch, which begins with row ``first`` of its file, to ``out``, shape (n, n_features)."""
    for name in chosen.features:
        require_full(batch.column(name), path, name, first)
    if chosen.lists:
        _fill_lists(batch, chosen.features[0], path, first, out)
    else:
        _fill_numbers(batch.select(list(chosen.features)), out)


def carried(batch: "pa.RecordBatch", name: str, column: Column, path: str, first: int) -> Block:
    """Return a column of a batch that travels with the rows; missing text is empty, other missing values are refused.

    Times and decimals become text, times in the form of ISO 8601.
    """
    array = _stored(batch.column(name))
    if column.dtype != STRING or column.name == "id":
        require_full(array, path, name, first)
    if column.dtype != STRING:
        return _numbers(array, path, name, column)
    return _texts(array, path, name)


def with_widths(chosen: Chosen, batch: "pa.RecordBatch | None") -> Chosen:
    """Return the columns with the mean length of the texts that are carried, as some rows have them."""
    import pyarrow as pa

    def measured(name: str, column: Column) -> Column:
        if column.dtype != STRING or not batch:
            return column
        array = _stored(batch.column(name))
        if not is_text(array.type):
            return column
        _, lengths = _indexed(array if pa.types.is_dictionary(array.type) else array.dictionary_encode())
        return replace(column, width=round(lengths.mean()))

    return replace(chosen, carried=tuple((name, measured(name, column)) for name, column in chosen.carried))


def require_full(array: "pa.Array", path: str, name: str, first: int, per_row: int = 1) -> None:
    """Refuse missing values in a column of which ``array`` begins with row ``first``; NaN is none."""
    if array.null_count:
        row = first + int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0]) // per_row
        count = "a missing value" if array.null_count == 1 else f"{array.null_count:,} missing values"
        where = f"in column {name!r}, the first in row {row:,} (counted from 0)"
        raise BadFile(path, "nulls", f"has {count} {where}: fill them, or leave their rows out")


def _fill_lists(batch: "pa.RecordBatch", name: str, path: str, first: int, out: Block) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc

    array, width = _stored(batch.column(name)), out.shape[1]
    if pa.types.is_fixed_size_list(array.type):
        wrong = [array.type.list_size] if array.type.list_size != width else []
        row = first
    else:
        lengths = pc.list_value_length(array).to_numpy()
        rows = np.flatnonzero(lengths != width)[:1]
        wrong, row = lengths[rows].tolist(), first + int(rows.sum())
    if wrong:
        what = (
            f"has a list of {wrong[0]:,} in column {name!r}, row {row:,} (counted from 0), where others have {width:,}"
        )
        raise BadFile(path, "ragged", what)
    values = array.flatten()
    require_full(values, path, name, first, width)
    out[:] = values.to_numpy(zero_copy_only=False).reshape(out.shape)


def _fill_numbers(batch: "pa.RecordBatch", out: Block) -> None:
    import pyarrow as pa

    kind = pa.from_numpy_dtype(out.dtype)
    columns = [array if array.type == kind else array.cast(kind, safe=False) for array in map(_stored, batch.columns)]
    batch = pa.RecordBatch.from_arrays(columns, names=batch.schema.names)
    for start in range(0, len(out), _TILE_ROWS):
        out[start : start + _TILE_ROWS] = batch.slice(start, _TILE_ROWS).to_tensor().to_numpy()


def _numbers(array: "pa.Array", path: str, name: str, column: Column) -> Block:
    import pyarrow as pa

    try:
        numbers: Block = array.cast(pa.from_numpy_dtype(column.dtype)).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid as error:
        raise BadFile(path, "values", f"has a number in column {name!r} that {column.dtype} cannot hold") from error
    return numbers


def _texts(array: "pa.Array", path: str, name: str) -> Block:
    """Return text as objects. Those of a dictionary are made once, however many rows have them."""
    import pyarrow as pa

    texts: Block
    if not is_text(array.type):
        array = array.cast(pa.string())
    if not pa.types.is_dictionary(array.type):
        array = array.dictionary_encode() if array.null_count else array
    if not pa.types.is_dictionary(array.type):
        texts = array.to_numpy(zero_copy_only=False)
        return texts
    index, lengths = _indexed(array)
    size = int(lengths.sum())
    if size > _MOST_TEXT_BYTES:
        raise BadFile(path, "values", f"has {size:,} bytes of text in column {name!r} of {len(index):,} rows")
    texts = np.array([*array.dictionary.to_pylist(), ""], dtype=object)[index]
    return texts


def _indexed(array: "pa.Array") -> tuple[Integers, Integers]:
    """Return which text of its dictionary each row has, the one behind the last where it has none, and its bytes."""
    import pyarrow.compute as pc

    index = array.indices.fill_null(len(array.dictionary)).to_numpy()
    lengths = np.append(pc.binary_length(array.dictionary).to_numpy(zero_copy_only=False), 0)
    return index, lengths[index]


def _stored(array: "pa.Array") -> "pa.Array":
    return getattr(array, "storage", array)
