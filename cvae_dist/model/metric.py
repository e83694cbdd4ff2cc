"""Latents whose distances are like those of the rows: what ``metric="data"`` makes of them.

Posterior means have unit spread in every direction that the model uses, however little a direction changes the rows.
Here each direction is stretched by a power of how much it does.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from cvae_dist.errors import InvalidInput

Metric = Literal["latent", "data"]

_MOST_ROWS = 2000
_DERIVATIVES = 2**14  # of rows by latent dimensions, in all: their number decides the time that it takes
_VALUES = 2**22  # of Jacobians that are held at once
_STEP = 1e-2  # of latents whose spread is 1: slopes are right to about 1e-4
_POWER = 0.75  # 1 would weigh directions as the rows do, and lose neighbours: tests/bench/model/bench_vectors.py
_FLOOR = 1e-6  # of the largest eigenvalue: a direction that changes nothing can be turned back too
_NOTHING = 1e-12  # eigenvalue of a decoder whose rows are all the same


def check_metric(metric: str, stretch: Tensor | None) -> None:
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


def stretch_of(pullback: Tensor) -> Tensor:
    """Return what latents are multiplied by, and what undoes it, (2, dim_latent, dim_latent) float32.

    It is a power of the ``pullback``, see :func:`mean_pullback`. On average it leaves lengths as they are.
    """
    values, vectors = torch.linalg.eigh(pullback.nan_to_num())
    values = values.clamp_min(max(float(values[-1]) * _FLOOR, _NOTHING))
    powers = values.pow(_POWER / 2)
    powers = powers / powers.square().mean().sqrt()
    return torch.stack([vectors * powers @ vectors.T, vectors / powers @ vectors.T]).float()


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
