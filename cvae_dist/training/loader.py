"""How rows arrive: a thread reads the next request of the order while the rows of the last one are consumed."""

import logging
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np

from cvae_dist.errors import InvalidInput
from cvae_dist.store.layout import Block
from cvae_dist.store.ranges import RowNumbers, expand_ranges
from cvae_dist.store.reader import ArrayRows, Reader
from cvae_dist.training.sampler import Part, Request, Share

_LOGGER = logging.getLogger(__name__)

INDEX_BYTES = 8  # of a row that waits in memory, beside its own
_RANGES_AT_ONCE = 16_384  # bounds the lists of a read, however small the ranges are
_ALIVE_SECONDS = 1.0  # between looks whether the other side still lives


@dataclass(frozen=True, eq=False)
class Batch(Part):
    """A rank's part of one step, and its rows ``x`` as stored, (n, n_features).

    ``x`` is a view of a reused buffer, valid until the next batch is asked for.
    """

    x: Block


class Loader:
    """The batches of a share of the order, read one request ahead by one thread into memory allocated once.

    Where the whole store fits into ``buffer_bytes`` it is read once, in order, and kept: the loader is ``resident``.
    Else it stays within ``buffer_bytes`` if the requests allow that (see ``plan_sampler``). The attribute
    ``buffer_bytes`` is the memory that is allocated.
    """

    def __init__(self, reader: Reader, share: Share, *, buffer_bytes: int) -> None:
        if share.stored_rows != reader.n_rows:
            raise InvalidInput(
                f"the order is made for {share.stored_rows} rows, but there are {reader.n_rows} rows; "
                "make the order anew for this store"
            )
        self._reader, self._share = reader, share
        self._array = reader.array if isinstance(reader, ArrayRows) else None
        row_bytes = reader.dtype.itemsize * reader.n_features
        self.resident = self._array is not None or fits(reader.n_rows, row_bytes, buffer_bytes)
        held = 0 if self._array is not None else reader.n_rows if self.resident else 2 * share.request_rows
        self.buffer_bytes = (held + share.part_rows) * row_bytes + 2 * share.request_rows * INDEX_BYTES
        self._slots: list[_Slot] = []
        self._prefetcher: _Prefetcher | None = None
        _LOGGER.debug("%s", self)

    def __repr__(self) -> str:
        how = "held in memory" if self.resident else f"streamed by {self._share.request_rows}"
        return f"Loader({self._reader.n_rows} rows {how}, {self.buffer_bytes / 1e6:.0f} MB)"

    def batches(self, epoch: int = 0, first_step: int = 0) -> Iterator[Batch]:
        """Return batches from a position on, epoch after epoch without end.

        Errors of the reading thread are raised by the iterator. A new iterator ends the one before; an
        iterator that is closed or dropped ends its thread.
        """
        return self._iterate(self._share.parts(epoch, first_step), epoch, first_step)

    def close(self) -> None:
        """End the reading thread; an iterator that is still in use ends too."""
        if self._prefetcher is not None:
            self._prefetcher.stop()
            self._prefetcher = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _iterate(self, parts: Iterator[Part], epoch: int, first_step: int) -> Iterator[Batch]:
        prefetcher = self._prefetch(self._share.requests(epoch, first_step))
        slot: _Slot | None = None
        try:
            out = np.empty((self._share.part_rows, self._reader.n_features), self._reader.dtype)
            while not prefetcher.stopped.is_set():
                part = next(parts)
                count, filled = len(part.positions), 0
                while filled < count:
                    slot = slot or prefetcher.next()
                    if slot is None:
                        return
                    filled += slot.take(out[filled:count])
                    if slot.is_used:
                        prefetcher.release(slot)  # now the thread's
                        slot = None
                yield Batch(part.epoch, part.step, part.positions, part.n_global, out[:count])
        finally:
            prefetcher.stop()

    def _prefetch(self, requests: Iterator[Request]) -> "_Prefetcher":
        """Start to read requests, into memory that all iterators share."""
        self.close()
        if not self._slots:
            held = _Held(self._reader, self._array) if self.resident else None
            self._slots = [_Slot(self._reader, self._share.request_rows, held) for _ in range(2)]
        self._prefetcher = _Prefetcher(requests, self._slots)
        self._prefetcher.thread.start()
        return self._prefetcher


def read_rows(reader: Reader, rows: RowNumbers) -> Block:
    """Return single rows, (len(rows), n_features), in the given order (ascending is fastest)."""
    out = np.empty((len(rows), reader.n_features), reader.dtype)
    first = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
    reader.read_into(out, rows[first], np.diff(first, append=len(rows)))
    return out


def fits(rows: int, row_bytes: int, buffer_bytes: int) -> bool:
    """Whether a loader of ``buffer_bytes`` holds the whole store in memory."""
    return rows * row_bytes <= buffer_bytes


class _Held:
    """All rows in memory: ``array``, or else what is read with the first request."""

    def __init__(self, reader: Reader, array: Block | None) -> None:
        self._reader = reader
        self._is_read = array is not None
        self.rows = np.empty((reader.n_rows, reader.n_features), reader.dtype) if array is None else array

    def find(self, request: Request) -> RowNumbers:
        """Return which of the rows come, one after the other."""
        if not self._is_read:
            self._reader.read_into(self.rows, np.array([0]), np.array([len(self.rows)]), verify=True)
            self._is_read = True
        return expand_ranges(request.starts, request.counts)[request.take]


class _Slot:
    """The rows of one request, or all rows where they fit in memory, and the order in which they are handed out."""

    def __init__(self, reader: Reader, count: int, held: _Held | None) -> None:
        self._reader, self._held = reader, held
        self._rows = held.rows if held else np.empty((count, reader.n_features), reader.dtype)
        self._index = np.empty(count, np.intp)
        self._count = self._used = 0

    @property
    def is_used(self) -> bool:
        """Whether every row was taken."""
        return self._used == self._count

    def fill(self, request: Request, stopped: threading.Event) -> None:
        """Hold a request in place of the one before."""
        if self._held:
            take = self._held.find(request)
        else:
            self._read(request, stopped)
            take = request.take
        self._index[: len(take)] = take
        self._count, self._used = len(take), 0

    def _read(self, request: Request, stopped: threading.Event) -> None:
        done = 0
        for first in range(0, len(request.starts), _RANGES_AT_ONCE):
            if stopped.is_set():
                break
            part = slice(first, first + _RANGES_AT_ONCE)
            end = done + int(request.counts[part].sum())
            self._reader.read_into(self._rows[done:end], request.starts[part], request.counts[part])
            done = end

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
        self.stopped = threading.Event()
        # a daemon: an interpreter that exits with the loader open must not wait for storage
        self.thread = threading.Thread(target=self._run, name="loader", daemon=True)

    def next(self) -> _Slot | None:
        """Return the next filled slot, or None after :meth:`stop`; raise what the thread raised."""
        while not self.stopped.is_set():
            try:
                item = self._ready.get(timeout=_ALIVE_SECONDS)
            except queue.Empty:
                if self.thread.is_alive():
                    continue
                raise RuntimeError("the reading thread of the loader has ended without a word") from None
            if isinstance(item, BaseException):
                raise item
            return item
        return None

    def release(self, slot: _Slot) -> None:
        """Give a consumed slot back to be filled again."""
        self._free.put(slot)

    def stop(self) -> None:
        """End the thread and wait until it has; it may be in the middle of a read."""
        self.stopped.set()
        self._free.put(None)
        # the garbage collector may end an iterator from inside the thread
        if self.thread is not threading.current_thread():
            self.thread.join()

    def _run(self) -> None:
        try:
            while (slot := self._free.get()) is not None and not self.stopped.is_set():
                slot.fill(next(self._requests), self.stopped)
                self._ready.put(slot)
        except BaseException as error:
            self._ready.put(error)
