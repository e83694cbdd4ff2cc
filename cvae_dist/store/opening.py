"""Which storage a URL means."""

import fsspec
from fsspec.implementations.local import LocalFileSystem

from cvae_dist.errors import InvalidInput, MissingExtra
from cvae_dist.store.files import LocalFiles
from cvae_dist.store.remote import remote_storage
from cvae_dist.store.storage import Storage, StorageOptions, clean

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "abfs": "azure", "abfss": "azure", "az": "azure"}


def open_storage(url: str, options: StorageOptions) -> tuple[Storage, str]:
    """Return the storage of a path or URL, and the path in it."""
    protocol = url.partition("://")[0]
    try:
        filesystem, path = fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError, TypeError) as error:
        name, said = clean(url, options), clean(str(error), options)
        extra = EXTRAS.get(protocol)
        # of some protocols, such as abfss, fsspec hears only from the package that is missing
        if isinstance(error, ImportError) or (extra and protocol not in fsspec.available_protocols()):
            remedy = f"pip install 'cvae-dist[{extra}]'" if extra else f"install what fsspec names: {said}"
            raise MissingExtra(f"{name} needs a package that is not installed; {remedy}") from None
        raise InvalidInput(f"{name} cannot be opened ({said}). Mend the URL or the storage options") from None
    if isinstance(filesystem, LocalFileSystem):
        return LocalFiles(), path
    return remote_storage(filesystem), path
