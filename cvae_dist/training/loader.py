"""How rows arrive: a thread fills the next window of the sampler's order while the last one is consumed."""

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np

from cvae_dist.errors import InvalidInput
from cvae_dist.store.layout import Block
from cvae_dist.store.ranges import RowNumbers, expand_ranges
from cvae_dist.store.reader import ArrayRows, Reader
from cvae_dist.training.sampler import INDEX_BYTES, NO_ROWS, EpochOrder, Sampler, fits

_LOGGER = logging.getLogger(__name__)

BUFFER_BYTES = 96_000_000
_RANGES_AT_ONCE = 16_384  # bounds the lists of a read, however small the blocks are
_ALIVE_SECONDS = 1.0  # between looks whether the other side still lives


@dataclass(frozen=True)
class Batch:
    """A rank's part of one step.

    Attributes
    ----------
    x : numpy.ndarray, shape (n, n_features)
        RowNumbers as stored; a view of a reused buffer, valid until the next batch is asked for.
    positions : numpy.ndarray, shape (n,), int64
        Where these rows stand inside the global batch.
    n_global : int
        RowNumbers of the step over all ranks.
    epoch, step : int
        Position of the batch; the position to go on from is that of the next one.
    """

    x: Block
    positions: RowNumbers
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
        RowNumbers of the store that are not trained on.
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
        excluded: RowNumbers = NO_ROWS,
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
        self._batch = batch
        self._window = window
        self.buffer_bytes = (held + batch) * row_bytes + 2 * window * INDEX_BYTES
        self._windows: _Windows | None = None
        self._slots: list[_Slot] = []
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
        """Return batches from a position on, epoch after epoch without end.

        Errors of the reading thread are raised by the iterator. A new iterator ends the one before; an
        iterator that is closed or dropped ends its thread.
        """
        self._sampler.step(first_step)
        return self._iterate(epoch, first_step)

    def close(self) -> None:
        """End the reading thread; an iterator that is still in use ends too."""
        if self._prefetcher is not None:
            self._prefetcher.stop()
            self._prefetcher = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _iterate(self, epoch: int, step: int) -> Iterator[Batch]:
        prefetcher = self._prefetch(epoch, step)
        out = np.empty((self._batch, self._reader.n_features), self._reader.dtype)
        try:
            opening = prefetcher.next()
            opening.used = self._served(opening.first, self._sampler.step(step)[0])
            slot: _Slot | None = opening
            while not prefetcher.stopped:
                first, end = self._sampler.step(step)
                count, filled = self._served(first, end), 0
                while filled < count:
                    slot = slot or prefetcher.next()
                    filled += slot.take(out[filled:count])
                    if slot.used == slot.count:
                        prefetcher.release(slot)  # now the thread's
                        slot = None
                positions = self._sampler.positions(step, self._rank, self._world)
                yield Batch(out[:count], positions, end - first, epoch, step)
                step += 1
                if step == self._sampler.steps_per_epoch:
                    epoch, step = epoch + 1, 0
        except _Stopped:
            return
        finally:
            prefetcher.stop()

    def _prefetch(self, epoch: int, step: int) -> "_Prefetcher":
        """Start to read the windows from a position on, into memory that all iterators share."""
        self.close()
        if self._windows is None:
            self._windows = _Windows(self._reader, self._excluded, self.resident, self._rank, self._world)
            self._slots = [self._windows.slot(self._window) for _ in range(2)]
        window = self._sampler.window_of(self._sampler.step(step)[0])
        self._prefetcher = _Prefetcher(self._windows, self._sampler, self._slots, epoch, window)
        self._prefetcher.start()
        return self._prefetcher

    def _served(self, first: int, end: int) -> int:
        """Return how many positions in [first, end) this rank serves."""
        before = self._sampler.served_before
        return before(end, self._rank, self._world) - before(first, self._rank, self._world)


def read_rows(reader: Reader, rows: RowNumbers) -> Block:
    """Return single rows, in the given order (ascending is fastest).

    Returns
    -------
    numpy.ndarray, shape (len(rows), n_features)
    """
    out = np.empty((len(rows), reader.n_features), reader.dtype)
    first = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
    reader.read_into(out, rows[first], np.diff(first, append=len(rows)))
    return out


class _Stopped(Exception):
    """The consumer closed the loader."""


class _Slot:
    """Memory of one window: rows, and which of them come one after the other."""

    def __init__(self, rows: Block, window: int) -> None:
        self.rows = rows
        self.index = np.empty(window, np.intp)
        self.first = self.count = self.used = 0

    def take(self, out: Block) -> int:
        """Copy the next rows, as many as there are and fit; return how many."""
        count = min(len(out), self.count - self.used)
        index = self.index[self.used : self.used + count]
        # "clip" spares NumPy a second buffer; every index is inside
        np.take(self.rows, index, axis=0, out=out[:count], mode="clip")
        self.used += count
        return count


class _Windows:
    """Fills slots with windows, either from storage or from rows that are held in memory."""

    def __init__(self, reader: Reader, excluded: RowNumbers, resident: bool, rank: int, world: int) -> None:
        self._reader, self._excluded, self._part = reader, excluded, (rank, world)
        self._resident = resident
        self._is_read = isinstance(reader, ArrayRows)
        self._rows = self._memory(reader.n_rows) if resident else None

    def slot(self, window: int) -> _Slot:
        """Return a slot for ``window`` rows."""
        return _Slot(self._memory(window) if self._rows is None else self._rows, window)

    def fill(self, slot: _Slot, order: EpochOrder, window: int, stopped: Callable[[], bool]) -> None:
        """Make a slot hold one window."""
        starts, counts = order.ranges(window, *self._part)
        take = order.take(window, *self._part)
        if self._rows is None:
            self._read(slot.rows, starts, counts, stopped)
        else:
            self._read_once()
            take = expand_ranges(starts, counts)[take]
        slot.index[: len(take)] = take
        slot.first, slot.count, slot.used = order.sampler.window_start(window), len(take), 0

    def order(self, sampler: Sampler, epoch: int) -> EpochOrder:
        """Return the order of an epoch over the rows that are trained on."""
        return sampler.order(epoch, self._excluded)

    def _memory(self, rows: int) -> Block:
        if isinstance(self._reader, ArrayRows):
            return self._reader.array
        return np.empty((rows, self._reader.n_features), self._reader.dtype)

    def _read(self, out: Block, starts: RowNumbers, counts: RowNumbers, stopped: Callable[[], bool]) -> None:
        done = 0
        for first in range(0, len(starts), _RANGES_AT_ONCE):
            if stopped():
                return
            part = slice(first, first + _RANGES_AT_ONCE)
            end = done + int(counts[part].sum())
            self._reader.read_into(out[done:end], starts[part], counts[part])
            done = end

    def _read_once(self) -> None:
        if not self._is_read and self._rows is not None:
            self._reader.read_into(self._rows, np.array([0]), np.array([len(self._rows)]), verify=True)
            self._is_read = True


class _Prefetcher:
    """A thread that fills free slots with window after window, epoch after epoch."""

    def __init__(self, windows: _Windows, sampler: Sampler, slots: list[_Slot], epoch: int, window: int) -> None:
        self._windows, self._sampler, self._position = windows, sampler, (epoch, window)
        self._free: queue.SimpleQueue[_Slot | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[_Slot | BaseException] = queue.SimpleQueue()
        for slot in slots:
            self._free.put(slot)
        self._stop = threading.Event()
        # a daemon: an interpreter that exits with the loader open must not wait for storage
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)

    @property
    def stopped(self) -> bool:
        """Whether :meth:`stop` was called."""
        return self._stop.is_set()

    def start(self) -> None:
        """Start to read."""
        self._thread.start()

    def next(self) -> _Slot:
        """Return the next filled slot; raise what the thread raised."""
        while not self.stopped:
            try:
                item = self._ready.get(timeout=_ALIVE_SECONDS)
            except queue.Empty:
                if self._thread.is_alive():
                    continue
                raise RuntimeError("the reading thread of the loader has ended without a word") from None
            if isinstance(item, BaseException):
                raise item
            return item
        raise _Stopped

    def release(self, slot: _Slot) -> None:
        """Give a consumed slot back to be filled again."""
        self._free.put(slot)

    def stop(self) -> None:
        """End the thread and wait until it has; it may be in the middle of a read."""
        self._stop.set()
        self._free.put(None)
        # the garbage collector may end an iterator from inside the thread
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        try:
            epoch, first = self._position
            while not self.stopped:
                order = self._windows.order(self._sampler, epoch)
                for window in range(first, self._sampler.windows):
                    slot = self._free.get()
                    if slot is None or self.stopped:
                        return
                    self._windows.fill(slot, order, window, self._stop.is_set)
                    self._ready.put(slot)
                epoch, first = epoch + 1, 0
        except BaseException as error:
            self._ready.put(error)


def _check(reader: Reader, sampler: Sampler, excluded: RowNumbers) -> None:
    if excluded.size and (np.any(np.diff(excluded) < 1) or excluded[0] < 0 or excluded[-1] >= reader.n_rows):
        raise InvalidInput(f"the {len(excluded)} excluded rows must be ascending, distinct and below {reader.n_rows}")
    if sampler.rows + len(excluded) != reader.n_rows:
        raise InvalidInput(
            f"the order is made for {sampler.rows} training rows and {len(excluded)} are excluded, but there "
            f"are {reader.n_rows} rows; make the order anew for this store"
        )
