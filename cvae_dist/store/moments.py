"""Mergeable first and second moments per feature, in float64."""

import threading
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cvae_dist.store.compiled import HALF_UNIT, SIGN_AND_HALF, TILE_ROWS, add_values

Vector = npt.NDArray[np.float64]
Values = npt.NDArray[Any]

STATISTICS = ("mean", "m2", "minimum", "maximum")  # of every feature

# Two threads of short NumPy calls only fight for the interpreter: one computes while the others read and write.
_ARITHMETIC = threading.Lock()

_LANES = 512  # narrow rows are folded to this width: reductions then run over long contiguous vectors
_TILE_LANES = 1024  # with 64 rows of them, a tile of float64 stays in the second cache
_GROUP = 16 * TILE_ROWS  # vectors whose range is taken at once
_SAMPLE_VALUES = 8192  # that decide what is subtracted
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
    def of(cls, block: npt.NDArray[np.generic]) -> "Moments":
        """Compute the moments of ``block``, shape (n_rows, n_features), any finite real dtype.

        A non-finite value makes ``mean`` non-finite; see :meth:`is_finite`.
        """
        running = RunningMoments(block.shape[1], block.dtype)
        running.add(block)
        return running.moments()

    @property
    def is_finite(self) -> bool:
        """Whether every value seen was finite, and its square too."""
        return bool(np.isfinite(self.mean).all() and np.isfinite(self.m2).all())

    @property
    def std(self) -> Vector:
        """Population standard deviation, shape (n_features,), in the unit of the data."""
        std: Vector = np.sqrt(self.m2 / max(self.count, 1))
        return std

    @np.errstate(over="ignore", invalid="ignore")  # whoever publishes them asks whether they are finite
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


class RunningMoments:
    """Moments of blocks that come one after the other.

    One pass over cache-sized float64 tiles. A sum of squares loses digits far from zero, so the mean of the first rows
    is subtracted, unless it is near zero (Chan, Golub, LeVeque 1983, section 3). Sums of bytes are exact.

    Rows lie side by side in vectors of at least 257 lanes. Every lane adds 64 values, then adds this sum to its total.
    That order alone decides the bits: they are the same from NumPy and from compiled code, on every processor.

    Parameters
    ----------
    n_features : int
    dtype : numpy.dtype
        Of the rows; any real one.
    """

    def __init__(self, n_features: int, dtype: np.dtype[Any]) -> None:
        self._features, self._dtype = n_features, dtype
        self._fold = max(1, _LANES // n_features)
        width = self._fold * n_features
        self._half, self._exact = dtype == np.float16, dtype.itemsize == 1
        self._unit = HALF_UNIT if self._half else 1.0
        self._count = 0
        self._shift = np.zeros(width)
        self._first, self._second = np.zeros(width), np.zeros(width)
        self._minimum, self._maximum = np.full(width, np.inf), np.full(width, -np.inf)
        self._shifted = False

    def add(self, rows: npt.NDArray[np.generic]) -> None:
        """Add rows, shape (n_rows, n_features). The bits of the result depend on how they are cut into blocks."""
        if not len(rows):
            return
        values = np.ascontiguousarray(rows).reshape(-1)
        with np.errstate(invalid="ignore", over="ignore"):
            if not self._count and not self._exact:
                self._choose_shift(rows[: max(1, _SAMPLE_VALUES // self._features)])
            self._count += len(rows)
            sums = (self._first, self._second, self._minimum, self._maximum)
            if not add_values(values, self._shift, *sums):
                with _ARITHMETIC:
                    self._add_values(values)

    def moments(self) -> Moments:
        """Return the moments of what was added."""
        if not self._count:
            return Moments.empty(self._features)
        with np.errstate(invalid="ignore", over="ignore"):
            first, second = (self._folded(sums, np.add) for sums in (self._first, self._second))
            shift = self._shift[: self._features]
            if self._exact:  # so it is not too late to subtract the mean
                shift = np.rint(first / self._count)
                second += shift * (self._count * shift - 2.0 * first)
                first -= self._count * shift
            m2 = np.maximum(second - first * first / self._count, 0.0) / self._unit**2
            mean = (shift + first / self._count) / self._unit
        # zeros of both signs are equal, so whichever was found first is made positive
        minimum, maximum = self._folded(self._minimum, np.minimum) + 0.0, self._folded(self._maximum, np.maximum) + 0.0
        return Moments(self._count, mean, m2, minimum, maximum)

    @cached_property
    def _tile(self) -> "_Tile":
        return _Tile(self._dtype, TILE_ROWS * min(len(self._shift), _TILE_LANES))

    def _choose_shift(self, rows: npt.NDArray[np.generic]) -> None:
        """Subtract the mean of the first rows, or nothing where it is near zero."""
        fold = self._fold if len(rows) >= self._fold else 1
        sample = rows[: len(rows) // fold * fold].astype(np.float64).reshape(-1, fold * self._features) * self._unit
        mean = sample.mean(axis=0).reshape(fold, -1).mean(axis=0)
        sample -= np.tile(mean, fold)
        spread = np.sqrt(np.square(sample, out=sample).mean(axis=0).reshape(fold, -1).mean(axis=0))
        if (np.abs(mean) > _NEGLIGIBLE_OFFSET * spread).any():
            self._shifted = True
            # sums of small integers stay exact
            self._shift[:] = np.tile(mean if self._dtype.kind == "f" else np.rint(mean), self._fold)

    def _add_values(self, values: Values) -> None:
        full, width = len(values) // len(self._shift), len(self._shift)
        vectors = values[: full * width].reshape(full, width)
        for start in range(0, full, _GROUP):
            self._add_group(vectors[start : start + _GROUP])
        if full * width < len(values):
            self._add_group(values[None, full * width :])

    def _add_group(self, vectors: Values) -> None:
        """Add vectors, which may end before the last lane."""
        minimum, maximum = _half_range(vectors) if self._half else (vectors.min(axis=0), vectors.max(axis=0))
        lanes = slice(0, vectors.shape[1])
        np.minimum(self._minimum[lanes], minimum, out=self._minimum[lanes])
        np.maximum(self._maximum[lanes], maximum, out=self._maximum[lanes])
        if not (np.isfinite(minimum).all() and np.isfinite(maximum).all()):
            self._first[lanes] += np.where(np.isfinite(minimum) & np.isfinite(maximum), 0.0, np.nan)
        for lane in range(0, vectors.shape[1], _TILE_LANES):
            part = vectors[:, lane : lane + _TILE_LANES]
            lanes = slice(lane, lane + part.shape[1])
            first, second, shift = self._first[lanes], self._second[lanes], self._shift[lanes]
            for start in range(0, len(part), TILE_ROWS):
                deviations = self._tile.wide(part[start : start + TILE_ROWS])
                if self._shifted:
                    deviations -= shift
                first += np.add.reduce(deviations, axis=0)
                np.square(deviations, out=deviations)
                second += np.add.reduce(deviations, axis=0)

    def _folded(self, vector: Vector, reduce: np.ufunc) -> Vector:
        """Reduce a vector of folded rows to one value per feature."""
        folded: Vector = reduce.reduce(vector.reshape(self._fold, -1), axis=0)
        return folded


class _Tile:
    """Scratch memory for one tile: allocated anew for every tile, it would cost more than the arithmetic."""

    def __init__(self, dtype: np.dtype[Any], values: int) -> None:
        # 64 squares of 8 bits add up to less than 2**24: all sums are exact in float32
        self._wide = np.empty(values, np.float32 if dtype.itemsize == 1 else np.float64)
        self._bits = np.empty(values if dtype == np.float16 else 0, np.int32)

    def wide(self, vectors: Values) -> Values:
        """Return a floating-point copy that lives until the next call; float16 in units of 2**112.

        Moving the bits of a half to their place in a float32 takes a fraction of the time of NumPy's cast. Infinity
        and NaN come out as finite values.
        """
        wide = self._wide[: vectors.size].reshape(vectors.shape)
        if vectors.dtype == np.float16:
            bits = self._bits[: vectors.size].reshape(vectors.shape)
            np.copyto(bits, vectors.view(np.int16))  # extends the sign to the upper half
            np.left_shift(bits, 13, out=bits)
            vectors = np.bitwise_and(bits, SIGN_AND_HALF, out=bits).view(np.float32)
        np.copyto(wide, vectors)
        return wide


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
