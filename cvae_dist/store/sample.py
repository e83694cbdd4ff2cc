"""A fixed sample of the rows of a store, from which quantiles are taken.

Which rows are in it depends on their numbers alone, so its bytes do not depend on workers, kills and retries. (Sketches
of quantiles draw random bits, and would.)
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from cvae_dist.store.hashing import GOLDEN, mix
from cvae_dist.store.layout import Block, Layout
from cvae_dist.store.publication import Publication, Stored
from cvae_dist.store.ranges import RowNumbers

# A store keeps to the sample it was made with: other numbers are another version of the format.
_MOST_ROWS = 4096
_MOST_BYTES = 4_000_000
_MOST_FEATURES = 1024


@dataclass(frozen=True)
class Sample:
    """Some rows of a store.

    Attributes
    ----------
    rows : numpy.ndarray, shape (n_sampled,), int64
        Their numbers in the store, ascending.
    values : numpy.ndarray, shape (n_sampled, sample_width(layout))
        Of every ``feature_stride(layout)``-th feature, in the dtype of the store.
    """

    rows: RowNumbers
    values: Block

    @classmethod
    def none(cls, layout: Layout) -> Self:
        """Return the sample of no rows."""
        return cls(np.zeros(0, np.int64), np.zeros((0, sample_width(layout)), layout.arrays[0].dtype))

    @classmethod
    def joined(cls, parts: Iterable[Self]) -> Self:
        """Return the rows of some parts, at least one, one part after the other."""
        parts = list(parts)
        parts = [part for part in parts if len(part.rows)] or parts[:1]
        if len(parts) == 1:
            return parts[0]
        return cls(np.concatenate([part.rows for part in parts]), np.concatenate([part.values for part in parts]))

    def __getitem__(self, index: npt.NDArray[np.bool_] | RowNumbers) -> Self:
        return type(self)(self.rows[index], self.values[index])

    def sorted(self) -> Self:
        """Return the same rows in ascending order of their numbers."""
        in_order = (self.rows[1:] >= self.rows[:-1]).all()
        return self if in_order else self[np.argsort(self.rows, kind="stable")]

    def thinned(self, level: int) -> Self:
        """Return the rows that a higher level keeps."""
        if not len(self.rows) or not level:
            return self
        kept = np.isin(self.rows, sampled_rows(int(self.rows[0]), int(self.rows[-1]) + 1, level), assume_unique=True)
        return self[kept]


class RunningSample:
    """The sample of rows ``start:stop``, which come block by block; of none where ``level`` is None."""

    def __init__(self, start: int, stop: int, level: int | None, layout: Layout) -> None:
        self._next, self._stride = start, feature_stride(layout)
        self._rows = sampled_rows(start, start if level is None else stop, level or 0)
        self._values = np.empty((len(self._rows), sample_width(layout)), layout.arrays[0].dtype)

    def add(self, block: Block) -> None:
        """Take in the next rows, shape (n_rows, n_features)."""
        first, last = np.searchsorted(self._rows, (self._next, self._next + len(block)))
        if first < last:
            self._values[first:last] = block[self._rows[first:last] - self._next, :: self._stride]
        self._next += len(block)

    def sample(self) -> Sample:
        """Return the sample, once all rows were there."""
        return Sample(self._rows, self._values)


def sampled_rows(start: int, stop: int, level: int) -> RowNumbers:
    """Return the numbers, among ``start:stop``, of the rows that are sampled at a level, ascending.

    It is one row of every ``2**level`` neighbours: of two neighbours of the level below a hash keeps one. So a level's
    rows are among those of all levels below, and any part of a store can be sampled by itself, in time that depends on
    the rows that are kept.
    """
    rows = np.arange(start >> level, (stop - 1 >> level) + 1, dtype=np.uint64)
    for number in range(level, 0, -1):
        hashed = mix(rows * np.uint64(GOLDEN) + np.uint64(number))
        rows = 2 * rows + (hashed >> np.uint64(63))
    found = rows.view(np.int64)
    return found[(found >= start) & (found < stop)]


def level_of(rows: int, layout: Layout) -> int:
    """Return the level at which so many neighbouring rows are sampled: the lowest that keeps no more than allowed."""
    return (max(0, rows - 1) // _most(layout)).bit_length()


def feature_stride(layout: Layout) -> int:
    """Return the distance between the features that are sampled: 1 unless rows are wide."""
    return -(-layout.n_features // _MOST_FEATURES)


def sample_width(layout: Layout) -> int:
    """Return how many features of a row are sampled."""
    return -(-layout.n_features // feature_stride(layout))


def _most(layout: Layout) -> int:
    """Return how many rows are sampled at most: 4,096, or as many as have 4 MB."""
    row_bytes = 8 + sample_width(layout) * np.dtype(layout.arrays[0].dtype).itemsize
    return min(_MOST_ROWS, _MOST_BYTES // row_bytes)


def write_sample(publication: Publication, sample: Sample, layout: Layout) -> None:
    """Write the sample of all rows of a store."""
    publication.write("sample_row", sample.rows, ("sampled",), long_name="numbers of sampled rows")
    publication.write(
        "sample", sample.values, ("sampled", "sampled_feature"),
        long_name=f"{layout.arrays[0].name} of sampled rows", feature_stride=feature_stride(layout),
    )  # fmt: skip


def read_sample(publication: Publication, layout: Layout) -> Sample:
    """Read what :func:`write_sample` wrote; no rows where it wrote nothing. ``Corrupt`` when it cannot be read."""
    if "sample" not in publication.arrays:
        return Sample.none(layout)
    return Sample(publication.read("sample_row"), publication.read("sample"))


def require_sample(arrays: Mapping[str, Stored], layout: Layout) -> None:
    """Raise ``ValueError`` where the arrays of a publication are not those of a sample."""
    found = {name: (arrays[name].dtype, arrays[name].shape) for name in ("sample_row", "sample") if name in arrays}
    count = arrays["sample_row"].shape[0] if "sample_row" in arrays else 0
    dtype = np.dtype(layout.arrays[0].dtype).str
    expected = {"sample_row": ("<i8", (count,)), "sample": (dtype, (count, sample_width(layout)))}
    if found and (found != expected or count > _most(layout)):
        raise ValueError(f"its sample has the arrays {found}, instead of {expected}")
