"""Runs of rows in files: what a source lists and reads."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pieces:
    """Runs of rows in files, in the order in which they are stored.

    Attributes
    ----------
    path : numpy.ndarray of object (str)
        Relative to the root of the tree.
    first, rows : numpy.ndarray, int64
        First row in the file, and number of rows.
    size, modified : numpy.ndarray, int64
        Bytes and modification time (ns since 1970) of the file.
    """

    path: npt.NDArray[np.object_]
    first: Integers
    rows: Integers
    size: Integers
    modified: Integers

    def __len__(self) -> int:
        return len(self.path)

    def __getitem__(self, index: Any) -> "Pieces":
        return Pieces(*(values[index] for values in self.arrays().values()))

    def stamps(self) -> dict[str, tuple[int, int]]:
        """Return size and modification time by path."""
        return {
            path: (int(size), int(time)) for path, size, time in zip(self.path, self.size, self.modified, strict=True)
        }

    def identity(self, start: int, stop: int) -> bytes:
        """Return what tells rows ``start:stop`` from others: names, sizes and times of their files, and which rows."""
        lo, hi = self._overlap(start, stop)
        taken = f"{start - self._starts(lo)} {stop - self._starts(hi - 1)}" if lo < hi else ""
        numbers = (values[lo:hi].tobytes() for values in (self.first, self.rows, self.size, self.modified))
        return b"".join(["\0".join([*self.path[lo:hi].tolist(), taken]).encode(), *numbers])

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def ends(self) -> Integers:
        """Rows up to and including each piece: one sum over all pieces, however often they are cut."""
        ends: Integers = np.cumsum(self.rows, dtype=np.int64)
        return ends

    @property
    def total(self) -> int:
        """Rows of all pieces together."""
        return int(self.ends[-1]) if len(self) else 0

    def between(self, start: int, stop: int) -> "Pieces":
        """Return the pieces, cut at both ends, that make rows ``start:stop`` of all of them."""
        lo, hi = self._overlap(start, stop)
        first, rows = self.first[lo:hi].copy(), self.rows[lo:hi].copy()
        if len(rows):
            rows[-1] -= self._ends[hi - 1] - stop
            skipped = start - self._starts(lo)
            first[0] += skipped
            rows[0] -= skipped
        whole = Pieces(self.path[lo:hi], first, rows, self.size[lo:hi], self.modified[lo:hi])
        return whole[rows > 0] if not rows.all() else whole

    def _overlap(self, start: int, stop: int) -> tuple[int, int]:
        """Return the range of pieces that have some of these rows."""
        lo, hi = bisect.bisect_right(self._ends, start), bisect.bisect_left(self._ends, stop) + 1
        return lo, min(max(lo, hi), len(self))

    def _starts(self, piece: int) -> int:
        return self._ends[piece] - int(self.rows[piece])

    @cached_property
    def _ends(self) -> Sequence[int]:
        """The same as ``ends``, for one value at a time: NumPy takes ten times as long for it."""
        return self.ends.data

    def without(self, dropped: Integers) -> "Pieces":
        """Return the pieces that remain when these rows, counted over all pieces, are left out."""
        cuts = np.unique(np.concatenate([[0], self.ends, dropped, dropped + 1]))
        starts, stops = cuts[:-1], cuts[1:]
        keep = ~np.isin(starts, dropped)
        starts, stops = starts[keep], stops[keep]
        piece = np.searchsorted(self.ends, starts, side="right")
        first = self.first[piece] + starts - (self.ends - self.rows)[piece]
        return Pieces(self.path[piece], first, stops - starts, self.size[piece], self.modified[piece])
