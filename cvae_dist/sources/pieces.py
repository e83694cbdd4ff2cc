"""Runs of rows in files: what a source lists and reads."""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from cvae_dist.store.lineage import digest_bytes

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

    def digest(self) -> str:
        """Return a digest of names, sizes and times, and of which rows are taken."""
        numbers = (values.tobytes() for name, values in self.arrays().items() if name != "path")
        return digest_bytes(b"".join(["\0".join(self.path.tolist()).encode(), *numbers]))

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
        lo = np.searchsorted(self.ends, start, side="right")
        hi = np.searchsorted(self.ends, stop, side="left") + 1
        part, stops = self[lo:hi], self.ends[lo:hi]
        starts = stops - part.rows
        skipped = np.maximum(start - starts, 0)
        kept = np.minimum(stops, stop) - starts - skipped
        whole = Pieces(part.path, part.first + skipped, kept, part.size, part.modified)
        return whole[kept > 0] if (kept <= 0).any() else whole

    def without(self, dropped: Integers) -> "Pieces":
        """Return the pieces that remain when these rows, counted over all pieces, are left out."""
        cuts = np.unique(np.concatenate([[0], self.ends, dropped, dropped + 1]))
        starts, stops = cuts[:-1], cuts[1:]
        keep = ~np.isin(starts, dropped)
        starts, stops = starts[keep], stops[keep]
        piece = np.searchsorted(self.ends, starts, side="right")
        first = self.first[piece] + starts - (self.ends - self.rows)[piece]
        return Pieces(self.path[piece], first, stops - starts, self.size[piece], self.modified[piece])
