"""Reproducible draws: what a row gets depends on a seed and on its row number alone."""

import hashlib
from collections.abc import Iterator

import numpy as np
import torch

from cvae_dist.model.kernels import inference
from cvae_dist.model.prior import Prior
from cvae_dist.model.tiling import Floats, Rows
from cvae_dist.model.vae import VAE

_BLOCK_ROWS = 1024  # rows, counted from row 0, that share one random generator


def numbered_noise(start: int, stop: int, dim_latent: int) -> Floats:
    """Return standard normal noise, (stop - start, dim_latent), for the rows ``start:stop``; its seed is 0."""
    return np.concatenate([_normal(0, block, dim_latent)[part] for part, block in _blocks(start, stop)])


def numbered_rows(
    vae: VAE, start: int, stop: int, *, seed: int, temperature: float, noise: bool, prior: Prior | None
) -> Rows:
    """Draw the rows ``start:stop``, (stop - start, n_features) in data units.

    Parameters
    ----------
    vae : VAE
    start, stop : int
        Row numbers.
    seed : int
    temperature : float
        Scales the spread of the latents.
    noise : bool
        Draw from the likelihood. False gives the mean row of each latent.
    prior : Prior or None
        What latents are drawn from; None: N(0, I).
    """
    drawn = []
    with inference():
        for part, block in _blocks(start, stop):  # whole blocks, so that a row does not depend on its company
            latents = _latents(prior, seed, block, vae.dim_latent, temperature)
            drawn.append((_noisy(vae, latents, seed, block) if noise else vae.decode_rows(latents))[part])
    return np.concatenate(drawn)


def _latents(prior: Prior | None, seed: int, block: int, dim_latent: int, temperature: float) -> Floats:
    if prior is None:
        return np.float32(temperature) * _normal(seed, block, dim_latent)
    return prior.draw(_BLOCK_ROWS, temperature, np.random.RandomState(_key(seed, block, "latent") % 2**32))


def _noisy(vae: VAE, latents: Floats, seed: int, block: int) -> Rows:
    generator = torch.Generator().manual_seed(_key(seed, block, "likelihood"))
    rows: Rows = vae.decode(torch.from_numpy(latents), generator).numpy()
    return rows.astype(vae.scaling.restored_dtype)


def _blocks(start: int, stop: int) -> Iterator[tuple[slice, int]]:
    """Yield, for every block with rows of ``start:stop``, the slice of them in the block and the block's number."""
    for block in range(start // _BLOCK_ROWS, -(-stop // _BLOCK_ROWS)):
        first = block * _BLOCK_ROWS
        yield slice(max(0, start - first), stop - first), block


def _normal(seed: int, block: int, dim_latent: int) -> Floats:
    generator = torch.Generator().manual_seed(_key(seed, block, "latent"))
    draws: Floats = torch.randn(_BLOCK_ROWS, dim_latent, generator=generator).numpy()
    return draws


def _key(seed: int, block: int, purpose: str) -> int:
    digest = hashlib.blake2b(f"{seed} {block} {purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
