"""What lies at a location that is no store of ours: said in messages, never touched."""

import json

from cvae_dist.store.urls import Location

ORDER = "A store is named before its model: cvae-dist train STORE MODEL, cvae-dist embed STORE MODEL LATENTS"


def describe(location: Location) -> str:
    """Return what is at a location, and what can be done with it, as the middle of a sentence and the next one."""
    if _is_model(location):
        return f"is the directory of a model. {ORDER}"
    if any((location / name).exists() for name in ("zarr.json", ".zgroup", ".zarray")):
        return "is a Zarr store that cvae-dist did not make. Name one that `cvae-dist ingest` or `embed` wrote"
    if location.is_file():
        return "is a file. Name the directory of a store"
    if location.holds(".npy"):
        return f"is a folder of .npy files. Make a store of them first: cvae-dist ingest {location} STORE"
    return "holds something else. Mend the path"


def _is_model(location: Location) -> bool:
    try:
        return str(json.loads((location / "config.json").read())["format"]).startswith("cvae-dist model")
    except (OSError, ValueError, KeyError, TypeError):
        return False
