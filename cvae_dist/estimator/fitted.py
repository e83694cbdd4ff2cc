"""The trained model of an estimator: in memory, or in its directory."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError

from cvae_dist.errors import NotFitted
from cvae_dist.model.directory import load_model
from cvae_dist.model.files import FEATURE_NAMES, HISTORY, is_finished, read_description
from cvae_dist.model.vae import VAE
from cvae_dist.store import Location
from cvae_dist.training.history import History, Record

_RESTORED = ("model_", "history_", "item_shape_", "n_features_in_")


class ModelNotTrained(NotFitted, NotFittedError):  # type: ignore[misc]
    """The estimator has no model yet; also what scikit-learn expects to be raised then."""


class Fitted(BaseEstimator):  # type: ignore[misc]
    """An estimator that has, or can restore, a trained model."""

    logdir: str | os.PathLike[str] | None
    storage_options: Mapping[str, Any] | None
    model_: VAE
    history_: list[Record]
    item_shape_: tuple[int, ...]
    n_features_in_: int
    feature_names_in_: NDArray[Any]

    if not TYPE_CHECKING:  # a type checker would take every name for an attribute

        def __getattr__(self, name: str) -> Any:
            """Restore the model of ``logdir`` where what it holds is asked for first."""
            if name not in _RESTORED or not self.__sklearn_is_fitted__():
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            self._restore()
            return vars(self)[name]

    @property
    def _directory(self) -> str | None:
        return None if self.logdir is None else os.fspath(self.logdir)

    def _place(self) -> Location:
        return Location.of(cast(str, self._directory), self.storage_options)

    def _model(self) -> VAE:
        """Return the trained model, restoring it from ``logdir`` where this object did not train it."""
        if not self.__sklearn_is_fitted__():
            raise ModelNotTrained(self._not_trained())
        return self.model_

    def _not_trained(self) -> str:
        where = "no logdir is given" if self.logdir is None else f"{self.logdir} holds no finished model"
        return (
            f"this {type(self).__name__} instance is not fitted yet ({where}), so it can neither embed nor "
            "decode: call train() or fit(X) first, or give the logdir of a trained model"
        )

    def _restore(self) -> None:
        place = self._place()
        self.model_ = load_model(place)
        self.n_features_in_ = self.model_.n_features
        lineage = read_description(place)["lineage"]
        self.item_shape_ = tuple(lineage.get("item_shape") or (self.n_features_in_,))
        self.history_ = History.read(place / HISTORY).records
        if (place / FEATURE_NAMES).exists():
            self.feature_names_in_ = np.array(json.loads((place / FEATURE_NAMES).read()), dtype=object)

    def _keep_feature_names(self) -> None:
        """Write the names of the features beside the model, so that a restored one checks them too."""
        if hasattr(self, "feature_names_in_"):
            (self._place() / FEATURE_NAMES).write(json.dumps(list(self.feature_names_in_)).encode())
        else:
            (self._place() / FEATURE_NAMES).delete()

    def __sklearn_is_fitted__(self) -> bool:
        if "model_" in vars(self):
            return True
        return vars(self).get("logdir") is not None and is_finished(self._place())
