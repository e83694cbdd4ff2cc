"""A model on disk, without pickle: ``config.json`` and ``model.safetensors`` in a directory, and priors beside them."""

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import safetensors.numpy
import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from cvae_dist.config import ModelConfig, make_config
from cvae_dist.errors import Corrupt, NotFitted, SourceNotFound
from cvae_dist.model import prior
from cvae_dist.model.prior import Prior, PriorName
from cvae_dist.model.scaling import Scaling
from cvae_dist.model.vae import VAE
from cvae_dist.store.lineage import digest_bytes
from cvae_dist.store.urls import Location, StorageOptions

_FORMAT = "cvae-dist model"
_VERSION = 1
_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_PRIORS = "priors"

Url = str | Location


def save_model(url: Url, vae: VAE, lineage: Mapping[str, Any], storage_options: StorageOptions | None = None) -> str:
    """Write the model and return its digest. Without ``config.json``, written last, there is no model."""
    place = Location.of(url, storage_options)
    weights = _bytes(vae)
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
    for name in (_CONFIG, _WEIGHTS, _PRIORS):
        (place / name).delete()


def save_prior(
    place: Location, name: PriorName, prior: Prior, vae: VAE, lineage: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Write a prior fitted to the latents of ``vae`` beside the model at ``place``; an earlier one is replaced."""
    arrays = safetensors.numpy.save(prior.arrays())
    description = {"model": digest_bytes(_bytes(vae)), "digest": digest_bytes(arrays), "lineage": dict(lineage)}
    (place / _PRIORS / f"{name}.safetensors").write(arrays)
    (place / _PRIORS / f"{name}.json").write(json.dumps(description).encode() + b"\n")


def load_prior(place: Location, name: PriorName) -> tuple[Prior, str]:
    """Load a prior of the model at ``place``, and its digest.

    Raises
    ------
    NotFitted
        No such prior was fitted to the latents of this model.
    Corrupt
        The files are not what :func:`save_prior` wrote.
    MissingExtra
        The flow's package is not installed.
    """
    prior.check_name(name)
    remedy = f"fit it with fit_prior (cvae-dist fit-prior STORE {place} --prior {name})"
    try:
        text = (place / _PRIORS / f"{name}.json").read()
        arrays = (place / _PRIORS / f"{name}.safetensors").read()
    except FileNotFoundError:
        raise NotFitted(f"no prior {name!r} was fitted to the latents of the model {place}; {remedy}") from None
    try:
        model, digest = (json.loads(text)[key] for key in ("model", "digest"))
        if model != read_description(place)["digest"]:
            raise NotFitted(f"the prior {name!r} of {place} belongs to an earlier model; {remedy}")
        if digest_bytes(arrays) != digest:
            raise Corrupt(f"the prior {name!r} of {place} does not match its digest; {remedy}")
        return prior.restored(name, safetensors.numpy.load(arrays)), digest
    except (json.JSONDecodeError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise Corrupt(f"the prior {name!r} of {place} cannot be rebuilt ({error}); {remedy}") from None


def prior_lineage(place: Location, name: PriorName) -> dict[str, Any]:
    """Return what :func:`save_prior` was told; nothing where no whole prior of the model that is here was written."""
    try:
        load_prior(place, name)
        return dict(json.loads((place / _PRIORS / f"{name}.json").read()).get("lineage", {}))
    except (NotFitted, Corrupt):
        return {}


def _bytes(vae: VAE) -> bytes:
    data: bytes = safetensors.torch.save({name: value.contiguous() for name, value in vae.state_dict().items()})
    return data


def _absence(place: Location) -> str:
    if (place / "checkpoints").exists():
        return f"the training of {place} is not finished (it has checkpoints only); run the same command again"
    if (place / "params.json").exists() and (place / "checkpoint").exists():
        return f"{place} was written by CompressionVAE, whose models cannot be read; train one on the same rows"
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
