"""Files of a source: what a listing says of them, and reads that notice when one is no longer what was listed."""

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from cvae_dist.errors import InvalidInput
from cvae_dist.store.columns import Columns, Integers, Texts
from cvae_dist.store.storage import Buffer, Changed, Storage
from cvae_dist.store.urls import Location

__all__ = ["BadFile", "File", "FileStream", "Files", "Integers", "Texts", "local_version"]

_RANGE = 8_000_000  # bytes of one request: enough to forget its latency, few enough to have several in flight
_THREADS = 8
_LARGEST_DIGESTED = 1_000_000  # bytes of a file; larger ones are read in parts, which no ETag tells anything of
_READS = 4  # of a file whose content is not what its ETag says
_digested: dict[Storage, bool] = {}  # whether ETags are digests of the content, as the first object showed


class BadFiles(InvalidInput):
    """Files that cannot be used as they are.

    Attributes
    ----------
    problems : tuple of BadFile
        All of them.
    """

    problems: "tuple[BadFile, ...]"

    def __init__(self, problems: "Iterable[BadFile]") -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(map(str, self.problems)))

    def __reduce__(self) -> tuple[Any, ...]:
        return BadFiles, (self.problems,)


class BadFile(BadFiles):
    """One file that cannot be used as it is.

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
        InvalidInput.__init__(self, f"{path} {detail}")
        self.path, self.code, self.detail = path, code, detail
        self.problems = (self,)

    def __reduce__(self) -> tuple[Any, ...]:
        return BadFile, (self.path, self.code, self.detail)


def require_none(problems: Sequence[BadFile]) -> None:
    """Raise what is wrong with files, if anything is."""
    if problems:
        raise problems[0] if len(problems) == 1 else BadFiles(problems)


@dataclass(frozen=True)
class Files(Columns):
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

    def of(self, root: Location) -> "Iterator[File]":
        """Yield every file by itself."""
        for path, size, version in zip(self.path, self.size.tolist(), self.version, strict=True):
            yield File(root, path, size, version)


@dataclass(frozen=True)
class File:
    """One file as it was listed. Its reads return what was listed, or raise :class:`BadFile`.

    Whatever a network loses is noticed: every answer must have the length that was asked for, and the version that
    was listed. A byte that arrives as another is noticed where the answer is a whole object and its checksum is known:
    that is its ETag in S3 (files of 1 MB at most), and comes with it from Google Cloud Storage. Elsewhere, and for
    parts of large files, the checksums of TLS and TCP are all there is.
    """

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
        if stop - start == self.size <= _LARGEST_DIGESTED:
            return self._read_digested()
        return self._read_remote(start, stop)

    def _read_digested(self) -> Buffer:
        """Read the whole file, again where its content is not what its ETag says.

        What comes twice the same is the content: the ETag of an encrypted object is no digest, and does not say so.
        """
        storage, before = self.root.storage, None
        if not _digested.get(storage, True):
            return self._read_remote(0, self.size)
        for _ in range(_READS):
            data = self._read_remote(0, self.size)
            confirmed = storage.confirms(self.version, data)
            if confirmed or data == before:
                _digested.setdefault(storage, confirmed)
                return data
            before = data
        raise BadFile(self.path, "damaged", f"came otherwise each of {_READS} times it was read")

    def _read_remote(self, start: int, stop: int) -> Buffer:
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
                self._start = max(0, min(self._position, self._file.size - self._BLOCK))  # an end is fetched whole
                self._block = memoryview(self._file.read(self._start, self._start + self._BLOCK))
            first = self._position - self._start
            view[:count] = self._block[first : first + count]
        self._position += count
        return count


def file_name(url: str, path: str) -> str:
    """Return path or URL of a file of the source at ``url``, which may be that file."""
    return url if url.endswith(f"/{path}") else f"{url}/{path}"


def local_version(status: os.stat_result) -> str:
    """Return the version of a file on a disk."""
    return str(status.st_mtime_ns)


def _fill(file: File, start: int, out: memoryview) -> None:
    """Read from a local file straight into a buffer."""
    try:
        descriptor = os.open(str(file), os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(str(file)):
            target = os.readlink(str(file))
            raise BadFile(file.path, "link", f"is a symbolic link to {target}, which is not there") from None
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
