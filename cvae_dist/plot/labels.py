"""Labels of rows: classes with names and colours, or a measured quantity. A row may have none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cvae_dist.errors import InvalidInput
from cvae_dist.plot.figure import Floats
from cvae_dist.plot.palette import NO_LABEL_COLOUR, OTHER_COLOUR, PALETTE

MAX_CLASSES = len(PALETTE)
NO_LABEL = -1

_UNITS = {  # in seconds
    "days": 86_400.0,
    "hours": 3600.0,
    "minutes": 60.0,
    "seconds": 1.0,
    "milliseconds": 1e-3,
    "microseconds": 1e-6,
}
_LONGEST = 24  # characters of a name; more would take the map's place


@dataclass(frozen=True)
class Classes:
    """Labels as classes: row i has the name ``names[codes[i]]``, or no label where its code is ``NO_LABEL``."""

    names: tuple[str, ...]
    codes: NDArray[np.intp]
    last_is_merged: bool = False

    @property
    def colours(self) -> list[str]:
        """One colour for each name; grey for classes that were put together."""
        named = len(self.names) - self.last_is_merged
        return [*PALETTE[:named], *[OTHER_COLOUR] * self.last_is_merged]

    @property
    def missing(self) -> NDArray[np.bool_]:
        """Which rows have no label."""
        return np.equal(self.codes, NO_LABEL)

    def of_rows(self, colours: Sequence[str]) -> NDArray[np.str_]:
        """Return the colour of each row, given those of the names."""
        return np.array([*colours, NO_LABEL_COLOUR])[self.codes]


@dataclass(frozen=True)
class Quantity:
    """Labels as a measured quantity; a row without one has NaN.

    ``unit`` is that of durations. Dates are counted in days since 1970, as matplotlib counts them.
    """

    values: Floats
    unit: str = ""
    dates: bool = False

    @property
    def missing(self) -> NDArray[np.bool_]:
        """Which rows have no label."""
        return np.isnan(self.values)


def as_labels(labels: ArrayLike) -> NDArray[Any]:
    """Return labels as an array. Those of a list stay the objects they are: NumPy would make None and NaN strings."""
    return np.asarray(labels) if hasattr(labels, "dtype") else np.asarray(labels, dtype=object)


def is_missing(labels: NDArray[Any]) -> NDArray[np.bool_]:
    """Say which labels are none: None, NaN, NaT, NA, and the empty string, as stores hold nothing but strings."""
    import pandas  # here, as most of what imports this package draws nothing

    missing: NDArray[np.bool_] = pandas.isna(labels)
    if labels.dtype.kind in "OTU":
        missing[~missing] = labels[~missing] == ""
    return missing


def shortened(name: str, longest: int = _LONGEST) -> str:
    """Return a name as matplotlib can show it in one short line: its beginning and its end where it is longer."""
    line = " ".join(name.split())
    if len(line) > longest:
        half = (longest - 1) // 2
        line = f"{line[: longest - 1 - half]}…{line[-half:]}"
    return line.replace("$", r"\$")  # two of them would begin and end a formula


def classify(labels: NDArray[Any], categories: Sequence[str] | None = None) -> Classes | Quantity:
    """Decide whether labels are classes or a measured quantity.

    Strings and booleans are classes, and so are whole numbers (also written as strings) of at most 20 different
    values. Other numbers, dates and durations are a quantity. Of more than 20 classes the 19 most frequent keep their
    names, the others become one. Missing labels (see :func:`is_missing`) decide nothing. ``categories`` are the names
    of the classes where the labels (n,) are indices 0, 1, ...

    Raises
    ------
    InvalidInput
        A label is no index of ``categories``.
    """
    known = ~is_missing(labels)
    if not known.any():
        return Classes((), np.full(len(labels), NO_LABEL))
    found = _classify_known(labels[known], categories)
    if isinstance(found, Quantity):
        return replace(found, values=_spread(found.values, known, np.nan))
    return replace(found, codes=_spread(found.codes, known, NO_LABEL))


def _classify_known(labels: NDArray[Any], categories: Sequence[str] | None) -> Classes | Quantity:
    """Classify labels none of which is missing; numbers written as strings may still be "nan"."""
    from pandas.api.types import infer_dtype

    kind = infer_dtype(labels)
    if kind in ("datetime", "datetime64", "date"):
        return _dates(labels)
    if kind in ("timedelta", "timedelta64"):
        return _durations(labels)
    numbers = _as_numbers(labels)
    if numbers is not None and categories is not None:
        return _named_indices(numbers, categories)
    if kind == "boolean":
        return _classes(labels.astype(bool))
    return _classes(_as_strings(labels)) if numbers is None else _classify_numbers(numbers)


def _classify_numbers(numbers: Floats) -> Classes | Quantity:
    known = ~np.isnan(numbers)
    values, codes = np.unique(numbers[known], return_inverse=True)
    if len(values) <= MAX_CLASSES and np.all(values == np.round(values)):
        names = (f"{value:.0f}" if isinstance(value, np.floating) else str(value) for value in values)
        return Classes(tuple(names), _spread(codes, known, NO_LABEL))
    finite = values[np.isfinite(values)]
    clipped = np.clip(numbers, finite[0], finite[-1])  # the infinite have the colours of the ends
    return Quantity(clipped.astype(np.float64))


def _named_indices(numbers: Floats, categories: Sequence[str]) -> Classes:
    if len(numbers) and not (numbers.min() >= 0 and numbers.max() < len(categories)):
        raise InvalidInput(
            f"labels run from {numbers.min():g} to {numbers.max():g} with {len(categories)} categories, "
            "so some cannot be named: give one category name for every label 0, 1, ..."
        )
    return _merge_rare([str(name) for name in categories], numbers.astype(np.intp))


def _classes(labels: NDArray[Any]) -> Classes:
    names, codes = np.unique(labels, return_inverse=True)
    return _merge_rare([str(name) for name in names], codes)


def _merge_rare(names: Sequence[str], codes: NDArray[np.intp]) -> Classes:
    """Keep the most frequent of too many classes in their order and put all others into one."""
    if len(names) <= MAX_CLASSES:
        return Classes(tuple(names), codes)
    kept = np.sort(np.argsort(-np.bincount(codes, minlength=len(names)), kind="stable")[: MAX_CLASSES - 1])
    renumbered = np.full(len(names), len(kept))
    renumbered[kept] = np.arange(len(kept))
    others = f"other ({len(names) - len(kept)} classes)"
    return Classes((*(names[i] for i in kept), others), renumbered[codes], last_is_merged=True)


def _dates(labels: NDArray[Any]) -> Quantity:
    """Return points in time; those with a time zone in UTC."""
    from pandas import to_datetime

    times = to_datetime(labels, utc=True).tz_localize(None).to_numpy()
    return Quantity(times.astype("datetime64[us]").astype(np.int64) / 86_400e6, dates=True)


def _durations(labels: NDArray[Any]) -> Quantity:
    """Return durations in the largest unit of which the long ones last at least one."""
    from pandas import to_timedelta

    seconds = to_timedelta(labels).total_seconds().to_numpy()
    long = np.percentile(np.abs(seconds), 99)
    unit = next((unit for unit, size in _UNITS.items() if size <= long), "seconds")
    return Quantity(seconds / _UNITS[unit], unit)


def _as_numbers(labels: NDArray[Any]) -> Floats | None:
    """Return the labels as numbers, strings such as "7" included, or None where one of them is no number."""
    if labels.dtype.kind in "iu":  # large ones would not all differ as floats
        return labels
    try:
        return np.asarray(labels, np.float64)
    except (TypeError, ValueError):
        return None


def _as_strings(labels: NDArray[Any]) -> NDArray[Any]:
    """Return the labels as strings. Those of variable width, as stores hold, stay so: NumPy cannot cast them."""
    return labels if labels.dtype.kind == "T" else labels.astype(str)


def _spread(values: NDArray[Any], known: NDArray[np.bool_], fill: float) -> NDArray[Any]:
    """Return an array that has ``values`` at the ``known`` places and ``fill`` at the others."""
    spread = np.full(len(known), fill, dtype=values.dtype)
    spread[known] = values
    return spread
