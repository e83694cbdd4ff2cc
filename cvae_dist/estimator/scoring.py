"""How normal rows are to the model, and how well the model is."""

from __future__ import annotations

from functools import partial
from numbers import Integral
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from sklearn.utils import check_random_state

from cvae_dist.errors import InvalidInput
from cvae_dist.estimator import lazy
from cvae_dist.estimator.inference import Inference
from cvae_dist.model import scoring
from cvae_dist.model.scoring import Score

_DEFAULT_DRAWS = {"elbo": 8, "reconstruction": 8, "iwae": 100}


class Scoring(Inference):
    """Likelihoods of rows."""

    def score_samples(
        self,
        X: Any,
        kind: Score = "elbo",
        k: int | None = None,
        random_state: int | np.random.RandomState | None = 0,
    ) -> NDArray[np.float64]:
        """Return how normal rows are to the model: higher is more normal, as in scikit-learn.

        Parameters
        ----------
        X : array, DataFrame, path, URL or RowStore
            Rows as for :meth:`embed`; lazy ones give lazy scores with their coordinates.
        kind : {"elbo", "reconstruction", "iwae"}
            ``elbo``: the lower bound of log p(x). ``reconstruction``: its first part, E[log p(x | z)]. With the
            Bernoulli likelihood both are given relative to the best any model could do for this very row, that is
            the row's own entropy is added: otherwise dark, empty rows score as normal whatever they show. Take these
            two to find unusual rows. ``iwae``: the importance-weighted estimate of log p(x) itself, as published
            figures are given; nothing is added.
        k : int, optional
            Draws of the latent. Default: 8, or 100 for ``iwae``.
        random_state : int, RandomState or None
            Seed of the draws, which are the same for all rows: a row scores the same in any company. None: other
            draws at every call.

        Returns
        -------
        (n,) float64 array
            Nats, as a density over the data's units; with Bernoulli features a probability. A plain autoencoder
            (``kl_weight=0``) has no bound; its ``elbo`` is its reconstruction.
        """
        model = self._model()
        if kind not in _DEFAULT_DRAWS:
            raise InvalidInput(f"kind={kind!r} is unknown: choose one of {', '.join(_DEFAULT_DRAWS)}")
        count = _DEFAULT_DRAWS[kind] if k is None else k
        if not isinstance(count, Integral) or count < 1:
            raise InvalidInput(f"k={k!r}: a score needs at least 1 draw of the latent, and a whole number of them")
        random = check_random_state(random_state)
        draws = list(random.standard_normal((count, model.dim_latent)).astype(np.float32))
        scores = partial(scoring.log_likelihood, model, kind=kind, draws=draws)
        return cast("NDArray[np.float64]", self._mapped(X, scores, lazy.SCORES, (), np.float64))

    def score(self, X: Any, y: object = None) -> float:
        """Return the mean of :meth:`score_samples`, for model selection by ``GridSearchCV``; ``y`` is ignored.

        It compares models of the same rows whose likelihoods are all densities, but not those with one whose
        likelihood is ``bernoulli``: a probability of shares is no density.
        """
        with lazy.computed(self.score_samples(X), lazy.SCORES) as scores:
            return float(np.mean(scores))
