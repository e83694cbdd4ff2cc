"""Reading a table on from where the last read stopped."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

_thread = threading.local()


class Cursor:
    """A place in a table that is read from front to back.

    Attributes
    ----------
    position : int
        The row that comes next.
    """

    def __init__(self, key: object, position: int, batches: "Iterator[pa.RecordBatch]") -> None:
        self.key, self.position = key, position
        self._batches = batches
        self._rest: pa.RecordBatch | None = None

    def read(self, count: int) -> "Iterator[pa.RecordBatch]":
        """Yield the next ``count`` rows in batches, fewer where the table ends before."""
        stop = self.position + count
        while self.position < stop:
            batch = self._rest if self._rest is not None else next(self._batches, None)
            if batch is None:
                return
            taken = min(stop - self.position, len(batch))
            self._rest = batch.slice(taken) if taken < len(batch) else None
            self.position += taken
            if taken:
                yield batch.slice(0, taken)


@contextlib.contextmanager
def cursor_at(
    key: object, first: int, start_of: Callable[[int], int], open_at: "Callable[[int], Iterator[pa.RecordBatch]]"
) -> Iterator[Cursor]:
    """Lend a cursor at row ``first``: the one with which this thread read the same table last, or a new one.

    Tables can be entered at some rows only. What lies between the last such row and ``first`` is decoded and thrown
    away, once: a thread keeps its last cursor until it has need of another, so successive reads of it cost nothing.

    Parameters
    ----------
    key : object
        Table and columns; equal ones are read by the same cursor.
    first : int
    start_of : callable
        Returns the last row not after a given one at which reading can begin.
    open_at : callable
        Returns the batches of the table from such a row on.
    """
    start = start_of(first)
    cursor: Cursor | None = vars(_thread).pop("cursor", None)
    if cursor is None or cursor.key != key or not start <= cursor.position <= first:
        cursor = Cursor(key, start, open_at(start))
    for _ in cursor.read(first - cursor.position):
        pass
    yield cursor
    if start_of(cursor.position) < cursor.position:  # a new one could not begin here
        _thread.cursor = cursor
