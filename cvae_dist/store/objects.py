"""Objects in S3 and Azure through obstore: one request for each read and write, retried for as long as it may help."""

import contextlib
import errno
import functools
import hashlib
import itertools
import os
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

import numpy as np

from cvae_dist.errors import InvalidInput, StorageFailed
from cvae_dist.store.storage import (
    Buffer,
    Changed,
    Entry,
    Page,
    Storage,
    StorageOptions,
    clean_url,
    client_errors,
    scatter,
    unquoted,
)

if TYPE_CHECKING:
    from obstore.store import AzureStore, S3Store

_S3_OPTIONS = {"key", "secret", "token", "anon", "endpoint_url", "profile", "use_ssl", "client_kwargs"}
_S3_CLIENT_OPTIONS = {
    "endpoint_url", "region_name", "verify", "use_ssl", "aws_access_key_id", "aws_secret_access_key",
    "aws_session_token",
}  # fmt: skip
_AZURE_OPTIONS = {
    "account_name": "account_name", "account_key": "account_key", "sas_token": "sas_key", "anon": "skip_signature",
    "tenant_id": "tenant_id", "client_id": "client_id", "client_secret": "client_secret",
}  # fmt: skip
_AZURE_CONNECTION = {
    "AccountName": "account_name", "AccountKey": "account_key", "SharedAccessSignature": "sas_key",
    "BlobEndpoint": "endpoint",
}  # fmt: skip
_CREDENTIALS_LAST = timedelta(minutes=9)  # then botocore is asked again; it renews what ends within 10 minutes
_MAKING = threading.Lock()  # many threads may be the first to need a client
_LARGEST_PUT = 256_000_000  # bytes
_PART = 64_000_000
_WORTH_KEEPING = 1_000_000  # bytes of an object, from which a thread keeps the memory it was put together in
_MD5 = re.compile("[0-9a-f]{32}")  # the ETag of what was uploaded in one part
_LIST_AGAIN = 4  # times in a row that a list which broke off goes on
_LIST_PAUSE = 0.5  # seconds
_KNOCKS = (0.5, 1.5)  # seconds before an endpoint where nobody listens is tried again
_thread = threading.local()
_CLIENT = {"timeout": "120s", "connect_timeout": "10s"}
_RETRIES = {
    "max_retries": 12,
    "retry_timeout": timedelta(seconds=170),
    "backoff": {"init_backoff": timedelta(seconds=0.5), "base": 3, "max_backoff": timedelta(seconds=20)},
}


@dataclass(frozen=True, repr=False)
class ObjectStore(Storage):
    """A bucket or container. ``options`` are those of s3fs, or of adlfs; versions are ETags."""

    protocol: str
    bucket: str
    options: StorageOptions = field(hash=False)

    def url(self, path: str) -> str:
        return f"{self.protocol}://{self.bucket}/{path}" if path else f"{self.protocol}://{self.bucket}"

    def read(self, path: str, start: int | None = None, stop: int | None = None) -> bytes:
        return bytes(self.view(path, start, stop))

    def view(self, path: str, start: int | None = None, stop: int | None = None) -> Buffer:
        import obstore

        with self._errors(path) as store:
            try:
                if start is None:
                    return memoryview(obstore.get(store, path).bytes())
                if start < 0 and self._lacks_suffixes:
                    stop = int(obstore.head(store, path)["size"])
                    start = max(0, stop + start)
                if start < 0:
                    return memoryview(obstore.get(store, path, options={"range": {"suffix": -start}}).bytes())
                if start == stop:
                    return b""
                return memoryview(obstore.get_range(store, path, start=start, end=stop))
            except obstore.exceptions.BaseError as error:
                if self.ends_before(path, start, error):
                    return b""
                raise

    def fill(self, path: str, start: int, buffers: Sequence[memoryview]) -> tuple[int, str]:
        import obstore

        with self._errors(path) as store:
            try:
                found = obstore.get(store, path, options={"range": (start, start + sum(map(len, buffers)))})
                version = unquoted(found.meta["e_tag"])
                return scatter(found.stream(min_chunk_size=0), buffers), version  # as it comes: it is still in a cache
            except obstore.exceptions.BaseError as error:
                if self.ends_before(path, start, error):
                    return 0, ""
                raise

    def read_as(self, path: str, version: str, start: int, stop: int) -> Buffer:
        import obstore

        if start == stop:
            return b""
        with self._errors(path) as store:
            try:
                options: Any = {"range": (start, stop), **({"if_match": f'"{version}"'} if version else {})}
                found = obstore.get(store, path, options=options)
            except obstore.exceptions.PreconditionError:
                raise Changed(errno.EEXIST, f"{self.url(path)} is not of version {version}") from None
            return memoryview(found.bytes())

    def confirms(self, version: str, data: Buffer) -> bool:
        if self.protocol != "s3" or not _MD5.fullmatch(version):
            return True
        return hashlib.md5(data, usedforsecurity=False).hexdigest() == version

    def read_versioned(self, path: str) -> tuple[bytes, str]:
        import obstore

        with self._errors(path) as store:
            found = obstore.get(store, path)
            return bytes(found.bytes()), unquoted(found.meta["e_tag"])

    def size(self, path: str) -> int | None:
        import obstore

        if path:
            with contextlib.suppress(FileNotFoundError), self._errors(path) as store:
                return int(obstore.head(store, path)["size"])
        return None

    def entry(self, path: str) -> Entry | None:
        import obstore

        with contextlib.suppress(FileNotFoundError), self._errors(path) as store:
            found = obstore.head(store, path)
            return Entry(path, int(found["size"]), unquoted(found["e_tag"]))
        return None

    def write(self, path: str, buffers: Sequence[Buffer]) -> str:
        return self._put(path, self.joined([buffers]), "overwrite")

    def joined(self, parts: Iterable[Sequence[Buffer]]) -> bytes:
        if (
            isinstance(parts, list)
            and sum(memoryview(buffer).nbytes for part in parts for buffer in part) < _WORTH_KEEPING
        ):
            return super().joined(parts)
        memory, end = getattr(_thread, "memory", np.empty(0, np.uint8)), 0
        for buffer in itertools.chain.from_iterable(parts):
            part = memoryview(buffer).cast("B")
            if end + len(part) > len(memory):  # what is never used costs no memory
                larger = np.empty(max(2 * (end + len(part)), _WORTH_KEEPING), np.uint8)
                larger[:end] = memory[:end]
                memory = larger
            memory.data[end : end + len(part)] = part
            end += len(part)
        _thread.memory = memory
        return cast(bytes, memory[:end].data)  # it is only read, and fresh memory would cost page faults

    def write_if(self, path: str, data: bytes, version: str | None) -> str:
        return self._put(path, data, "create" if version is None else {"e_tag": f'"{version}"'})

    def remove(self, path: str, version: str) -> bool:
        return False

    def move(self, path: str, target: str) -> None:
        import obstore

        with self._errors(path) as store:
            obstore.copy(store, path, target)
            obstore.delete(store, path)

    def version(self, path: str) -> str:
        import obstore

        with self._errors(path) as store:
            return unquoted(obstore.head(store, path)["e_tag"])

    def list(self, path: str) -> Iterator[Entry]:
        for page in self.pages(path):
            yield from map(Entry, *page)

    def pages(self, path: str) -> Iterator[Page]:
        prefix = f"{path}/" if path else ""
        with self._errors(path) as store:
            for names, sizes, versions in _pages(store, prefix):
                yield Page([name[len(prefix) :] for name in names], sizes, versions)

    def delete(self, path: str, keep: str | None = None) -> None:
        import obstore

        prefix = f"{path}/" if path else ""
        names = [prefix + entry.name for entry in self.list(path) if entry.name != keep]
        with self._errors(path) as store:
            if names:
                obstore.delete(store, names)
            if path and keep is None:
                with contextlib.suppress(FileNotFoundError):  # Azure says so
                    obstore.delete(store, path)

    def proof(self, path: str) -> tuple[str, ...] | None:
        return (self.protocol, str(_endpoint(self.options)), self.bucket)

    def wrong_version(self, version: str) -> str:
        return "0x8D0000000000000" if self._lacks_suffixes else super().wrong_version(version)

    @property
    def _lacks_suffixes(self) -> bool:
        """Whether the last bytes of an object cannot be asked for without its size."""
        return self.protocol == "az"

    def _put(self, path: str, data: bytes, mode: Any) -> str:
        import obstore

        with self._errors(path, writes=True) as store:
            try:
                # a multipart upload that is killed leaves parts that cost money and that nobody sees
                in_parts = mode == "overwrite" and len(data) > _LARGEST_PUT
                result = obstore.put(store, path, data, mode=mode, use_multipart=in_parts, chunk_size=_PART)
            except (obstore.exceptions.AlreadyExistsError, obstore.exceptions.PreconditionError) as error:
                raise FileExistsError(self.url(path)) from error
            except FileNotFoundError as error:  # what was to be replaced
                if isinstance(mode, Mapping):
                    raise FileExistsError(self.url(path)) from error
                raise
        return unquoted(result["e_tag"])

    @contextlib.contextmanager
    def _errors(self, path: str, writes: bool = False) -> "Iterator[S3Store | AzureStore]":
        with client_errors(self.url(path), self.options, writes):
            with _MAKING:
                store = _client(self)
            yield store


def _pages(store: "S3Store | AzureStore", prefix: str) -> Iterator[Page]:
    """Yield all objects below a prefix, by their whole names.

    The client gives up when an answer breaks off. Then the list goes on after the last name, but only where all names
    came in order: elsewhere some could be lost.
    """
    import obstore

    last, ordered, failures = "", True, 0
    while True:
        try:
            batches: Any = obstore.list(store, prefix, offset=last or None, chunk_size=1000, return_arrow=True)
            for batch in batches:
                names, sizes, tags = (batch.column(name).to_pylist() for name in ("path", "size", "e_tag"))
                ordered = ordered and last < names[0] and names == sorted(names)
                last, failures = names[-1], 0
                versions = map(str.strip, tags, itertools.repeat('"')) if all(tags) else map(unquoted, tags)
                yield Page(names, sizes, list(versions))
            return
        except obstore.exceptions.GenericError:
            failures += 1
            if not ordered or failures > _LIST_AGAIN:
                raise
            time.sleep(_LIST_PAUSE)


def s3_storage(bucket: str, options: StorageOptions) -> ObjectStore | None:
    """Return the storage of an S3 bucket, None where an option means something to s3fs alone."""
    unknown = {*options} - _S3_OPTIONS or {*(options.get("client_kwargs") or {})} - _S3_CLIENT_OPTIONS
    return None if unknown else ObjectStore("s3", bucket, dict(options))


def azure_storage(container: str, options: StorageOptions) -> ObjectStore:
    """Return the storage of an Azure container."""
    unknown = {*options} - {*_AZURE_OPTIONS, "connection_string"}
    if unknown:
        known = ", ".join(sorted({*_AZURE_OPTIONS, "connection_string"}))
        raise InvalidInput(f"Azure knows no storage options {', '.join(sorted(unknown))}; known: {known}")
    return ObjectStore("az", container, dict(options))


@functools.cache
def _client(storage: ObjectStore) -> "S3Store | AzureStore":
    return _azure_client(storage) if storage.protocol == "az" else _s3_client(storage)


def _s3_client(storage: ObjectStore) -> "S3Store":
    from botocore.configprovider import ConfiguredEndpointProvider
    from botocore.session import Session
    from obstore.store import S3Store

    options = {**storage.options, **(storage.options.get("client_kwargs") or {})}
    session = Session(profile=options.get("profile"))
    endpoint = options.get("endpoint_url")
    if endpoint is None:
        endpoint = ConfiguredEndpointProvider(session.full_config, session.get_scoped_config(), "s3").provide()
    if endpoint is not None:
        _require_listener(endpoint)
    region = options.get("region_name")
    if region is None and endpoint is None:
        region = _region(storage.bucket)
    region = region or session.get_config_variable("region") or "us-east-1"
    verify = options.get("verify", session.get_config_variable("ca_bundle"))
    config = {"region": region, **({"endpoint": endpoint} if endpoint else {})}
    provider = None
    if options.get("anon"):
        config["skip_signature"] = "true"
    else:
        provider = _credentials(storage, session, options)
    return S3Store(
        storage.bucket,
        config=config,  # type: ignore[arg-type] # a dict of strings
        client_options=_client_options(endpoint, verify),  # type: ignore[arg-type]
        retry_config=_RETRIES,  # type: ignore[arg-type]
        credential_provider=provider,  # type: ignore[arg-type]
    )


def _credentials(storage: ObjectStore, session: Any, options: StorageOptions) -> Callable[[], dict[str, Any]]:
    """Return what tells the client its credentials, again and again as they may expire."""
    key = options.get("key") or options.get("aws_access_key_id")
    secret = options.get("secret") or options.get("aws_secret_access_key")
    if key and secret:
        token = options.get("token") or options.get("aws_session_token")
        return lambda: {"access_key_id": key, "secret_access_key": secret, "token": token, "expires_at": None}
    found = session.get_credentials()
    if found is None:
        raise StorageFailed(
            f"there are no credentials for s3://{storage.bucket}. Give the storage options key and secret (or anon for "
            "a public bucket), set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run `aws configure`"
        )

    def current() -> dict[str, Any]:
        now = found.get_frozen_credentials()
        names = {"access_key_id": now.access_key, "secret_access_key": now.secret_key, "token": now.token}
        return {**names, "expires_at": datetime.now(UTC) + _CREDENTIALS_LAST}

    return current


def _region(bucket: str) -> str | None:
    """Ask AWS in which region a bucket lies. Only there is it answered, which no redirect of obstore would do."""
    request = urllib.request.Request(f"https://s3.amazonaws.com/{bucket}", method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            found = answer.headers
    except urllib.error.HTTPError as error:
        found = error.headers
    except OSError:
        return None
    region: str | None = found.get("x-amz-bucket-region")
    return region


def _azure_client(storage: ObjectStore) -> "AzureStore":
    from obstore.store import AzureStore

    options = storage.options
    connection = options.get("connection_string")
    if connection is None and not {"account_name", "account_key"} & {*options}:
        connection = os.environ.get("AZURE_STORAGE_CONNECTION_STRING")
    config = {_AZURE_OPTIONS[name]: value for name, value in options.items() if name in _AZURE_OPTIONS}
    for part in filter(None, (connection or "").split(";")):
        name, _, value = part.partition("=")
        if name in _AZURE_CONNECTION:
            config[_AZURE_CONNECTION[name]] = value
    config = {name: str(value).lower() if isinstance(value, bool) else value for name, value in config.items()}
    if "endpoint" in config:
        _require_listener(config["endpoint"])
    return AzureStore(
        storage.bucket,
        config=config,  # type: ignore[arg-type] # a dict of strings
        client_options=_client_options(config.get("endpoint"), None),  # type: ignore[arg-type]
        retry_config=_RETRIES,  # type: ignore[arg-type]
    )


def _require_listener(endpoint: str) -> None:
    """Refuse an endpoint at which nobody listens, before its first use: the client would try it again for minutes."""
    place = urlsplit(endpoint)
    if place.scheme in urllib.request.getproxies():  # then another machine finds it
        return
    port = place.port or (80 if place.scheme == "http" else 443)
    for pause in (*_KNOCKS, None):
        try:
            with contextlib.suppress(TimeoutError):  # what is slow gets the time that the client gives it
                socket.create_connection((place.hostname or "", port), timeout=5).close()
            return
        except OSError as error:
            if pause is None:
                raise StorageFailed(
                    f"nobody listens at {clean_url(endpoint)} ({error.strerror}). Everything finished before is kept; "
                    "mend the endpoint, or start its server, and run the same command again"
                ) from None
            time.sleep(pause)


def _client_options(endpoint: str | None, verify: bool | str | None) -> dict[str, Any]:
    options: dict[str, Any] = {**_CLIENT, "allow_http": (endpoint or "").startswith("http://")}
    if verify is False:
        options["allow_invalid_certificates"] = True
    elif isinstance(verify, str):
        options["root_certificate"] = Path(verify).read_bytes()
    return options


def _endpoint(options: StorageOptions) -> str | None:
    endpoint: str | None = {**options, **(options.get("client_kwargs") or {})}.get("endpoint_url")
    return endpoint or options.get("account_name")
