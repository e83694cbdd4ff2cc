"""A model on disk, without pickle: its weights, its description, and the priors fitted to its latents.

The names of the files are in :mod:`cvae_dist.model.files`.
"""

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import safetensors.numpy
import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from cvae_dist.config import ModelConfig, make_config
from cvae_dist.errors import Corrupt, NotFitted
from cvae_dist.model import prior
from cvae_dist.model.files import CONFIG, FORMAT, PRIORS, VERSION, WEIGHTS, prior_files, read_description, remedy
from cvae_dist.model.metric import Stretch
from cvae_dist.model.prior import Prior, PriorName
from cvae_dist.model.scaling import Scaling
from cvae_dist.model.vae import VAE
from cvae_dist.store.lineage import digest_bytes
from cvae_dist.store.urls import Location, StorageOptions

Url = str | Location


def save_model(url: Url, vae: VAE, lineage: Mapping[str, Any]) -> str:
    """Write the model, its description last, and return the digest of its weights."""
    place = Location.of(url)
    weights = _bytes(vae)
    description = {
        "format": FORMAT,
        "version": VERSION,
        "digest": digest_bytes(weights),
        "model": vae.config.model_dump(mode="json"),
        "lineage": dict(lineage),
    }
    (place / WEIGHTS).write(weights)
    (place / CONFIG).write(json.dumps(description, indent=2).encode() + b"\n")
    return str(description["digest"])


def load_model(url: Url, storage_options: StorageOptions | None = None) -> VAE:
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
    return _rebuild(place, description["model"], weights).requires_grad_(False).eval()


def delete_model(place: Location) -> None:
    """Delete the model's own files: the description first, so that the rest is never taken for a model."""
    for name in (CONFIG, WEIGHTS, PRIORS):
        (place / name).delete()


def save_prior(
    place: Location, name: PriorName, prior: Prior, vae: VAE, lineage: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Write a prior fitted to the latents of ``vae`` beside the model at ``place``; an earlier one is replaced."""
    description, arrays = prior_files(place, name)
    data = safetensors.numpy.save(prior.arrays())
    document = {
        "model": digest_bytes(_bytes(vae)),
        "digest": digest_bytes(data),
        "architecture": prior.architecture,
        "lineage": dict(lineage),
    }
    arrays.write(data)
    description.write(json.dumps(document).encode() + b"\n")


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
    fitted, document = _read_prior(place, name)
    return fitted, str(document["digest"])


def prior_lineage(place: Location, name: PriorName) -> dict[str, Any]:
    """Return the lineage that :func:`save_prior` wrote; empty where this model has no such prior, or a damaged one."""
    try:
        return dict(_read_prior(place, name)[1].get("lineage", {}))
    except (NotFitted, Corrupt):
        return {}


def _read_prior(place: Location, name: PriorName) -> tuple[Prior, dict[str, Any]]:
    """Return a prior and its checked description."""
    prior.check_name(name)
    fit = f"fit it with fit_prior (cvae-dist fit-prior STORE {place} --prior {name})"
    try:
        text, data = (file.read() for file in prior_files(place, name))
    except FileNotFoundError:
        raise NotFitted(f"no prior {name!r} was fitted to the latents of the model {place}; {fit}") from None
    try:
        document: dict[str, Any] = json.loads(text)
        if document["model"] != read_description(place)["digest"]:
            raise NotFitted(f"the prior {name!r} of {place} belongs to an earlier model; {fit}")
        if digest_bytes(data) != document["digest"]:
            raise Corrupt(f"the prior {name!r} of {place} does not match its digest; {fit}")
        return prior.restored(name, safetensors.numpy.load(data), document["architecture"]), document
    except (json.JSONDecodeError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise Corrupt(f"the prior {name!r} of {place} cannot be rebuilt ({error}); {fit}") from None


def _bytes(vae: VAE) -> bytes:
    data: bytes = safetensors.torch.save({name: value.contiguous() for name, value in vae.state_dict().items()})
    return data


def _read_weights(place: Location, digest: str) -> dict[str, Tensor]:
    file = place / WEIGHTS
    try:
        data = file.read()
    except FileNotFoundError:
        raise Corrupt(f"{file} is missing beside {CONFIG}; {remedy(place)}") from None
    if digest_bytes(data) != digest:
        raise Corrupt(f"{file} ({len(data)} bytes) does not match the digest {digest} in {CONFIG}; {remedy(place)}")
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise Corrupt(f"{file} is no safetensors file ({error}), and is not read; {remedy(place)}") from None


def _rebuild(place: Location, settings: Mapping[str, Any], weights: dict[str, Tensor]) -> VAE:
    try:
        scaling = Scaling(*(weights[f"scaling.{name}"] for name in ("center", "scale", "low", "high")))
        vae = VAE(make_config(ModelConfig, settings), scaling)
        if "stretch.power" in weights:  # models of earlier releases have none
            vae.stretch = Stretch(weights["stretch.matrices"], weights["stretch.power"])
        vae.load_state_dict(weights)
    except (KeyError, RuntimeError, ValueError) as error:
        raise Corrupt(f"{CONFIG} and {WEIGHTS} of {place} do not fit together ({error}); {remedy(place)}") from None
    return vae
