"""The files whose rows one run reads: spooled by the driver, staged beside the shards, read by tasks as intervals."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count as counting

import numpy as np

from cvae_dist.sources.files import Integers, Texts
from cvae_dist.sources.pieces import Pieces
from cvae_dist.sources.spool import Spool
from cvae_dist.store.columns import Columns, ColumnsDigest, regrouped
from cvae_dist.store.layout import decode_chunk, encode_chunk
from cvae_dist.store.manifest import COLUMNS, Entries, dropped_count, read_spans
from cvae_dist.store.urls import Location

_FILES = 65_536  # of one object, and in memory at a time


@dataclass(frozen=True)
class _Told(Columns):
    """What tasks are told of some files, which tells their rows from others; see :class:`Entries`."""

    path: Texts
    size: Integers
    version: Texts
    rows: Integers
    dropped: Texts


class Batch:
    """Files in the order in which their rows are stored, on a temporary file of the driver.

    Attributes
    ----------
    files, rows, dropped : int
        How many there are; rows that are kept of all of them, and rows that are left out.
    digest : str
        Of all that tasks are told of the files.
    """

    def __init__(self, entries: Iterable[Entries]) -> None:
        self._spool = Spool(Entries)
        self.rows = self.dropped = 0
        digest = ColumnsDigest(*_Told.names())
        for part in entries:
            self._spool.append(part)
            digest.add(part)
            self.rows += int(part.rows.sum())
            self.dropped += sum(map(dropped_count, filter(None, part.dropped)))
        self.files = len(self._spool)
        self.digest = digest.digest().hex()

    def __iter__(self) -> Iterator[Entries]:
        """Yield the files, some at a time."""
        return regrouped(self._spool, _FILES)

    def stage(self, folder: Location) -> "StagedBatch":
        """Write the batch where tasks find it, as a few objects that nobody changes."""
        place = self.staged(folder)
        for number, part in enumerate(self._told()):
            (place.place / str(number)).write(_encoded(part))
        return place

    def staged(self, folder: Location) -> "StagedBatch":
        """Return where :meth:`stage` writes it: named after its content, as an earlier run may have left another."""
        return StagedBatch(folder / self.digest)

    def cut(self, edges: Integers) -> "list[Interval]":
        """Return which files make the rows between every two neighbouring edges, which are row numbers of the batch."""
        intervals: list[Interval] = []
        digest, before, base = ColumnsDigest(*_Told.names()), 0, 0
        file = skip = 0
        for part in self._told():
            ends = before + np.cumsum(part.rows)
            starts = ends - part.rows
            digested = 0, 0  # files of this part, without those before; often the same ones make many intervals
            found = b""
            while len(intervals) < len(edges) - 1 and edges[len(intervals)] < ends[-1]:
                start, stop = edges[len(intervals)], edges[len(intervals) + 1]
                files = int(ends.searchsorted(start, side="right")), int(starts.searchsorted(stop, side="left"))
                if start >= before:
                    file, skip = base + files[0], int(start - starts[files[0]])
                    if files != digested:
                        digest = ColumnsDigest(*_Told.names())
                if start < before or files != digested:
                    inside = part[slice(*files)]
                    digest.add(inside if inside.rows.all() else inside[inside.rows > 0])
                    digested, found = files if start >= before else (0, 0), digest.digest()
                if stop > ends[-1]:
                    break
                intervals.append(Interval(file, skip, int(stop - start), found))
            before, base = int(ends[-1]), base + len(part)
        return intervals

    def first(self, rows: int) -> Pieces:
        """Return the first rows, at most so many."""
        part = next(part for part in self._told() if part.rows.any())
        return _runs(part).cut(0, min(rows, int(part.rows.sum())))

    def _told(self) -> Iterator[_Told]:
        return (part.as_kind(_Told) for part in self)


@dataclass(frozen=True, slots=True)
class Interval:
    """Neighbouring rows of a batch.

    Attributes
    ----------
    file, skip, rows : int
        Number of the first file, kept rows of it that come before, and how many rows there are.
    digest : bytes
        Of what is known of the files.
    """

    file: int
    skip: int
    rows: int
    digest: bytes

    @property
    def identity(self) -> bytes:
        """What tells these rows from others."""
        return f"{self.skip} {self.rows} ".encode() + self.digest


@dataclass(frozen=True)
class StagedBatch:
    """A batch that tasks read: it travels with them as the name of a place."""

    place: Location

    def pieces(self, interval: Interval) -> Pieces:
        """Return the runs of rows that make an interval."""
        parts, rows, start = [], -interval.skip, interval.file % _FILES
        for number in counting(interval.file // _FILES):
            part = _staged(self.place, number)[start:]
            stop = int(np.searchsorted(np.cumsum(part.rows), interval.rows - rows, side="left")) + 1
            parts.append(part[:stop])
            rows, start = rows + int(parts[-1].rows.sum()), 0
            if rows >= interval.rows:
                return _runs(_Told.join(parts)).cut(interval.skip, interval.skip + interval.rows)
        raise AssertionError("an interval ends in its batch")


@lru_cache(maxsize=2)
def _staged(place: Location, number: int) -> _Told:
    return _decoded((place / str(number)).read())


def _runs(files: _Told) -> Pieces:
    """Return the runs of kept rows of every file."""
    if not any(files.dropped):
        whole = np.zeros(len(files), dtype=np.int64)
        return Pieces(files.path, files.size, files.version, whole, files.rows)
    runs: list[tuple[int, int, int]] = []  # number of the file, first row and number of rows
    for number, (text, kept) in enumerate(zip(files.dropped, files.rows.tolist(), strict=True)):
        start = 0
        for left, right in read_spans(text).tolist():
            runs.append((number, start, left - start))
            kept, start = kept - (left - start), right
        runs.append((number, start, kept))
    owner, first, rows = np.array(runs, dtype=np.int64).T
    owners = files[owner]
    return Pieces(owners.path, owners.size, owners.version, first, rows)


def _encoded(files: _Told) -> bytes:
    chunks = [b"".join(encode_chunk(values, len(files))) for values in files.columns().values()]
    return b"".join([np.array([len(files), *map(len, chunks)], "<i8").tobytes(), *chunks])


def _decoded(data: bytes) -> _Told:
    head = 8 * (1 + len(_Told.names()))
    count, *sizes = np.frombuffer(data[:head], "<i8").tolist()
    ends = head + np.cumsum(sizes)
    parts = zip(_Told.names(), ends - sizes, ends, strict=True)
    return _Told(*(decode_chunk(data[start:end], COLUMNS[name], (count,)) for name, start, end in parts))
