"""Where an output came from: recorded in attributes, never with credentials."""

import datetime
import hashlib
import json
import platform
import sys
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from typing import Any
from urllib.parse import urlsplit, urlunsplit

_PACKAGES = ("cvae-dist", "numpy", "zarr", "torch")


@cache
def version(package: str) -> str:
    """Return the version of an installed package."""
    return metadata.version(package)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that make the bytes, of those that are imported."""
    imported = [name for name in _PACKAGES if name == "cvae-dist" or name in sys.modules]
    return {"python": platform.python_version(), **{name: version(name) for name in imported}}


def history_line(command: str) -> str:
    """Return one line of the CF attribute ``history``: time in UTC and what was done."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return f"{now}: cvae-dist {version('cvae-dist')} {command}"


def without_credentials(url: str) -> str:
    """Return ``url`` without user, password, query and fragment."""
    parts = urlsplit(url)
    if not parts.scheme:
        return url
    return urlunsplit((parts.scheme, parts.netloc.rsplit("@", 1)[-1], parts.path, "", ""))


def digest_json(document: Mapping[str, Any]) -> str:
    """Return a 128-bit hex digest of a JSON document that does not depend on the order of its keys."""
    return digest_bytes(json.dumps(document, sort_keys=True, separators=(",", ":")).encode())


def digest_bytes(data: bytes) -> str:
    """Return a 128-bit hex digest."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()
