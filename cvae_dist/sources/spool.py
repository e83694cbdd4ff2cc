"""Tables that outgrow the memory: spooled on a temporary file that has no name any more, and sorted there."""

import os
import tempfile
import weakref
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, Generic

import numpy as np
from numcodecs.vlen import VLenUTF8

from cvae_dist.errors import InvalidInput, StorageFailed
from cvae_dist.store.columns import Integers, Rows, regrouped

_BATCH = 2_048  # rows: when many runs are merged, a batch of each is in memory
_RUN = 65_536  # rows that are sorted in memory
_FEW = 131_072  # rows that stay in memory


class Spool(Generic[Rows]):
    """Rows of any number, in the order in which they came; several may read them at a time. A few stay in memory."""

    def __init__(self, kind: type[Rows]) -> None:
        self.kind = kind
        self._count = 0
        self._pending: list[Rows] = []
        self._waiting = 0
        self._batches: list[list[int]] = []  # bytes of each column
        self._starts = [0]  # of the batches in the file, and of the next one
        self._file: int | None = None

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Rows]:
        yield from self.part(0, len(self._batches))
        yield from self._pending

    def append(self, rows: Rows) -> None:
        """Add rows; ``StorageFailed`` when there is no room for them."""
        if not len(rows):
            return
        self._count += len(rows)
        self._waiting += len(rows)
        self._pending.append(rows)
        if self._waiting >= (_BATCH if self._batches else max(_BATCH, _FEW)):
            *full, last = regrouped(self._pending, _BATCH)
            for batch in full:
                self._write(batch)
            self._pending, self._waiting = [last], len(last)

    def end_batch(self) -> int:
        """Write what waits to be a batch, and return the number of the next batch."""
        for batch in regrouped(self._pending, _BATCH):
            self._write(batch)
        self._pending, self._waiting = [], 0
        return len(self._batches)

    def part(self, first: int, stop: int) -> Iterator[Rows]:
        """Yield the batches ``first`` to ``stop``, which are written."""
        return map(self._read, range(first, stop))

    def _write(self, rows: Rows) -> None:
        columns = [_packed(values) for values in rows.columns().values()]
        try:
            if self._file is None:
                self._file = _nameless_file()
                weakref.finalize(self, os.close, self._file)
            _write_at(self._file, b"".join(columns), self._starts[-1])
        except OSError as error:
            raise StorageFailed(
                error.errno,
                f"no temporary file can be written in {tempfile.gettempdir()}: {error.strerror}. Nothing was changed; "
                "free some room there, or name another folder by the environment variable TMPDIR",
            ) from error
        self._batches.append([len(column) for column in columns])
        self._starts.append(self._starts[-1] + sum(self._batches[-1]))

    def _read(self, number: int) -> Rows:
        assert self._file is not None
        start, columns = self._starts[number], []
        for field, size in zip(fields(self.kind), self._batches[number], strict=True):  # type: ignore[arg-type]
            columns.append(_unpacked(os.pread(self._file, size, start), field.type == Integers))
            start += size
        return self.kind(*columns)


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
        keys = self._keys(rows)
        if not self._waiting and self._follow(keys) and (keys[1:] > keys[:-1]).all():
            self._extend(rows)
            return
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
        if not self._follow(self._keys(rows)):
            self._runs.append(self._spool.end_batch())
        self._extend(rows)

    def _follow(self, keys: Any) -> bool:
        """Whether keys come after all that was written last."""
        return self._last is not None and len(keys) > 0 and keys[0] > self._last

    def _extend(self, rows: Rows) -> None:
        self._spool.append(rows)
        self._last = self._keys(rows)[-1]

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


def _packed(values: Any) -> bytes:
    """Return a column as bytes; it is read again soon, so it is not worth compressing."""
    return values.astype("<i8").tobytes() if values.dtype.kind == "i" else bytes(VLenUTF8().encode(values))


def _unpacked(data: bytes, integers: bool) -> Any:
    return np.frombuffer(data, np.int64).copy() if integers else VLenUTF8().decode(data)


def _write_at(descriptor: int, data: bytes, start: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, start)
        view, start = view[written:], start + written


def _nameless_file() -> int:
    """Open a temporary file that is gone when it is closed, however this process ends."""
    descriptor, path = tempfile.mkstemp(prefix="cvae-dist-")
    os.unlink(path)
    return descriptor
