"""New rows: from a prior, and between two rows."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cvae_dist.errors import InvalidInput
from cvae_dist.estimator.arrays import checked_block
from cvae_dist.estimator.inputs import GivenRows
from cvae_dist.model import prior as priors
from cvae_dist.model import sampling
from cvae_dist.model.prior import Prior, PriorName
from cvae_dist.model.sampling import Interpolation
from cvae_dist.model.vae import VAE

Floats = NDArray[np.floating[Any]]


def check_draws(n: int, temperature: float = 1.0) -> None:
    """Refuse a number of draws or a spread that cannot be."""
    if not isinstance(n, Integral) or n < 1:
        raise InvalidInput(f"{n!r} draws were asked for: ask for a whole number, at least 1")
    if not isinstance(temperature, Real) or not 0 <= temperature < np.inf:
        raise InvalidInput(f"temperature={temperature!r} is no factor of a spread: give a finite number >= 0")


def sample(
    model: VAE, n: int, temperature: float, noise: bool, prior: Prior | None, random: np.random.RandomState
) -> Floats:
    """Return ``n`` new rows from a fitted prior, or from N(0, I) where there is none."""
    if prior is None:
        latents = np.float32(temperature) * sampling.standard_normal(n, model.dim_latent, random)
    else:
        latents = prior.draw(n, temperature, random)
    if noise:
        return sampling.decode_draws(model, latents, int(random.randint(2**31)))
    return cast(Floats, model.decode_rows(latents))


def fit_prior(model: VAE, rows: GivenRows, name: PriorName, n_components: int, random: np.random.RandomState) -> Prior:
    """Fit a prior to one draw from the posterior of each row."""
    latents = sampling.posterior_draws(model, rows.some(priors.MAX_FITTED_ROWS), 1, random)[:, 0]
    return priors.fit_prior(name, latents, random, n_components)


def interpolate(model: VAE, a: ArrayLike, b: ArrayLike, n: int, kind: Interpolation) -> Floats:
    """Return ``n`` rows on the way from one row to another, through the latent space."""
    rows = [np.ravel(end) for end in (a, b)]
    if any(row.size != model.n_features for row in rows):
        raise InvalidInput(
            f"a of shape {np.shape(a)} and b of shape {np.shape(b)} are not both a row of {model.n_features} "
            "features: give two rows, or items, of the kind the model was trained on"
        )
    start, end = model.embed_rows(checked_block(np.asarray(rows), model.n_features, "a, b"))
    return cast(Floats, model.decode_rows(sampling.between(start, end, n, kind)))
