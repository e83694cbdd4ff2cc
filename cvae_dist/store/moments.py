"""Mergeable first and second moments per feature, in float64."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]

STATISTICS = ("mean", "m2", "minimum", "maximum")  # of every feature

_TILE_VALUES = 131_072  # 1 MB of float64: large enough to forget the calls, small enough to stay in the cache
_VECTOR_VALUES = 512  # narrow rows are folded to this width: reductions then run over long contiguous vectors
_SIGN_AND_HALF = np.int32(-0x70002000)  # 0x8FFFE000: sign, and exponent and fraction of a half in their new place
_NEGLIGIBLE_OFFSET = 4.0  # standard deviations: a mean so near zero costs the sum of squares 4 of its 53 bits


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

        One pass over cache-sized float64 tiles. A sum of squares loses digits far from zero, so the mean of the first
        tile is subtracted, unless it is near zero (Chan, Golub, LeVeque 1983, section 3). A non-finite value makes
        ``mean`` non-finite; see :meth:`is_finite`.
        """
        rows, features = block.shape
        if rows == 0:
            return cls.empty(features)
        fold = max(1, _VECTOR_VALUES // features)
        folded = rows // fold * fold
        tile_rows = max(1, _TILE_VALUES // (fold * features)) * fold
        tile = _Tile(tile_rows * features)
        with np.errstate(invalid="ignore", over="ignore"):
            shift = _shift(tile.widened(block[:tile_rows]))
            sums, tail = _Sums(shift, fold, tile), _Sums(shift, 1, tile)
            for start in range(0, folded, tile_rows):
                sums.add(block[start : min(start + tile_rows, folded)])
            if folded < rows:
                tail.add(block[folded:])
            return cls._from_sums(rows, shift, sums, tail)

    @classmethod
    def _from_sums(cls, rows: int, shift: Vector, *parts: "_Sums") -> Self:
        first = np.sum([part.fold(part.first, np.add) for part in parts], axis=0)
        second = np.sum([part.fold(part.second, np.add) for part in parts], axis=0)
        m2 = np.maximum(second - first * first / rows, 0.0)
        minimum = np.min([part.fold(part.minimum, np.minimum) for part in parts], axis=0)
        maximum = np.max([part.fold(part.maximum, np.maximum) for part in parts], axis=0)
        return cls(rows, shift + first / rows, m2, minimum, maximum)

    @property
    def is_finite(self) -> bool:
        """Whether every value seen was finite, and its square too."""
        return bool(np.isfinite(self.mean).all() and np.isfinite(self.m2).all())

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


def _shift(rows: npt.NDArray[np.generic]) -> Vector:
    """Return what to subtract from every row: the mean of the first ones, or zeros where they are near zero."""
    mean: Vector = rows.mean(axis=0, dtype=np.float64)
    spread = rows.std(axis=0, dtype=np.float64, mean=mean[None])
    return mean if (np.abs(mean) > _NEGLIGIBLE_OFFSET * spread).any() else np.zeros_like(mean)


class _Tile:
    """Scratch memory for one tile: allocated anew for every tile, it would cost more than the arithmetic."""

    def __init__(self, values: int) -> None:
        self._bits = np.empty(values, np.int32)
        self._double = np.empty(values, np.float64)

    def widened(self, rows: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """Return float16 as float32, exactly, and anything else as it is.

        Moving the bits and scaling by 2**112 (the difference of the exponents' biases) takes a tenth of the time of
        NumPy's cast, which looks at every value by itself. Infinities and NaN come out as finite values.
        """
        if rows.dtype != np.float16:
            return rows
        bits = self._bits[: rows.size]
        np.copyto(bits, np.ascontiguousarray(rows).view(np.int16).ravel())  # extends the sign to the upper half
        np.left_shift(bits, 13, out=bits)
        np.bitwise_and(bits, _SIGN_AND_HALF, out=bits)
        single = bits.view(np.float32)
        np.multiply(single, np.float32(2.0**112), out=single)
        return single.reshape(rows.shape)

    def double(self, rows: npt.NDArray[np.generic]) -> Vector:
        """Return a float64 copy that lives until the next call."""
        double = self._double[: rows.size].reshape(rows.shape)
        np.copyto(double, rows)
        return double


class _Sums:
    """Running sums of one block, ``fold`` rows side by side in one long vector."""

    def __init__(self, shift: Vector, fold: int, tile: _Tile) -> None:
        width = len(shift) * fold
        self._shift = np.tile(shift, fold)
        self._shifted = bool(shift.any())
        self._rows_per_vector = fold
        self._tile = tile
        self.first = np.zeros(width)
        self.second = np.zeros(width)
        self.minimum = np.full(width, np.inf)
        self.maximum = np.full(width, -np.inf)

    def add(self, rows: npt.NDArray[np.generic]) -> None:
        """Add rows, shape (k * fold, n_features)."""
        vectors = rows.reshape(-1, len(self._shift))
        minimum, maximum = _half_range(vectors) if rows.dtype == np.float16 else (vectors.min(0), vectors.max(0))
        np.minimum(self.minimum, minimum, out=self.minimum)
        np.maximum(self.maximum, maximum, out=self.maximum)
        finite = np.isfinite(minimum).all() and np.isfinite(maximum).all()
        deviations = self._tile.double(self._tile.widened(vectors) if finite else vectors)
        if self._shifted:
            deviations -= self._shift
        self.first += deviations.sum(axis=0)
        np.square(deviations, out=deviations)
        self.second += deviations.sum(axis=0)

    def fold(self, vector: Vector, reduce: np.ufunc) -> Vector:
        """Reduce a folded vector back to one value per feature."""
        folded: Vector = reduce.reduce(vector.reshape(self._rows_per_vector, -1), axis=0)
        return folded


def _half_range(vectors: npt.NDArray[np.generic]) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float16]]:
    """Return minimum and maximum of each column of float16, compared as integers, which NumPy does 40 times faster.

    Halves are sign and magnitude. As int16 the largest is the largest positive half; as uint16 it is the most negative
    one. Columns of one sign take the other ends. NaN is beyond infinity on either side.
    """
    signed, unsigned = vectors.view(np.int16), vectors.view(np.uint16)
    maximum, minimum = signed.max(axis=0), unsigned.max(axis=0).view(np.int16)
    if (maximum < 0).any():
        maximum = np.where(maximum < 0, unsigned.min(axis=0).view(np.int16), maximum)
    if (minimum >= 0).any():
        minimum = np.where(minimum >= 0, signed.min(axis=0), minimum)
    return minimum.view(np.float16), maximum.view(np.float16)
