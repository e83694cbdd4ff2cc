"""Held-out rows with fixed noise: successive validations differ by the weights alone."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cvae_dist.config import MAX_VALIDATION_ROWS
from cvae_dist.model.kernels import inference
from cvae_dist.model.tiling import tiles
from cvae_dist.model.vae import VAE, Terms
from cvae_dist.store.permutation import pick_rows
from cvae_dist.store.ranges import RowNumbers
from cvae_dist.store.reader import Reader
from cvae_dist.training.loader import read_rows
from cvae_dist.training.world import World

_MAX_BYTES = 16_000_000
_BATCH_SIZE = 1024


def choose_rows(reader: Reader, count: int, seed: int) -> RowNumbers:
    """Choose ``count`` rows, or as many as there are and as may be held in memory during the whole training."""
    return pick_rows(reader.n_rows, min(count, affordable_rows(reader)), seed)


def affordable_rows(reader: Reader) -> int:
    """Return how many rows may be held in memory during the whole training, and are not too many to validate on."""
    return min(MAX_VALIDATION_ROWS, max(1, _MAX_BYTES // (reader.n_features * reader.dtype.itemsize)))


@dataclass(frozen=True, eq=False)
class Validation:
    """Rows held in memory, (n, n_features), and their noise, (n, dim_latent).

    Rank 0 holds all ``count`` of them, another rank those that it computes.
    """

    rows: npt.NDArray[np.generic]
    noise: npt.NDArray[np.float32]
    count: int

    @classmethod
    def read(cls, reader: Reader, chosen: RowNumbers, dim_latent: int, seed: int, world: World | None = None) -> Self:
        """Read the ``chosen`` rows, sorted positions, and draw their noise."""
        noise = torch.randn((len(chosen), dim_latent), generator=torch.Generator().manual_seed(seed)).numpy()
        if world is None or world.leads:
            return cls(read_rows(reader, chosen), noise, len(chosen))
        mine = np.arange(len(chosen)) // _BATCH_SIZE % world.size == world.rank
        return cls(read_rows(reader, chosen[mine]), noise[mine], len(chosen))

    def __len__(self) -> int:
        return self.count

    def terms(self, vae: VAE, weights: Mapping[str, Tensor], world: World | None = None) -> tuple[float, float]:
        """Return mean reconstruction and KL per row, in nats, of ``vae`` with these ``weights``.

        Every rank of ``world`` computes some tiles of the rows.
        """
        world = world or World()
        device = world.device
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        step = world.size if world.leads else 1
        with inference():
            both = zip(tiles(self.rows, _BATCH_SIZE), tiles(self.noise, _BATCH_SIZE), strict=True)
            for (part, tile), (_, noise) in itertools.islice(both, 0, None, step):
                terms: Terms = torch.func.functional_call(vae, dict(weights), (tile.to(device), noise.to(device)))
                stacked = torch.stack((terms.reconstruction, terms.kl))
                sums += stacked[:, : part.stop - part.start].sum(dim=1, dtype=torch.float64)
        world.sum(sums)
        reconstruction, kl = (sums / len(self)).tolist()
        return reconstruction, kl
