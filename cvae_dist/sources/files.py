"""Files of a source: what a listing says of them, and reads that notice when one is no longer what was listed."""

import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cvae_dist.errors import InvalidInput
from cvae_dist.store.storage import Buffer, Changed
from cvae_dist.store.urls import Location

Integers = npt.NDArray[np.int64]
Texts = npt.NDArray[np.object_]

_RANGE = 8_000_000  # bytes of one request: enough to forget its latency, few enough to have several in flight
_THREADS = 8


class BadFile(InvalidInput):
    """A file that cannot be used as it is.

    Attributes
    ----------
    path : str
        Relative to the root of the source.
    code : str
        One word for what is wrong: missing, changed, truncated, header, dtype, shape, values, ...
    detail : str
        The same for a person.
    """

    def __init__(self, path: str, code: str, detail: str) -> None:
        super().__init__(f"{path} {detail}")
        self.path, self.code, self.detail = path, code, detail

    def __reduce__(self) -> tuple[type["BadFile"], tuple[str, str, str]]:
        return BadFile, (self.path, self.code, self.detail)


@dataclass(frozen=True)
class Files:
    """Some files as they were listed.

    Attributes
    ----------
    path : numpy.ndarray of object (str), shape (n,)
        Relative to the root of the source, with slashes.
    size : numpy.ndarray, shape (n,), int64
        Bytes.
    version : numpy.ndarray of object (str), shape (n,)
        Changes with the content: the ETag or generation in an object store, the modification time (ns since 1970)
        on a disk; empty where the storage has none.
    """

    path: Texts
    size: Integers
    version: Texts

    def __len__(self) -> int:
        return len(self.path)

    def __getitem__(self, index: slice | npt.NDArray[np.bool_] | Integers) -> "Files":
        return Files(self.path[index], self.size[index], self.version[index])

    def of(self, root: Location) -> "Iterator[File]":
        """Yield every file by itself."""
        for path, size, version in zip(self.path, self.size.tolist(), self.version, strict=True):
            yield File(root, path, size, version)


@dataclass(frozen=True)
class File:
    """One file as it was listed. Its reads return what was listed, or raise :class:`BadFile`."""

    root: Location
    path: str
    size: int
    version: str

    def __str__(self) -> str:
        return str(self.root / self.path)

    def read(self, start: int = 0, stop: int | None = None) -> Buffer:
        """Return bytes ``start:stop``; to the end by default.

        Raises
        ------
        BadFile
            The file is missing, or another one by now, or shorter than it was said to be.
        """
        stop = self.size if stop is None else min(stop, self.size)
        if self.root.is_local:
            filled = bytearray(max(0, stop - start))
            _fill(self, start, memoryview(filled))
            return filled
        try:
            data = (self.root / self.path).read_as(self.version, start, stop)
        except Changed:
            raise BadFile(self.path, "changed", "was changed after it was listed") from None
        except (FileNotFoundError, NotADirectoryError):
            raise BadFile(self.path, "missing", "was deleted after it was listed") from None
        if len(data) != stop - start:
            raise BadFile(
                self.path,
                "truncated",
                f"gave {len(data):,} bytes where {stop - start:,} were asked for, from {start:,}",
            )
        return data

    def read_into(self, start: int, out: memoryview) -> None:
        """Fill ``out``, a buffer of bytes, from position ``start``; large ones by several requests at a time."""
        size = len(out)
        if self.root.is_local:
            _fill(self, start, out)
            return

        def read(first: int) -> None:
            last = min(first + _RANGE, size)
            out[first:last] = self.read(start + first, start + last)

        if size <= _RANGE:
            read(0)
            return
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(read, range(0, size, _RANGE)))

    def open(self) -> "FileStream":
        """Return a binary stream that can seek, for libraries that read files themselves."""
        return FileStream(self)


class FileStream(io.RawIOBase):
    """A file that was listed, as a stream. Small reads are served from the last block that was fetched."""

    _BLOCK = 1_000_000

    def __init__(self, file: File) -> None:
        self._file, self._position = file, 0
        self._start, self._block = 0, memoryview(b"")

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position in bytes."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, out: "memoryview") -> int:  # type: ignore[override] # the base class says Buffer
        """Read up to ``len(out)`` bytes."""
        view = memoryview(out).cast("B")
        count = max(0, min(len(view), self._file.size - self._position))
        if count >= self._BLOCK:
            self._file.read_into(self._position, view[:count])
        elif count:
            if not self._start <= self._position <= self._position + count <= self._start + len(self._block):
                self._start = self._position
                self._block = memoryview(self._file.read(self._start, self._start + self._BLOCK))
            first = self._position - self._start
            view[:count] = self._block[first : first + count]
        self._position += count
        return count


def local_version(status: os.stat_result) -> str:
    """Return the version of a file on a disk."""
    return str(status.st_mtime_ns)


def _fill(file: File, start: int, out: memoryview) -> None:
    """Read from a local file straight into a buffer."""
    try:
        descriptor = os.open(str(file), os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise BadFile(file.path, "missing", "was deleted after it was listed") from None
    except OSError as error:
        raise BadFile(file.path, "unreadable", f"cannot be read: {error.strerror}") from error
    try:
        while len(out):
            count = os.preadv(descriptor, [out], start)
            if not count:
                raise BadFile(file.path, "truncated", f"became shorter while it was read: it ends at byte {start:,}")
            start, out = start + count, out[count:]
        status = os.fstat(descriptor)
        if (status.st_size, local_version(status)) != (file.size, file.version):
            raise BadFile(file.path, "changed", "was changed after it was listed")
    finally:
        os.close(descriptor)
