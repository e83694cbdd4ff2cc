"""How rows arrive: threads find or read the next rows of the order, and gather them, before they are asked for."""

import itertools
import logging
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

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
_GROUP_BYTES = 4_000_000  # batches that are handed over together: to wake a thread takes as long as half a megabyte
_MOST_GROUPED = 64
_LOOKED_AT_ONCE = 16  # chunks, of about 1 MB
_ALIVE_SECONDS = 1.0  # between looks whether the other side still lives

Item = TypeVar("Item")


@dataclass(frozen=True, eq=False)
class Batch(Part):
    """A rank's part of one step, and its rows ``x`` as stored, (n, n_features), in memory of their own.

    They are on the loader's device.
    """

    x: Tensor


class Loader:
    """The batches of a share of the order.

    One thread finds their rows, one request ahead. Another gathers them, about 4 MB of batches ahead.

    Where the whole store fits into ``buffer_bytes`` it is read once, in order, and kept: the loader is ``resident``.
    Plain shards on a disk are mapped: their rows lie in the kernel's cache, and go from there into a batch. All others
    are read into two buffers, within ``buffer_bytes`` but for a batch or a row that is larger. The attribute
    ``buffer_bytes`` is the memory that all this takes, beside the batches that are ready.

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
        batch_bytes = share.sampler.batch_size * row_bytes // share.world
        self._group_size = min(max(1, _GROUP_BYTES // max(1, batch_bytes)), _MOST_GROUPED)
        self._slots: list[_Slot] = []
        self._mapped: _Mapped | None = None
        self._threads: tuple[_Ahead[_Slot], _Ahead[_Group]] | tuple[()] = ()
        _LOGGER.debug("%s", self)

    def __repr__(self) -> str:
        how = "held in memory" if self.resident else f"in requests of {self._request_rows}"
        return f"Loader({self._reader.n_rows} rows {how}, {self.buffer_bytes / 1e6:.0f} MB)"

    def batches(self, epoch: int = 0, first_step: int = 0) -> Iterator[Batch]:
        """Return batches from a position on, epoch after epoch without end.

        Errors of the threads are raised by the iterator. A new iterator ends the one before; an iterator that is closed
        or dropped ends its threads.
        """
        return self._iterate(self._share.parts(epoch, first_step), epoch, first_step)

    def close(self) -> None:
        """End the threads; an iterator that is still in use ends too."""
        for thread in self._threads:
            thread.stop()
        self._threads = ()
        if self._mapped is not None:
            self._mapped.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _iterate(self, parts: Iterator[Part], epoch: int, first_step: int) -> Iterator[Batch]:
        self.close()
        if not self._slots:
            self._slots = self._open_slots()
        requests = self._share.requests(epoch, first_step, self._request_rows)
        stopped = threading.Event()
        slots = _Ahead(self._filled(requests, stopped), stopped)
        groups = _Ahead(self._gathered(parts, slots), stopped)
        self._threads = threads = slots, groups
        try:
            for group, rows in groups:
                for part, x in zip(group, torch.split(rows, [len(part.positions) for part in group]), strict=True):
                    if stopped.is_set():
                        return
                    x = self._transfer(x)
                    x = self._home.gather(x) if self._home else x
                    yield Batch(part.epoch, part.step, part.positions, part.n_global, x)
        finally:
            if self._threads is threads:
                self.close()

    def _filled(self, requests: Iterator[Request], stopped: threading.Event) -> "Iterator[_Slot]":
        """Yield the slots in turn, with request after request."""
        for slot, request in zip(itertools.cycle(self._slots), requests, strict=False):
            slot.fill(request, stopped)
            yield slot

    def _gathered(self, parts: Iterator[Part], slots: "Iterator[_Slot]") -> "Iterator[_Group]":
        """Yield some batches at a time: what is said of them, and their rows one after the other.

        Those that are there never wait for the next request: a batch that needs it comes by itself.
        """
        slot, part = next(slots, None), next(parts)
        while slot is not None:
            group, count = [part], len(part.positions)
            part = next(parts)
            while len(group) < self._group_size and count + len(part.positions) <= slot.left:
                group.append(part)
                count += len(part.positions)
                part = next(parts)
            found = [slot.take(count)]
            while len(found[-1]) < count:
                count -= len(found[-1])
                slot = next(slots, None)
                if slot is None:
                    return
                found.append(slot.take(count))
            yield group, tensor_of(found[0] if len(found) == 1 else np.concatenate(found))

    def _open_slots(self) -> "list[_Slot]":
        reader, share, rows = self._reader, self._share, self._request_rows
        if self.resident:
            held = _Held(reader, self._home)
            return [_Slot(held), _Slot(held)]
        mapped = MappedRows.of(reader.stored) if isinstance(reader, RowReader) else None
        if mapped:
            self._mapped = _Mapped(mapped, share)
            self.buffer_bytes = 2 * rows * INDEX_BYTES
            return [_Slot(self._mapped), _Slot(self._mapped)]
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

    Rows that stay are read once in order, by a thread of its own, as fast as the disk is. What a request needs earlier
    is read for it.
    """

    def __init__(self, rows: MappedRows, share: Share) -> None:
        self._mapped, self._share = rows, share
        self._next = share.rank * rows.chunks // share.world
        self._due = 0.0
        self._left = rows.chunks if rows.stays else 0  # chunks that this process has not looked at
        self._first_look: threading.Thread | None = None
        self._problem: BaseException | None = None  # that it met

    def find(self, request: Request, stopped: threading.Event) -> RowNumbers:
        if self._left and self._first_look is None:
            self._first_look = threading.Thread(target=self._look, args=(stopped,), name="loader", daemon=True)
            self._first_look.start()
        if self._problem:
            raise self._problem
        if self._left or not self._mapped.stays:
            self._mapped.bring(request.starts, request.counts)
        if not self._left:
            self._mapped.check(*self._part(len(request.take) / self._share.sampler.rows))
        return self._mapped.locate(request.starts, request.counts)[request.take]

    def take(self, places: RowNumbers) -> Block:
        return self._mapped.gather(places)

    def close(self) -> None:
        """Wait until the first look has ended, which was told to stop."""
        if self._first_look not in (None, threading.current_thread()):
            self._first_look.join()
        self._first_look = None

    def _look(self, stopped: threading.Event) -> None:
        """Check the chunks that are left, in order, and let the disk read some ahead."""
        try:
            while self._left and not stopped.is_set():
                end = min(self._next + min(_LOOKED_AT_ONCE, self._left), self._mapped.chunks)
                self._mapped.expect(end, min(end + _LOOKED_AT_ONCE, self._mapped.chunks))
                self._mapped.check(self._next, end)
                self._left, self._next = self._left - (end - self._next), end % self._mapped.chunks
        except BaseException as error:
            self._problem = error

    def _part(self, share_of_epoch: float) -> tuple[int, int]:
        """Return the chunks to check beside a part of an epoch."""
        self._due += share_of_epoch * self._mapped.chunks
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
    def left(self) -> int:
        """Rows that were not taken yet."""
        return len(self._places) - self._used

    def fill(self, request: Request, stopped: threading.Event) -> None:
        """Hold a request in place of the one before."""
        self._places = self._rows.find(request, stopped)
        self._used = 0

    def take(self, count: int) -> Block:
        """Return the next ``count`` rows, or those that are left; none once every row was taken."""
        first, self._used = self._used, min(self._used + count, len(self._places))
        return self._rows.take(self._places[first : self._used])


_Group = tuple[list[Part], Tensor]


class _Ahead(Generic[Item]):
    """An iterator that a thread of its own runs ahead: it makes an item while the one before is in use.

    An item is in use until the next one is asked for. Then its memory may be used again.
    """

    def __init__(self, items: Iterator[Item], stopped: threading.Event) -> None:
        self._items, self._stopped = items, stopped
        self._room = threading.Semaphore(2)
        self._in_use = False
        self._ready: queue.SimpleQueue[Item | BaseException] = queue.SimpleQueue()
        # a daemon: an interpreter that exits with the loader open must not wait for storage
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Item:
        """Return the next item, or end after :meth:`stop`; raise what the thread raised."""
        if self._in_use:
            self._room.release()
        self._in_use = True
        while not self._stopped.is_set():
            try:
                item = self._ready.get(timeout=_ALIVE_SECONDS)
            except queue.Empty:
                if self._thread.is_alive():
                    continue
                raise RuntimeError("a thread of the loader has ended without a word") from None
            if isinstance(item, BaseException):
                raise item
            return item
        raise StopIteration

    def stop(self) -> None:
        """End the thread and wait until it has; it may be in the middle of a read."""
        self._stopped.set()
        self._room.release()
        self._ready.put(StopIteration())
        # the garbage collector may end an iterator from inside the thread
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        try:
            while self._room.acquire() and not self._stopped.is_set():
                self._ready.put(next(self._items))
        except BaseException as error:
            self._ready.put(error)
