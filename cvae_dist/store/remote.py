"""Objects through the file systems of fsspec: whatever obstore does not speak."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

from cvae_dist.errors import StorageFailed
from cvae_dist.store.lineage import digest_bytes
from cvae_dist.store.storage import Buffer, Entry, Storage, clean, client_errors

_MEMORY = threading.Lock()  # the objects of memory:// live in this process
_VERSIONS = ("ETag", "etag", "generation", "mtime", "modified", "last_modified", "LastModified", "updated", "created")


@dataclass(frozen=True, repr=False)
class FsspecFiles(Storage):
    """Any file system of fsspec. It reads and writes, but cannot keep an output exclusive."""

    filesystem: fsspec.AbstractFileSystem

    def url(self, path: str) -> str:
        return clean(str(self.filesystem.unstrip_protocol(path)), {})

    def read(self, path: str, start: int | None = None, stop: int | None = None) -> bytes:
        with self._errors(path):
            data: bytes = self.filesystem.cat_file(path, start=start, end=stop)
        return data

    def read_versioned(self, path: str) -> tuple[bytes, str]:
        data = self.read(path)
        return data, digest_bytes(data)

    def size(self, path: str) -> int | None:
        with contextlib.suppress(FileNotFoundError), self._errors(path):
            found = self.filesystem.info(path)
            return int(found["size"] or 0) if found["type"] == "file" else None
        return None

    def write(self, path: str, buffers: Sequence[Buffer]) -> str:
        data = b"".join(buffers)
        with self._errors(path):
            self.filesystem.pipe_file(path, data)
        return digest_bytes(data)

    def write_if(self, path: str, data: bytes, version: str | None) -> str:
        raise StorageFailed(
            f"{self.url(path)} was not written: this kind of storage cannot write on a condition, so an output cannot "
            "be kept exclusive there. Write to a mounted file system, S3, Google Cloud Storage or Azure"
        )

    def remove(self, path: str, version: str) -> bool:
        return False

    def list(self, path: str) -> Iterator[Entry]:
        with self._errors(path):
            self.filesystem.invalidate_cache()
            found = self.filesystem.find(path, detail=True)
        for name in sorted(found):
            if name.startswith(f"{path}/"):
                version = next((str(found[name][key]) for key in _VERSIONS if found[name].get(key)), "")
                yield Entry(name.removeprefix(f"{path}/"), int(found[name]["size"] or 0), version)

    def exists(self, path: str) -> bool:
        with self._errors(path):
            return bool(self.filesystem.exists(path))

    def delete(self, path: str, keep: str | None = None) -> None:
        with contextlib.suppress(FileNotFoundError), self._errors(path):
            if keep is None:
                self.filesystem.rm(path, recursive=True)
                return
            for found in self.filesystem.ls(path, detail=False):
                if found.rstrip("/").rsplit("/", 1)[-1] != keep:
                    self.filesystem.rm(found, recursive=True)

    def _errors(self, path: str) -> contextlib.AbstractContextManager[None]:
        return client_errors(self.url(path), getattr(self.filesystem, "storage_options", {}))


class MemoryFiles(FsspecFiles):
    """``memory://``: versions are digests of the content, as on a disk."""

    def write_if(self, path: str, data: bytes, version: str | None) -> str:
        with _MEMORY:
            if self._version(path) != version:
                raise FileExistsError(self.url(path))
            return self.write(path, [data])

    def remove(self, path: str, version: str) -> bool:
        with _MEMORY:
            if self._version(path) != version:
                return False
            self.filesystem.rm(path)
            return True

    def list(self, path: str) -> Iterator[Entry]:
        for entry in super().list(path):
            with contextlib.suppress(FileNotFoundError):
                yield entry._replace(version=digest_bytes(self.read(f"{path}/{entry.name}")))

    def _version(self, path: str) -> str | None:
        try:
            return self.read_versioned(path)[1]
        except FileNotFoundError:
            return None


def remote_storage(filesystem: Any) -> Storage:
    """Return the storage that knows this file system best."""
    return MemoryFiles(filesystem) if isinstance(filesystem, MemoryFileSystem) else FsspecFiles(filesystem)
