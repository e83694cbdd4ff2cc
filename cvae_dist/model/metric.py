"""Latents whose distances are like those of the rows: what ``metric="data"`` makes of them.

Posterior means have unit spread in every direction that the model uses, however little a direction changes the rows.
Here each direction is stretched by a power of how much it does.

Rows of one length, such as embeddings, lie on a sphere, where near means a small angle. The lengths of their latents
differ all the same: a row that the model is less certain of lies nearer to the origin. Here they differ less.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from cvae_dist.errors import InvalidInput
from cvae_dist.model.kernels import exact

Metric = Literal["latent", "data"]

_MOST_ROWS = 2000
_DERIVATIVES = 2**14  # of rows by latent dimensions, in all: their number decides the time that it takes
_VALUES = 2**22  # of Jacobians that are held at once
_STEP = 1e-2  # of latents whose spread is 1: slopes are right to about 1e-4
_POWER = 0.5  # 1 would weigh directions as the rows do, and lose neighbours: tests/bench/model/bench_vectors.py
_POWER_OF_LENGTHS = 0.25  # 0 would leave directions alone, and could not be undone
_ONE_LENGTH = 0.08  # relative spread of lengths: that of unit vectors of text is .01 to .03, of images .13
_FLOOR = 1e-6  # of the largest eigenvalue: a direction that changes nothing can be turned back too
_NO_LENGTH = 1e-20  # of a latent at the origin, which stays there
_NO_LENGTH_AT_ALL = 1e-3  # of the latents of a model that learned nothing
_NOTHING = 1e-12  # eigenvalue of a decoder whose rows are all the same


class Stretch(nn.Module):
    """From latents as they are to those whose distances are like the rows', and back.

    Parameters
    ----------
    matrices : Tensor, shape (2, dim_latent, dim_latent), float32
        What latents are multiplied by, and what undoes it. Both are symmetric.
    power : Tensor, shape (), float32
        The power that their lengths are then raised to.
    """

    def __init__(self, matrices: Tensor, power: Tensor) -> None:
        super().__init__()
        self.matrices, self.power = nn.Buffer(matrices), nn.Buffer(power)

    def forward(self, latents: Tensor) -> Tensor:
        """Return latents (n, dim_latent), stretched."""
        return _lengths_to_the(self.power, _times(latents, self.matrices[0]))

    def undo(self, stretched: Tensor) -> Tensor:
        """Return the latents, (n, dim_latent), that :meth:`forward` made ``stretched`` of."""
        return _times(_lengths_to_the(1 / self.power, stretched), self.matrices[1])


def _times(latents: Tensor, matrix: Tensor) -> Tensor:
    """Return latents (n, dim_latent) times a symmetric matrix."""
    return exact(latents, matrix, torch.zeros(len(matrix)))


def _lengths_to_the(power: Tensor, latents: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(latents, dim=1, keepdim=True)
    return latents * lengths.clamp_min(_NO_LENGTH).pow(power - 1)


def check_metric(metric: str, stretch: Stretch | None) -> None:
    """Refuse a metric that does not exist, or that a model without ``stretch`` does not know.

    Raises
    ------
    InvalidInput
        It is so.
    """
    if metric not in ("latent", "data"):
        raise InvalidInput(
            f"metric={metric!r} is unknown: choose 'latent', the latents as they are, or 'data', the latents stretched "
            "so that Euclidean distances are like those of the rows"
        )
    if metric == "data" and stretch is None:
        raise InvalidInput(
            "this model was trained by a release that did not know metric='data', and lacks the matrix for it. "
            "Use metric='latent', or train the model again with --overwrite"
        )


def rows_to_look_at(dim_latent: int) -> int:
    """Return how many rows are enough, and affordable, for :func:`mean_pullback`."""
    return min(_MOST_ROWS, max(1, _DERIVATIVES // dim_latent))


def stretch_of(pullback: Tensor, latents: Tensor, lengths: Tensor) -> Stretch:
    """Return what makes a power of the ``pullback``, see :func:`mean_pullback`, the metric of latents.

    Parameters
    ----------
    pullback : Tensor, shape (dim_latent, dim_latent)
    latents : Tensor, shape (n, dim_latent)
        Of some rows. On average, their lengths stay as they are.
    lengths : Tensor, shape (n,)
        Of the same rows, about their mean. Where they hardly differ, those of the latents are made to differ less.
    """
    values, vectors = torch.linalg.eigh(pullback.nan_to_num())
    values = values.clamp_min(max(float(values[-1]) * _FLOOR, _NOTHING))
    powers = values.pow(_POWER / 2)
    powers = powers / powers.square().mean().sqrt()
    there, back = ((vectors * gains @ vectors.T).float() for gains in (powers, 1 / powers))
    if not lengths.std(correction=0) < _ONE_LENGTH * lengths.mean():
        return Stretch(torch.stack([there, back]), torch.tensor(1.0))
    length = _times(latents, there).square().sum(dim=1).mean().sqrt().clamp_min(_NO_LENGTH_AT_ALL)
    gain = length ** (1 / _POWER_OF_LENGTHS - 1)
    return Stretch(torch.stack([there * gain, back / gain]), torch.tensor(_POWER_OF_LENGTHS))


def mean_pullback(decode: Callable[[Tensor], Tensor], latents: Tensor) -> Tensor:
    """Return the mean of J^T J over latents (n, dim_latent), as (dim_latent, dim_latent) float64.

    J is the Jacobian of ``decode``, which makes (n, n_features) of (n, dim_latent), from central differences. Torch's
    forward derivatives would take as long, and seconds more the first time.
    """
    steps = _STEP * torch.eye(latents.shape[1])
    total = torch.zeros(steps.shape, dtype=torch.float64)
    n_features = decode(latents[:1]).shape[1]
    for part in torch.split(latents, max(1, _VALUES // (len(steps) * n_features))):
        ahead, behind = (decode((part + step).flatten(0, 1)) for step in (steps[:, None], -steps[:, None]))
        slopes = ((ahead - behind) / (2 * _STEP)).reshape(len(steps), -1)
        total += slopes @ slopes.T
    return total / len(latents)
