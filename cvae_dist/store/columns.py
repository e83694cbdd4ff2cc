"""Tables as arrays of equal length, which come in batches: how batches are cut and joined."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from functools import cache
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
Texts = npt.NDArray[np.object_]
Rows = TypeVar("Rows", bound="Columns")


class Columns:
    """Rows of a table. A subclass is a frozen dataclass whose fields are ``Integers`` and ``Texts`` of shape (n,)."""

    def __len__(self) -> int:
        return len(next(iter(self.columns().values())))

    def __getitem__(self, index: slice | npt.NDArray[np.bool_] | Integers) -> Self:
        return type(self)(*(values[index] for values in self.columns().values()))

    @classmethod
    @cache
    def names(cls) -> tuple[str, ...]:
        """Return the names of the columns, in order."""
        return tuple(field.name for field in fields(cls))  # type: ignore[arg-type] # every subclass is a dataclass

    @classmethod
    def none(cls) -> Self:
        """Return no rows."""
        kinds = (field.type for field in fields(cls))  # type: ignore[arg-type]
        return cls(*(np.zeros(0, np.int64 if kind == Integers else object) for kind in kinds))

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Return the rows of some parts, at least one, one part after the other."""
        parts = list(filter(len, parts)) or parts[:1]
        if len(parts) == 1:
            return parts[0]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.names()))

    def as_kind(self, kind: type[Rows]) -> Rows:
        """Return the same rows with those columns that another kind of table has."""
        return kind(*(getattr(self, name) for name in kind.names()))

    def columns(self) -> dict[str, Any]:
        """Return the arrays by name."""
        return {name: getattr(self, name) for name in self.names()}


class ColumnsDigest:
    """A digest of some columns of a table, each by itself: how the rows are cut into batches does not matter."""

    def __init__(self, *names: str) -> None:
        self._columns = {name: hashlib.blake2b(digest_size=16) for name in names}

    def add(self, rows: Columns) -> None:
        """Take in the next rows."""
        for name, hashed in self._columns.items():
            values = getattr(rows, name)
            texts = values.dtype.kind == "O"
            hashed.update("\0".join([*values, ""]).encode() if texts else values.astype("<i8").tobytes())

    def digest(self) -> bytes:
        """Return the digest of all rows so far, 128 bits."""
        return hashlib.blake2b(b"".join(hashed.digest() for hashed in self._columns.values()), digest_size=16).digest()


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
