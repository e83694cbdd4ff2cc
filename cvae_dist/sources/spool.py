"""Tables that outgrow the memory: spooled on a temporary file that has no name any more, and sorted there."""

import os
import tempfile
import weakref
from bisect import bisect_right
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Generic

import numpy as np

from cvae_dist.errors import InvalidInput, StorageFailed
from cvae_dist.store.columns import Rows, regrouped

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH = 2_048  # rows: when many runs are merged, a batch of each is in memory
_RUN = 65_536  # rows that are sorted in memory


class Spool(Generic[Rows]):
    """Rows of any number, in the order in which they came; several may read them at a time. A few stay in memory."""

    def __init__(self, kind: type[Rows]) -> None:
        self.kind = kind
        self._count = 0
        self._pending: list[Rows] = []
        self._waiting = 0
        self._places: list[tuple[int, int]] = []  # of the batches: position in the file, bytes
        self._end = 0
        self._file: int | None = None

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Rows]:
        yield from self.part(0, len(self._places))
        yield from self._pending

    def append(self, rows: Rows) -> None:
        """Add rows; ``StorageFailed`` when there is no room for them."""
        if not len(rows):
            return
        self._count += len(rows)
        self._waiting += len(rows)
        self._pending.append(rows)
        if self._waiting >= _BATCH:
            *full, last = regrouped(self._pending, _BATCH)
            for batch in full:
                self._write(batch)
            self._pending, self._waiting = [last], len(last)

    def end_batch(self) -> int:
        """Write what waits to be a batch, and return the number of the next batch."""
        if self._waiting:
            self._write(self.kind.join(self._pending))
            self._pending, self._waiting = [], 0
        return len(self._places)

    def part(self, first: int, stop: int) -> Iterator[Rows]:
        """Yield the batches ``first`` to ``stop``, which are written."""
        for start, size in self._places[first:stop]:
            yield self._read(start, size)

    def _write(self, rows: Rows) -> None:
        import pyarrow as pa

        batch = pa.record_batch({name: _arrow(values) for name, values in rows.columns().items()})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
            writer.write_batch(batch)
        data = sink.getvalue()
        try:
            if self._file is None:
                self._file = _nameless_file()
                weakref.finalize(self, os.close, self._file)
            written = os.pwrite(self._file, data, self._end)
            while written < data.size:
                written += os.pwrite(self._file, memoryview(data)[written:], self._end + written)
        except OSError as error:
            raise StorageFailed(
                error.errno,
                f"no temporary file can be written in {tempfile.gettempdir()}: {error.strerror}. Nothing was changed; "
                "free some room there, or name another folder by the environment variable TMPDIR",
            ) from error
        self._places.append((self._end, data.size))
        self._end += data.size

    def _read(self, start: int, size: int) -> Rows:
        import pyarrow as pa

        assert self._file is not None
        batch = pa.ipc.open_stream(os.pread(self._file, size, start)).read_next_batch()
        return self.kind(*(column.to_numpy(zero_copy_only=False) for column in batch.columns))


class Sorter(Generic[Rows]):
    """Sorts rows of any number by one column: strings in the order of their UTF-8 bytes, or numbers.

    Rows that come in order are written once. Others make sorted runs, which are merged in the end.

    Parameters
    ----------
    kind : type
        What holds the rows.
    key : str
        The column to sort by.
    unique : bool
        Whether rows with equal keys are refused. Otherwise they come in any order.
    """

    def __init__(self, kind: type[Rows], key: str, unique: bool = False) -> None:
        self._key, self._unique = key, unique
        self._spool = Spool(kind)
        self._pending: list[Rows] = []
        self._waiting = 0
        self._runs: list[int] = []  # number of the first batch of each
        self._last: Any = None

    def append(self, rows: Rows) -> None:
        """Add rows, in any order; ``InvalidInput`` where a key is there twice."""
        self._pending.append(rows)
        self._waiting += len(rows)
        if self._waiting >= _RUN:
            self._write()

    def finish(self) -> Spool[Rows]:
        """Return all rows, sorted; ``InvalidInput`` where a key is there twice."""
        if self._waiting:
            self._write()
        if len(self._runs) < 2:
            return self._spool
        merged = Spool(self._spool.kind)
        for rows in self._merged():
            merged.append(rows)
        return merged

    def _write(self) -> None:
        """Write what waits: to the last run where it goes on in order, else as a new one."""
        rows = self._sorted(self._pending)
        self._pending, self._waiting = [], 0
        keys = self._keys(rows)
        if self._last is None or keys[0] <= self._last:
            self._runs.append(self._spool.end_batch())
        self._spool.append(rows)
        self._last = keys[-1]

    def _merged(self) -> Iterator[Rows]:
        stops = [*self._runs[1:], self._spool.end_batch()]
        runs = [self._spool.part(first, stop) for first, stop in zip(self._runs, stops, strict=True)]
        heads = [next(run) for run in runs]
        while heads:
            bound = min(self._keys(head)[-1] for head in heads)  # all rows up to here are in memory
            cuts = [bisect_right(self._keys(head), bound) for head in heads]
            yield self._sorted([head[:cut] for head, cut in zip(heads, cuts, strict=True)])
            left = [
                (head[cut:] if cut < len(head) else next(run, None), run)
                for head, cut, run in zip(heads, cuts, runs, strict=True)
            ]
            heads = [head for head, _ in left if head is not None]
            runs = [run for head, run in left if head is not None]

    def _sorted(self, parts: list[Rows]) -> Rows:
        rows = self._spool.kind.join(parts)
        keys = self._keys(rows)
        if not (keys[1:] >= keys[:-1]).all():
            rows = rows[np.argsort(keys, kind="stable")]
        if self._unique:
            self._require_unique(self._keys(rows))
        return rows

    def _require_unique(self, keys: Any) -> None:
        again = np.flatnonzero(keys[1:] == keys[:-1])
        if len(again):
            raise InvalidInput(
                f"the {self._key} {keys[again[0]]} is there twice, so nobody could tell which one is meant. "
                "Nothing was written; rename or remove one of them"
            )

    def _keys(self, rows: Rows) -> Any:
        return getattr(rows, self._key)


def _arrow(values: Any) -> "pa.Array[Any]":
    import pyarrow as pa

    return pa.array(values, pa.string() if values.dtype.kind == "O" else None)


def _nameless_file() -> int:
    """Open a temporary file that is gone when it is closed, however this process ends."""
    descriptor, path = tempfile.mkstemp(prefix="cvae-dist-")
    os.unlink(path)
    return descriptor
