"""Labels of rows: classes with names and colours, or a measured quantity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cvae_dist.errors import InvalidInput
from cvae_dist.plot.figure import Floats
from cvae_dist.plot.palette import OTHER_COLOUR, PALETTE

MAX_CLASSES = len(PALETTE)


@dataclass(frozen=True)
class Classes:
    """Labels as classes: row i has the name ``names[codes[i]]``, and ``colours`` has one entry per name."""

    names: tuple[str, ...]
    codes: NDArray[np.intp]

    @property
    def colours(self) -> list[str]:
        """One colour for each name; grey for classes that were put together."""
        merged = [name.startswith("other (") for name in self.names]
        return [OTHER_COLOUR if grey else PALETTE[i] for i, grey in enumerate(merged)]


def _as_numbers(labels: NDArray[Any]) -> NDArray[Any] | None:
    """Return the labels as numbers, strings such as "7" included, or None where one of them is no number."""
    try:
        return np.asarray(labels, np.float64)
    except (TypeError, ValueError):
        return None


def _as_strings(labels: NDArray[Any]) -> NDArray[Any]:
    """Return the labels as strings. Those of variable width, as stores hold, stay so: NumPy cannot cast them."""
    return labels if labels.dtype.kind == "T" else labels.astype(str)


def _merge_rare(names: NDArray[Any], codes: NDArray[np.intp]) -> Classes:
    """Keep the most frequent classes in their order and put all others into one."""
    kept = np.sort(np.argsort(-np.bincount(codes), kind="stable")[: MAX_CLASSES - 1])
    renumbered = np.full(len(names), len(kept))
    renumbered[kept] = np.arange(len(kept))
    others = f"other ({len(names) - len(kept)} classes)"
    return Classes((*(str(names[i]) for i in kept), others), renumbered[codes])


def classify(labels: NDArray[Any], categories: Sequence[str] | None = None) -> Classes | Floats:
    """Decide whether labels are classes or a measured quantity.

    Strings are classes, and so are whole numbers (also written as strings) of at most 20 different values. Other
    numbers are a quantity. Of more than 20 classes the 19 most frequent keep their names, the others become one.
    ``categories`` are the names of the classes where the labels (n,) are indices 0, 1, ...

    Raises
    ------
    InvalidInput
        A label is no index of ``categories``.
    """
    numbers = _as_numbers(labels)
    if categories is not None and numbers is not None:
        codes = numbers.astype(np.intp)
        if len(codes) and (codes.min() < 0 or codes.max() >= len(categories)):
            raise InvalidInput(
                f"labels run from {codes.min()} to {codes.max()} with {len(categories)} categories, "
                "so some cannot be named: give one category name for every label 0, 1, ..."
            )
        names = np.array([str(name) for name in categories])
        return _merge_rare(names, codes) if len(names) > MAX_CLASSES else Classes(tuple(names), codes)
    if numbers is not None:
        values, codes = np.unique(numbers, return_inverse=True)
        if len(values) > MAX_CLASSES or not np.all(values == np.round(values)):
            return numbers
        return Classes(tuple(f"{value:.0f}" for value in values), codes)
    names, codes = np.unique(_as_strings(labels), return_inverse=True)
    return _merge_rare(names, codes) if len(names) > MAX_CLASSES else Classes(tuple(map(str, names)), codes)
