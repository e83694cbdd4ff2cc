"""Where objects live: a path or a URL, with the reads and writes that the store protocol needs."""

import contextlib
import errno
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from cvae_dist.errors import InvalidInput, StorageFailed
from cvae_dist.store.files import LocalFiles
from cvae_dist.store.opening import open_storage
from cvae_dist.store.storage import Buffer, Changed, Entry, Storage, StorageOptions

__all__ = ["Buffer", "Changed", "Entry", "Location", "StorageOptions"]

Input = TypeVar("Input")
Result = TypeVar("Result")

_MOST_NAMES = 10_000  # that are looked at to say what a place holds
_PAUSES = (0.2, 0.5, 1.0, 3.0)  # seconds before a conditional write is tried again
_QUICK = 10.0  # seconds: what failed later had been tried for long enough
_THREADS = 32  # requests in flight of one caller who reads many ranges
_PROVED: set[tuple[str, ...]] = set()  # stores that this process saw refuse a wrong condition


@dataclass(frozen=True, repr=False)
class Location:
    """A place in some storage: a file, an object, or the prefix of several.

    Writes are atomic for readers and for a killed writer: an object is there whole or not at all. Locally that is a
    temporary file and a rename, which survive a power loss only with ``fsync``; object stores do it by nature.
    Every version is a string that changes with the object. Its text never contains credentials.
    """

    storage: Storage
    path: str

    @classmethod
    def of(
        cls,
        url: "str | os.PathLike[str] | Location",
        storage_options: StorageOptions | None = None,
        fsync: bool = False,
    ) -> "Location":
        """Resolve a path, ``~`` path or URL such as ``s3://bucket/prefix``.

        ``fsync`` makes local writes survive a power loss: the file and its folder are on the disk when they return.

        Raises
        ------
        InvalidInput
            The URL has no protocol that is known, or options that it does not take.
        MissingExtra
            The package behind the protocol is not installed.
        """
        if not isinstance(url, Location):
            storage, path = open_storage(os.fspath(url), storage_options or {})
            url = cls(storage, path.rstrip("/") or path)
        return cls(LocalFiles(fsync=True), url.path) if fsync and url.is_local else url

    def __truediv__(self, name: str) -> "Location":
        return Location(self.storage, f"{self.path}/{name}" if self.path else name)

    def __str__(self) -> str:
        return self.storage.url(self.path)

    def __repr__(self) -> str:
        return f"Location({str(self)!r})"

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.rsplit("/", 1)[-1]

    @property
    def is_local(self) -> bool:
        """Whether the place is on a mounted file system."""
        return isinstance(self.storage, LocalFiles)

    def lies_in(self, other: "Location") -> bool:
        """Whether this place is ``other`` or below it."""
        return f"{self}/".startswith(f"{other}/")

    def require_apart(self, *others: "Location") -> None:
        """Refuse to write here when one of ``others``, which are read, lies in this place or this place in it.

        Raises
        ------
        InvalidInput
            They are not apart: writing, and ``--overwrite`` above all, would destroy what is read.
        """
        for other in others:
            if self.lies_in(other) or other.lies_in(self):
                raise InvalidInput(
                    f"the output {self} and the input {other} lie in one another. Nothing was changed; "
                    "name an output of its own"
                )

    def beside(self, suffix: str) -> "Location":
        """Return the sibling whose name is this one's with ``suffix`` appended."""
        return Location(self.storage, self.path + suffix)

    def read(self) -> bytes:
        """Return the whole object; ``FileNotFoundError`` when it is not there."""
        return self.storage.read(self.path)

    def read_versioned(self) -> tuple[bytes, str]:
        """Return the object and its version, from one look; ``FileNotFoundError`` when it is not there."""
        return self.storage.read_versioned(self.path)

    def read_range(self, start: int, stop: int) -> bytes:
        """Return bytes ``start:stop``, fewer where the object ends before."""
        return self.storage.read(self.path, start, stop)

    def read_as(self, version: str, start: int, stop: int) -> Buffer:
        """Return bytes ``start:stop``, fewer where the object ends before, of an object that has a listed version.

        Raises
        ------
        Changed
            It has another one by now.
        """
        return self.storage.read_as(self.path, version, start, stop)

    def read_tail(self, count: int) -> bytes:
        """Return the last ``count`` bytes, fewer where the object is smaller."""
        return self.storage.read(self.path, -count)

    @staticmethod
    def read_many(ranges: Sequence[tuple["Location", int, int | None]]) -> "Sequence[Buffer]":
        """Return many ranges of many objects, (object, start, stop) each, with many requests in flight.

        With a negative start and None as stop these are the last bytes of the object. A missing object is a
        ``FileNotFoundError`` whose ``filename`` is its URL.
        """
        return _at_once(_read_one, ranges)

    @staticmethod
    def fill_many(ranges: Sequence[tuple["Location", int, Sequence[memoryview]]]) -> "list[tuple[int, str]]":
        """Fill memory with ranges of many objects, (object, start, buffers) each, with many requests in flight.

        The buffers of one range are filled one after the other. Returned is for each range how many bytes came, fewer
        than asked for where the object ends before, and the object's version, empty where the answer does not name it.
        For a missing object see :meth:`read_many`.
        """
        return _at_once(_fill_one, ranges)

    def size(self) -> int:
        """Return the size of the object in bytes, 0 when it is not there."""
        return self.storage.size(self.path) or 0

    def exists(self) -> bool:
        """Whether an object or a prefix is here."""
        return self.storage.exists(self.path)

    def is_file(self) -> bool:
        """Whether a file or an object, and not a prefix, is here."""
        return self.storage.size(self.path) is not None

    def holds(self, suffix: str) -> bool:
        """Whether a file whose name ends in ``suffix`` is here, in this folder or one below it."""
        return any(entry.name.endswith(suffix) for entry in itertools.islice(self.storage.list(self.path), _MOST_NAMES))

    def is_blank(self) -> bool:
        """Whether nothing is here. Empty directories count as nothing, and so does what killed writers left."""
        return self.storage.is_blank(self.path)

    def list(self) -> Iterator[Entry]:
        """Yield every object below this prefix, sorted by name. Object stores are asked once per 1,000 objects."""
        entries = self.storage.list(self.path)
        return entries if self.is_local else iter(sorted(entries))  # SeaweedFS has an order of its own

    def look(self, prefix: str, names: Sequence[str]) -> "dict[str, Entry]":
        """Return what lies at names below this one, all of which begin with ``prefix``; what is missing is left out.

        Object stores are asked once per 1,000 objects below the prefix.
        """
        return self.storage.look(self.path, prefix, names)

    def write(self, *buffers: Buffer) -> str:
        """Write the object atomically, replacing an older one, and return its version.

        Raises
        ------
        StorageFailed
            The storage refused; nothing was changed.
        """
        return self.storage.write(self.path, buffers)

    def write_guarded(self, *buffers: Buffer, guard: Callable[[], None]) -> str:
        """Like :meth:`write`, but never over what somebody else wrote after ``guard`` passed, however long it takes.

        ``guard`` raises where this caller may not write any more. On a mounted file system it is called right before
        the file appears.

        Raises
        ------
        StorageFailed, Changed
            The storage refused; others write the same object all the time.
        """
        return self.write_made([buffers], guard)

    def write_made(self, parts: Iterable[Sequence[Buffer]], guard: Callable[[], None]) -> str:
        """Do the same with parts that are made as they are written: each is used up before the next one is taken.

        What their maker raises is raised here, and then nothing is written.
        """
        return self.storage.write_guarded(self.path, parts, guard)

    def create(self, data: bytes) -> str:
        """Write the object only if it does not exist, and return its version; ``FileExistsError`` otherwise.

        ``data`` must be the caller's own, such as by a random token: where the same bytes are found, they are taken
        for those of a write whose acknowledgement was lost.
        """
        return self._write_if(data, None)

    def replace(self, data: bytes, version: str) -> str:
        """Write the object only if it still has this version, and return the new one; ``Changed`` otherwise.

        For ``data`` see :meth:`create`.
        """
        return self._write_if(data, version)

    def _write_if(self, data: bytes, version: str | None) -> str:
        try:
            return self._write_if_again(data, version)
        except FileExistsError:
            if self.storage.proof(self.path) is not None:
                with contextlib.suppress(FileNotFoundError):
                    there, found = self.read_versioned()
                    if there == data:
                        return found
            refusal = FileExistsError if version is None else Changed
            how = "is there already" if version is None else "was changed or deleted by another"
            raise refusal(errno.EEXIST, f"{self} {how}; nothing was written") from None

    def _write_if_again(self, data: bytes, version: str | None) -> str:
        """Write on a condition, again where a connection broke: clients leave that to us, as it may have arrived."""
        for pause in _PAUSES if not self.is_local else ():
            began = time.monotonic()
            try:
                return self.storage.write_if(self.path, data, version)
            except StorageFailed:
                if time.monotonic() - began > _QUICK:
                    raise
                time.sleep(pause)
        return self.storage.write_if(self.path, data, version)

    def move(self, target: "Location") -> None:
        """Give the object another place in the same storage, over what is there.

        Raises
        ------
        FileNotFoundError
            It is not there.
        """
        self.storage.move(self.path, target.path)

    def remove(self, version: str) -> bool:
        """Delete the object only if it still has this version.

        Returns False, and changes nothing, where it has another or where the storage cannot do this.
        """
        return self.storage.remove(self.path, version)

    def require_conditional_writes(self, version: str) -> None:
        """Prove, once a process, that the storage heeds conditions, on this object of the caller's own.

        Raises
        ------
        StorageFailed
            It wrote, or would have written, what it had to refuse.
        """
        proof = self.storage.proof(self.path)
        if proof is None or proof in _PROVED:
            return
        data = self.read()
        for wrong in (None, self.storage.wrong_version(version)):
            try:
                self._write_if_again(data, wrong)
            except FileExistsError:
                continue
            raise StorageFailed(
                f"{self} was written although it was there, or had changed: this storage ignores the conditions of a "
                "write (If-None-Match, If-Match), so two drivers could write one output. Update the server or its "
                "client, or write to another store"
            )
        _PROVED.add(proof)

    def delete(self) -> None:
        """Delete the object or the whole prefix; nothing happens when it is not there."""
        self.storage.delete(self.path)

    def clear(self, keep: str) -> None:
        """Delete everything below this prefix but the object of that name directly in it."""
        self.storage.delete(self.path, keep)

    def sweep_partial(self, deep: bool = True) -> None:
        """Delete temporary files that killed writers left below this prefix, or only directly in it."""
        self.storage.sweep(self.path, deep)


def _read_one(one: tuple[Location, int, int | None]) -> Buffer:
    location, start, stop = one
    return location.storage.view(location.path, start, stop)


def _fill_one(one: tuple[Location, int, Sequence[memoryview]]) -> tuple[int, str]:
    location, start, buffers = one
    return location.storage.fill(location.path, start, buffers)


def _at_once(function: Callable[[Input], Result], inputs: Sequence[Input]) -> list[Result]:
    if len(inputs) < 2:
        return [function(one) for one in inputs]
    with ThreadPoolExecutor(min(_THREADS, len(inputs))) as pool:
        return list(pool.map(function, inputs))
