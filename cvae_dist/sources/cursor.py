"""Reading tables on from where the last reads stopped.

Hidden state: a process keeps a few cursors.
"""

import contextlib
import itertools
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

_MOST = 8  # cursors that are kept
_BEHIND = 48_000_000  # bytes that a cursor keeps of what it has passed: threads do not come in the order of their rows
_choosing = threading.Lock()
_cursors: "list[Cursor]" = []  # that used last at the end


class Cursor:
    """A place in a table that is read from front to back, by one thread at a time.

    Attributes
    ----------
    key : object
        Table and columns.
    begin, stop : int
        The first row that it still has, and the row after the last one that it was asked for.
    lock : threading.Lock
        Whoever reads holds it.
    """

    def __init__(self, key: object, start: int, batches: "Iterator[pa.RecordBatch]") -> None:
        self.key, self.begin, self.stop = key, start, start
        self.lock = threading.Lock()
        self._batches = batches
        self._passed: deque[pa.RecordBatch] = deque()

    def read(self, first: int, stop: int) -> "Iterator[pa.RecordBatch]":
        """Yield rows ``first:stop`` in batches, fewer where the table ends before."""
        start = self.begin
        for batch in itertools.chain(tuple(self._passed), self._decoded()):
            low, high = max(first - start, 0), min(stop - start, len(batch))
            if low < high:
                yield batch.slice(low, high - low)
            start += len(batch)
            if start >= stop:
                return

    def _decoded(self) -> "Iterator[pa.RecordBatch]":
        for batch in self._batches:
            self._passed.append(batch)
            while sum(one.nbytes for one in self._passed) - self._passed[0].nbytes > _BEHIND:
                self.begin += len(self._passed.popleft())
            yield batch


@contextlib.contextmanager
def rows_at(
    key: object,
    first: int,
    stop: int,
    start_of: Callable[[int], int],
    open_at: "Callable[[int], Iterator[pa.RecordBatch]]",
) -> "Iterator[Iterator[pa.RecordBatch]]":
    """Lend rows ``first:stop`` of a table in batches, fewer where it ends before.

    Tables can be entered at some rows only. What lies between the last such row and ``first`` is decoded and thrown
    away, once: threads that read neighbouring rows share a cursor, one after the other.

    Parameters
    ----------
    key : object
        Table and columns; equal ones are read by the same cursors.
    first, stop : int
    start_of : callable
        Returns the last row not after a given one at which reading can begin.
    open_at : callable
        Returns the batches of the table from such a row on.
    """
    with _held(key, first, stop, start_of(first), open_at) as cursor:
        try:
            yield cursor.read(first, stop)
        except BaseException:
            cursor.begin = sys.maxsize  # it stopped anywhere: nobody reads on from there
            raise
        finally:
            if cursor.begin == sys.maxsize or start_of(cursor.stop) == cursor.stop:  # a new one would do as well
                with _choosing:
                    _cursors[:] = [one for one in _cursors if one is not cursor]


@contextlib.contextmanager
def _held(
    key: object, first: int, stop: int, start: int, open_at: "Callable[[int], Iterator[pa.RecordBatch]]"
) -> Iterator[Cursor]:
    """Hold the nearest cursor that can reach row ``first`` from ``start`` or a later row, or a new one."""
    while True:
        with _choosing:
            fit = [one for one in _cursors if one.key == key and one.begin <= first and one.stop >= start]
            cursor = max(fit, key=lambda one: one.stop) if fit else Cursor(key, start, open_at(start))
            cursor.stop = max(cursor.stop, stop)
            _cursors[:] = [*(one for one in _cursors if one is not cursor), cursor][-_MOST:]
        with cursor.lock:
            if cursor.begin <= first:  # and did not pass by, while this thread waited
                yield cursor
                return
