"""A model on disk: ``config.json`` and ``model.safetensors`` in a directory, without pickle."""

import json
from collections.abc import Mapping
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from cvae_dist.config import ModelConfig, make_config
from cvae_dist.errors import Corrupt, SourceNotFound
from cvae_dist.model.scaling import Scaling
from cvae_dist.model.vae import VAE
from cvae_dist.store.lineage import digest_bytes
from cvae_dist.store.urls import Location, StorageOptions

_FORMAT = "cvae-dist model"
_VERSION = 1
_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"

Url = str | Location


def save_model(url: Url, vae: VAE, lineage: Mapping[str, Any], storage_options: StorageOptions | None = None) -> str:
    """Write the model and return its digest. Without ``config.json``, written last, there is no model."""
    place = Location.of(url, storage_options)
    weights = safetensors.torch.save({name: value.contiguous() for name, value in vae.state_dict().items()})
    config = {
        "format": _FORMAT,
        "version": _VERSION,
        "digest": digest_bytes(weights),
        "model": vae.config.model_dump(mode="json"),
        "lineage": dict(lineage),
    }
    (place / _WEIGHTS).write(weights)
    (place / _CONFIG).write(json.dumps(config, indent=2).encode() + b"\n")
    return str(config["digest"])


def load_model(url: Url, device: str = "cpu", storage_options: StorageOptions | None = None) -> VAE:
    """Load a finished model, ready for inference.

    Raises
    ------
    SourceNotFound
        There is no finished model.
    Corrupt
        The files are not what :func:`save_model` wrote.
    """
    place = Location.of(url, storage_options)
    description = read_description(place)
    weights = _read_weights(place, str(description["digest"]))
    vae = _rebuild(place, description["model"], weights)
    return vae.to(device).requires_grad_(False).eval()


def model_digest(url: Url, storage_options: StorageOptions | None = None) -> str:
    """Return the digest that ``config.json`` gives for the weights; reads no weights."""
    return str(read_description(Location.of(url, storage_options))["digest"])


def read_description(place: Location) -> dict[str, Any]:
    """Return the checked content of ``config.json``: ``digest``, ``model`` (its settings) and ``lineage``."""
    try:
        text = (place / _CONFIG).read()
    except FileNotFoundError:
        raise SourceNotFound(_absence(place)) from None
    try:
        description = json.loads(text)
    except ValueError as error:
        raise Corrupt(f"{place / _CONFIG} is not JSON ({error}); {_remedy(place)}") from None
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        raise Corrupt(f"{place / _CONFIG} was not written by cvae-dist; give the directory of a model it trained")
    if description.get("version") != _VERSION:
        raise Corrupt(
            f"{place} has model format {description.get('version')!r}, this release reads {_VERSION}; "
            "use the release of cvae-dist that trained it, or train it again"
        )
    if not {"digest", "model", "lineage"} <= description.keys():
        raise Corrupt(f"{place / _CONFIG} is incomplete; {_remedy(place)}")
    return description


def is_finished(place: Location) -> bool:
    """Whether a finished model is here."""
    return (place / _CONFIG).exists()


def delete_model(place: Location) -> None:
    """Delete the model's own files, ``config.json`` first, so that the rest is never taken for a model."""
    (place / _CONFIG).delete()
    (place / _WEIGHTS).delete()


def _absence(place: Location) -> str:
    if (place / "checkpoints").exists():
        return f"the training of {place} is not finished (it has checkpoints only); run the same command again"
    if place.exists():
        return f"{place} is not a model: it has no {_CONFIG}; give the directory that `train` wrote"
    return f"there is no model at {place}; train one first, or mend the path"


def _remedy(place: Location) -> str:
    return f"copy the model again from where it was trained, or train with --overwrite to replace {place}"


def _read_weights(place: Location, digest: str) -> dict[str, Tensor]:
    try:
        data = (place / _WEIGHTS).read()
    except FileNotFoundError:
        raise Corrupt(f"{place / _WEIGHTS} is missing beside {_CONFIG}; {_remedy(place)}") from None
    if digest_bytes(data) != digest:
        raise Corrupt(
            f"{place / _WEIGHTS} ({len(data)} bytes) does not match the digest {digest} in {_CONFIG}; {_remedy(place)}"
        )
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise Corrupt(
            f"{place / _WEIGHTS} is no safetensors file ({error}), and is not read; {_remedy(place)}"
        ) from None


def _rebuild(place: Location, settings: Mapping[str, Any], weights: dict[str, Tensor]) -> VAE:
    try:
        scaling = Scaling(*(weights[f"scaling.{name}"] for name in ("center", "scale", "low", "high")))
        vae = VAE(make_config(ModelConfig, settings), scaling)
        vae.load_state_dict(weights)
    except (KeyError, RuntimeError, ValueError) as error:
        raise Corrupt(f"{_CONFIG} and {_WEIGHTS} of {place} do not fit together ({error}); {_remedy(place)}") from None
    return vae
