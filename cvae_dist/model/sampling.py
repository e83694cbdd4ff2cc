"""Latents that are drawn: from a prior, from the posterior of given rows, or between two others."""

import hashlib
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cvae_dist.config import ComputePrecision
from cvae_dist.errors import InvalidInput
from cvae_dist.model import tiling
from cvae_dist.model.kernels import compute_dtype, inference
from cvae_dist.model.tiling import BATCH_SIZE, Floats, Rows
from cvae_dist.model.vae import VAE

Interpolation = Literal["linear", "slerp"]

_SPREAD_DRAWS = 64
_PARALLEL = 1e-6  # radians: below it the two arcs differ by less than float32 can tell


def standard_normal(n: int, dim_latent: int, random: np.random.RandomState) -> Floats:
    """Return draws, (n, dim_latent), of the prior the model was trained with."""
    draws: Floats = random.standard_normal((n, dim_latent)).astype(np.float32)
    return draws


def posterior_draws(vae: VAE, rows: Rows, k: int, random: np.random.RandomState) -> Floats:
    """Return ``k`` draws of the posterior of each row, (n, k, dim_latent), of rows (n, n_features) in data units."""
    draws = np.empty((len(rows), k, vae.dim_latent), np.float32)
    for index in range(k):
        draws[:, index] = standard_normal(len(rows), vae.dim_latent, random)
    noises = draws.reshape(len(rows), k * vae.dim_latent)

    def drawn(tile: Tensor, noise: Tensor) -> Tensor:
        return torch.stack(list(vae.draws(tile, noise.reshape(len(noise), k, -1).unbind(1))), dim=1)

    with inference():
        for part, latents in tiling.by_tiles(drawn, BATCH_SIZE, rows, noises):
            draws[part] = latents
    return draws


def posterior_draws_of_block(vae: VAE, rows: Rows, k: int, seed: int) -> Floats:
    """Return :func:`posterior_draws` that depend on ``seed`` and on these rows alone, wherever they are computed."""
    digest = hashlib.blake2b(np.ascontiguousarray(rows).data, digest_size=16, key=str(seed).encode()).digest()
    return posterior_draws(vae, rows, k, np.random.RandomState(np.frombuffer(digest, np.uint32)))


def posterior_moments(
    vae: VAE, rows: Rows, batch_size: int = BATCH_SIZE, precision: ComputePrecision = "float32"
) -> tuple[Floats, Floats]:
    """Return mean and log-variance of the posteriors before a flow, each (n, dim_latent)."""
    moments = np.empty((2, len(rows), vae.dim_latent), np.float32)
    tile_rows = tiling.cached_rows(vae.n_features, batch_size)
    with inference(compute_dtype(precision)):
        for part, both in tiling.by_tiles(lambda tile: torch.stack(vae.encode(tile), dim=1), tile_rows, rows):
            moments[:, part] = both.swapaxes(0, 1)
    return moments[0], moments[1]


def posterior_spread(
    vae: VAE, rows: Rows, batch_size: int = BATCH_SIZE, precision: ComputePrecision = "float32"
) -> Floats:
    """Return the posteriors' standard deviations, (n, dim_latent). Behind a flow they are estimated from 64 draws.

    The draws are the same for all rows, so the spread of a row does not depend on the others.
    """
    if vae.flow is None:
        spread: Floats = np.exp(0.5 * posterior_moments(vae, rows, batch_size, precision)[1])
        return spread
    random = np.random.RandomState(0)
    noises = torch.from_numpy(standard_normal(_SPREAD_DRAWS, vae.dim_latent, random))
    total = np.zeros((2, len(rows), vae.dim_latent))
    with inference(compute_dtype(precision)):
        for part, tile in tiling.tiles(rows, tiling.cached_rows(vae.n_features, batch_size)):
            for drawn in vae.draws(tile, (noise.expand(len(tile), -1) for noise in noises)):
                exact = drawn[: part.stop - part.start].numpy(force=True).astype(np.float64)
                total[:, part] += exact, exact**2
    mean, square = total / _SPREAD_DRAWS
    deviation: Floats = np.sqrt(np.maximum(square - mean**2, 0)).astype(np.float32)
    return deviation


def decode_draws(vae: VAE, latents: Floats, seed: int) -> npt.NDArray[np.floating]:
    """Return one draw of p(x | z) for each latent: rows (n, n_features) in data units, the decoder's noise included."""
    generator = torch.Generator().manual_seed(seed)
    rows = np.empty((len(latents), vae.n_features), vae.scaling.restored_dtype)
    with inference():
        for part, drawn in tiling.by_tiles(lambda tile: vae.decode(tile, generator), BATCH_SIZE, latents):
            rows[part] = drawn
    return rows


def between(start: Floats, end: Floats, n: int, kind: Interpolation) -> Floats:
    """Return ``n`` latents, (n, dim_latent), from ``start`` to ``end``, each (dim_latent,) and both included.

    ``linear`` follows the straight line. ``slerp`` (Shoemake 1985) turns the direction and changes the length evenly,
    so it stays where a prior of many dimensions has its mass.

    Raises
    ------
    InvalidInput
        The kind is unknown, or there is no step to take.
    """
    if n < 2:
        raise InvalidInput(f"n={n}: an interpolation needs at least its two ends; ask for n >= 2")
    share = np.linspace(0, 1, n)[:, None]
    a, b = start.astype(np.float64), end.astype(np.float64)
    if kind == "linear":
        return ((1 - share) * a + share * b).astype(np.float32)
    if kind == "slerp":
        return _slerp(a, b, share).astype(np.float32)
    raise InvalidInput(f"kind={kind!r} is unknown: choose 'linear' or 'slerp'")


def _slerp(
    a: npt.NDArray[np.float64], b: npt.NDArray[np.float64], share: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    line: npt.NDArray[np.float64] = (1 - share) * a + share * b
    lengths = np.linalg.norm(a), np.linalg.norm(b)
    if min(lengths) == 0:
        return line
    u, v = a / lengths[0], b / lengths[1]
    angle = np.arctan2(np.linalg.norm(u - v), np.linalg.norm(u + v)) * 2
    if angle < _PARALLEL or np.pi - angle < _PARALLEL:  # the arc is the line, or no arc is the shortest
        return line
    direction = (np.sin((1 - share) * angle) * u + np.sin(share * angle) * v) / np.sin(angle)
    arc: npt.NDArray[np.float64] = ((1 - share) * lengths[0] + share * lengths[1]) * direction
    return arc
