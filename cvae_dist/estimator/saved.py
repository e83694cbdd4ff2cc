"""The directory of a trained estimator: its model, its history, the names of its features, its priors."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import NotFittedError

from cvae_dist.errors import NotFitted
from cvae_dist.model.directory import load_model, load_prior, save_prior
from cvae_dist.model.files import FEATURE_NAMES, HISTORY, is_finished, read_description
from cvae_dist.model.prior import Prior, PriorName
from cvae_dist.model.vae import VAE
from cvae_dist.store import Location
from cvae_dist.training.history import History


class ModelNotTrained(NotFitted, NotFittedError):  # type: ignore[misc]
    """The estimator has no model yet; also what scikit-learn expects to be raised then."""


def restored(place: Location) -> dict[str, Any]:
    """Return the fitted attributes of the estimator that was trained into ``place``."""
    model = load_model(place)
    lineage = read_description(place)["lineage"]
    item_shape = lineage.get("item_shape") or (model.n_features,)
    attributes = {
        "model_": model,
        "history_": History.read(place / HISTORY).records,
        "stopped_because_": lineage["figures"]["stopped_because"],
        "item_shape_": tuple(item_shape),
        "n_features_in_": model.n_features,
    }
    if (place / FEATURE_NAMES).exists():
        attributes["feature_names_in_"] = np.array(json.loads((place / FEATURE_NAMES).read()), dtype=object)
    return attributes


def keep_feature_names(place: Location, names: NDArray[Any] | None) -> None:
    """Write the names of the features beside the model, so that a restored estimator checks them too."""
    if names is None:
        (place / FEATURE_NAMES).delete()
    else:
        (place / FEATURE_NAMES).write(json.dumps(list(names)).encode())


def kept_prior(place: Location | None, name: PriorName) -> Prior | None:
    """Return the prior that was fitted to the latents of the model at ``place``, if there is one."""
    try:
        return None if place is None else load_prior(place, name)[0]
    except NotFitted:
        return None


def keep_prior(place: Location | None, name: PriorName, prior: Prior, model: VAE) -> None:
    """Write a prior beside the model at ``place``, if there is one."""
    if place is not None and is_finished(place):
        save_prior(place, name, prior, model)
