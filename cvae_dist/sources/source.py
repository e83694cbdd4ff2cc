"""What a source of rows is: it lists files, says how many rows each of them has, and reads some of these."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np

from cvae_dist.sources.files import BadFile, File, Files, Integers, require_none
from cvae_dist.sources.pieces import Pieces
from cvae_dist.store.layout import Block
from cvae_dist.store.urls import Location

if TYPE_CHECKING:
    from cvae_dist.sources.file_table import FileTable

RowsPerFile = Literal["auto", "one", "many"]

_TEXT_BYTES = 64  # as the layout of a store counts them
_COPIES = 6  # of a text while it becomes part of a shard: read, decoded, held by Python, encoded, compressed
_THREADS = 32  # files that are looked at at a time where that is waiting for a storage


@dataclass(frozen=True)
class Column:
    """A column that travels with the rows.

    Attributes
    ----------
    name : str
    dtype : str
        "string", or a little-endian NumPy code such as "<i8".
    width : int
        Bytes that a text has, about, by the first ones of a file.
    """

    name: str
    dtype: str
    width: int = field(default=_TEXT_BYTES, compare=False)


@dataclass(frozen=True)
class Schema:
    """What all files of a source have in common.

    Attributes
    ----------
    item_shape : tuple of int
        Shape of one item; a row is the item flattened.
    dtype : numpy.dtype
        Native byte order.
    one_per_file : bool
        Each file is one item, and the file's path the item's id.
    columns : tuple of Column
        What travels with the rows.
    features : tuple of str
        Names of the features; empty where they have none.
    """

    item_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    one_per_file: bool = False
    columns: tuple[Column, ...] = ()
    features: tuple[str, ...] = ()

    @property
    def n_features(self) -> int:
        """Values of a row."""
        return math.prod(self.item_shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.n_features * self.dtype.itemsize

    @property
    def text_bytes(self) -> int:
        """Memory that a row needs, about, because texts of it are longer than is assumed of texts."""
        return _COPIES * sum(max(0, column.width - _TEXT_BYTES) for column in self.columns)

    def to_json(self) -> dict[str, Any]:
        """Return the schema as settings of a store."""
        document = {"item_shape": list(self.item_shape), "dtype": self.dtype.name, "one_per_file": self.one_per_file}
        columns = {"columns": {column.name: column.dtype for column in self.columns}} if self.columns else {}
        return {**document, **columns, **({"features": list(self.features)} if self.features else {})}


class Reader(Protocol):
    """Reads files of one kind. It travels with every task: small, picklable, and without state that matters.

    Attributes
    ----------
    schema : Schema
        What every file has to follow.
    """

    @property
    def schema(self) -> Schema:
        """What every file has to follow."""

    @property
    def streams(self) -> bool:
        """Whether about 4 MB of rows at a time is read as fast as many of them."""

    def count(self, files: Files) -> tuple[Integers, list[BadFile]]:
        """Return the rows of every file, shape (n,), and what is wrong with those that cannot be used; they have 0.

        Headers and footers are looked at, and no more where that says enough.
        """

    def read(self, pieces: Pieces, out: Block) -> Mapping[str, Block]:
        """Read rows into ``out``, shape (n_rows, n_features), and return their columns by name.

        Raises
        ------
        BadFiles
            Files are not what was listed, or hold something else than was counted: all such files, or one.
        """

    def remark(self, files: int, rows: int) -> str:
        """Return what a person should be told of how so many files were understood; may be empty."""


class FileReader(ABC):
    """A reader that looks at each file by itself: what most kinds of files need.

    Attributes
    ----------
    root : Location
    schema : Schema
    """

    root: Location
    schema: Schema

    @property
    def streams(self) -> bool:
        """Whether about 4 MB of rows at a time is read as fast as many of them: mostly not."""
        return False

    @abstractmethod
    def count_file(self, file: File) -> int:
        """Return the rows of a file, which follows the schema, or raise :class:`BadFile`."""

    @abstractmethod
    def read_file(self, file: File, first: int, out: Block) -> Mapping[str, Block]:
        """Read rows ``first`` to ``first + len(out)`` of a file into ``out``, and return their columns by name."""

    def count(self, files: Files) -> tuple[Integers, list[BadFile]]:
        """Count the rows of every file; see :class:`Reader`."""

        def count(file: File) -> int | BadFile:
            try:
                return self.count_file(file)
            except BadFile as error:
                return error

        if self.root.is_local:
            found = [count(file) for file in files.of(self.root)]
        else:
            with ThreadPoolExecutor(_THREADS) as pool:
                found = list(pool.map(count, files.of(self.root)))
        rows = np.array([0 if isinstance(one, BadFile) else one for one in found], dtype=np.int64)
        return rows, [one for one in found if isinstance(one, BadFile)]

    def remark(self, files: int, rows: int) -> str:
        """Return nothing: there is no doubt how these files are to be understood."""
        return ""

    def read(self, pieces: Pieces, out: Block) -> Mapping[str, Block]:
        """Read rows of several files; see :class:`Reader`."""
        parts, problems, start = list[Mapping[str, Block]](), list[BadFile](), 0
        for file, first, rows in pieces.files(self.root):
            if rows:
                try:
                    parts.append(self.read_file(file, first, out[start : start + rows]))
                except BadFile as error:  # the files after it may be bad, too
                    problems.append(error)
                start += rows
        require_none(problems)
        return {column.name: np.concatenate([part[column.name] for part in parts]) for column in self.schema.columns}


@dataclass(frozen=True)
class ArrayReader(FileReader):
    """Reads one array of each file: that of a name, or the only one. Its first axis counts rows.

    Attributes
    ----------
    root : Location
    schema : Schema
    array : str or None
    """

    root: Location
    schema: Schema
    array: str | None

    def require_like(self, file: File, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """Refuse an array that does not follow the schema."""
        if (shape[1:] or (1,)) != self.schema.item_shape:
            raise BadFile(file.path, "shape", f"has items of shape {shape[1:]}, not {self.schema.item_shape}")
        if dtype != self.schema.dtype:
            raise BadFile(file.path, "dtype", f"has dtype {dtype}, not {self.schema.dtype}")


def require_rows(file: File, rows: int, stop: int) -> None:
    """Refuse to read rows up to ``stop`` of a file that has fewer."""
    if stop > rows:
        raise BadFile(file.path, "changed", f"has {rows:,} rows, fewer than were counted")


def schema_of(file: File, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Schema:
    """Return the schema of rows along the first axis of an array; a 1-D array has rows of one value.

    Raises
    ------
    BadFile
        Its items have no values.
    """
    item_shape = shape[1:] or (1,)
    if 0 in item_shape:
        raise BadFile(file.path, "shape", f"has shape {shape}: items without values cannot be used")
    return Schema(item_shape, dtype.newbyteorder("="))


@runtime_checkable
class Source(Protocol):
    """Where rows come from."""

    @property
    def url(self) -> str:
        """Where it is, without credentials."""

    def list(self) -> "FileTable":
        """List the files, sorted by path; none is opened."""

    def reader(self, model: Files) -> Reader:
        """Return what reads the files, all of which have to be like the one in ``model``.

        Raises
        ------
        BadFile
            That one cannot be used.
        """
