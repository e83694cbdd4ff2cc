"""Trees of ``.npy`` files, and single ones: one item per file, or many rows per file."""

import io
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cvae_dist.errors import InvalidInput, SourceNotFound
from cvae_dist.sources.convert import how_to_convert
from cvae_dist.sources.npy_header import Header, read_header
from cvae_dist.sources.pieces import Integers, Pieces
from cvae_dist.sources.source import Listing, RowsPerFile, Schema
from cvae_dist.store import Location

_MOST_ROW_BYTES = 1_000_000_000
_NAMED = 5  # bad files named in one message


@dataclass(frozen=True)
class NpyTree:
    """A directory tree of ``.npy`` files of one item shape and dtype, or one such file.

    Attributes
    ----------
    root : Location
        A local directory, which is walked recursively, hidden names left out; or a file.
    rows_per_file : {"auto", "one", "many"}
        ``one``: each file is one item of any shape. ``many``: the first axis of each file counts items.
        ``auto``: a file with one axis is one vector, others hold many.
    """

    root: Location
    rows_per_file: RowsPerFile

    @property
    def url(self) -> str:
        """Path of the directory or file."""
        return str(self.root)

    def list(self) -> Listing:
        """List the files: names, sizes and headers; no rows are read.

        Raises
        ------
        SourceNotFound
            No such directory or file, or no ``.npy`` file in it.
        InvalidInput
            A file that is no array of numbers, is truncated, or differs from the first in shape or dtype; or the data
            are of another format.
        """
        directory, found = _found(self.root)
        paths, sizes, times = (list(column) for column in zip(*found, strict=True))
        files = self._files(directory, paths[0])
        _require_text(directory, paths)
        if files.schema.one_per_file:
            expected = files.model.size
            files.headers([path for path, size in zip(paths, sizes, strict=True) if size != expected])
            rows = np.ones(len(paths), dtype=np.int64)
        else:
            rows = np.array([header.shape[0] for header in files.headers(paths)], dtype=np.int64)
        starts = np.zeros(len(paths), dtype=np.int64)
        names = np.array(paths, dtype=object)
        pieces = Pieces(names, starts, rows, np.array(sizes, dtype=np.int64), np.array(times, dtype=np.int64))
        return Listing(files.schema, pieces, files.read, self._note(files, rows))

    def _files(self, directory: str, first: str) -> "NpyFiles":
        """Return what reads the files, all of which have to be like the first one."""
        try:
            header = read_header(os.path.join(directory, first))
        except InvalidInput as error:
            raise InvalidInput(f"{error}. {_KEPT}") from None
        one = self.rows_per_file == "one" or (self.rows_per_file == "auto" and len(header.shape) == 1)
        item_shape = header.shape if one else header.shape[1:] or (1,)
        if 0 in item_shape:
            raise InvalidInput(
                f"{directory}/{first} has shape {header.shape}: items without values cannot be used. {_KEPT}"
            )
        schema = Schema(item_shape, header.dtype.newbyteorder("="), one)
        if schema.row_bytes > _MOST_ROW_BYTES:
            raise InvalidInput(
                f"{directory}/{first} has items of shape {item_shape}, {schema.row_bytes:,} bytes each. A row has "
                f"{_MOST_ROW_BYTES:,} bytes at most. {_KEPT}"
            )
        return NpyFiles(directory, schema, header, first)

    def _note(self, files: "NpyFiles", rows: Integers) -> str:
        """Say what the shapes were taken to mean: a tree of images looks like a tree of matrices."""
        guessed = self.rows_per_file == "auto" and not files.schema.one_per_file and len(rows) > 1
        if not guessed or (rows != rows[0]).any():
            return ""
        return (
            f"each of {len(rows):,} files of shape {files.model.shape} is read as {int(rows[0]):,} rows; "
            "if each is one item, say --rows-per-file one --overwrite"
        )


@dataclass(frozen=True)
class NpyFiles:
    """Reads files that were listed; small, as it travels with every task.

    Attributes
    ----------
    root : str
        The directory.
    schema : Schema
    model : Header
        That of the first file, which every other has to follow.
    first : str
        Path of that file, relative to the root.
    """

    root: str
    schema: Schema
    model: Header
    first: str

    def read(self, pieces: Pieces, out: npt.NDArray[Any]) -> None:
        """Read the rows of ``pieces`` into ``out``, shape (n_rows, n_features).

        Raises
        ------
        InvalidInput
            A file is missing, truncated, too long, of another shape or dtype, or no array at all.
        """
        if self.schema.one_per_file and self.model.plain:
            self._read_items(pieces, out)
        else:
            start = 0
            for path, first, rows in zip(pieces.path, pieces.first, pieces.rows, strict=True):
                if rows:
                    self._read_rows(path, int(first), out[start : start + int(rows)])
                start += int(rows)

    def _read_items(self, pieces: Pieces, out: npt.NDArray[Any]) -> None:
        """Read one item per file with three system calls each: header, row and end of file in one ``preadv``."""
        expected, size = self.model.text, self.model.size
        header, beyond = bytearray(self.model.offset), bytearray(1)
        rows = out.data.cast("B") if out.size else memoryview(b"")
        width = out.shape[1] * out.itemsize
        root = self.root + "/"
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
        full = os.path.join(self.root, path)
        if header.plain:
            with open(full, "rb", buffering=0) as file:
                file.seek(header.offset + first * out.shape[1] * out.itemsize)
                _read_fully(file, out)
        else:
            array = np.load(full, mmap_mode="r", allow_pickle=False)
            items = array[None] if self.schema.one_per_file else array[first : first + len(out)]
            out[:] = items.reshape(len(out), -1)

    def headers(self, paths: Sequence[str]) -> list[Header]:
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
        full = os.path.join(self.root, path)
        header, schema = read_header(full), self.schema
        shape = header.shape if schema.one_per_file else header.shape[1:] or (1,)
        if shape != schema.item_shape:
            raise InvalidInput(
                f"{full} has items of shape {shape}, the first file, {self.first}, has {schema.item_shape}"
            )
        if header.dtype.newbyteorder("=") != schema.dtype:
            raise InvalidInput(f"{full} has dtype {header.dtype}, the first file, {self.first}, has {schema.dtype}")
        return header


_KEPT = (
    "Nothing of it was used and rows recorded before are kept; mend or remove the file and run the same command again"
)


def _found(root: Location) -> tuple[str, list[tuple[str, int, int]]]:
    """Return a directory, and path, size and modification time of every ``.npy`` file below it that ``root`` means."""
    if not root.is_local:
        raise InvalidInput(f"{root} is not a local directory; trees of .npy files are read from a mounted file system")
    if os.path.isdir(root.path):
        found = sorted(_walk(root.path))
        if not found:
            raise SourceNotFound(
                f"there is no .npy file below {root}. Nothing was written; {how_to_convert(root.path)}"
            )
        return root.path, found
    if not os.path.isfile(root.path):
        raise SourceNotFound(f"there is no directory or file {root}. Nothing was written; mend the path")
    if not root.path.lower().endswith(".npy"):
        raise InvalidInput(f"{root} is no .npy file. Nothing was written; {how_to_convert(root.path)}")
    directory, name = os.path.split(root.path)
    status = os.stat(root.path)
    return directory, [(name, status.st_size, status.st_mtime_ns)]


def _walk(root: str) -> list[tuple[str, int, int]]:
    """Return relative path, size and modification time of every ``.npy`` file."""
    found = []
    pending = [(root, "", _Way(os.path.realpath(root)))]
    while pending:
        folder, prefix, way = pending.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = entry.name
                    if name[0] == ".":
                        continue
                    if entry.is_dir():
                        pending.append((entry.path, f"{prefix}{name}/", way.through(entry, folder)))
                    elif name[-4:].lower() == ".npy":
                        status = entry.stat()
                        if stat.S_ISREG(status.st_mode):
                            found.append((prefix + name, status.st_size, status.st_mtime_ns))
        except OSError as error:
            raise InvalidInput(
                f"{error.filename or folder} cannot be read: {error.strerror}. Nothing was written; "
                "mend or remove it and run the same command again"
            ) from error
    return found


@dataclass(frozen=True)
class _Way:
    """How a folder was reached: where the last link led, and from where to where it went between those before."""

    start: str
    before: tuple[tuple[str, str], ...] = ()

    def through(self, entry: "os.DirEntry[str]", folder: str) -> "_Way":
        """Return the way on, which is the same one unless the entry of a folder is a link."""
        if not entry.is_symlink():
            return self
        target = os.path.realpath(entry.path)
        parts = (*self.before, (self.start, os.path.realpath(folder)))
        if any(f"{target}/".startswith(f"{start}/") and f"{end}/".startswith(f"{target}/") for start, end in parts):
            raise InvalidInput(
                f"{entry.path} is a symbolic link to a directory it lies in, so the tree has no end. "
                "Nothing was written; remove the link"
            )
        return _Way(target, parts)


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


def _read_fully(file: io.FileIO, out: npt.NDArray[Any]) -> None:
    view = out.data.cast("B")
    while len(view):
        count = file.readinto(view)
        if not count:
            raise InvalidInput(f"{file.name} became shorter while it was read. {_KEPT}")
        view = view[count:]
