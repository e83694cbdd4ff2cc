"""How rows arrive: a thread finds or reads the next rows of the order while those before are consumed."""

import logging
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from cvae_dist.errors import InvalidInput
from cvae_dist.model.tiling import tensor_of
from cvae_dist.store.layout import Block
from cvae_dist.store.mapped import MappedRows
from cvae_dist.store.ranges import RowNumbers, expand_ranges
from cvae_dist.store.reader import ArrayRows, Reader, RowReader
from cvae_dist.training.device import CPU
from cvae_dist.training.sampler import Part, Request, Share
from cvae_dist.training.transfer import Home, Transfer

_LOGGER = logging.getLogger(__name__)

INDEX_BYTES = 20  # of a row of a request, beside its own: its place, and what it takes to find it
_RANGES_AT_ONCE = 16_384  # bounds the lists of a read, however small the ranges are
_AHEAD = 4  # times the pace of the first epoch at which a store that stays in memory is read in order
_ALIVE_SECONDS = 1.0  # between looks whether the other side still lives


@dataclass(frozen=True, eq=False)
class Batch(Part):
    """A rank's part of one step, and its rows ``x`` as stored, (n, n_features), in memory of their own.

    They are on the loader's device.
    """

    x: Tensor


class Loader:
    """The batches of a share of the order, found one request ahead by one thread.

    Where the whole store fits into ``buffer_bytes`` it is read once, in order, and kept: the loader is ``resident``.
    Plain shards on a disk are mapped: their rows lie in the kernel's cache, and go from there into a batch. All others
    are read into two buffers, within ``buffer_bytes`` but for a batch or a row that is larger. The attribute
    ``buffer_bytes`` is the memory that all this takes.

    What a resident loader keeps goes to its ``device`` once, where there is room for it; else every batch goes there.
    """

    def __init__(self, reader: Reader, share: Share, *, buffer_bytes: int, device: torch.device = CPU) -> None:
        if share.stored_rows != reader.n_rows:
            raise InvalidInput(
                f"the order is made for {share.stored_rows} rows, but there are {reader.n_rows} rows; "
                "make the order anew for this store"
            )
        self._reader, self._share = reader, share
        row_bytes = reader.dtype.itemsize * reader.n_features
        held = isinstance(reader, ArrayRows)
        self.resident = held or fits(reader.n_rows, row_bytes, buffer_bytes)
        self._transfer = Transfer(device)
        self._home = Home.of(device, reader.n_rows * row_bytes) if self.resident else None
        self._request_rows = share.window_rows
        rows = 0 if held else reader.n_rows
        if not self.resident:
            affordable = slot_rows(share.sampler.batch_size, row_bytes, buffer_bytes)
            self._request_rows = max(1, min(share.window_rows, affordable))
            rows = 2 * self._request_rows
        self.buffer_bytes = rows * row_bytes + 2 * self._request_rows * INDEX_BYTES
        self._slots: list[_Slot] = []
        self._prefetcher: _Prefetcher | None = None
        _LOGGER.debug("%s", self)

    def __repr__(self) -> str:
        how = "held in memory" if self.resident else f"in requests of {self._request_rows}"
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
        prefetcher = self._prefetch(epoch, first_step)
        slot: _Slot | None = None
        try:
            while not prefetcher.stopped.is_set():
                part = next(parts)
                count = len(part.positions)
                found: list[Block] = []
                while count or not found:
                    slot = slot or prefetcher.next()
                    if slot is None:
                        return
                    found.append(slot.take(count))
                    count -= len(found[-1])
                    if slot.is_used:
                        prefetcher.release(slot)  # now the thread's
                        slot = None
                x = self._transfer(tensor_of(found[0] if len(found) == 1 else np.concatenate(found)))
                rows = self._home.gather(x) if self._home else x
                yield Batch(part.epoch, part.step, part.positions, part.n_global, rows)
        finally:
            prefetcher.stop()

    def _prefetch(self, epoch: int, first_step: int) -> "_Prefetcher":
        """Start to find rows, in memory that all iterators share."""
        self.close()
        if not self._slots:
            self._slots = self._open_slots()
        requests = self._share.requests(epoch, first_step, self._request_rows)
        self._prefetcher = _Prefetcher(requests, self._slots)
        self._prefetcher.thread.start()
        return self._prefetcher

    def _open_slots(self) -> "list[_Slot]":
        reader, share, rows = self._reader, self._share, self._request_rows
        if self.resident:
            held = _Held(reader, self._home)
            return [_Slot(held), _Slot(held)]
        mapped = MappedRows.of(reader.stored) if isinstance(reader, RowReader) else None
        if mapped:
            source = _Mapped(mapped, share)
            self.buffer_bytes = 2 * rows * INDEX_BYTES
            return [_Slot(source), _Slot(source)]
        return [_Slot(_Streamed(reader, rows)) for _ in range(2)]


def read_rows(reader: Reader, rows: RowNumbers) -> Block:
    """Return single rows, (len(rows), n_features), in the given order (ascending is fastest)."""
    out = np.empty((len(rows), reader.n_features), reader.dtype)
    first = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
    reader.read_into(out, rows[first], np.diff(first, append=len(rows)))
    return out


def fits(rows: int, row_bytes: int, buffer_bytes: int) -> bool:
    """Whether a loader of ``buffer_bytes`` holds the whole store in memory."""
    return rows * row_bytes <= buffer_bytes


def slot_rows(batch_size: int, row_bytes: int, buffer_bytes: int) -> int:
    """Return how many rows each of two buffers may have, beside a batch."""
    return max(1, (buffer_bytes - batch_size * row_bytes) // (2 * (row_bytes + INDEX_BYTES)))


class _Rows(Protocol):
    """Where the rows of a request are once they were found."""

    def find(self, request: Request, stopped: threading.Event) -> RowNumbers:
        """Make the rows of a request ready, and return where they are, in the order in which they come."""

    def take(self, places: RowNumbers) -> Block:
        """Return a copy of rows, or their places where they are at home on a device."""


class _Held:
    """All rows in memory: those of an array, or else what is read with the first request.

    Where they have a ``home`` on a device they go on there, at once.
    """

    def __init__(self, reader: Reader, home: Home | None) -> None:
        self._reader, self._home = reader, home
        self._is_read = isinstance(reader, ArrayRows)
        shape = reader.n_rows, reader.n_features
        self._rows = reader.array if isinstance(reader, ArrayRows) else np.empty(shape, reader.dtype)

    def find(self, request: Request, stopped: threading.Event) -> RowNumbers:
        if not self._is_read:
            self._reader.read_into(self._rows, np.array([0]), np.array([len(self._rows)]), verify=True)
            self._is_read = True
        if self._home and self._home.is_empty:
            self._home.fill(self._rows)
            self._rows = self._rows[:0].copy()  # lets go of what was read
        return expand_ranges(request.starts, request.counts)[request.take]

    def take(self, places: RowNumbers) -> Block:
        return places if self._home else _taken(self._rows, places)


class _Streamed:
    """The rows of one request, read into a buffer."""

    def __init__(self, reader: Reader, count: int) -> None:
        self._reader = reader
        self._rows = np.empty((count, reader.n_features), reader.dtype)

    def find(self, request: Request, stopped: threading.Event) -> RowNumbers:
        done = 0
        for first in range(0, len(request.starts), _RANGES_AT_ONCE):
            if stopped.is_set():
                break
            part = slice(first, first + _RANGES_AT_ONCE)
            end = done + int(request.counts[part].sum())
            self._reader.read_into(self._rows[done:end], request.starts[part], request.counts[part])
            done = end
        return request.take

    def take(self, places: RowNumbers) -> Block:
        return _taken(self._rows, places)


class _Mapped:
    """Rows in the kernel's cache. Every chunk is compared with its checksum once an epoch, by one of the ranks.

    That is where the rows stay in memory. Else it would read the store twice: then only the sizes of the shards are
    compared, and the rest is left to ``cvae-dist verify``.
    """

    def __init__(self, rows: MappedRows, share: Share) -> None:
        self._mapped, self._share = rows, share
        self._next = share.rank * rows.chunks // share.world
        self._due = 0.0
        self._coming = (0, 0)  # chunks that are checked next
        self._left = rows.chunks if rows.stays else 0  # chunks that this process has not looked at

    def find(self, request: Request, stopped: threading.Event) -> RowNumbers:
        part, self._coming = self._coming, self._part(len(request.take) / self._share.sampler.rows)
        if self._left or not self._mapped.stays:
            self._mapped.bring(request.starts, request.counts)
        if self._left:
            self._mapped.expect(*self._coming)  # the disk reads it while the part before is checked
        self._mapped.check(*part)
        self._left = max(0, self._left - (part[1] - part[0]))
        return self._mapped.locate(request.starts, request.counts)[request.take]

    def take(self, places: RowNumbers) -> Block:
        return self._mapped.gather(places)

    def _part(self, share_of_epoch: float) -> tuple[int, int]:
        """Return the chunks to check beside a part of an epoch; more while they are read, as they lie in order."""
        self._due += share_of_epoch * self._mapped.chunks * (_AHEAD if self._left else 1)
        first, end = self._next, min(self._next + int(self._due), self._mapped.chunks)
        self._due -= end - first
        self._next = end % self._mapped.chunks
        return first, end


def _taken(rows: Block, places: RowNumbers) -> Block:
    # "clip" spares NumPy a second look; every place is inside
    return np.take(rows, places, axis=0, mode="clip")


class _Slot:
    """One request, and how many of its rows were handed out."""

    def __init__(self, rows: _Rows) -> None:
        self._rows = rows
        self._places = np.empty(0, np.int64)
        self._used = 0

    @property
    def is_used(self) -> bool:
        """Whether every row was taken."""
        return self._used == len(self._places)

    def fill(self, request: Request, stopped: threading.Event) -> None:
        """Hold a request in place of the one before."""
        self._places = self._rows.find(request, stopped)
        self._used = 0

    def take(self, count: int) -> Block:
        """Return the next ``count`` rows, or those that are left."""
        first, self._used = self._used, min(self._used + count, len(self._places))
        return self._rows.take(self._places[first : self._used])


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
