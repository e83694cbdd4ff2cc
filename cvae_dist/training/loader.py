"""How rows arrive: one thread fills the next window of the sampler's order while the last one is consumed."""

import logging
import threading
import weakref
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np

from cvae_dist.errors import InvalidInput
from cvae_dist.store.layout import Block
from cvae_dist.store.reader import ArrayRows, Reader
from cvae_dist.training.sampler import INDEX_BYTES, NO_ROWS, Rows, Sampler, expand_ranges, fits

_LOGGER = logging.getLogger(__name__)

BUFFER_BYTES = 96_000_000
_SEQUENTIAL_BYTES = 4_000_000  # of one read when a whole store is held in memory
_RANGES_AT_ONCE = 16_384  # bounds the lists of a read, however small the blocks are
_ALIVE_SECONDS = 1.0  # between looks whether the other thread still lives


@dataclass(frozen=True)
class Batch:
    """A rank's part of one step.

    Attributes
    ----------
    x : numpy.ndarray, shape (n, n_features)
        Rows as stored; a view of a reused buffer, valid until the next batch is asked for.
    positions : numpy.ndarray, shape (n,), int64
        Where these rows stand inside the global batch.
    n_global : int
        Rows of the step over all ranks.
    epoch, step : int
        Position of the batch; the position to go on from is that of the next one.
    """

    x: Block
    positions: Rows
    n_global: int
    epoch: int
    step: int


class Loader:
    """Batches of a sampler's order, read one window ahead by one thread into memory allocated once.

    Where the whole store fits the memory it is read once, in order, and kept.

    Parameters
    ----------
    reader : Reader
        Where the rows are.
    sampler : Sampler
        Which rows come next.
    excluded : numpy.ndarray, int64, ascending
        Rows of the store that are not trained on.
    rank, world : int
        Which part of every step to load.
    buffer_bytes : int
        Memory to stay within if the sampler's windows allow it (see ``plan_sampler``).

    Attributes
    ----------
    resident : bool
        Whether the rows are held in memory.
    """

    def __init__(
        self,
        reader: Reader,
        sampler: Sampler,
        *,
        excluded: Rows = NO_ROWS,
        rank: int = 0,
        world: int = 1,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        _check(reader, sampler, excluded)
        self._reader, self._sampler, self._excluded = reader, sampler, excluded
        self._rank, self._world = rank, world
        self._lanes = len(sampler.lanes_of(rank, world))
        row_bytes = reader.dtype.itemsize * reader.n_features
        self.resident = isinstance(reader, ArrayRows) or fits(reader.n_rows, row_bytes, buffer_bytes)
        window = min(self._lanes * sampler.window_rows, sampler.rows)
        batch = min(-(-sampler.batch_size // sampler.lanes) * self._lanes, sampler.batch_size)
        held = 0 if isinstance(reader, ArrayRows) else reader.n_rows if self.resident else 2 * window
        self._window, self._batch = window, batch
        self.buffer_bytes = (held + batch) * row_bytes + 2 * window * INDEX_BYTES
        self._rows: _Resident | None = None
        self._slots: tuple[_Slot, _Slot] | None = None
        self._out: Block | None = None
        self._prefetcher: _Prefetcher | None = None
        _LOGGER.debug("%s", self)

    def __repr__(self) -> str:
        how = "held in memory" if self.resident else f"in blocks of {self._sampler.block_rows} rows"
        return (
            f"Loader({self._sampler.rows} rows {how}, {self.buffer_bytes / 1e6:.0f} MB, "
            f"variance inflation {self.variance_inflation:.2f})"
        )

    @property
    def variance_inflation(self) -> float:
        """Shuffle quality, 1 is perfect; see :attr:`Sampler.variance_inflation`."""
        return self._sampler.variance_inflation

    def batches(self, epoch: int = 0, first_step: int = 0) -> Iterator[Batch]:
        """Yield batches from a position on, epoch after epoch without end.

        A new iterator stops the one before. Errors of the reading thread are raised here.
        """
        self.close()
        self._sampler.step(first_step)
        self._allocate()
        prefetcher = self._prefetcher = _Prefetcher(self, epoch, first_step)
        prefetcher.start()
        return self._iterate(prefetcher, epoch, first_step)
