"""How probable rows are under a model, per row and in nats: bounds and estimates of log p(x)."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from cvae_dist.model import tiling
from cvae_dist.model.draws import numbered_noise
from cvae_dist.model.kernels import inference
from cvae_dist.model.tiling import BATCH_SIZE, Floats, Rows
from cvae_dist.model.vae import VAE

Scores = npt.NDArray[np.float64]
Score = Literal["elbo", "reconstruction", "iwae"]


def log_likelihood(vae: VAE, rows: Rows, kind: Score, draws: Sequence[Floats]) -> Scores:
    """Return how probable rows are, (n,), in nats and as a density over the data's units. Higher is more normal.

    ``elbo`` and ``reconstruction`` are relative to the :func:`entropy` of the row, ``iwae`` is not. For ``draws`` see
    :func:`elbo_terms`.
    """
    if kind == "iwae":
        return log_marginal(vae, rows, draws) - vae.likelihood.log_volume
    reconstruction, kl = elbo_terms(vae, rows, draws)
    loss = reconstruction + kl if kind == "elbo" else reconstruction
    return entropy(vae, rows) - loss - vae.likelihood.log_volume


def numbered_scores(vae: VAE, rows: Rows, start: int, batch_size: int) -> dict[str, Floats]:
    """Return what the verb ``score`` writes of rows (n, n_features) whose first row number is ``start``.

    Each of the three is (n,). ``score`` and ``negative_elbo``, in nats, are those of one draw of the latent, which
    depends on the row number alone. ``reconstruction_error``, in the data's units squared, is that of the decoded
    latent.
    """
    noise = numbered_noise(start, start + len(rows), vae.dim_latent)
    reconstruction, kl = vae.score_rows(rows, noise, batch_size)
    error = np.empty(len(rows), np.float32)
    for first in range(0, len(rows), batch_size):
        part = slice(first, first + batch_size)
        decoded = vae.decode_rows(vae.embed_rows(rows[part], batch_size), batch_size, np.float64)
        error[part] = np.square(np.subtract(decoded, rows[part])).mean(axis=1)
    loss = reconstruction + kl
    score = entropy(vae, rows, batch_size) - loss - vae.likelihood.log_volume
    return {"score": score.astype(np.float32), "negative_elbo": loss, "reconstruction_error": error}


def elbo_terms(vae: VAE, rows: Rows, draws: Sequence[Floats]) -> tuple[Scores, Scores]:
    """Return reconstruction, -log p(x | z), and KL per row, each (n,), averaged over ``draws``.

    Each of ``draws`` is standard normal: (dim_latent,), used for all rows, so that the terms of a row depend neither on
    the others nor on its place among them; or (n, dim_latent), for a more precise mean over many rows.
    """
    total = np.zeros((2, len(rows)))
    for draw in draws:
        total += vae.score_rows(rows, np.broadcast_to(draw, (len(rows), vae.dim_latent)))
    return total[0] / len(draws), total[1] / len(draws)


def log_marginal(vae: VAE, rows: Rows, draws: Sequence[Floats]) -> Scores:
    """Return the importance-weighted estimate of log p(x) (Burda et al. 2015) per row, (n,).

    For ``draws`` see :func:`elbo_terms`.
    """
    result = np.full(len(rows), -np.inf)
    with inference():
        for draw in draws:
            noise = np.broadcast_to(draw, (len(rows), vae.dim_latent))
            for part, weights in tiling.by_tiles(vae.log_weights, BATCH_SIZE, rows, noise):
                result[part] = np.logaddexp(result[part], weights)
    estimate: Scores = result - np.log(len(draws))
    return estimate


def entropy(vae: VAE, rows: Rows, batch_size: int = BATCH_SIZE) -> Scores:
    """Return the least reconstruction term that each row can have, (n,), in nats, in float64.

    With a Bernoulli likelihood that of grey rows is above 0. Unless it is added, grey rows seem improbable, and dark
    ones probable, whatever the model knows of them.
    """
    least = np.zeros(len(rows))
    with torch.inference_mode():
        for part, each in tiling.by_tiles(vae.likelihood.entropy, batch_size, rows):
            least[part] = each
    return least
