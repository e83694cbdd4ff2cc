"""Mergeable first and second moments per feature, in float64."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]

_TILE_VALUES = 65_536  # 512 kB of float64: stays in a core's L2 cache
_VECTOR_VALUES = (
    512  # narrow rows are folded to this width so that every reduction runs over long contiguous rows
)


@dataclass(frozen=True)
class Moments:
    """Count, mean, sum of squared deviations and range of every feature.

    Attributes
    ----------
    count : int
        Rows seen; the same for every feature.
    mean, m2, minimum, maximum : numpy.ndarray, shape (n_features,), float64
        ``m2`` is the sum of squared deviations from the mean. All in the unit of the data (``m2`` squared).
        ``mean`` and ``m2`` are 0, ``minimum`` is +inf and ``maximum`` is -inf while ``count`` is 0.
    """

    count: int
    mean: Vector
    m2: Vector
    minimum: Vector
    maximum: Vector

    @classmethod
    def empty(cls, n_features: int) -> Self:
        """Return the moments of no rows: the neutral element of :meth:`merge`."""
        zeros, infinity = np.zeros(n_features), np.full(n_features, np.inf)
        return cls(0, zeros, zeros, infinity, -infinity)

    @classmethod
    def of(cls, block: npt.NDArray[np.generic]) -> Self:
        """Compute the moments of ``block``, shape (n_rows, n_features), any finite real dtype.

        One pass over cache-sized float64 tiles. Deviations are taken from the mean of the first tile, which keeps
        the textbook cancellation of sum and sum of squares away (Chan, Golub, LeVeque 1983, section 3).
        A non-finite value makes ``mean`` non-finite; see :meth:`is_finite`.
        """
        rows, features = block.shape
        if rows == 0:
            return cls.empty(features)
        fold = max(1, _VECTOR_VALUES // features)
        folded = rows // fold * fold
        tile_rows = max(1, _TILE_VALUES // (fold * features)) * fold
        shift = block[:tile_rows].mean(axis=0, dtype=np.float64)
        sums = _Sums(shift, fold)
        for start in range(0, folded, tile_rows):
            sums.add(block[start : min(start + tile_rows, folded)])
        tail = _Sums(shift, 1)
        if folded < rows:
            tail.add(block[folded:])
        return cls._from_sums(rows, shift, sums, tail)

    @classmethod
    def _from_sums(cls, rows: int, shift: Vector, *parts: "_Sums") -> Self:
        first = np.sum([part.fold(part.first, np.add) for part in parts], axis=0)
        second = np.sum([part.fold(part.second, np.add) for part in parts], axis=0)
        with np.errstate(invalid="ignore", over="ignore"):
            m2 = np.maximum(second - first * first / rows, 0.0)
        minimum = np.min([part.fold(part.minimum, np.minimum) for part in parts], axis=0)
        maximum = np.max([part.fold(part.maximum, np.maximum) for part in parts], axis=0)
        return cls(rows, shift + first / rows, m2, minimum, maximum)

    @property
    def is_finite(self) -> bool:
        """Whether every value seen was finite."""
        return bool(np.isfinite(self.mean).all())

    @property
    def n_features(self) -> int:
        """Number of features."""
        return len(self.mean)

    @property
    def std(self) -> Vector:
        """Population standard deviation, shape (n_features,), in the unit of the data."""
        std: Vector = np.sqrt(self.m2 / max(self.count, 1))
        return std

    def merge(self, other: "Moments") -> "Moments":
        """Return the moments of both sets of rows (Chan, Golub, LeVeque 1983, eq. 2.1)."""
        if other.count == 0:
            return self
        if self.count == 0:
            return other
        count = self.count + other.count
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * (other.count / count),
            self.m2 + other.m2 + delta * delta * (self.count * (other.count / count)),
            np.minimum(self.minimum, other.minimum),
            np.maximum(self.maximum, other.maximum),
        )


class _Sums:
    """Running sums of one block, ``fold`` rows side by side in one long vector."""

    def __init__(self, shift: Vector, fold: int) -> None:
        width = len(shift) * fold
        self.shift = np.tile(shift, fold)
        self.rows_per_vector = fold
        self.first = np.zeros(width)
        self.second = np.zeros(width)
        self.minimum = np.full(width, np.inf)
        self.maximum = np.full(width, -np.inf)

    def add(self, rows: npt.NDArray[np.generic]) -> None:
        """Add rows, shape (k * fold, n_features)."""
        tile = rows.reshape(-1, len(self.shift)).astype(np.float64)
        np.minimum(self.minimum, tile.min(axis=0), out=self.minimum)
        np.maximum(self.maximum, tile.max(axis=0), out=self.maximum)
        with np.errstate(invalid="ignore", over="ignore"):
            tile -= self.shift
            self.first += tile.sum(axis=0)
            np.multiply(tile, tile, out=tile)
            self.second += tile.sum(axis=0)

    def fold(self, vector: Vector, reduce: np.ufunc) -> Vector:
        """Reduce a folded vector back to one value per feature."""
        folded: Vector = reduce.reduce(vector.reshape(self.rows_per_vector, -1), axis=0)
        return folded
