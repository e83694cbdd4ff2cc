"""Likelihoods of rows: how many draws of the latent they are estimated from, and which."""

from __future__ import annotations

from functools import partial
from numbers import Integral

import numpy as np

from cvae_dist.errors import InvalidInput
from cvae_dist.estimator.lazy import RowFunction
from cvae_dist.model.scoring import Score, log_likelihood
from cvae_dist.model.vae import VAE

_DEFAULT_DRAWS: dict[Score, int] = {"elbo": 8, "reconstruction": 8, "iwae": 100}


def scores_by(model: VAE, kind: Score, k: int | None, random: np.random.RandomState) -> RowFunction:
    """Return the function of rows that gives their scores, all from the same ``k`` draws."""
    if kind not in _DEFAULT_DRAWS:
        raise InvalidInput(f"kind={kind!r} is unknown: choose one of {', '.join(_DEFAULT_DRAWS)}")
    count = _DEFAULT_DRAWS[kind] if k is None else k
    if not isinstance(count, Integral) or count < 1:
        raise InvalidInput(f"k={k!r}: a score needs at least 1 draw of the latent, and a whole number of them")
    draws = list(random.standard_normal((count, model.dim_latent)).astype(np.float32))
    return partial(log_likelihood, model, kind=kind, draws=draws)
