"""Distribution of a row given the decoder's output: the reconstruction term, the mean and draws.

All work in standardised units (``scaling``). Constant features take no part: a feature without variance would
drag a shared sigma to zero.
"""

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cvae_dist.config import LikelihoodName
from cvae_dist.model.scaling import Choice, Scaling
from cvae_dist.store.moments import Moments

_LOG_SIGMA_RANGE = (-6.0, 4.0)
_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)
_MASS_AT_ENDS = 0.75  # share of the greatest variance that values in [0, 1] can have; binary data reach 1
_LOGIT_MARGIN = 1e-3


def choose_likelihood(requested: LikelihoodName, moments: Moments) -> Choice:
    """Decide ``likelihood``: ``bernoulli`` for binary values and grey values that are mostly 0 or 1."""
    if requested != "auto":
        return Choice(requested, f"likelihood={requested}, as asked for")
    low, high = float(moments.minimum.min()), float(moments.maximum.max())
    if low < 0 or high > 1:
        return Choice("gaussian", f"Gaussian: the values, {low:.6g} to {high:.6g}, are not probabilities in [0, 1]")
    greatest = float((moments.mean * (1 - moments.mean)).sum())
    share = float(np.square(moments.std).sum()) / greatest if greatest > 0 else 0.0
    if share >= _MASS_AT_ENDS:
        return Choice("bernoulli", f"Bernoulli: values in [0, 1] with {share:.0%} of the variance of binary ones")
    return Choice("gaussian", f"Gaussian: values in [0, 1] with only {share:.0%} of the variance of binary ones")


class Gaussian(nn.Module):
    """Independent normal features around the decoder's output with one learned sigma (Rybkin et al. 2021)."""

    active: Tensor

    def __init__(self, scaling: Scaling) -> None:
        super().__init__()
        self.log_sigma = nn.Parameter(torch.zeros(()))
        self.register_buffer("active", scaling.active.to(torch.float32), persistent=False)

    @property
    def sigma(self) -> Tensor:
        """Standard deviation in standardised units, ()."""
        return self.log_sigma.clamp(*_LOG_SIGMA_RANGE).exp()

    def initial_output(self) -> Tensor:
        """Return the output, (n_features,), whose mean is the mean row."""
        return torch.zeros_like(self.active)

    def negative_log_likelihood(self, output: Tensor, standardised: Tensor) -> Tensor:
        """Return -log p(row | output) per row, (n,), in nats of standardised units; all (n, n_features)."""
        log_sigma = self.log_sigma.clamp(*_LOG_SIGMA_RANGE)
        squares = ((standardised - output) * self.active).square().sum(dim=-1)
        return 0.5 * squares * torch.exp(-2 * log_sigma) + self.active.sum() * (log_sigma + _HALF_LOG_TWO_PI)

    def mean(self, output: Tensor) -> Tensor:
        """Return the mean row in standardised units, (n, n_features)."""
        return output

    def draw(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Return one draw per row in standardised units, (n, n_features)."""
        return torch.normal(output, self.sigma.expand_as(output), generator=generator)


class Bernoulli(nn.Module):
    """Independent Bernoulli features; the decoder gives logits; values within (0, 1) count as shares."""

    active: Tensor
    slope: Tensor
    offset: Tensor

    def __init__(self, scaling: Scaling) -> None:
        super().__init__()
        width = scaling.high - scaling.low
        width = torch.where(width > 0, width, 1.0)
        self.register_buffer("active", scaling.active.to(torch.float32), persistent=False)
        self.register_buffer("slope", (scaling.scale / width).to(torch.float32), persistent=False)
        self.register_buffer("offset", ((scaling.center - scaling.low) / width).to(torch.float32), persistent=False)

    def initial_output(self) -> Tensor:
        """Return the logits, (n_features,), of the mean row."""
        return torch.logit(self.offset, eps=_LOGIT_MARGIN)

    def negative_log_likelihood(self, output: Tensor, standardised: Tensor) -> Tensor:
        """Return -log p(row | logits) per row, (n,), in nats; arguments (n, n_features)."""
        share = torch.addcmul(self.offset, standardised, self.slope).clamp(0, 1)
        return (functional.binary_cross_entropy_with_logits(output, share, reduction="none") * self.active).sum(dim=-1)

    def mean(self, output: Tensor) -> Tensor:
        """Return the mean row in standardised units, (n, n_features)."""
        return self._standardise(torch.sigmoid(output))

    def draw(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Return one draw per row, every feature at its lower or upper bound, in standardised units."""
        return self._standardise(torch.bernoulli(torch.sigmoid(output), generator=generator))

    def _standardise(self, share: Tensor) -> Tensor:
        return torch.where(self.active > 0, (share - self.offset) / self.slope, 0.0)


Likelihood = Gaussian | Bernoulli


def make_likelihood(name: Literal["gaussian", "bernoulli"], scaling: Scaling) -> Likelihood:
    """Return the likelihood called ``name`` for data scaled by ``scaling``."""
    return Bernoulli(scaling) if name == "bernoulli" else Gaussian(scaling)
