"""A Zarr array, or one of a group such as xarray's data sets: one entry for the rows of each chunk or shard."""

import itertools
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from cvae_dist.errors import CvaeDistError, InvalidInput, SourceNotFound, StorageFailed
from cvae_dist.sources.cf import BadValues, Packing
from cvae_dist.sources.file_table import FileTable
from cvae_dist.sources.files import BadFile, File, Files, Integers, local_version
from cvae_dist.sources.pieces import Pieces
from cvae_dist.sources.source import Column, Schema
from cvae_dist.sources.zarr_metadata import METADATA, ArrayMetadata
from cvae_dist.store.layout import STRING, Block
from cvae_dist.store.lineage import digest_bytes
from cvae_dist.store.row_store import RowStore
from cvae_dist.store.urls import Location

_LACKS = " lacks "  # in the version of an entry some of whose objects are missing
_ENTRY = "rows/"  # how the paths of entries begin; the first row follows
_DIGITS = 15
_NAMED = 10
_THREADS = 32
_MOST_ABSENT = 1000  # rows of chunks that may be missing beside those that are there, ten times as many
_MOST_KEPT = 256_000_000  # bytes of rows that a thread keeps because their chunks are decoded whole

_kept = threading.local()


def fits(root: Location, array: str | None) -> str | None:
    """Say so where a source is a finished store of rows already, which needs no ingest; None where it is not."""
    try:
        store = RowStore.open(root)
    except CvaeDistError:
        return None
    if store.kind != "rows" or array not in (None, "x"):
        return None
    return (
        f"{root} is a store of {store.rows:,} rows already, which train and embed read as it is: "
        f"cvae-dist train {root} MODEL"
    )


@dataclass(frozen=True)
class ZarrSource:
    """Rows along the first axis of an array.

    Every run of rows whose chunks (or shards) lie side by side is listed as a file: ``rows/000000000000000`` is the one
    that begins with row 0. Its version is a digest of its number of rows, of the objects in which these lie, in the
    array and in its columns, as listed, and of what the metadata says of them. It stays the same while the array grows,
    but where one of these objects was not full.

    Attributes
    ----------
    root : Location
        A Zarr array of format 2 or 3, or a group.
    array : str or None
        Path of the array in the group; by default the only one in it that holds numbers and has at least two axes.
    id : str or None
        Array beside it that names the rows: a number or a text for each.
    carry : tuple of str
        More arrays that travel with the rows.
    """

    root: Location
    array: str | None = None
    id: str | None = None
    carry: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        """Where it is."""
        return str(self.root)

    def list(self) -> FileTable:
        """List the blocks of rows. Objects are listed and metadata is read, nothing else."""
        arrays = (self._rows, *self._columns)
        rows, found = self._rows, [_listing(array.place) for array in arrays]
        _require_plausible(rows, len(found[0]))
        starts = range(0, rows.array.shape[0], rows.block_shape[0])
        blocks = [_names(rows, start, min(start + starts.step, starts.stop)) for start in starts]
        sizes = [sum(found[0][name].size for name in names if name in found[0]) for names in blocks]
        files = Files(
            np.array([f"{_ENTRY}{start:0{_DIGITS}d}" for start in starts], dtype=object),
            np.array(sizes, dtype=np.int64),
            np.array([_version(arrays, start, found) for start in starts], dtype=object),
        )
        return FileTable.of(files)

    def reader(self, model: Files) -> "ZarrReader":
        """Return what reads the rows."""
        rows = self._rows
        item_shape = rows.array.shape[1:] or (1,)
        if 0 in item_shape:
            raise InvalidInput(f"{rows.place} has shape {rows.array.shape}: items without values cannot be used")
        packing = _packing(rows)
        dtypes = (STRING if one.dtype.kind == "O" else one.dtype.newbyteorder("<").str for one in self._columns)
        called = ("id" if name == self.id else name for name in self._names)
        named = tuple(map(Column, called, dtypes))
        return ZarrReader(rows, self._columns, packing, Schema(item_shape, packing.dtype, columns=named))

    @property
    def _names(self) -> tuple[str, ...]:
        return (*filter(None, [self.id]), *self.carry)

    @cached_property
    def _columns(self) -> tuple[ArrayMetadata, ...]:
        return tuple(map(self._column, self._names))

    @cached_property
    def _rows(self) -> ArrayMetadata:
        if self.array is not None:
            return self._numeric(self.array)
        if (found := ArrayMetadata.find(self.root)) is not None:
            return self._checked(found)
        names = _arrays_below(self.root)
        arrays = [ArrayMetadata.find(self.root / name) for name in names if "/" not in name]
        able = [array for array in arrays if array and array.is_numeric and len(array.array.shape) > 1]
        if len(able) != 1:
            raise self._refusal(
                f"holds {len(able)} arrays of numbers with at least two axes, so one has to be named", names
            )
        return able[0]

    def _numeric(self, name: str) -> ArrayMetadata:
        found = ArrayMetadata.find(self.root / name) if _is_below(name) else None
        if found is None:
            raise self._refusal(f"holds no array {name!r}", _arrays_below(self.root))
        return self._checked(found)

    def _checked(self, found: ArrayMetadata) -> ArrayMetadata:
        if not found.is_numeric:
            raise InvalidInput(
                f"{found.place} has dtype {found.dtype}; float16, float32, float64 and integers are accepted"
            )
        if not found.array.shape:
            raise InvalidInput(f"{found.place} has shape (), which holds no rows")
        return found

    def _column(self, name: str) -> ArrayMetadata:
        above = (self.array or "").rpartition("/")[0]
        found = ArrayMetadata.find(self.root / (f"{above}/{name}" if above else name)) if _is_below(name) else None
        length = self._rows.array.shape[0]
        if found is None:
            raise self._refusal(f"holds no array {name!r}", _arrays_below(self.root))
        if found.array.shape != (length,) or not (found.is_numeric or found.dtype.kind == "O"):
            raise InvalidInput(
                f"{found.place} has shape {found.array.shape} and dtype {found.dtype}, so it cannot travel with "
                f"{length:,} rows; name an array of as many numbers or texts"
            )
        return found

    def _refusal(self, what: str, names: "Sequence[str]") -> InvalidInput | SourceNotFound:
        if not names:
            return SourceNotFound(f"there is no Zarr array at {self.root}; mend the path")
        shown = ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
        return InvalidInput(f"{self.root} {what}: give --array one of {shown}")


@dataclass(frozen=True)
class ZarrReader:
    """Reads blocks of rows that were listed, and notices when an object is no longer the one that was."""

    rows: ArrayMetadata
    columns: tuple[ArrayMetadata, ...]
    packing: Packing
    schema: Schema

    @property
    def streams(self) -> bool:
        """Whether about 4 MB of rows at a time is read as fast as many of them: chunks may be larger."""
        return False

    def count(self, files: Files) -> tuple[Integers, list[BadFile]]:
        """Return the rows of every block; those with missing objects cannot be used. Nothing is read.

        An object that was never written reads as the array's fill value. Only NaN is taken for what it is then.
        """
        counts, bad = np.zeros(len(files), dtype=np.int64), []
        for number, (path, version) in enumerate(zip(files.path, files.version, strict=True)):
            first = self._first(path)
            if first is None:
                bad.append(BadFile(path, "missing", f"is no block of {self.rows.place}, or was deleted with its rows"))
            elif _LACKS in version and not self.packing.is_missing(self.rows.array.fill_value):
                lacks = version.partition(_LACKS)[2]
                fill = self.rows.array.fill_value
                bad.append(BadFile(path, "missing", f"lacks {lacks}, which would read as the fill value {fill}"))
            else:
                counts[number] = min(self._step, self.rows.array.shape[0] - first)
        return counts, bad

    def remark(self, files: int, rows: int) -> str:
        """Say how numbers are unpacked."""
        return self.packing.remark

    def read(self, pieces: Pieces, out: Block) -> Mapping[str, Block]:
        """Read rows into ``out``, shape (n_rows, n_features), and return their columns."""
        parts: list[list[Block]] = [[] for _ in self.columns]
        done = 0
        for run in _runs(pieces, self._step):
            files, *others = self._files(run)
            rows = self._read(run, files)
            out[done : done + len(rows)] = rows.reshape(len(rows), -1)
            done += len(rows)
            for part, column, found in zip(parts, self.columns, others, strict=True):
                part.append(_plain(self._read_column(run, column, found)))
        return {one.name: np.concatenate(part) for one, part in zip(self.schema.columns, parts, strict=True)}

    def _files(self, run: "_Run") -> list[dict[str, File]]:
        """Return the objects of every array, as they were listed, in which a run lies."""
        found: list[dict[str, File]] = [{} for _ in (self.rows, *self.columns)]
        for path, version in zip(run.paths, run.versions, strict=True):
            for files, more in zip(found, _objects((self.rows, *self.columns), path, version), strict=True):
                files.update(more)
        return found

    def _read(self, run: "_Run", files: Mapping[str, File]) -> Block:
        """Return rows as an array (n, ...)."""
        try:
            return self.packing.decode(_decoded(self.rows, files, run))
        except (StorageFailed, MemoryError):
            raise
        except Exception as error:
            raise self._named(run, error, lambda one: self._read(one, files)) from error

    def _read_column(self, run: "_Run", column: ArrayMetadata, files: Mapping[str, File]) -> Block:
        """Return the entries of a column, all of whose objects have to be there."""
        if lacking := [name for name in _names(column, run.start, run.stop) if name not in files]:
            raise BadFile(run.paths[0], "missing", f"has rows for which {column.place} lacks {lacking[0]}")
        try:
            found = np.asarray(column.opened(files)[run.start : run.stop])
        except (StorageFailed, MemoryError):
            raise
        except Exception as error:
            raise self._named(run, error, lambda one: self._read_column(one, column, files)) from error
        return found

    def _named(self, run: "_Run", error: Exception, read: Callable[["_Run"], Block]) -> BadFile:
        """Return what is wrong with an entry of a run. Where there are several, they are read one by one."""
        for one in run.split(self._step) if len(run.paths) > 1 else ():
            read(one)  # raises
        return _bad(run.paths[0], error)

    def _first(self, path: str) -> int | None:
        """Return the first row of an entry, None where the array has no such entry."""
        name = path.removeprefix(_ENTRY)
        first = int(name) if name.isdecimal() else -1
        return first if first in range(0, self.rows.array.shape[0], self._step) else None

    @property
    def _step(self) -> int:
        return self.rows.block_shape[0]


class _Run(NamedTuple):
    """Neighbouring rows of the array, and the entries in which they lie."""

    start: int
    stop: int
    paths: list[str]
    versions: list[str]

    def split(self, step: int) -> "list[_Run]":
        """Return the parts that lie in each entry."""
        edges = [*range(self.start - self.start % step, self.stop, step), self.stop]
        return [
            _Run(max(first, self.start), stop, [path], [version])
            for first, stop, path, version in zip(edges[:-1], edges[1:], self.paths, self.versions, strict=True)
        ]


def _runs(pieces: Pieces, step: int) -> list[_Run]:
    """Join pieces that lie one after the other in the array: Zarr then reads their objects at the same time."""
    runs: list[_Run] = []
    columns = pieces.path, pieces.version, pieces.first.tolist(), pieces.rows.tolist()
    for path, version, first, rows in zip(*columns, strict=True):
        start = int(path.removeprefix(_ENTRY)) + first
        if runs and runs[-1].stop == start and start % step == 0:
            last = runs.pop()
            runs.append(_Run(last.start, start + rows, [*last.paths, path], [*last.versions, version]))
        elif rows:
            runs.append(_Run(start, start + rows, [path], [version]))
    return runs


def _decoded(rows: ArrayMetadata, files: Mapping[str, File], run: _Run) -> Block:
    """Return rows as they are stored; a block that is decoded whole is kept for those that are asked for next."""
    array, step = rows.opened(files), rows.block_shape[0]
    start, stop = run.start - run.start % step, min(array.shape[0], run.start - run.start % step + step)
    size = (stop - start) * math.prod(array.shape[1:]) * rows.dtype.itemsize
    if array.shards is not None or run.stop - run.start == stop - start or len(run.paths) > 1 or size > _MOST_KEPT:
        return np.asarray(array[run.start : run.stop])
    key = rows.digest, run.paths, run.versions
    if getattr(_kept, "block", (None,))[0] != key:
        _kept.block = key, np.asarray(array[start:stop])
    block: Block = _kept.block[1][run.start - start : run.stop - start]
    return block


@lru_cache(maxsize=256)
def _objects(arrays: tuple[ArrayMetadata, ...], path: str, version: str) -> list[dict[str, File]]:
    """Return the objects of an entry in each array, the rows first. They have to be those that were listed."""
    first = int(path.removeprefix(_ENTRY))
    stop = min(first + arrays[0].block_shape[0], arrays[0].array.shape[0])
    files = [_look(array.place, _names(array, first, stop)) for array in arrays]
    if _version(arrays, first, files) != version:
        raise BadFile(path, "changed", "was changed after it was listed: another object, or other metadata")
    return files


def _names(array: ArrayMetadata, first: int, stop: int) -> list[str]:
    """Return the names of the objects that hold rows ``first`` to ``stop`` of an array."""
    size = array.block_shape[0]
    numbers = range(first // size, -(-stop // size))
    return [array.key(block) for block in itertools.product(numbers, *map(range, array.blocks[1:]))]


def _version(arrays: Sequence[ArrayMetadata], first: int, found: Sequence[Mapping[str, File]]) -> str:
    """Return the version of a block of rows, the first of ``arrays``, by the objects that were found of each array."""
    rows, *columns = arrays
    stop = min(first + rows.block_shape[0], rows.array.shape[0])
    names = _names(rows, first, stop)
    lines = [rows.digest, str(stop - first), *_lines(names, found[0])]
    for column, files in zip(columns, found[1:], strict=True):
        lines += [column.digest, *_lines(_names(column, first, stop), files)]
    lacking = [name for name in names if name not in found[0]]
    lacks = f"{_LACKS}{len(lacking):,} of {len(names):,} objects ({lacking[0]} first)" if lacking else ""
    return digest_bytes("\n".join(lines).encode()) + lacks


def _lines(names: Sequence[str], files: Mapping[str, File]) -> list[str]:
    return [f"{name} {files[name].size} {files[name].version}" for name in names if name in files]


def _look(place: Location, names: Sequence[str]) -> dict[str, File]:
    """Return the objects of these names, without those that are missing."""
    if place.is_local:
        found = [_local_file(place, name) for name in names]
    else:
        with ThreadPoolExecutor(_THREADS) as pool:
            found = list(pool.map(lambda name: _remote_file(place, name), names))
    return {file.path: file for file in found if file is not None}


def _listing(place: Location) -> dict[str, File]:
    """Return all objects below a place."""
    if not place.is_local:
        return {entry.name: File(place, *entry) for entry in place.list()}
    top = str(place)
    found = (os.path.relpath(os.path.join(folder, name), top) for folder, _, names in os.walk(top) for name in names)
    return _look(place, list(found))


def _local_file(place: Location, name: str) -> File | None:
    try:
        status = os.stat(str(place / name))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return File(place, name, status.st_size, local_version(status))


def _remote_file(place: Location, name: str) -> File | None:
    entry = place.storage.entry((place / name).path)
    return None if entry is None else File(place, name, entry.size, entry.version)


def _require_plausible(rows: ArrayMetadata, found: int) -> None:
    """Refuse a shape that was made up before anything of that length is made."""
    expected = math.prod(rows.blocks)
    if expected > 10 * found + _MOST_ABSENT:
        raise InvalidInput(
            f"{rows.place} has shape {rows.array.shape}, which takes {expected:,} objects, but {found:,} are listed "
            "there. It was never written, or its storage lists nothing; mend the path, or get it from a copy"
        )


def _packing(rows: ArrayMetadata) -> Packing:
    try:
        return Packing.of(rows.attributes, rows.dtype)
    except BadValues as error:
        raise InvalidInput(f"{rows.place} {error}; mend that attribute") from None


def _arrays_below(root: Location) -> list[str]:
    """Return the paths of all arrays in a group."""
    parts = (entry.name.rpartition("/") for entry in root.list())
    places = sorted({folder for folder, _, name in parts if folder and name in METADATA})
    return [place for place in places if _is_array(root / place)]


def _is_array(place: Location) -> bool:
    """Whether metadata is that of an array; damaged ones are told later."""
    return (place / METADATA[1]).exists() or b'"array"' in (place / METADATA[0]).read()


def _is_below(path: str) -> bool:
    return not {"", ".", ".."} & {*path.split("/")}


def _plain(entries: Block) -> Block:
    """Return texts as objects (str), numbers as they are."""
    return np.array([str(one) for one in entries], dtype=object) if entries.dtype.kind in "OTU" else entries


def _bad(path: str, error: Exception) -> BadFile:
    if isinstance(error, BadFile):
        return BadFile(path, error.code, f"has an object {error.path}, which {error.detail}")
    if isinstance(error, BadValues):
        return BadFile(path, "values", str(error))
    why = (str(error).splitlines() or [""])[0]
    return BadFile(path, "corrupt", f"cannot be decoded ({type(error).__name__}: {why})")
