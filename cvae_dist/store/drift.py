"""Drift: how the rows of an append differ from the rows that the store had before, feature by feature."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import numpy.typing as npt

from cvae_dist.store.layout import Block, Layout
from cvae_dist.store.moments import Moments, Vector
from cvae_dist.store.publication import Publication, Stored
from cvae_dist.store.sample import Sample, feature_stride

_BINS = 10
_NAMED = 5  # features in one message
_ARRAYS = {
    "drift_mean_shift": "mean of the appended rows minus mean of the rows before, in standard deviations of these",
    "drift_sd_ratio": "standard deviation of the appended rows, divided by that of the rows before",
    "drift_psi": "population-stability index of the appended rows over deciles of the rows before; NaN: not sampled",
}


@dataclass(frozen=True)
class Drift:
    """How new rows differ from the rows before them.

    Attributes
    ----------
    before, new : int
        How many rows are compared.
    mean_shift : numpy.ndarray, shape (n_features,), float64
        Difference of the means, in standard deviations of the rows before.
    sd_ratio : numpy.ndarray, shape (n_features,), float64
        Standard deviation of the new rows, divided by that of the rows before.
    psi : numpy.ndarray, shape (n_features,), float64
        Population-stability index, see :func:`stability_index`. NaN where a feature is not sampled.

    Notes
    -----
    A feature that is constant among the rows before, or among the new ones, has no standard deviation to compare with.
    It is given the one that a single other value, at the far end of the range of all rows, would give it; or that of
    the other rows where this is smaller. So a constant feature that stays as it was has a shift of 0 and a ratio of 1,
    a rare value that appears or is missing is a small drift, and one constant that becomes another a large one.
    """

    before: int
    new: int
    mean_shift: Vector
    sd_ratio: Vector
    psi: Vector

    @classmethod
    def between(cls, before: Moments, new: Moments, samples: tuple[Sample, Sample], layout: Layout) -> Self:
        """Compare new rows with the rows before, given the moments and the samples of both."""
        spread = np.maximum(before.maximum, new.maximum) - np.minimum(before.minimum, new.minimum)
        sd_before, sd_new = _deviation(before, new, spread), _deviation(new, before, spread)
        moving = spread > 0
        both = _is_constant(before) & _is_constant(new)
        shift = np.divide(new.mean - before.mean, sd_before, out=np.zeros_like(spread), where=moving)
        ratio = np.divide(sd_new, sd_before, out=np.ones_like(spread), where=moving & ~both)
        psi = np.full_like(spread, np.nan)
        psi[:: feature_stride(layout)] = stability_index(*(sample.values for sample in samples))
        return cls(before.count, new.count, shift, ratio, psi)

    @cached_property
    def of_features(self) -> Vector:
        """Drift of every feature, shape (n_features,): the larger of the sizes of ``mean_shift`` and ``ln(sd_ratio)``.

        Both are 0 where nothing changed. Between normal distributions that differ a little, both count about alike:
        the divergence is shift**2 / 2 + (ln ratio)**2. By chance alone, n new rows give about 1 / sqrt(n).
        """
        drift: Vector = np.maximum(np.abs(self.mean_shift), np.abs(np.log(self.sd_ratio)))
        return drift

    @property
    def largest(self) -> float:
        """Largest drift of a feature: the drift of the append."""
        return float(self.of_features.max())

    def order(self) -> npt.NDArray[np.intp]:
        """Return the numbers of all features, those with the largest drift first."""
        return np.argsort(-self.of_features, kind="stable")

    def told(self, names: Sequence[str] = (), features: int = _NAMED) -> str:
        """Name the features that drifted most, by their names or else by their numbers."""
        return "; ".join(self._feature(number, names) for number in self.order()[:features].tolist())

    def _feature(self, number: int, names: Sequence[str]) -> str:
        name = names[number] if names else f"feature {number}"
        psi = "" if np.isnan(self.psi[number]) else f", PSI {self.psi[number]:.2g}"
        return f"{name}: mean {self.mean_shift[number]:+.2g} sd, sd x {self.sd_ratio[number]:.3g}{psi}"


def _is_constant(rows: Moments) -> npt.NDArray[np.bool_]:
    # rounding leaves a constant some variance, and may take that of nearly equal large values
    constant: npt.NDArray[np.bool_] = (rows.minimum == rows.maximum) | (rows.m2 == 0)
    return constant


def _deviation(rows: Moments, others: Moments, spread: Vector) -> Vector:
    """Return the standard deviation of every feature; where it is constant, see :class:`Drift`."""
    one_other = spread / np.sqrt(rows.count)
    at_most = np.where(_is_constant(others), np.inf, others.std)
    return np.where(_is_constant(rows), np.minimum(one_other, at_most), rows.std)


def stability_index(before: Block, new: Block) -> Vector:
    """Return the population-stability index of every feature, shape (n_features,).

    That is the sum of (p - q) ln(p / q) over ten bins, where p and q are the shares of the rows before and of the new
    ones. The bins end at the deciles of the rows before, which belong to the bin that they end. To every share is added
    that of half a row of the smaller sample, as otherwise an empty bin would count infinitely. Below 0.1 little has
    changed, above 0.25 much has (but for samples of some hundred rows or less, where chance gives as much).

    Parameters
    ----------
    before, new : numpy.ndarray, shape (n_rows, n_features)
        The index is NaN where one of them has no rows.
    """
    if not len(before) or not len(new):
        return np.full(before.shape[1], np.nan)
    before, new = before.astype(np.float64), new.astype(np.float64)
    edges = np.quantile(before, np.arange(1, _BINS) / _BINS, axis=0)
    half = 0.5 / min(len(before), len(new))
    p, q = (_shares(rows, edges) + half for rows in (before, new))
    index: Vector = ((p - q) * np.log(p / q)).sum(axis=0) / (1 + _BINS * half)
    return index


def _shares(rows: Vector, edges: Vector) -> Vector:
    """Return the share of the rows in every bin, shape (n_bins, n_features)."""
    below = [(rows <= edge).mean(axis=0) for edge in edges]
    return np.diff(below, axis=0, prepend=0, append=1)


def write_drift(publication: Publication, drift: Drift) -> None:
    """Write the drift of the last append of a store."""
    counts = np.array([drift.before, drift.new])
    publication.write("drift_rows", counts, ("part",), long_name="rows before the append; rows appended")
    for name, meaning in _ARRAYS.items():
        publication.write(name, getattr(drift, name.removeprefix("drift_")), ("feature",), long_name=meaning)


def require_drift(arrays: Mapping[str, Stored], n_features: int) -> None:
    """Raise ``ValueError`` where the arrays of a publication are not those of a drift."""
    found = {name: stored.shape for name, stored in arrays.items() if name.startswith("drift_")}
    expected = {"drift_rows": (2,), **dict.fromkeys(_ARRAYS, (n_features,))}
    if found and found != expected:
        raise ValueError(f"its drift has arrays of shapes {found}, instead of {expected}")


def read_drift(publication: Publication) -> Drift | None:
    """Read what :func:`write_drift` wrote; None where it wrote nothing. ``Corrupt`` when it cannot be read."""
    if "drift_rows" not in publication.arrays:
        return None
    before, new = publication.read("drift_rows").tolist()
    return Drift(before, new, *(publication.read(name) for name in _ARRAYS))
