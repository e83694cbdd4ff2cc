"""Objects through the file systems of fsspec: whatever obstore does not speak."""

import contextlib
import errno
import json
import threading
import uuid
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import fsspec
from fsspec.asyn import sync

from cvae_dist.errors import StorageFailed
from cvae_dist.store.lineage import digest_bytes
from cvae_dist.store.storage import Buffer, Changed, Entry, Storage, clean_url, client_errors, unquoted

_MEMORY = threading.Lock()  # the objects of memory:// live in this process
_CONFLICT = (409, 412)
_AT_ONCE = 1000  # objects that S3 deletes by one request
_THREADS = 32
_VERSIONS = ("generation", "ETag", "etag", "mtime", "modified", "last_modified", "LastModified", "updated", "created")


@dataclass(frozen=True, repr=False)
class FsspecFiles(Storage):
    """Any file system of fsspec. It reads and writes, but cannot keep an output exclusive."""

    filesystem: fsspec.AbstractFileSystem

    def url(self, path: str) -> str:
        return clean_url(str(self.filesystem.unstrip_protocol(path)))

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

    def version(self, path: str) -> str:
        with self._errors(path):
            return _version(self.filesystem.info(path))

    def write(self, path: str, buffers: Sequence[Buffer]) -> str:
        data = b"".join(buffers)
        with self._errors(path, writes=True):
            self.filesystem.pipe_file(path, data)
        return digest_bytes(data)

    def write_if(self, path: str, data: bytes, version: str | None) -> str:
        raise StorageFailed(
            f"{self.url(path)} was not written: this kind of storage cannot write on a condition, so an output cannot "
            "be kept exclusive there. Write to a mounted file system, S3, Google Cloud Storage or Azure"
        )

    def remove(self, path: str, version: str) -> bool:
        return False

    def move(self, path: str, target: str) -> None:
        with self._errors(path):
            self.filesystem.cp_file(path, target)
            self.filesystem.rm_file(path)

    def list(self, path: str) -> Iterator[Entry]:
        found: dict[str, Any] = {}
        with contextlib.suppress(FileNotFoundError), self._errors(path):
            found = self.filesystem.find(path, detail=True)
        for name in found:
            if name.startswith(f"{path}/"):
                yield Entry(name.removeprefix(f"{path}/"), int(found[name]["size"] or 0), _version(found[name]))

    def exists(self, path: str) -> bool:
        with self._errors(path):
            return bool(self.filesystem.exists(path))

    def delete(self, path: str, keep: str | None = None) -> None:
        spared = () if keep is None else (path, f"{path}/{keep}")
        with contextlib.suppress(FileNotFoundError), self._errors(path):
            found = self.filesystem.find(path, withdirs=True, detail=True)  # `rm` would take names for patterns
            for name in sorted({*found} - {*spared}, reverse=True):
                with contextlib.suppress(FileNotFoundError):
                    is_folder = found[name]["type"] == "directory"
                    (self.filesystem.rmdir if is_folder else self.filesystem.rm_file)(name)

    def _errors(self, path: str, writes: bool = False) -> contextlib.AbstractContextManager[None]:
        self.filesystem.invalidate_cache()
        return client_errors(self.url(path), self.filesystem.storage_options, writes)


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

    def version(self, path: str) -> str:
        return self._version(path) or ""

    def _version(self, path: str) -> str | None:
        try:
            return self.read_versioned(path)[1]
        except FileNotFoundError:
            return None


class _Conditional(FsspecFiles):
    """A store whose server compares versions when it is asked to."""

    def read(self, path: str, start: int | None = None, stop: int | None = None) -> bytes:
        if start is not None and start == stop:
            return b""
        with self._errors(path):
            try:
                return self._get(path, {} if start is None else {"Range": _http_range(start, stop)})[0]
            except Exception as error:
                if self.ends_before(path, start, error):
                    return b""
                raise

    def read_versioned(self, path: str) -> tuple[bytes, str]:
        with self._errors(path):
            return self._get(path, {})

    def read_as(self, path: str, version: str, start: int, stop: int) -> Buffer:
        if start == stop:
            return b""
        with self._errors(path):
            data, found = self._get(path, {"Range": _http_range(start, stop)})
        if version and found != version:
            raise Changed(errno.EEXIST, f"{self.url(path)} is not of version {version}")
        return data

    def write(self, path: str, buffers: Sequence[Buffer]) -> str:
        with self._errors(path, writes=True):
            return self._put(path, b"".join(buffers), {})

    def write_if(self, path: str, data: bytes, version: str | None) -> str:
        with self._errors(path, writes=True):
            try:
                return self._put(path, data, self._condition(version))
            except Exception as error:
                if _status(error) in _CONFLICT or (version is not None and isinstance(error, FileNotFoundError)):
                    raise FileExistsError(self.url(path)) from error
                raise

    def exists(self, path: str) -> bool:
        if self.size(path) is not None:
            return True
        with self._errors(path):
            return self._any_below(path)

    def delete(self, path: str, keep: str | None = None) -> None:
        names = [f"{path}/{entry.name}" for entry in self.list(path) if entry.name != keep]
        with self._errors(path):
            self._delete_all(names if keep is not None or "/" not in path else [*names, path])

    def proof(self, path: str) -> tuple[str, ...] | None:
        return (type(self).__name__, str(self.filesystem.storage_options.get("endpoint_url")), path.partition("/")[0])

    @abstractmethod
    def _get(self, path: str, headers: Mapping[str, str]) -> tuple[bytes, str]:
        """Return content and version of an object."""

    @abstractmethod
    def _put(self, path: str, data: bytes, condition: Mapping[str, str]) -> str:
        """Write an object in one request and return its version."""

    @abstractmethod
    def _any_below(self, path: str) -> bool:
        """Whether any object lies below a prefix; folders that a server remembers are none."""

    @abstractmethod
    def _delete_all(self, paths: Sequence[str]) -> None:
        """Delete objects, some of which may not be there."""

    @abstractmethod
    def _condition(self, version: str | None) -> Mapping[str, str]:
        """Say that an object must have this version, or be absent."""


class S3Files(_Conditional):
    """S3 through s3fs, where an option means something to it alone; versions are ETags."""

    def _get(self, path: str, headers: Mapping[str, str]) -> tuple[bytes, str]:
        from s3fs.core import _error_wrapper

        bucket, key, _ = self.filesystem.split_path(path)

        async def get() -> tuple[bytes, str]:
            answer = await self.filesystem._call_s3("get_object", Bucket=bucket, Key=key, **headers)
            async with answer["Body"] as body:
                return await body.read(), unquoted(answer["ETag"])

        found: tuple[bytes, str] = sync(self.filesystem.loop, _error_wrapper, get, retries=self.filesystem.retries)
        return found

    def _put(self, path: str, data: bytes, condition: Mapping[str, str]) -> str:
        bucket, key, _ = self.filesystem.split_path(path)
        answer = self.filesystem.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)
        return unquoted(answer["ETag"])

    def _any_below(self, path: str) -> bool:
        bucket, key, _ = self.filesystem.split_path(path)
        found = self.filesystem.call_s3("list_objects_v2", Bucket=bucket, Prefix=key and f"{key}/", MaxKeys=1)
        return bool(found.get("Contents"))

    def _delete_all(self, paths: Sequence[str]) -> None:
        for first in range(0, len(paths), _AT_ONCE):
            objects = [{"Key": self.filesystem.split_path(path)[1]} for path in paths[first : first + _AT_ONCE]]
            where, what = paths[0].partition("/")[0], {"Objects": objects, "Quiet": True}
            refused = self.filesystem.call_s3("delete_objects", Bucket=where, Delete=what).get("Errors")
            if refused:
                raise PermissionError(f"{len(refused)} objects were not deleted, as {refused[0]}")

    def _condition(self, version: str | None) -> Mapping[str, str]:
        return {"IfNoneMatch": "*"} if version is None else {"IfMatch": f'"{version}"'}


class GcsFiles(_Conditional):
    """Google Cloud Storage through gcsfs; versions are generations."""

    def wrong_version(self, version: str) -> str:
        return "1"

    def _get(self, path: str, headers: Mapping[str, str]) -> tuple[bytes, str]:
        found, data = self.filesystem.call("GET", self.filesystem.url(path), headers=dict(headers))
        return data, str(found["X-Goog-Generation"])

    def _put(self, path: str, data: bytes, condition: Mapping[str, str]) -> str:
        bucket, key, _ = self.filesystem.split_path(path)
        where = f"{self.filesystem._location}/upload/storage/v1/b/{quote(bucket, safe='')}/o"
        border = uuid.uuid4().hex
        described = json.dumps({"name": key})
        parts = (
            f"--{border}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{described}\r\n"
            f"--{border}\r\nContent-Type: application/octet-stream\r\n\r\n"
        )
        body = b"".join([parts.encode(), data, f"\r\n--{border}--".encode()])
        headers = {"Content-Type": f"multipart/related; boundary={border}"}
        upload = {"uploadType": "multipart", "headers": headers, "data": body}
        return str(self.filesystem.call("POST", where, json_out=True, **upload, **condition)["generation"])

    def _any_below(self, path: str) -> bool:
        bucket, key, _ = self.filesystem.split_path(path)
        found = self.filesystem.call("GET", "b/{}/o", bucket, prefix=key and f"{key}/", maxResults=1, json_out=True)
        return bool(found.get("items"))

    def _delete_all(self, paths: Sequence[str]) -> None:
        def delete(path: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                self.filesystem.rm_file(path)

        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(delete, paths))

    def _condition(self, version: str | None) -> Mapping[str, str]:
        return {"ifGenerationMatch": version or "0"}


def remote_storage(filesystem: Any) -> Storage:
    """Return the storage that knows this file system best."""
    kinds = {"memory": MemoryFiles, "s3": S3Files, "gs": GcsFiles}
    protocols = [filesystem.protocol] if isinstance(filesystem.protocol, str) else filesystem.protocol
    return next((kinds[name] for name in protocols if name in kinds), FsspecFiles)(filesystem)


def _http_range(start: int, stop: int | None) -> str:
    return f"bytes={start}" if start < 0 else f"bytes={start}-{'' if stop is None else stop - 1}"


def _version(found: Mapping[str, Any]) -> str:
    """Return the version in what a file system says of a file."""
    return next((unquoted(found[key]) for key in _VERSIONS if found.get(key)), "")


def _status(error: BaseException | None) -> int | None:
    """Return the HTTP status that an error of a client comes from."""
    while error is not None:
        if isinstance(error, FileExistsError):
            return 412
        response = getattr(error, "response", None)
        found = response["ResponseMetadata"]["HTTPStatusCode"] if response else getattr(error, "code", None)
        if found is not None:
            return int(found)
        error = error.__cause__
    return None
