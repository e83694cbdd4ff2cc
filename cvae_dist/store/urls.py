"""Where objects live: a path or an fsspec URL, with the three writes the store protocol needs."""

import contextlib
import errno
import itertools
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from cvae_dist.errors import InvalidInput, MissingExtra, StorageFailed

Buffer = bytes | bytearray | memoryview
StorageOptions = Mapping[str, Any]
_PARTIAL = ".partial"
_MOST_FOLDERS = 100  # that are looked into to say what a place holds
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "abfs": "azure", "abfss": "azure", "az": "azure"}


@dataclass(frozen=True)
class Location:
    """A place in some file system: a file, an object, or the prefix of several.

    Writes are atomic for readers and for a killed writer: an object is there whole or not at all. Locally that is a
    temporary file and a rename (safe against process death, not against power loss); object stores do it by nature.
    """

    filesystem: fsspec.AbstractFileSystem
    path: str

    @classmethod
    def of(cls, url: "str | os.PathLike[str] | Location", storage_options: StorageOptions | None = None) -> "Location":
        """Resolve a path, ``~`` path or fsspec URL such as ``s3://bucket/prefix``.

        Raises
        ------
        InvalidInput
            The URL has no protocol that fsspec knows, or options that it does not take.
        MissingExtra
            The package behind the protocol is not installed.
        """
        if isinstance(url, Location):
            return url
        text = os.fspath(url)
        protocol = text.partition("://")[0]
        try:
            filesystem, path = fsspec.core.url_to_fs(text, **(storage_options or {}))
        except (ImportError, ValueError, TypeError) as error:
            extra = _EXTRAS.get(protocol)
            # of some protocols, such as abfss, fsspec hears only from the package that is missing
            if isinstance(error, ImportError) or (extra and protocol not in fsspec.available_protocols()):
                remedy = f"pip install 'cvae-dist[{extra}]'" if extra else f"install what fsspec names: {error}"
                raise MissingExtra(f"{text} needs a package that is not installed; {remedy}") from error
            raise InvalidInput(f"{text} cannot be opened ({error}). Mend the URL or the storage options") from error
        return cls(filesystem, path.rstrip("/") or path)

    def __truediv__(self, name: str) -> "Location":
        return Location(self.filesystem, f"{self.path}/{name}")

    def __str__(self) -> str:
        return self.path if self.is_local else str(self.filesystem.unstrip_protocol(self.path))

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.rsplit("/", 1)[-1]

    @property
    def is_local(self) -> bool:
        """Whether the place is on a mounted file system."""
        return isinstance(self.filesystem, LocalFileSystem)

    def lies_in(self, other: "Location") -> bool:
        """Whether this place is ``other`` or below it."""
        same = type(self.filesystem) is type(other.filesystem)
        return same and f"{self.path}/".startswith(f"{other.path}/")

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
        return Location(self.filesystem, self.path + suffix)

    def read(self) -> bytes:
        """Return the whole object; ``FileNotFoundError`` when it is not there."""
        if self.is_local:
            with open(self.path, "rb", buffering=0) as file:
                return file.read()
        with _client_errors(self):
            data: bytes = self.filesystem.cat_file(self.path)
        return data

    def size(self) -> int:
        """Return the size of the object in bytes, 0 when it is not there."""
        try:
            if self.is_local:
                return os.path.getsize(self.path)
            with _client_errors(self):
                return int(self.filesystem.size(self.path) or 0)
        except FileNotFoundError:
            return 0

    def exists(self) -> bool:
        """Whether an object or a prefix is here."""
        if self.is_local:
            return os.path.exists(self.path)
        with _client_errors(self):
            return bool(self.filesystem.exists(self.path))

    def is_file(self) -> bool:
        """Whether a file or an object, and not a prefix, is here."""
        with _client_errors(self):
            return bool(self.filesystem.isfile(self.path))

    def holds(self, suffix: str) -> bool:
        """Whether a file whose name ends in ``suffix`` is here, in this folder or one below it."""
        with _client_errors(self):
            folders = itertools.islice(self.filesystem.walk(self.path), _MOST_FOLDERS)
            return any(name.endswith(suffix) for _, _, names in folders for name in names)

    def is_blank(self) -> bool:
        """Whether nothing is here. Empty directories count as nothing, and so do temporary files of killed writers."""
        if self.is_local and os.path.isdir(self.path):
            return all(name.endswith(_PARTIAL) for name in os.listdir(self.path))
        return not self.exists()

    def write(self, *buffers: Buffer) -> None:
        """Write the object atomically, replacing an older one.

        Raises
        ------
        StorageFailed
            The storage refused; nothing was changed.
        """
        if self.is_local:
            with _storage_errors(self), _partial_file(self.path, buffers) as temporary:
                os.replace(temporary, self.path)
                return
        with _client_errors(self):
            self.filesystem.pipe_file(self.path, b"".join(buffers))

    def create(self, data: bytes) -> None:
        """Write the object only if it does not exist; ``FileExistsError`` otherwise."""
        if self.is_local:
            with _storage_errors(self), _partial_file(self.path, [data]) as temporary:
                _link(temporary, self.path, data)
        else:
            with _client_errors(self):
                self.filesystem.pipe_file(self.path, data, mode="create")

    def delete(self) -> None:
        """Delete the object or the whole prefix; nothing happens when it is not there."""
        with contextlib.suppress(FileNotFoundError):
            if not self.is_local:
                self.filesystem.rm(self.path, recursive=True)
            elif os.path.isdir(self.path):
                shutil.rmtree(self.path)
            else:
                os.unlink(self.path)

    def clear(self, keep: str) -> None:
        """Delete everything below this prefix but the object of that name directly in it."""
        if self.is_local:
            names = os.listdir(self.path)
        else:
            names = [entry.rstrip("/").rsplit("/", 1)[-1] for entry in self.filesystem.ls(self.path, detail=False)]
        for name in names:
            if name != keep:
                (self / name).delete()

    def sweep_partial(self) -> None:
        """Delete temporary files that killed writers left below this prefix."""
        if not self.is_local:
            return
        for folder, _, names in os.walk(self.path):
            for name in names:
                if name.endswith(_PARTIAL):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(os.path.join(folder, name))


@contextlib.contextmanager
def _partial_file(path: str, buffers: Sequence[Buffer]) -> Iterator[str]:
    """Write a temporary file beside ``path`` and remove it afterwards, unless it was renamed."""
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}{_PARTIAL}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        try:
            descriptor = os.open(temporary, flags, 0o666)
        except FileNotFoundError:
            os.makedirs(folder, exist_ok=True)
            descriptor = os.open(temporary, flags, 0o666)
        try:
            _write_all(descriptor, buffers)
        finally:
            os.close(descriptor)
        yield temporary
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _link(temporary: str, path: str, data: bytes) -> None:
    """Give a whole file its name, unless that is taken. Where there are no hard links, create it under its name."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        with open(path, "xb") as file:
            file.write(data)


def _write_all(descriptor: int, buffers: Sequence[Buffer]) -> None:
    """Write every byte of every buffer; ``writev`` may stop short and takes a bounded number of buffers."""
    pending = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
    limit = os.sysconf("SC_IOV_MAX")
    while pending:
        written = os.writev(descriptor, pending[:limit])
        while pending and written >= len(pending[0]):
            written -= len(pending.pop(0))
        if written:
            pending[0] = pending[0][written:]


@contextlib.contextmanager
def _client_errors(location: Location) -> Iterator[None]:
    """Turn what an object store's client says, in classes of its own, into one error of ours."""
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except Exception as error:
        raise StorageFailed(
            f"{location} does not answer as it should: {type(error).__name__}: {error}. Everything finished before is "
            "kept; mend the cause (credentials, network, bucket) and run the same command again"
        ) from error


@contextlib.contextmanager
def _storage_errors(location: Location) -> Iterator[None]:
    """Turn what the operating system says into what the user can do."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        raise StorageFailed(error.errno, _explain(error, location)) from error


def _explain(error: OSError, location: Location) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"no room left to write {location} ({error.strerror}). The object was not written and everything "
            "finished before is kept; free some room and run the same command again to go on"
        )
    return (
        f"cannot write {location}: {error.strerror or error}. Everything finished before is kept; "
        "mend the cause and run the same command again to go on"
    )
