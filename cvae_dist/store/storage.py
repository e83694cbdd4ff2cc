"""What every storage can do: the protocol behind a location, and how its errors are told."""

import contextlib
import errno
import itertools
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from cvae_dist.errors import StorageFailed

Buffer = bytes | bytearray | memoryview
StorageOptions = Mapping[str, Any]

_ATTEMPTS = 4  # to write what others write, too
_PAGE = 10_000  # objects
_SHORTEST_SECRET = 6
_HARMLESS = ("endpoint_url", "region", "region_name", "account_name", "project", "default_location", "profile", "host")
_BEYOND = ("416", "InvalidRange", "range is not satisfiable", "non-partial", "larger than")
_USER = re.compile(r"(\w+://)[^\s/@'\"]*:[^\s/@'\"]*@")
_QUERY = re.compile(r"(\w+://[^\s?'\"<>]*)\?[^\s'\"<>]*")


class Changed(FileExistsError):
    """The object is no longer of the version that was to be replaced, or is gone."""


class Entry(NamedTuple):
    """One object below a prefix: its name relative to it, its size in bytes and its version."""

    name: str
    size: int
    version: str


class Page(NamedTuple):
    """Some objects below a prefix: what is an :class:`Entry` for each, as lists."""

    names: list[str]
    sizes: list[int]
    versions: list[str]


class Storage(ABC):
    """Objects by path. Picklable, and equal where the same objects are meant.

    Clients are made once a process, on first use. Every method may be called from several threads. A missing object
    is a ``FileNotFoundError``; what else goes wrong is a ``StorageFailed`` that names the object.
    """

    @abstractmethod
    def url(self, path: str) -> str:
        """Return path or URL of an object, without credentials."""

    @abstractmethod
    def read(self, path: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Return bytes ``start:stop`` of an object, all by default. A negative ``start`` counts from the end."""

    def view(self, path: str, start: int | None = None, stop: int | None = None) -> Buffer:
        """Return the same as :meth:`read`, without a copy where the client has a buffer of its own."""
        return self.read(path, start, stop)

    def fill(self, path: str, start: int, buffers: Sequence[memoryview]) -> tuple[int, str]:
        """Fill buffers, one after the other, with an object from ``start`` on.

        Return how many bytes there were, and the version of the object where the answer names it.
        """
        return scatter([self.view(path, start, start + sum(map(len, buffers)))], buffers), ""

    @abstractmethod
    def read_versioned(self, path: str) -> tuple[bytes, str]:
        """Return an object and its version, from one look."""

    def read_as(self, path: str, version: str, start: int, stop: int) -> Buffer:
        """Return bytes ``start:stop`` of an object that has this version, or raise ``Changed``.

        An empty version is that of a storage that knows none.
        """
        data = self.view(path, start, stop)
        if version and self.version(path) != version:
            raise Changed(errno.EEXIST, f"{self.url(path)} is not of version {version}")
        return data

    def confirms(self, version: str, data: Buffer) -> bool:
        """Whether a whole object of this version may have this content, as far as the version tells."""
        return True

    def version(self, path: str) -> str:
        """Return the version that a listing gives an object; empty where the storage knows none."""
        return next((entry.version for entry in self.list(path)), "")

    @abstractmethod
    def size(self, path: str) -> int | None:
        """Return the size of an object in bytes, None where there is none."""

    def entry(self, path: str) -> Entry | None:
        """Return what a listing says of one object, its whole path as the name; None where there is none."""
        size = self.size(path)
        return None if size is None else Entry(path, size, self.version(path))

    def ends_before(self, path: str, start: int | None, error: Exception) -> bool:
        """Whether a range was refused because the object has no byte there."""
        if start is None or not any(mark in str(error) for mark in _BEYOND):
            return False
        return (self.size(path) or 0) <= max(0, start)

    @abstractmethod
    def write(self, path: str, buffers: Sequence[Buffer]) -> str:
        """Write an object whole or not at all, and return its version."""

    def joined(self, parts: Iterable[Sequence[Buffer]]) -> bytes:
        """Return the parts of an object as one, which may be valid only until this thread joins others."""
        return b"".join(map(b"".join, parts))

    @abstractmethod
    def write_if(self, path: str, data: bytes, version: str | None) -> str:
        """Write an object where it has this version, or where none is (None), or raise ``FileExistsError``."""

    def write_guarded(self, path: str, parts: Iterable[Sequence[Buffer]], guard: Callable[[], None]) -> str:
        """Write an object, and replace another's only as it was before ``guard`` passed; return its version.

        Its parts may be made as they are written: each is used up before the next one is taken.
        A write that is slow, or that the client repeats, is refused where somebody else wrote after ``guard``.
        """
        data, version = self.joined(parts), None
        for attempt in range(_ATTEMPTS):
            try:
                return self.write_if(path, data, version)
            except (FileExistsError, StorageFailed):  # clients do not repeat such a write when its connection breaks
                if attempt == _ATTEMPTS - 1:
                    raise
            try:
                there, version = self.read_versioned(path)
            except FileNotFoundError:
                version = None
            else:
                if there == data:
                    return version
            guard()
        raise AssertionError("the last attempt returns or raises")

    @abstractmethod
    def remove(self, path: str, version: str) -> bool:
        """Delete an object if it has this version; False where it has not, or where the storage cannot do this."""

    @abstractmethod
    def move(self, path: str, target: str) -> None:
        """Give an object another path, over what is there; ``FileNotFoundError`` when it is not there.

        Where that takes a copy, a process that is killed leaves the object at both paths.
        """

    @abstractmethod
    def list(self, path: str) -> Iterator[Entry]:
        """Yield every object below a prefix, in the order of the storage."""

    def pages(self, path: str) -> Iterator[Page]:
        """Yield the same as :meth:`list`, many at a time, as there may be millions."""
        entries = self.list(path)
        while some := list(itertools.islice(entries, _PAGE)):
            yield Page(*map(list, zip(*some, strict=True)))

    @abstractmethod
    def delete(self, path: str, keep: str | None = None) -> None:
        """Delete an object and everything below it, but for one object directly in it."""

    def exists(self, path: str) -> bool:
        """Whether an object or a prefix is here."""
        return self.size(path) is not None or any(True for _ in self.list(path))

    def is_blank(self, path: str) -> bool:
        """Whether nothing is here that a user would miss."""
        return not self.exists(path)

    def look(self, path: str, prefix: str, names: Sequence[str]) -> dict[str, Entry]:
        """Return what lies at names below ``path`` that begin with ``prefix``, without what is missing."""
        wanted = set(names)
        entries = (Entry(f"{prefix}/{name}", size, version) for name, size, version in self.list(f"{path}/{prefix}"))
        return {entry.name: entry for entry in entries if entry.name in wanted}

    def sweep(self, path: str, deep: bool = True) -> None:  # noqa: B027 - only a file system has them
        """Delete what killed writers left below a prefix, or only directly there."""

    def proof(self, path: str) -> tuple[str, ...] | None:
        """Name the server and bucket that must be seen to heed conditions; None where that is certain."""
        return None

    def wrong_version(self, version: str) -> str:
        """Return a version that could be this object's and is not."""
        return "0" * 32


def scatter(parts: Iterable[Buffer], buffers: Sequence[memoryview]) -> int:
    """Fill buffers of bytes, one after the other, with parts of a stream; return how many bytes came."""
    room, done = iter(buffers), 0
    buffer = memoryview(b"")
    for part in parts:
        rest = memoryview(part)
        done += len(rest)
        while len(rest):
            while not len(buffer):
                buffer = next(room)
            count = min(len(rest), len(buffer))
            buffer[:count] = rest[:count]
            rest, buffer = rest[count:], buffer[count:]
    return done


def clean(text: str, options: StorageOptions) -> str:
    """Return ``text`` without passwords, queries of URLs and values of storage options that may be secret."""
    text = text.partition("\n\nDebug source")[0]  # obstore says it all again
    for secret in sorted(_secrets(options), key=len, reverse=True):
        text = text.replace(secret, "***")
    return _QUERY.sub(r"\1?***", clean_url(text))


def clean_url(url: str) -> str:
    """Return a URL without a password, and without a query where it is not part of a name."""
    url = _USER.sub(r"\1***@", url)
    return _QUERY.sub(r"\1?***", url) if url.startswith("http") else url


def unquoted(version: Any) -> str:
    """Return an ETag without its quotes, which some answers of Azure lack."""
    return str(version).strip('"')


def _secrets(options: StorageOptions) -> Iterator[str]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _secrets(value)
        elif isinstance(value, str) and len(value) >= _SHORTEST_SECRET and name not in _HARMLESS:
            yield value


@contextlib.contextmanager
def client_errors(name: str, options: StorageOptions, writes: bool = False) -> Iterator[None]:
    """Turn what an object store's client says, in classes of its own, into one error of ours, without its secrets.

    Where nothing is ``FileNotFoundError`` stays what it is, but for one that ``writes``: there is no such bucket.
    """
    try:
        yield
    except (FileExistsError, StorageFailed):
        raise
    except Exception as error:
        if isinstance(error, FileNotFoundError) and not writes:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name) from None
        said = clean(f"{type(error).__name__}: {error}", options)
        raise StorageFailed(
            f"{name} does not answer as it should: {said}. Everything finished before is "
            "kept; mend the cause (credentials, network, bucket) and run the same command again"
        ) from None
