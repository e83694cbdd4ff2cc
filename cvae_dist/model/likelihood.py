"""Distribution of a row given the decoder's output: the reconstruction term, the mean and draws.

All work in standardised units (``scaling``). Constant features take no part: a feature without variance would drag a
shared sigma to zero.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cvae_dist.config import LikelihoodName
from cvae_dist.errors import InvalidInput
from cvae_dist.model.scaling import Choice, Scaling, is_constant
from cvae_dist.store.moments import Moments

_LOG_SIGMA_RANGE = (-6.0, 4.0)
_LOG_DOF_RANGE = (0.0, math.log(1000.0))
_FIRST_DOF = 4.0
_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)
_BINARY = 0.99  # share of the greatest variance that values in [0, 1] can have; binary data reach 1
_LOGIT_MARGIN = 1e-3
_SHARE_MARGIN = 0.02  # a continuous Bernoulli feature starts at most at logit 50
_HEAVY_KURTOSIS = 30.0
_HEAVY_SHARE = 0.5
_SERIES_BELOW = 0.5  # |logit|: there the log normaliser's series is exact to 1e-11
_UNIFORM_BELOW = 1e-4  # |logit|: there a continuous Bernoulli is uniform to 1e-5


def choose_likelihood(requested: LikelihoodName, moments: Moments) -> Choice:
    """Decide ``likelihood`` from the statistics alone.

    ``bernoulli`` for binary values, ``student_t`` where most features are certain to have heavy tails, else
    ``gaussian``. Grey images are Gaussian too, in whatever unit: their cross-entropy is no likelihood, and a learned
    sigma keeps the neighbourhoods of MNIST better (5-NN .977 against .968, trustworthiness .993 against .972).
    """
    if requested != "auto":
        return Choice(requested, f"likelihood={requested}, as asked for")
    low, high = float(moments.minimum.min()), float(moments.maximum.max())
    if low < 0 or high > 1:
        values = f"the values, {low:.6g} to {high:.6g}, are not probabilities in [0, 1]"
        heavy = _heavy_tailed_share(moments)
        if heavy > _HEAVY_SHARE:
            kurtosis = f"{heavy:.0%} of the features have a kurtosis above {_HEAVY_KURTOSIS:.0f}"
            return Choice("student_t", f"Student-t: {values}, and {kurtosis}")
        return Choice("gaussian", f"Gaussian: {values}")
    greatest = float((moments.mean * (1 - moments.mean)).sum())
    share = float(np.square(moments.std).sum()) / greatest if greatest > 0 else 0.0
    if share >= _BINARY:
        return Choice("bernoulli", f"Bernoulli: values in [0, 1] with {share:.0%} of the variance of binary ones")
    return Choice("gaussian", f"Gaussian: values in [0, 1] with only {share:.0%} of the variance of binary ones")


def _heavy_tailed_share(moments: Moments) -> float:
    """Return the share of the varying features that are certain to have heavy tails.

    The two extreme values alone give a lower bound of the kurtosis. Both must lie more than one standard deviation from
    the mean. A feature that is seldom on has one extreme next to it; being rare is not having heavy tails.
    """
    active = ~is_constant(moments)
    if not active.any():
        return 0.0
    std = moments.std[active]
    below = (moments.mean - moments.minimum)[active] / std
    above = (moments.maximum - moments.mean)[active] / std
    heavy = (below**4 + above**4) / moments.count > _HEAVY_KURTOSIS
    return float(np.mean(heavy & (below > 1) & (above > 1)))


class _Likelihood(nn.Module):
    """What all likelihoods have in common.

    Attributes
    ----------
    active : Tensor, shape (n_features,), float32
        1 for features that vary, 0 for constant ones.
    log_volume : float
        log |dx / d standardised| in nats: how much lower a log density is in the data's units than in those of the
        reconstruction term. 0 for Bernoulli features, which have no density.
    """

    log_volume = 0.0

    def __init__(self, scaling: Scaling) -> None:
        super().__init__()
        self.active = nn.Buffer(scaling.active.to(torch.float32), persistent=False)

    def entropy(self, rows: Tensor) -> Tensor:
        """Return the least reconstruction term that each row can have, (n,) float64, in nats.

        Zeros where all rows have the same. ``rows`` are (n, n_features) in data units.
        """
        return torch.zeros(len(rows), dtype=torch.float64, device=rows.device)


class _Location(_Likelihood):
    """The decoder's output is the mean, or the median, of every feature in standardised units.

    Parameters
    ----------
    scaling : Scaling
    log_sigma : Parameter or Buffer, shape () or (n_features,)
        Logarithm of the scale, one for all features or one for each. A parameter is learned.
    """

    def __init__(self, scaling: Scaling, log_sigma: Tensor) -> None:
        super().__init__(scaling)
        self.log_sigma = log_sigma
        self.log_volume = float(scaling.scale[scaling.active].log().sum())

    @property
    def sigma(self) -> Tensor:
        """Scale in standardised units, () or (n_features,)."""
        return self.log_sigma.clamp(*_LOG_SIGMA_RANGE).exp()

    def initial_output(self) -> Tensor:
        """Return the output, (n_features,), whose mean is the mean row."""
        return torch.zeros_like(self.active)

    def mean(self, output: Tensor) -> Tensor:
        """Return the mean row in standardised units, (n, n_features)."""
        return output

    def _scaled(self, output: Tensor, standardised: Tensor) -> Tensor:
        return (output - standardised) * (self.active / self.sigma)

    def _log_scale(self) -> Tensor:
        """Return the log-scales summed over the features, ()."""
        return (self.log_sigma.clamp(*_LOG_SIGMA_RANGE) * self.active).sum()


class Gaussian(_Location):
    """Independent normal features around the decoder's output.

    A sigma is learned (Rybkin et al. 2021), one for all features or one for each, or it is 1. With 1 the reconstruction
    term is half the squared error, plus a constant.
    """

    def negative_log_likelihood(self, output: Tensor, standardised: Tensor) -> Tensor:
        """Return -log p(row | output) per row, (n,), in nats of standardised units; all (n, n_features)."""
        squares = self._scaled(output, standardised).square().sum(dim=-1)
        return 0.5 * squares + self._log_scale() + self.active.sum() * _HALF_LOG_TWO_PI

    def draw(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Return one draw per row in standardised units, (n, n_features)."""
        return torch.normal(output, self.sigma.expand_as(output), generator=generator)


class StudentT(_Location):
    """Independent Student-t features around the decoder's output, with a scale and degrees of freedom.

    All features share both, and both are learned. The degrees of freedom stay between 1 (Cauchy) and 1000 (all but
    normal). ``mean`` is the location: the median, and the mean where that exists.
    """

    def __init__(self, scaling: Scaling) -> None:
        super().__init__(scaling, nn.Parameter(torch.zeros(())))
        self.log_dof = nn.Parameter(torch.tensor(math.log(_FIRST_DOF)))

    @property
    def dof(self) -> Tensor:
        """Degrees of freedom, ()."""
        return self.log_dof.clamp(*_LOG_DOF_RANGE).exp()

    def negative_log_likelihood(self, output: Tensor, standardised: Tensor) -> Tensor:
        """Return -log p(row | output) per row, (n,), in nats of standardised units; all (n, n_features)."""
        dof = self.dof
        tails = torch.log1p(self._scaled(output, standardised).square() / dof).sum(dim=-1)
        normaliser = torch.lgamma(dof / 2) - torch.lgamma((dof + 1) / 2) + 0.5 * torch.log(math.pi * dof)
        return 0.5 * (dof + 1) * tails + self._log_scale() + self.active.sum() * normaliser

    def draw(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Return one draw per row in standardised units, (n, n_features): Bailey's polar method (1994)."""
        radius, angle = torch.rand((2, *output.shape), generator=generator, dtype=output.dtype)
        squared = self.dof * torch.expm1(-2 / self.dof * torch.log1p(-radius))
        return output + self.sigma * squared.sqrt() * torch.cos(2 * math.pi * angle)


class _Share(_Likelihood):
    """The decoder gives a logit for every feature. A share is a value's place between the bounds of the data."""

    def __init__(self, scaling: Scaling) -> None:
        super().__init__(scaling)
        self._low, self._width = (
            nn.Buffer(bound, persistent=False) for bound in (scaling.low, scaling.high - scaling.low)
        )
        width = torch.where(self._width > 0, self._width, 1.0)
        self.slope = nn.Buffer((scaling.scale / width).to(torch.float32), persistent=False)
        self.offset = nn.Buffer(((scaling.center - scaling.low) / width).to(torch.float32), persistent=False)

    def _share(self, standardised: Tensor) -> Tensor:
        return torch.addcmul(self.offset, standardised, self.slope).clamp(0, 1)

    def _standardise(self, share: Tensor) -> Tensor:
        return torch.where(self.active > 0, (share - self.offset) / self.slope, 0.0)


class Bernoulli(_Share):
    """Independent Bernoulli features, given as logits. A value between the bounds counts as a share.

    The reconstruction term is the binary cross-entropy, which is never below the entropy of the shares.
    """

    def initial_output(self) -> Tensor:
        """Return the logits, (n_features,), of the mean row."""
        return torch.logit(self.offset, eps=_LOGIT_MARGIN)

    def negative_log_likelihood(self, output: Tensor, standardised: Tensor) -> Tensor:
        """Return -log p(row | logits) per row, (n,), in nats; arguments (n, n_features)."""
        entropy = functional.binary_cross_entropy_with_logits(output, self._share(standardised), reduction="none")
        return (entropy * self.active).sum(dim=-1)

    def entropy(self, rows: Tensor) -> Tensor:
        """Return the entropy of the rows' shares, (n,) float64, in nats; rows (n, n_features) in data units."""
        share = ((rows.to(torch.float64) - self._low) / self._width).clamp(0, 1)
        each: Tensor = (torch.special.entr(share) + torch.special.entr(1 - share)) * self.active
        return each.sum(dim=-1)

    def mean(self, output: Tensor) -> Tensor:
        """Return the mean row in standardised units, (n, n_features)."""
        return self._standardise(torch.sigmoid(output))

    def draw(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Return one draw per row, every feature at its lower or upper bound, in standardised units."""
        return self._standardise(torch.bernoulli(torch.sigmoid(output), generator=generator))


class ContinuousBernoulli(_Share):
    """Independent continuous Bernoulli features (Loaiza-Ganem and Cunningham 2019, arXiv:1907.06845).

    The density of a share s in [0, 1] is proportional to exp(logit * s). Unlike the cross-entropy of grey values, it
    is a density of the bounded interval.
    """

    def __init__(self, scaling: Scaling) -> None:
        super().__init__(scaling)
        self.log_volume = float(self._width.log() * scaling.active.sum())

    def initial_output(self) -> Tensor:
        """Return the logits, (n_features,), of the mean row."""
        share = self.offset.double().clamp(_SHARE_MARGIN, 1 - _SHARE_MARGIN)
        low, high = torch.full_like(share, -1 / _SHARE_MARGIN), torch.full_like(share, 1 / _SHARE_MARGIN)
        for _ in range(60):  # bisection: the mean grows with the logit
            middle = (low + high) / 2
            above = mean_share(middle) > share
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return low.to(self.offset.dtype)

    def negative_log_likelihood(self, output: Tensor, standardised: Tensor) -> Tensor:
        """Return -log p(row | logits) per row, (n,), in nats of shares; arguments (n, n_features)."""
        terms = log_normaliser(output) - output * self._share(standardised)
        return (terms * self.active).sum(dim=-1)

    def mean(self, output: Tensor) -> Tensor:
        """Return the mean row in standardised units, (n, n_features)."""
        return self._standardise(mean_share(output))

    def draw(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Return one draw per row in standardised units, (n, n_features), by inversion of the distribution."""
        uniform = torch.rand(output.shape, generator=generator, dtype=output.dtype)
        size = output.abs().clamp(min=_UNIFORM_BELOW)
        from_below = -torch.log1p(uniform * torch.expm1(-size)) / size
        return self._standardise(torch.where(output > 0, 1 - from_below, from_below))


def log_normaliser(logit: Tensor) -> Tensor:
    """Return log of the integral of exp(logit * s) over s in [0, 1]: log((exp(logit) - 1) / logit), exact around 0."""
    small = logit.clamp(-_SERIES_BELOW, _SERIES_BELOW)
    square = small.square()
    series = small / 2 + square * (1 / 24 - square * (1 / 2880 - square * (1 / 181_440 - square / 9_676_800)))
    size = logit.abs().clamp(min=_SERIES_BELOW)
    far = logit.clamp(min=0) + torch.log(-torch.expm1(-size) / size)
    return torch.where(logit.abs() < _SERIES_BELOW, series, far)


def mean_share(logit: Tensor) -> Tensor:
    """Return the mean of a continuous Bernoulli: the derivative of :func:`log_normaliser`, exact around 0."""
    small = logit.clamp(-_SERIES_BELOW, _SERIES_BELOW)
    square = small.square()
    series = 0.5 + small * (1 / 12 - square * (1 / 720 - square * (1 / 30_240 - square / 1_209_600)))
    size = logit.abs().clamp(min=_SERIES_BELOW)
    far = 1 / size + 1 / -torch.expm1(size)
    return torch.where(logit.abs() < _SERIES_BELOW, series, torch.where(logit > 0, 1 - far, far))


Likelihood = Gaussian | StudentT | Bernoulli | ContinuousBernoulli

_LIKELIHOODS: dict[LikelihoodName, Callable[[Scaling], Likelihood]] = {
    "gaussian": lambda scaling: Gaussian(scaling, nn.Parameter(torch.zeros(()))),
    "gaussian_per_feature": lambda scaling: Gaussian(scaling, nn.Parameter(torch.zeros(scaling.n_features))),
    "gaussian_unit": lambda scaling: Gaussian(scaling, nn.Buffer(torch.zeros(()), persistent=False)),
    "student_t": StudentT,
    "bernoulli": Bernoulli,
    "continuous_bernoulli": ContinuousBernoulli,
}


def make_likelihood(name: LikelihoodName, scaling: Scaling) -> Likelihood:
    """Return the likelihood called ``name`` for data scaled by ``scaling``."""
    if name not in _LIKELIHOODS:
        raise InvalidInput(f"likelihood={name!r} must be decided before the model is built; see `decide`")
    return _LIKELIHOODS[name](scaling)
