"""How probable rows are under a model, per row and in nats: bounds and estimates of log p(x)."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from cvae_dist.model import tiling
from cvae_dist.model.draws import numbered_noise
from cvae_dist.model.kernels import inference
from cvae_dist.model.vae import VAE

Rows = npt.NDArray[np.generic]
Floats = npt.NDArray[np.float32]
Scores = npt.NDArray[np.float64]
Score = Literal["elbo", "reconstruction", "iwae"]


def log_likelihood(vae: VAE, rows: Rows, kind: Score, draws: Sequence[Floats]) -> Scores:
    """Return how probable rows are, (n,), in nats and as a density over the data's units; higher is more normal.

    ``elbo`` and ``reconstruction`` are relative to the :func:`entropy` of the row, ``iwae`` is not.
    """
    if kind == "iwae":
        return log_marginal(vae, rows, draws) - log_volume(vae)
    reconstruction, kl = elbo_terms(vae, rows, draws)
    loss = reconstruction + kl if kind == "elbo" else reconstruction
    return entropy(vae, rows) - loss - log_volume(vae)


def numbered_scores(vae: VAE, rows: Rows, start: int, batch_size: int) -> dict[str, Floats]:
    """Return what the verb ``score`` writes of rows (n, n_features), the first of which has the number ``start``.

    ``score`` and ``negative_elbo``, each (n,), in nats, from one draw of the latent that depends on a row's number
    alone; ``reconstruction_error``, (n,), of the decoded posterior mean, in the data's units squared.
    """
    noise = numbered_noise(start, start + len(rows), vae.dim_latent)
    reconstruction, kl = vae.score_rows(rows, noise, batch_size)
    error = np.empty(len(rows), np.float32)
    for first in range(0, len(rows), batch_size):
        part = slice(first, first + batch_size)
        decoded = vae.decode_rows(vae.embed_rows(rows[part], batch_size), batch_size, np.float64)
        error[part] = np.square(np.subtract(decoded, rows[part])).mean(axis=1)
    loss = reconstruction + kl
    score = entropy(vae, rows, batch_size) - loss - log_volume(vae)
    return {"score": score.astype(np.float32), "negative_elbo": loss, "reconstruction_error": error}


def elbo_terms(vae: VAE, rows: Rows, draws: Sequence[Floats], batch_size: int = 2048) -> tuple[Scores, Scores]:
    """Return reconstruction, -log p(x | z), and KL per row, each (n,), averaged over ``draws``.

    ``draws`` are standard normal: (dim_latent,) each, the same for all rows, so that a row's terms depend neither on
    its company nor on its place; or (n, dim_latent) each, which makes the mean over many rows more precise.
    """
    total = np.zeros((2, len(rows)))
    for draw in draws:
        total += vae.score_rows(rows, np.broadcast_to(draw, (len(rows), vae.dim_latent)), batch_size)
    return total[0] / len(draws), total[1] / len(draws)


def log_marginal(vae: VAE, rows: Rows, draws: Sequence[Floats], batch_size: int = 2048) -> Scores:
    """Return the importance-weighted estimate of log p(x) (Burda et al. 2015) per row, (n,); see :func:`elbo_terms`."""
    result = np.full(len(rows), -np.inf)
    with inference():
        for draw in draws:
            noises = tiling.tiles(np.broadcast_to(draw, (len(rows), vae.dim_latent)), batch_size)
            for (part, tile), (_, noise) in zip(tiling.tiles(rows, batch_size), noises, strict=True):
                weights = vae.log_weights(tile, noise)[: part.stop - part.start].numpy(force=True)
                result[part] = np.logaddexp(result[part], weights)
    estimate: Scores = result - np.log(len(draws))
    return estimate


def entropy(vae: VAE, rows: Rows, batch_size: int = 2048) -> Scores:
    """Return the least reconstruction term a row can have, (n,), in nats; zeros where it is the same for all rows.

    Values between the bounds of a Bernoulli count as shares, whose cross-entropy is never below their own entropy.
    Grey rows therefore look improbable, and dark ones probable, whatever the model knows of them.
    """
    floor = np.zeros(len(rows))
    if vae.config.likelihood != "bernoulli":
        return floor
    low, width = vae.scaling.low, vae.scaling.high - vae.scaling.low
    with torch.inference_mode():
        for part, tile in tiling.tiles(rows, batch_size):
            share = ((tile.to(torch.float64) - low) / width).clamp(0, 1)
            each = (torch.special.entr(share) + torch.special.entr(1 - share)) * vae.scaling.active
            floor[part] = each.sum(dim=-1)[: part.stop - part.start].numpy(force=True)
    return floor


def log_volume(vae: VAE) -> float:
    """Return log |dx / d standardised| in nats: what a density of standardised rows loses in the data's units.

    0 for Bernoulli features, whose likelihood is no density.
    """
    if vae.config.likelihood == "bernoulli":
        return 0.0
    active = vae.scaling.active
    if vae.config.likelihood == "continuous_bernoulli":  # a density of shares of the bounds
        return float((vae.scaling.high - vae.scaling.low).log() * active.sum())
    return float(vae.scaling.scale[active].log().sum())
