"""How rows arrive: a thread reads the next request of the order while the rows of the last one are consumed."""

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
from cvae_dist.training.request import Order, Part, Request

_LOGGER = logging.getLogger(__name__)

INDEX_BYTES = 8  # of a row that waits in memory, beside its own
_RANGES_AT_ONCE = 16_384  # bounds the lists of a read, however small the ranges are
_ALIVE_SECONDS = 1.0  # between looks whether the other side still lives


@dataclass(frozen=True, eq=False)
class Batch(Part):
    """A rank's part of one step, and its rows.

    Attributes
    ----------
    x : numpy.ndarray, shape (n, n_features)
        Rows as stored; a view of a reused buffer, valid until the next batch is asked for.
    """

    x: Block


class Loader:
    """The batches of an order, read one request ahead by one thread into memory allocated once.

    Where the whole store fits the memory it is read once, in order, and kept.

    Parameters
    ----------
    reader : Reader
        Where the rows are.
    order : Order
        Which rows come next.
    buffer_bytes : int
        Memory to stay within if the requests allow it (see ``plan_sampler``).

    Attributes
    ----------
    resident : bool
        Whether the rows are held in memory.
    buffer_bytes : int
        Memory that is allocated.
    """

    def __init__(self, reader: Reader, order: Order, *, buffer_bytes: int) -> None:
        if order.stored_rows != reader.n_rows:
            raise InvalidInput(
                f"the order is made for {order.stored_rows} rows, but there are {reader.n_rows} rows; "
                "make the order anew for this store"
            )
        self._reader, self._order = reader, order
        self._array = reader.array if isinstance(reader, ArrayRows) else None
        row_bytes = reader.dtype.itemsize * reader.n_features
        self.resident = self._array is not None or fits(reader.n_rows, row_bytes, buffer_bytes)
        held = 0 if self._array is not None else reader.n_rows if self.resident else 2 * order.request_rows
        self.buffer_bytes = (held + order.part_rows) * row_bytes + 2 * order.request_rows * INDEX_BYTES
        self._slots: list[_Slot] = []
        self._prefetcher: _Prefetcher | None = None
        _LOGGER.debug("%s", self)

    def __repr__(self) -> str:
        how = "held in memory" if self.resident else f"streamed by {self._order.request_rows}"
        return f"Loader({self._reader.n_rows} rows {how}, {self.buffer_bytes / 1e6:.0f} MB)"

    def batches(self, epoch: int = 0, first_step: int = 0) -> Iterator[Batch]:
        """Return batches from a position on, epoch after epoch without end.

        Errors of the reading thread are raised by the iterator. A new iterator ends the one before; an
        iterator that is closed or dropped ends its thread.
        """
        return self._iterate(self._order.parts(epoch, first_step), epoch, first_step)

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

    def _iterate(self, parts: Iterator[Part], epoch: int, first_step: int) -> Iterator[Batch]:
        prefetcher = self._prefetch(self._order.requests(epoch, first_step))
        slot: _Slot | None = None
        try:
            out = np.empty((self._order.part_rows, self._reader.n_features), self._reader.dtype)
            while not prefetcher.stopped:
                part = next(parts)
                count, filled = len(part.positions), 0
                while filled < count:
                    slot = slot or prefetcher.next()
                    filled += slot.take(out[filled:count])
                    if slot.is_used:
                        prefetcher.release(slot)  # now the thread's
                        slot = None
                yield Batch(part.epoch, part.step, part.positions, part.n_global, out[:count])
        except _Stopped:
            return
        finally:
            prefetcher.stop()

    def _prefetch(self, requests: Iterator[Request]) -> "_Prefetcher":
        """Start to read requests, into memory that all iterators share."""
        self.close()
        if not self._slots:
            memory = _Held(self._reader, self._array) if self.resident else _Streamed(self._reader)
            self._slots = [_Slot(memory, self._order.request_rows) for _ in range(2)]
        self._prefetcher = _Prefetcher(requests, self._slots)
        return self._prefetcher


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


def fits(rows: int, row_bytes: int, buffer_bytes: int) -> bool:
    """Whether a loader of ``buffer_bytes`` holds the whole store in memory."""
    return rows * row_bytes <= buffer_bytes


class _Stopped(Exception):
    """The consumer closed the loader."""


class _Streamed:
    """Rows that are read when they are requested."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def allocate(self, count: int) -> Block:
        """Return memory for the rows of a request."""
        return np.empty((count, self._reader.n_features), self._reader.dtype)

    def fill(self, rows: Block, request: Request, stopped: Callable[[], bool]) -> RowNumbers:
        """Read a request into ``rows``; return which of them come, one after the other."""
        done = 0
        for first in range(0, len(request.starts), _RANGES_AT_ONCE):
            if stopped():
                break
            part = slice(first, first + _RANGES_AT_ONCE)
            end = done + int(request.counts[part].sum())
            self._reader.read_into(rows[done:end], request.starts[part], request.counts[part])
            done = end
        return request.take


class _Held:
    """Rows that are all held in memory: ``array``, or else what is read with the first request."""

    def __init__(self, reader: Reader, array: Block | None) -> None:
        self._reader = reader
        self._is_read = array is not None
        self._rows = np.empty((reader.n_rows, reader.n_features), reader.dtype) if array is None else array

    def allocate(self, count: int) -> Block:
        """Return the rows themselves."""
        return self._rows

    def fill(self, rows: Block, request: Request, stopped: Callable[[], bool]) -> RowNumbers:
        """Return which of the rows come, one after the other."""
        if not self._is_read:
            self._reader.read_into(rows, np.array([0]), np.array([len(rows)]), verify=True)
            self._is_read = True
        return expand_ranges(request.starts, request.counts)[request.take]


class _Slot:
    """Memory of one request: rows, and which of them come, one after the other."""

    def __init__(self, memory: _Streamed | _Held, count: int) -> None:
        self._memory = memory
        self._rows = memory.allocate(count)
        self._index = np.empty(count, np.intp)
        self._count = self._used = 0

    @property
    def is_used(self) -> bool:
        """Whether every row was taken."""
        return self._used == self._count

    def fill(self, request: Request, stopped: Callable[[], bool]) -> None:
        """Hold a request in place of the one before."""
        take = self._memory.fill(self._rows, request, stopped)
        self._index[: len(take)] = take
        self._count, self._used = len(take), 0

    def take(self, out: Block) -> int:
        """Copy the next rows, as many as there are and fit; return how many."""
        count = min(len(out), self._count - self._used)
        index = self._index[self._used : self._used + count]
        # "clip" spares NumPy a second buffer; every index is inside
        np.take(self._rows, index, axis=0, out=out[:count], mode="clip")
        self._used += count
        return count


class _Prefetcher:
    """A thread that fills free slots with request after request."""

    def __init__(self, requests: Iterator[Request], slots: list[_Slot]) -> None:
        self._requests = requests
        self._free: queue.SimpleQueue[_Slot | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[_Slot | BaseException] = queue.SimpleQueue()
        for slot in slots:
            self._free.put(slot)
        self._stop = threading.Event()
        # a daemon: an interpreter that exits with the loader open must not wait for storage
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
        self._thread.start()

    @property
    def stopped(self) -> bool:
        """Whether :meth:`stop` was called."""
        return self._stop.is_set()

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
            while (slot := self._free.get()) is not None and not self.stopped:
                slot.fill(next(self._requests), self._stop.is_set)
                self._ready.put(slot)
        except BaseException as error:
            self._ready.put(error)
