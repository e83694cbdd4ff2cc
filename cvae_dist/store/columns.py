"""Tables as arrays of equal length, which come in batches: how batches are cut and joined."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
Texts = npt.NDArray[np.object_]


class Columns:
    """Rows of a table. A subclass is a frozen dataclass whose fields are ``Integers`` and ``Texts`` of shape (n,)."""

    def __len__(self) -> int:
        return len(next(iter(self.columns().values())))

    def __getitem__(self, index: slice | npt.NDArray[np.bool_] | Integers) -> Self:
        return type(self)(*(values[index] for values in self.columns().values()))

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of the columns, in order."""
        return [field.name for field in fields(cls)]  # type: ignore[arg-type] # every subclass is a dataclass

    @classmethod
    def none(cls) -> Self:
        """Return no rows."""
        kinds = (field.type for field in fields(cls))  # type: ignore[arg-type]
        return cls(*(np.zeros(0, np.int64 if kind == Integers else object) for kind in kinds))

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Return the rows of some parts, at least one, one part after the other."""
        if len(parts) == 1:
            return parts[0]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.names()))

    def columns(self) -> dict[str, Any]:
        """Return the arrays by name."""
        return {name: getattr(self, name) for name in self.names()}


Rows = TypeVar("Rows", bound=Columns)


def regrouped(batches: Iterable[Rows], size: int) -> Iterator[Rows]:
    """Yield the same rows in batches of ``size``; the last one may be shorter, and none is empty."""
    parts: list[Rows] = []
    count = 0
    for batch in batches:
        parts.append(batch)
        count += len(batch)
        if count < size:
            continue
        rows = batch.join(parts)
        for first in range(0, count - size + 1, size):
            yield rows[first : first + size]
        parts, count = [rows[count - count % size :]], count % size
    if count:
        yield parts[0].join(parts)
