"""What lies at a location that is no store of ours: said in messages, never touched."""

import json
from typing import Literal

from cvae_dist.store.urls import Location

ORDER = "A store is named before its model: cvae-dist train STORE MODEL, cvae-dist embed STORE MODEL LATENTS"


def describe(location: Location) -> str:
    """Return what is at a location, and what can be done with it, as the middle of a sentence and the next one."""
    if _is_model(location):
        return f"is the directory of a model. {ORDER}"
    if (kind := zarr_kind(location)) is not None:
        line = "convert it with Python: " + zarr_conversion(str(location), kind)
        return f"is a Zarr store that cvae-dist did not make. Name a store that `cvae-dist ingest` wrote, or {line}"
    if location.is_file():
        return "is a file. Name the directory of a store"
    if location.holds(".npy"):
        return f"is a folder of .npy files. Make a store of them first: cvae-dist ingest {location} STORE"
    return "holds something else. Mend the path"


def zarr_kind(location: Location) -> Literal["array", "group"] | None:
    """Return which kind of Zarr node lies at a location, of either format."""
    if (location / ".zarray").exists():
        return "array"
    try:
        return "array" if json.loads((location / "zarr.json").read())["node_type"] == "array" else "group"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "group" if any((location / name).exists() for name in ("zarr.json", ".zgroup")) else None


def zarr_conversion(path: str, kind: Literal["array", "group"]) -> str:
    """Return the line of Python that writes a Zarr array, or the first one of a group, as a ``.npy`` file."""
    array = f"zarr.open({path!r}, mode='r')"
    if kind == "group":
        array = f"next(array for _, array in {array}.arrays())"
    return f"import numpy, zarr; numpy.save({path.rstrip('/').removesuffix('.zarr') + '.npy'!r}, {array}[...])"


def _is_model(location: Location) -> bool:
    try:
        return str(json.loads((location / "config.json").read())["format"]).startswith("cvae-dist model")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
