"""The files of a model directory, and what can be told of them without torch."""

import json
from typing import Any

from cvae_dist.errors import Corrupt, SourceNotFound
from cvae_dist.store.foreign import ORDER
from cvae_dist.store.urls import Location

CONFIG = "config.json"  # written last: without it there is no model
WEIGHTS = "model.safetensors"
PRIORS = "priors"
FEATURE_NAMES = "feature_names.json"
HISTORY = "history.jsonl"
CHECKPOINTS = "checkpoints"
LOGS = "logs"
MLFLOW_RUN = "mlflow_run.json"

FORMAT = "cvae-dist model"
VERSION = 1


def is_finished(place: Location) -> bool:
    """Whether a finished model is here."""
    return (place / CONFIG).exists()


def is_model(place: Location) -> bool:
    """Whether a finished model is here, and not a store."""
    return is_finished(place) and not (place / "zarr.json").exists()


def read_description(place: Location) -> dict[str, Any]:
    """Return the content of ``config.json``: ``digest`` of the weights, ``model`` (its settings), ``lineage``.

    Raises
    ------
    SourceNotFound
        There is no finished model.
    Corrupt
        The file is not what ``save_model`` wrote.
    """
    config = place / CONFIG
    try:
        text = config.read()
    except FileNotFoundError:
        raise SourceNotFound(_absence(place)) from None
    try:
        description = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"{config} is not JSON ({error}); {remedy(place)}") from None
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise Corrupt(f"{config} was not written by cvae-dist; give the directory of a model it trained")
    if description.get("version") != VERSION:
        raise Corrupt(
            f"{place} has model format {description.get('version')!r}, this release reads {VERSION}; "
            "use the release of cvae-dist that trained it, or train it again"
        )
    if not {"digest", "model", "lineage"} <= description.keys():
        raise Corrupt(f"{config} is incomplete; {remedy(place)}")
    return description


def prior_files(place: Location, name: str) -> tuple[Location, Location]:
    """Return where a prior of the model at ``place`` is described, and where its arrays are."""
    return place / PRIORS / f"{name}.json", place / PRIORS / f"{name}.safetensors"


def remedy(place: Location) -> str:
    """Return what to do about a damaged model."""
    return f"copy the model again from where it was trained, or train with --overwrite to replace {place}"


def _absence(place: Location) -> str:
    if (place / CHECKPOINTS).exists():
        return f"the training of {place} is not finished (it has checkpoints only); run the same command again"
    if (place / "params.json").exists() and (place / "checkpoint").exists():
        return f"{place} was written by CompressionVAE, whose models cannot be read; train one on the same rows"
    if (place / "zarr.json").exists():
        return f"{place} is a store, not a model. {ORDER}"
    if place.exists():
        return f"{place} is not a model: it has no {CONFIG}; give the directory that `train` wrote"
    return f"there is no model at {place}; train one first, or mend the path"
