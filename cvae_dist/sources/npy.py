"""Trees of ``.npy`` files: one item per file, or many rows per file."""

import io
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from cvae_dist.errors import InvalidInput, SourceNotFound
from cvae_dist.store import Location

RowsPerFile = Literal["auto", "one", "many"]
Integers = npt.NDArray[np.int64]

_HEADER_BYTES = 4096
_NAMED = 5  # bad files named in one message


class Header(NamedTuple):
    """What the header of a ``.npy`` file says.

    Attributes
    ----------
    shape : tuple of int
    dtype : numpy.dtype
        As stored, possibly big-endian.
    fortran : bool
        Column-major order.
    text : bytes
        The header itself, up to the data.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    text: bytes

    @property
    def offset(self) -> int:
        """Bytes before the data."""
        return len(self.text)

    @property
    def size(self) -> int:
        """Bytes a whole file with this header has."""
        return self.offset + self.dtype.itemsize * int(np.prod(self.shape, dtype=object))

    @property
    def plain(self) -> bool:
        """Whether rows lie in the file just as they lie in memory."""
        return self.dtype.isnative and (not self.fortran or len(self.shape) < 2)


@dataclass(frozen=True)
class Pieces:
    """Runs of rows in files, in the order in which they are stored.

    Attributes
    ----------
    path : numpy.ndarray of object (str)
        Relative to the root of the tree.
    first, rows : numpy.ndarray, int64
        First row in the file, and number of rows.
    size, modified : numpy.ndarray, int64
        Bytes and modification time (ns since 1970) of the file.
    """

    path: npt.NDArray[np.object_]
    first: Integers
    rows: Integers
    size: Integers
    modified: Integers

    def __len__(self) -> int:
        return len(self.path)

    def __getitem__(self, index: Any) -> "Pieces":
        return Pieces(*(values[index] for values in self.arrays().values()))

    def stamps(self) -> dict[str, tuple[int, int]]:
        """Return size and modification time by path."""
        return {
            path: (int(size), int(time)) for path, size, time in zip(self.path, self.size, self.modified, strict=True)
        }

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def ends(self) -> Integers:
        """Rows up to and including each piece: one sum over all pieces, however often they are cut."""
        ends: Integers = np.cumsum(self.rows, dtype=np.int64)
        return ends

    @property
    def total(self) -> int:
        """Rows of all pieces together."""
        return int(self.ends[-1]) if len(self) else 0

    def between(self, start: int, stop: int) -> "Pieces":
        """Return the pieces, cut at both ends, that make rows ``start:stop`` of all of them."""
        lo = np.searchsorted(self.ends, start, side="right")
        hi = np.searchsorted(self.ends, stop, side="left") + 1
        part, stops = self[lo:hi], self.ends[lo:hi]
        starts = stops - part.rows
        skipped = np.maximum(start - starts, 0)
        kept = np.minimum(stops, stop) - starts - skipped
        whole = Pieces(part.path, part.first + skipped, kept, part.size, part.modified)
        return whole[kept > 0] if (kept <= 0).any() else whole

    def without(self, dropped: Integers) -> "Pieces":
        """Return the pieces that remain when these rows, counted over all pieces, are left out."""
        cuts = np.unique(np.concatenate([[0], self.ends, dropped, dropped + 1]))
        starts, stops = cuts[:-1], cuts[1:]
        keep = ~np.isin(starts, dropped)
        starts, stops = starts[keep], stops[keep]
        piece = np.searchsorted(self.ends, starts, side="right")
        first = self.first[piece] + starts - (self.ends - self.rows)[piece]
        return Pieces(self.path[piece], first, stops - starts, self.size[piece], self.modified[piece])


@dataclass(frozen=True)
class NpyTree:
    """A directory tree of ``.npy`` files of one item shape and dtype.

    Attributes
    ----------
    root : Location
        A local directory.
    item_shape : tuple of int
        Shape of one item; a row is the item flattened.
    dtype : numpy.dtype
        Native byte order.
    header : Header
        Of the first file: the schema every other file has to follow.
    one_per_file : bool
        Each file is one item.
    model : str
        Path of the first file, relative to the root: the one every other file has to follow.
    """

    root: Location
    item_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    header: Header
    one_per_file: bool
    model: str

    @classmethod
    def scan(cls, root: Location, rows_per_file: RowsPerFile) -> "tuple[NpyTree, Pieces]":
        """List the tree: names, sizes and headers; no rows are read.

        Parameters
        ----------
        root : Location
            Directory; walked recursively, hidden names left out.
        rows_per_file : {"auto", "one", "many"}
            ``one``: each file is one item of any shape. ``many``: the first axis of each file counts items.
            ``auto``: a file with one axis is one vector, others hold many.

        Raises
        ------
        SourceNotFound
            No such directory, or no ``.npy`` file in it.
        InvalidInput
            A file that is no array of numbers, is truncated, or differs from the first in shape or dtype.
        """
        files = sorted(_walk(_local_directory(root)))
        if not files:
            raise SourceNotFound(f"there is no .npy file below {root}. Nothing was written; mend the path")
        try:
            first = read_header(os.path.join(root.path, files[0][0]))
        except InvalidInput as error:
            raise InvalidInput(f"{error}. {_KEPT}") from None
        one = rows_per_file == "one" or (rows_per_file == "auto" and len(first.shape) == 1)
        item_shape = first.shape if one else first.shape[1:]
        if not one and not item_shape:
            item_shape = (1,)
        if 0 in item_shape:
            raise InvalidInput(
                f"{root}/{files[0][0]} has shape {first.shape}: items without values cannot be used. {_KEPT}"
            )
        tree = cls(root, item_shape, first.dtype.newbyteorder("="), first, one, files[0][0])
        paths, sizes, times = (list(column) for column in zip(*files, strict=True))
        _require_text(root.path, paths)
        if one:
            expected = first.size
            tree._headers([path for path, size in zip(paths, sizes, strict=True) if size != expected])
            rows = np.ones(len(files), dtype=np.int64)
        else:
            rows = np.array([header.shape[0] for header in tree._headers(paths)], dtype=np.int64)
        starts = np.zeros(len(files), dtype=np.int64)
        names = np.array(paths, dtype=object)
        return tree, Pieces(names, starts, rows, np.array(sizes, dtype=np.int64), np.array(times, dtype=np.int64))

    @property
    def n_features(self) -> int:
        """Values of one item."""
        return int(np.prod(self.item_shape))

    def read(self, pieces: Pieces, out: npt.NDArray[Any]) -> None:
        """Read the rows of ``pieces`` into ``out``, shape (n_rows, n_features).

        Raises
        ------
        InvalidInput
            A file is missing, truncated, too long, of another shape or dtype, or no array at all.
        """
        if self.one_per_file and self.header.plain:
            self._read_items(pieces, out)
        else:
            start = 0
            for path, first, rows in zip(pieces.path, pieces.first, pieces.rows, strict=True):
                if rows:
                    self._read_rows(path, int(first), out[start : start + int(rows)])
                start += int(rows)

    def _read_items(self, pieces: Pieces, out: npt.NDArray[Any]) -> None:
        """Read one item per file with three system calls each: header, row and end of file in one ``preadv``."""
        expected = self.header.text
        header, beyond = bytearray(self.header.offset), bytearray(1)
        size = self.header.size
        rows = out.data.cast("B") if out.size else memoryview(b"")
        width = out.shape[1] * out.itemsize
        root = self.root.path + "/"
        for number, path in enumerate(pieces.path):
            start = number * width
            try:
                descriptor = os.open(root + path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise InvalidInput(f"{root}{path} cannot be read: {error.strerror}. {_KEPT}") from error
            try:
                count = os.preadv(descriptor, (header, rows[start : start + width], beyond), 0)
            finally:
                os.close(descriptor)
            if count != size or header != expected:
                self._read_rows(path, 0, out[number : number + 1])

    def _read_rows(self, path: str, first: int, out: npt.NDArray[Any]) -> None:
        """Read rows of any file that numpy reads, after checking it against the schema."""
        try:
            header = self._header(path)
        except InvalidInput as error:
            raise InvalidInput(f"{error}. {_KEPT}") from None
        full = os.path.join(self.root.path, path)
        if header.plain:
            with open(full, "rb", buffering=0) as file:
                file.seek(header.offset + first * out.shape[1] * out.itemsize)
                _read_fully(file, out)
        else:
            array = np.load(full, mmap_mode="r", allow_pickle=False)
            items = array[None] if self.one_per_file else array[first : first + len(out)]
            out[:] = items.reshape(len(out), -1)

    def _headers(self, paths: Sequence[str]) -> list[Header]:
        """Return the headers of files, or refuse all unusable ones in one message."""
        headers, problems = [], []
        for path in paths:
            try:
                headers.append(self._header(path))
            except InvalidInput as error:
                problems.append(str(error))
        if problems:
            count = f"{len(problems):,} unusable file{'s' * (len(problems) > 1)}"
            more = f"; and {len(problems) - _NAMED:,} more" if len(problems) > _NAMED else ""
            raise InvalidInput(f"{count}: {'; '.join(problems[:_NAMED])}{more}. {_KEPT}")
        return headers

    def _header(self, path: str) -> Header:
        """Return the header of a file that follows the schema."""
        full = os.path.join(self.root.path, path)
        header = read_header(full)
        shape = header.shape if self.one_per_file else header.shape[1:] or (1,)
        if shape != self.item_shape:
            raise InvalidInput(
                f"{full} has items of shape {shape}, the first file, {self.model}, has {self.item_shape}"
            )
        if header.dtype.newbyteorder("=") != self.dtype:
            raise InvalidInput(f"{full} has dtype {header.dtype}, the first file, {self.model}, has {self.dtype}")
        return header


_KEPT = (
    "Nothing of it was used and rows recorded before are kept; mend or remove the file and run the same command again"
)


def read_header(path: str) -> Header:
    """Read and check the header of one file.

    Raises
    ------
    InvalidInput
        It is not a whole ``.npy`` file of real numbers.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            head = file.read(_HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}") from error
    if not head.startswith(b"\x93NUMPY"):
        what = "is empty" if not size else "is not a .npy file"
        raise InvalidInput(f"{path} {what} (it starts with {head[:8]!r})")
    header = _parse_header(path, head)
    if header.size != size:
        how = "truncated" if size < header.size else "longer than its header says"
        raise InvalidInput(f"{path} is {how}: {size:,} bytes, {header.size:,} expected for shape {header.shape}")
    return header


def _parse_header(path: str, head: bytes) -> Header:
    start = 10 if head[6:7] == b"\x01" else 12
    length = int.from_bytes(head[8:start], "little")
    return (
        _parse_text(path, head[: start + length]) if start + length <= len(head) else _refuse_header(path, "too long")
    )


def _refuse_header(path: str, why: str) -> Header:
    raise InvalidInput(f"{path} has an unusable .npy header ({why})")


@lru_cache(maxsize=64)
def _parse_cached(head: bytes) -> Header:
    stream = io.BytesIO(head)
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    return Header(shape, dtype, fortran, head)


def _parse_text(path: str, head: bytes) -> Header:
    try:
        header = _parse_cached(head)
    except Exception as error:  # NumPy's parser lets several kinds of error through when the text is garbage
        return _refuse_header(path, (str(error).splitlines() or [type(error).__name__])[0])
    if header.dtype.hasobject:
        raise InvalidInput(f"{path} holds pickled Python objects, which are never loaded: they could run code")
    if header.dtype.kind not in "iuf" or header.dtype.itemsize > 8:
        raise InvalidInput(f"{path} has dtype {header.dtype}; float16, float32, float64 and integers are accepted")
    if not header.shape or any(n < 0 for n in header.shape):
        raise InvalidInput(f"{path} has shape {header.shape}, which holds no rows")
    return header


def _local_directory(root: Location) -> str:
    if not root.is_local:
        raise InvalidInput(f"{root} is not a local directory; trees of .npy files are read from a mounted file system")
    if os.path.isfile(root.path):
        raise InvalidInput(
            f"{root} is a file, but a source is a directory of .npy files. Nothing was written; name its directory"
        )
    if not os.path.isdir(root.path):
        raise SourceNotFound(f"there is no directory {root}. Nothing was written; mend the path")
    return root.path


def _walk(root: str, prefix: str = "", above: tuple[str, ...] = ()) -> list[tuple[str, int, int]]:
    """Return relative path, size and modification time of every ``.npy`` file."""
    above = (*above, os.path.realpath(root))
    found = []
    try:
        with os.scandir(root) as entries:
            for entry in entries:
                name = entry.name
                if name[-4:] == ".npy" and name[0] != ".":
                    status = entry.stat()
                    if stat.S_ISREG(status.st_mode):
                        found.append((prefix + name, status.st_size, status.st_mtime_ns))
                elif name[0] != "." and entry.is_dir():
                    _refuse_loop(entry, above)
                    found += _walk(entry.path, f"{prefix}{name}/", above)
    except OSError as error:
        raise InvalidInput(
            f"{error.filename or root} cannot be read: {error.strerror}. Nothing was written; "
            "mend or remove it and run the same command again"
        ) from error
    return found


def _require_text(root: str, paths: Sequence[str]) -> None:
    """Refuse names that are not UTF-8: they become ids."""
    try:
        "\0".join(paths).encode()
    except UnicodeEncodeError as error:
        start = error.object.rfind("\0", 0, error.start) + 1
        name = os.fsencode(os.path.join(root, error.object[start:].split("\0", 1)[0]))
        raise InvalidInput(
            f"the name {name!r} is not UTF-8, so it cannot be an id. Nothing was written; rename it"
        ) from None


def _refuse_loop(entry: "os.DirEntry[str]", above: tuple[str, ...]) -> None:
    if entry.is_symlink() and os.path.realpath(entry.path) in above:
        raise InvalidInput(
            f"{entry.path} is a symbolic link to a directory it lies in, so the tree has no end. "
            "Nothing was written; remove the link"
        )


def _read_fully(file: io.FileIO, out: npt.NDArray[Any]) -> None:
    view = out.data.cast("B")
    while len(view):
        count = file.readinto(view)
        if not count:
            raise InvalidInput(f"{file.name} became shorter while it was read. {_KEPT}")
        view = view[count:]
