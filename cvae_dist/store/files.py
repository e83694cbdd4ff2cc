"""Objects as files on a mounted file system: temporary file and rename, and locks where a condition must hold."""

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from cvae_dist.errors import StorageFailed
from cvae_dist.store.lineage import digest_bytes
from cvae_dist.store.storage import Buffer, Entry, Storage

_PARTIAL = ".partial"
_LOCK = ".lock"
_LOCK_SECONDS = 10.0
_HELD = (errno.EAGAIN, errno.EACCES, errno.EINTR)


@dataclass(frozen=True)
class LocalFiles(Storage):
    """A mounted file system.

    Writes are whole or not at all for readers and for a killed writer. With ``fsync`` what was acknowledged survives
    a power loss, too. Versions that conditions compare are digests of the content.
    """

    fsync: bool = False

    def url(self, path: str) -> str:
        return path

    def read(self, path: str, start: int | None = None, stop: int | None = None) -> bytes:
        with open(path, "rb", buffering=0) as file:
            if start is None:
                return file.read()
            if start < 0:
                start = max(0, os.fstat(file.fileno()).st_size + start)
            file.seek(start)
            return file.read() if stop is None else _read_exactly(file.fileno(), stop - start)

    def read_versioned(self, path: str) -> tuple[bytes, str]:
        data = self.read(path)
        return data, digest_bytes(data)

    def size(self, path: str) -> int | None:
        try:
            status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def exists(self, path: str) -> bool:
        return os.path.exists(path)

    def is_blank(self, path: str) -> bool:
        if os.path.isdir(path):
            return all(map(_is_hidden, os.listdir(path)))
        return not os.path.lexists(path)

    def write(self, path: str, buffers: Sequence[Buffer]) -> str:
        return self.write_guarded(path, [buffers], lambda: None)

    def write_guarded(self, path: str, parts: Iterable[Sequence[Buffer]], guard: Callable[[], None]) -> str:
        """Write an object as :meth:`write` does, with ``guard`` called right before it appears."""
        with _storage_errors(path), self._partial_file(path, parts) as temporary:
            guard()
            version = _version(os.stat(temporary))
            self._rename(temporary, path)
        return version

    def write_if(self, path: str, data: bytes, version: str | None) -> str:
        with _storage_errors(path), self._locked(path):
            if self._locked_version(path) != version:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
            with self._partial_file(path, [[data]]) as temporary:
                self._rename(temporary, path)
        return digest_bytes(data)

    def remove(self, path: str, version: str) -> bool:
        with _storage_errors(path), self._locked(path):
            if self._locked_version(path) != version:
                return False
            os.unlink(path)
            self._sync_folder(os.path.dirname(path))
            return True

    def move(self, path: str, target: str) -> None:
        os.stat(path)
        with _storage_errors(target):
            self._make_folder(os.path.dirname(target))
            self._rename(path, target)

    def list(self, path: str) -> Iterator[Entry]:
        pending = _scan(path, "")
        while pending:
            name, entry = pending.pop()
            if entry.is_dir(follow_symlinks=False):
                pending += _scan(entry.path, name)
            elif not _is_hidden(entry.name):
                with contextlib.suppress(FileNotFoundError):  # deleted while the list was made
                    status = entry.stat()
                    if stat.S_ISREG(status.st_mode):
                        yield Entry(name, status.st_size, _version(status))

    def look(self, path: str, prefix: str, names: Sequence[str]) -> dict[str, Entry]:
        found = {}
        for name in names:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                status = os.stat(f"{path}/{name}")
                found[name] = Entry(name, status.st_size, _version(status))
        return found

    def delete(self, path: str, keep: str | None = None) -> None:
        with _storage_errors(path), contextlib.suppress(FileNotFoundError):
            if not os.path.isdir(path) or os.path.islink(path):
                os.unlink(path)
            elif keep is None:
                shutil.rmtree(path)
            else:
                for name in os.listdir(path):
                    if _is_hidden(name):  # a lock may be held
                        _sweep_one(os.path.join(path, name))
                    elif name != keep:
                        self.delete(os.path.join(path, name))

    def sweep(self, path: str, deep: bool = True) -> None:
        """Delete temporary files, and locks that nobody holds, which killed writers left in a folder, or below it."""
        for folder, below, names in os.walk(path):
            for name in filter(_is_hidden, names):
                _sweep_one(os.path.join(folder, name))
            if not deep:
                below.clear()

    def _locked_version(self, path: str) -> str | None:
        try:
            return self.read_versioned(path)[1]
        except FileNotFoundError:
            return None

    def _rename(self, temporary: str, path: str) -> None:
        os.replace(temporary, path)
        self._sync_folder(os.path.dirname(path))

    def _sync_folder(self, folder: str) -> None:
        if self.fsync:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _make_folder(self, folder: str) -> None:
        above = os.path.dirname(folder)
        if not os.path.isdir(above):
            self._make_folder(above)
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder)
            self._sync_folder(above)

    def _open(self, path: str, flags: int) -> int:
        """Open a file that may be new, with the folders above it."""
        flags |= os.O_CREAT | os.O_CLOEXEC
        try:
            return os.open(path, flags, 0o666)
        except FileNotFoundError:
            self._make_folder(os.path.dirname(path))
            return os.open(path, flags, 0o666)

    @contextlib.contextmanager
    def _partial_file(self, path: str, parts: Iterable[Sequence[Buffer]]) -> Iterator[str]:
        """Write a temporary file beside ``path`` and remove it afterwards, unless it was renamed."""
        folder, name = os.path.split(path)
        temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}{_PARTIAL}")
        try:
            descriptor = self._open(temporary, os.O_WRONLY | os.O_EXCL)
            try:
                for part in parts:
                    _write_all(descriptor, part)
                if self.fsync:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
            yield temporary
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)

    @contextlib.contextmanager
    def _locked(self, path: str) -> Iterator[None]:
        """Hold the lock file beside ``path``, which every conditional write of it holds."""
        folder, name = os.path.split(path)
        lock = os.path.join(folder, f".{name}{_LOCK}")
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            descriptor = self._open(lock, os.O_RDWR)
            try:
                if _take(descriptor, lock):
                    try:
                        yield
                    finally:
                        with contextlib.suppress(FileNotFoundError):  # the whole folder was deleted
                            os.unlink(lock)
                    return
            finally:
                os.close(descriptor)
            if time.monotonic() > deadline:
                raise StorageFailed(
                    f"{lock} has been held by another process for {_LOCK_SECONDS:.0f} s, so {path} was not changed; "
                    "stop the process that holds it and run the same command again"
                )
            time.sleep(0.005)


def _is_hidden(name: str) -> bool:
    """Whether a file is no object: temporary, a lock, or what NFS keeps of a file that was deleted while open."""
    return name.startswith(".") and (name.endswith((_PARTIAL, _LOCK)) or name.startswith(".nfs"))


def _scan(folder: str, prefix: str) -> "list[tuple[str, os.DirEntry[str]]]":
    """Return what lies in a folder, last name first. Folders sort as if their names ended in a slash."""
    try:
        with os.scandir(folder) as entries:
            found = [(f"{prefix}/{entry.name}" if prefix else entry.name, entry) for entry in entries]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(found, key=lambda one: one[0] + "/" * one[1].is_dir(follow_symlinks=False), reverse=True)


def _take(descriptor: int, lock: str) -> bool:
    """Lock an open file, and see whether it still has its name: who held it before may have removed it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), os.stat(lock))
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno in _HELD:
            return False
        raise StorageFailed(
            error.errno,
            f"the file system of {lock} has no file locks ({error.strerror}), so nothing there can be kept "
            "exclusive. Nothing was changed; mount it with locks (NFS: without nolock), or write to another one",
        ) from error


def _sweep_one(path: str) -> None:
    """Delete a temporary file, or a lock that nobody holds."""
    with contextlib.suppress(FileNotFoundError):
        if path.endswith(_PARTIAL):
            os.unlink(path)
        elif path.endswith(_LOCK):
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                if _take(descriptor, path):
                    os.unlink(path)
            finally:
                os.close(descriptor)


def _version(status: os.stat_result) -> str:
    return f"{status.st_ino}-{status.st_mtime_ns}-{status.st_size}"


def _read_exactly(descriptor: int, count: int) -> bytes:
    """Read ``count`` bytes, or as many as there are."""
    parts = []
    while count > 0 and (part := os.read(descriptor, count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


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
def _storage_errors(path: str) -> Iterator[None]:
    """Turn what the operating system says into what the user can do."""
    try:
        yield
    except (FileExistsError, StorageFailed):
        raise
    except OSError as error:
        raise StorageFailed(error.errno, _explain(error, path)) from error


def _explain(error: OSError, path: str) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"no room left to write {path} ({error.strerror}). The object was not written and everything "
            "finished before is kept; free some room and run the same command again to go on"
        )
    return (
        f"cannot write {path}: {error.strerror or error}. Everything finished before is kept; "
        "mend the cause and run the same command again to go on"
    )
