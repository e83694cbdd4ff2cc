"""From data units to the standardised units the networks work in, and back."""

import math
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cvae_dist.errors import InvalidInput
from cvae_dist.store.moments import Moments

MAX_STANDARDISED = 10.0  # the scale of a rare feature is raised until no training row lies further out
_CONSTANT = 2.4e-7  # relative: two units in the last place of float32, the noise of computed constants
_COMMON_TOLERANCE = 0.25
_COMMON_SHARE = 0.6
_FEWEST_COMMON = 8  # fewer features than this are too few to tell a common unit from chance
_ALIKE = 5.0  # embeddings have a spread of 1.2 to 2.5, tables of mixed units 50 to 50,000
_ALIKE_IN_ORDER = 100.0
_TAIL = 2.5  # standard deviations: normal values reach 3 to 4, intensities of images 0.3 to 2 on their shorter side
_SAFE_OFFSET = 4.0  # up to this |center| / scale, float32 arithmetic is exact to 1e-6
_SAFE_MAGNITUDE = 1e30  # far from the ends of float32

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Choice:
    """A setting decided from the data, and why."""

    value: bool | int | str
    reason: str


def choose_normalization(
    requested: bool | Literal["auto"],
    moments: Moments,
    dtype: str | np.dtype[np.generic],
    item_shape: tuple[int, ...],
) -> Choice:
    """Decide ``feature_normalization``: one scale per feature (True) or one for all (False)."""
    if requested != "auto":
        return Choice(requested, f"feature_normalization={requested}, as asked for")
    if np.dtype(dtype) == np.uint8:
        return Choice(False, "one scale for all features: uint8 values share their unit")
    if len(item_shape) > 1:
        return Choice(False, f"one scale for all features: items of shape {item_shape} share their unit")
    if _common_bounds(moments):
        return Choice(False, "one scale for all features: they share their bounds")
    return _by_spread(moments)


def are_vectors(moments: Moments, dtype: str | np.dtype[np.generic], item_shape: tuple[int, ...]) -> bool:
    """Whether rows are like embeddings: their features vary alike, and have tails on both sides.

    Intensities, such as those of images, end at a bound on one side at least, however they are scaled.
    """
    if not np.issubdtype(dtype, np.floating) or len(item_shape) > 1 or len(moments.mean) < _FEWEST_COMMON:
        return False
    varies = ~is_constant(moments)
    if not varies.any():
        return False
    mean, std = moments.mean[varies], moments.std[varies]
    with np.errstate(invalid="ignore"):  # what is not finite is refused later, by name
        low, high = np.percentile(std, [5, 95])
        reach = np.minimum(mean - moments.minimum[varies], moments.maximum[varies] - mean) / std
        return bool(high <= _ALIKE * low and np.median(reach) >= _TAIL)


def _common_bounds(moments: Moments) -> bool:
    """Whether most features reach close to both ends of the range of all features."""
    active = moments.maximum > moments.minimum
    if np.count_nonzero(active) < _FEWEST_COMMON:
        return False
    low, high = moments.minimum[active], moments.maximum[active]
    margin = _COMMON_TOLERANCE * (high.max() - low.min())
    reaches_both = (low <= low.min() + margin) & (high >= high.max() - margin)
    return bool(reaches_both.mean() >= _COMMON_SHARE)


def _by_spread(moments: Moments) -> Choice:
    """Decide by how far apart the standard deviations lie; means do not matter, as every feature is centred.

    Features of one unit, such as those of an embedding, vary about alike. Those of mixed units do not. Where the order
    of features means something, as in spectra, they may differ more, but there is no jump from one to the next. A jump
    is a step of more than half the way, in logarithms, from the weakest feature to the strongest.
    """
    std = moments.std[~is_constant(moments)]
    if len(std) < _FEWEST_COMMON:
        return Choice(True, f"one scale per feature: {len(std)} that vary are too few to tell a common unit")
    with np.errstate(invalid="ignore"):  # what is not finite is refused later, by name
        low, high = np.percentile(std, [5, 95])
        spread, steps = high / low, np.abs(np.diff(np.log(std.clip(low, high))))
    told = f"95th / 5th percentile of their standard deviations: {spread:.3g}"
    if spread <= _ALIKE:
        return Choice(False, f"one scale for all features: they vary alike ({told}, at most {_ALIKE:g})")
    step = float(np.exp(steps.max()))
    told += f", largest ratio of neighbours within: {step:.3g}"
    if spread <= _ALIKE_IN_ORDER and step <= math.sqrt(spread):
        return Choice(False, f"one scale for all features: neighbours vary alike ({told})")
    return Choice(True, f"one scale per feature: they differ in unit or range ({told})")


class Scaling(nn.Module):
    """Standardise rows: ``(x - center) / scale``.

    Attributes
    ----------
    center, scale : Tensor, shape (n_features,), float64
        In data units. A constant feature has scale 0: it standardises to 0 and is restored as ``center``.
    low, high : Tensor, shape (), float64
        Bounds of all values, in data units.
    """

    def __init__(self, center: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.center, self.scale, self.low, self.high = (
            nn.Buffer(value.to(torch.float64)) for value in (center, scale, low, high)
        )
        inverse = torch.where(self.scale > 0, 1 / self.scale, 0.0)
        self._precision = _precision(self.center, self.scale, inverse)
        self._inverse = nn.Buffer(inverse.to(self._precision), persistent=False)
        self._shift = nn.Buffer((-self.center * inverse).to(self._precision), persistent=False)

    @classmethod
    def of(cls, moments: Moments, dtype: str | np.dtype[np.generic], *, per_feature: bool) -> Self:
        """Derive the scaling from the statistics of the data.

        Raises
        ------
        InvalidInput
            There are no rows, or a mean or variance is not finite.
        """
        _check_usable(moments)
        scale = feature_scales(moments) if per_feature else _global_scale(moments)
        values = (moments.mean, scale, *bounds(moments, dtype))
        return cls(*(torch.from_numpy(np.array(value, np.float64)) for value in values))

    @property
    def n_features(self) -> int:
        """Number of features."""
        return self.center.numel()

    @property
    def active(self) -> Tensor:
        """Which features vary, (n_features,), bool."""
        return self.scale > 0

    @property
    def restored_dtype(self) -> np.dtype[np.floating]:
        """Float type that holds both offset and digits of every feature: float32 if it can, else float64."""
        return np.dtype(np.float32 if self._precision == torch.float32 else np.float64)

    def forward(self, x: Tensor) -> Tensor:
        """Return rows (n, n_features) of any real dtype, standardised, as float32.

        Where a large offset would cost float32 its digits, the difference is taken in float64.
        """
        if self._precision == torch.float32:
            return torch.addcmul(self._shift, x.to(torch.float32), self._inverse)
        return ((x.to(self._precision) - self.center) * self._inverse).to(torch.float32)

    def restore(self, standardised: Tensor) -> Tensor:
        """Return standardised rows in data units, as :attr:`restored_dtype`."""
        rows = standardised.to(self._precision)
        return torch.addcmul(self.center.to(self._precision), rows, self.scale.to(self._precision))


def is_constant(moments: Moments) -> npt.NDArray[np.bool_]:
    """Return which features do not vary beyond the rounding of float32, (n_features,)."""
    constant: npt.NDArray[np.bool_] = (moments.maximum <= moments.minimum) | (
        moments.std <= _CONSTANT * np.abs(moments.mean)
    )
    return constant


def feature_scales(moments: Moments) -> Vector:
    """Return the standard deviation of every feature, (n_features,): raised for rare ones, 0 for constant ones."""
    reach = np.maximum(moments.maximum - moments.mean, moments.mean - moments.minimum)
    return np.where(is_constant(moments), 0.0, np.maximum(moments.std, reach / MAX_STANDARDISED))


def _global_scale(moments: Moments) -> Vector:
    """Return the root mean square of the standard deviations for every feature that varies, else 0."""
    active = ~is_constant(moments)
    scale = np.sqrt(np.mean(moments.std[active] ** 2)) if active.any() else 0.0
    return np.where(active, scale, 0.0)


def bounds(moments: Moments, dtype: str | np.dtype[np.generic]) -> tuple[float, float]:
    """Return bounds of all values: (0, 1) if they lie within, (0, 255) for bytes above 127, else the extremes."""
    low, high = float(moments.minimum.min()), float(moments.maximum.max())
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    return (0.0, 255.0) if np.dtype(dtype) == np.uint8 and high > 127 else (low, high)


def _precision(center: Tensor, scale: Tensor, inverse: Tensor) -> torch.dtype:
    """Return the dtype in which standardising is exact to about 1e-6."""
    offset = (center * inverse).abs().max()
    magnitude = torch.stack([center.abs().max(), scale.max(), inverse.max()]).max()
    return torch.float32 if offset <= _SAFE_OFFSET and magnitude <= _SAFE_MAGNITUDE else torch.float64


def _check_usable(moments: Moments) -> None:
    if moments.count == 0:
        raise InvalidInput("there are no rows to take the scale of the features from; ingest some rows first")
    broken = np.flatnonzero(~(np.isfinite(moments.mean) & np.isfinite(moments.std)))
    if broken.size:
        feature = int(broken[0])
        raise InvalidInput(
            f"{broken.size} features have no finite mean and variance (the first is feature {feature}, mean "
            f"{moments.mean[feature]}), so they cannot be standardised; remove or rescale their values and "
            "ingest again"
        )
