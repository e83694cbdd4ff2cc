"""How normal rows are to the model, and how well the model is."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cvae_dist.errors import InvalidInput
from cvae_dist.estimator.inference import Inference
from cvae_dist.model import scoring

_DEFAULT_DRAWS = {"elbo": 8, "reconstruction": 8, "iwae": 100}


class Scoring(Inference):
    """Likelihoods of rows."""

    def score_samples(
        self,
        X: Any,
        kind: Literal["elbo", "reconstruction", "iwae"] = "elbo",
        k: int | None = None,
        random_state: int = 0,
    ) -> NDArray[np.float64]:
        """Return how normal rows are to the model: higher is more normal, as in scikit-learn.

        Parameters
        ----------
        X : (n, n_features) array or DataFrame
        kind : {"elbo", "reconstruction", "iwae"}
            ``elbo``: the lower bound of log p(x). ``reconstruction``: its first part, E[log p(x | z)]. With the
            Bernoulli likelihood both are given relative to the best any model could do for this very row, that is
            the row's own entropy is added: otherwise dark, empty rows score as normal whatever they show. Take these
            two to find unusual rows. ``iwae``: the importance-weighted estimate of log p(x) itself, as published
            figures are given; nothing is added.
        k : int, optional
            Draws of the latent. Default: 8, or 100 for ``iwae``.
        random_state : int
            Seed of the draws, which are the same for all rows: a row scores the same in any company.

        Returns
        -------
        (n,) float64 array
            Nats, as a density over the data's units; with Bernoulli features a probability. A plain autoencoder
            (``kl_weight=0``) has no bound; its ``elbo`` is its reconstruction.
        """
        model = self._model()
        rows = self._rows(X)
        if kind not in _DEFAULT_DRAWS:
            raise InvalidInput(f"kind={kind!r} is unknown: choose one of {', '.join(_DEFAULT_DRAWS)}")
        count = _DEFAULT_DRAWS[kind] if k is None else k
        if count < 1:
            raise InvalidInput(f"k={k}: a score needs at least 1 draw of the latent")
        random = np.random.RandomState(random_state)
        draws = list(random.standard_normal((count, model.dim_latent)).astype(np.float32))
        volume = scoring.log_volume(model)
        if kind == "iwae":
            return scoring.log_marginal(model, rows, draws) - volume
        reconstruction, kl = scoring.elbo_terms(model, rows, draws)
        loss = reconstruction + kl if kind == "elbo" else reconstruction
        return scoring.entropy(model, rows) - loss - volume

    def score(self, X: Any, y: object = None) -> float:
        """Return the mean of :meth:`score_samples`, for model selection by ``GridSearchCV``; ``y`` is ignored."""
        return float(np.mean(self.score_samples(X)))
