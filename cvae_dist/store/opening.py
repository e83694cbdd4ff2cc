"""Which storage a URL means."""

import importlib.util
from typing import NoReturn

import fsspec
from fsspec.implementations.local import LocalFileSystem

from cvae_dist.errors import InvalidInput, MissingExtra, StorageFailed
from cvae_dist.store.files import LocalFiles
from cvae_dist.store.objects import azure_storage, s3_storage
from cvae_dist.store.remote import remote_storage
from cvae_dist.store.storage import Storage, StorageOptions, clean

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "abfs": "azure", "abfss": "azure", "az": "azure"}
_PACKAGES = {"s3": ("obstore", "arro3", "botocore", "s3fs"), "azure": ("obstore", "arro3"), "gcs": ("gcsfs",)}


def open_storage(url: str, options: StorageOptions) -> tuple[Storage, str]:
    """Return the storage of a path or URL, and the path in it."""
    protocol, _, rest = url.partition("://")
    bucket, _, path = rest.partition("/")
    extra = EXTRAS.get(protocol) if rest else None
    if extra and (":" in bucket or (extra != "azure" and "@" in bucket)):
        raise InvalidInput(
            f"{clean(url, options)} has credentials in it, which {extra} does not take from there; "
            "give them as storage options, or in the environment"
        )
    if extra and any(importlib.util.find_spec(package) is None for package in _PACKAGES[extra]):
        _refuse_missing(url, options, extra, "")
    if extra == "azure":
        return azure_storage(*_azure_place(bucket, options)), path
    storage = s3_storage(bucket, options) if extra == "s3" else None
    return (storage, path) if storage else _open_with_fsspec(url, options, extra)


def _azure_place(bucket: str, options: StorageOptions) -> tuple[str, StorageOptions]:
    """Read ``container`` or ``container@account.dfs.core.windows.net``."""
    container, _, host = bucket.partition("@")
    account = host.partition(".")[0]
    return container, {"account_name": account, **options} if account else options


def _open_with_fsspec(url: str, options: StorageOptions, extra: str | None) -> tuple[Storage, str]:
    try:
        filesystem, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        _refuse_missing(url, options, extra, str(error))
    except (ValueError, TypeError) as error:
        said = clean(str(error), options)
        raise InvalidInput(
            f"{clean(url, options)} cannot be opened ({said}). Mend the URL or the storage options"
        ) from None
    except Exception as error:  # some file systems connect at once
        said = clean(f"{type(error).__name__}: {error}", options)
        raise StorageFailed(
            f"{clean(url, options)} cannot be reached ({said}). Nothing was changed; mend the URL, the storage options "
            "or the network and run the same command again"
        ) from None
    if isinstance(filesystem, LocalFileSystem):
        return LocalFiles(), path
    return remote_storage(filesystem), path


def _refuse_missing(url: str, options: StorageOptions, extra: str | None, said: str) -> NoReturn:
    remedy = f"pip install 'cvae-dist[{extra}]'" if extra else f"install what fsspec names: {clean(said, options)}"
    raise MissingExtra(f"{clean(url, options)} needs a package that is not installed; {remedy}") from None
