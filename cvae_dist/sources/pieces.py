"""Runs of rows in files: what a reader is asked for."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cvae_dist.sources.files import File, Integers, Texts
from cvae_dist.store.urls import Location


@dataclass(frozen=True)
class Pieces:
    """Runs of rows in files, in the order in which they are stored.

    Attributes
    ----------
    path : numpy.ndarray of object (str)
        Relative to the root of the source.
    size : numpy.ndarray, int64
        Bytes of the file.
    version : numpy.ndarray of object (str)
        That of the file when it was listed.
    first, rows : numpy.ndarray, int64
        First row in the file, and number of rows.
    """

    path: Texts
    size: Integers
    version: Texts
    first: Integers
    rows: Integers

    def __len__(self) -> int:
        return len(self.path)

    @cached_property
    def ends(self) -> Integers:
        """Rows up to and including each piece."""
        ends: Integers = np.cumsum(self.rows, dtype=np.int64)
        return ends

    @property
    def total(self) -> int:
        """Rows of all pieces together."""
        return int(self.ends[-1]) if len(self) else 0

    def files(self, root: Location) -> Iterator[tuple[File, int, int]]:
        """Yield the file, the first row in it and the number of rows of every piece."""
        columns = (self.path, self.size.tolist(), self.version, self.first.tolist(), self.rows.tolist())
        for path, size, version, first, rows in zip(*columns, strict=True):
            yield File(root, path, size, version), first, rows

    def locate(self, row: int) -> tuple[str, int]:
        """Return the file of a row of all pieces, and its number in the file."""
        piece = int(np.searchsorted(self.ends, row, side="right"))
        return self.path[piece], row - int(self.ends[piece] - self.rows[piece]) + int(self.first[piece])

    def cut(self, start: int, stop: int) -> "Pieces":
        """Return rows ``start:stop`` of all pieces."""
        near = slice(np.searchsorted(self.ends, start, side="right"), np.searchsorted(self.ends, stop) + 1)
        starts = self.ends[near] - self.rows[near]
        lo, hi = np.maximum(starts, start), np.minimum(self.ends[near], stop)
        kept = lo < hi
        first = (self.first[near] + lo - starts)[kept]
        return Pieces(self.path[near][kept], self.size[near][kept], self.version[near][kept], first, (hi - lo)[kept])
