"""Where the rows of files lie in a store, also once some of the files changed or went.

Files that went, and changed ones that have another number of rows now, leave holes. New files that have as many rows
fill them, and then files from the end of the store. Where nothing fits, all rows behind a hole move up.
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from cvae_dist.sources.batch import Batch
from cvae_dist.sources.changes import Changes, aligned, merged, places
from cvae_dist.sources.file_table import FileTable
from cvae_dist.sources.files import Files, Integers
from cvae_dist.sources.spool import Sorter, Spool
from cvae_dist.store.manifest import NOWHERE, Batches, Entries
from cvae_dist.store.permutation import Permutation

_Runs = list[tuple[int, int]]  # first row and number of rows


def to_read(changes: Changes) -> FileTable:
    """Return the new files and the changed ones."""
    if not len(changes.changed):
        return changes.new
    files = Sorter(Files, "path")
    for new in changes.new.batches():
        files.append(new)
    for changed in changes.changed:
        files.append(changed.files)
    return FileTable(files.finish(), changes.new.kinds)


class Places:
    """The files of a store after a run, and where the rows of each are.

    Parameters
    ----------
    known : callable
        Yields the files of the published store, sorted by path.
    changes : Changes
        What became of them.
    fresh : Batch
        The files of :func:`to_read`, whose rows are nowhere yet.
    published : int
        Rows of the published store.
    key : int, optional
        What the order of rows at the end depends on, where files have one row each; by default it is that of the files.

    Raises
    ------
    ValueError
        The known files do not have each row of the published store once.

    Attributes
    ----------
    rows : int
        Rows of the store after the run.
    first : int
        Rows before this one stay as they are.
    last : int
        So do published rows from this one on.
    moved_up : int
        Rows that move up because nothing fits a hole before them.
    """

    def __init__(self, known: Batches, changes: Changes, fresh: Batch, published: int, key: int | None = None) -> None:
        self._key = key
        self._known, self._deleted, self._fresh = known, changes.deleted, fresh
        self._placed: Iterable[Entries] = fresh
        self._moves = _Moves({}, [])
        self._end = self.first = published
        self.rows, self.last, self.moved_up = published + fresh.rows, 0, 0
        if len(changes.changed) or len(changes.deleted):
            self._place(changes, published)

    def files(self) -> Iterator[Entries]:
        """Yield all files, sorted by path."""
        placed, shuffled = 0, self._key is not None and Permutation(self.rows - self._end, self._key)
        for part in self._unmoved():
            start, new = self._moves.of(part.start), part.start == NOWHERE
            rows = np.where(new, part.rows, 0)
            start[new] = (self._end + placed + np.cumsum(rows) - rows)[new]
            if shuffled:
                at_end = rows > 0
                start[at_end] = self._end + shuffled(start[at_end] - self._end)
            placed += int(rows.sum())
            yield replace(part, start=np.minimum(start, self.rows - part.rows))  # a file without rows is anywhere

    def behind(self, first: int) -> tuple[Batch, int]:
        """Return the files of all rows from number ``first`` on, in the order of their rows, and their first row."""
        if first >= self.rows or (self._key is None and first == self.first == self._end):  # none, or new ones alone
            return self._fresh, first
        table = Sorter(Entries, "start")
        for part in self.files():
            table.append(part[(part.rows > 0) & (part.start + part.rows > first)])
        batch = Batch(table.finish())
        return batch, next((int(part.start[0]) for part in batch), first)

    def _unmoved(self) -> Iterator[Entries]:
        """Yield all files, sorted by path, where they are before any moves."""
        return merged(_lacking(self._known(), self._deleted), self._placed)

    def _place(self, changes: Changes, published: int) -> None:
        """Give the changed and the new files places among the known ones, and find out which of these move."""
        holes: _Runs = [run for part in changes.deleted for run in _runs(part)]
        kept, touched = self._keep_places(changes, holes)
        self._placed, holes = _filled(kept, sorted(holes))
        self._end = published - sum(rows for _, rows in holes)
        self.rows = self._end + sum(int(part.rows[part.start == NOWHERE].sum()) for part in self._placed)
        self.first = min([published, *(start for start, _ in touched)])
        self.last = max((start + rows for start, rows in touched), default=0)
        if holes:
            files = sorted(self._beyond(self._end))
            _require_tiled([*files, *(hole for hole in holes if sum(hole) > self._end)], self._end, published)
            self._moves = _moves(holes, files, published)
            self.last = published
            self.moved_up = self._end - self._moves.holes[0][0] if self._moves.holes else 0

    def _keep_places(self, changes: Changes, holes: _Runs) -> tuple[Spool[Entries], _Runs]:
        """Give changed files that have as many rows as before their old places. The others leave more holes.

        Return the files to read, and runs of rows outside of which no row changes.
        """
        kept, same = Spool(Entries), list[tuple[int, int]]()
        for now, before in aligned(self._fresh, Entries, (part.known for part in changes.changed), Entries):
            place = places(before.path, now.path)
            stays = now.rows[place] == before.rows
            start = now.start.copy()
            start[place[stays]] = np.where(before.rows[stays] > 0, before.start[stays], NOWHERE)
            same += _extent(before[stays])
            holes += _runs(before[~stays])
            kept.append(replace(now, start=start))
        return kept, same + holes

    def _beyond(self, row: int) -> Iterator[tuple[int, int]]:
        """Yield the rows of files that have a place, and end behind some row."""
        for part in self._unmoved():
            yield from _runs(part[(part.start != NOWHERE) & (part.start + part.rows > row)])


def _require_tiled(runs: _Runs, first: int, end: int) -> None:
    """Refuse runs that do not make all rows from ``first`` on, or before it, to the ``end`` of a store."""
    edges = np.array([*sorted(runs), (end, 0)], np.int64)
    if edges[0, 0] > max(0, first) or (edges[:-1].sum(axis=1) != edges[1:, 0]).any():
        raise ValueError("its files share rows, or lack some")


class _Moves:
    """What rows move where: those of some files to other first rows, and up where holes are before them."""

    def __init__(self, moved: dict[int, int], holes: _Runs) -> None:
        self.holes = holes
        self._before, self._after = np.array([*sorted(moved.items()), (np.iinfo(np.int64).max, 0)], np.int64).T
        self._starts = np.array([start for start, _ in holes], np.int64)
        self._rows = np.cumsum([0, *(rows for _, rows in holes)])

    def of(self, starts: Integers) -> Integers:
        """Return the first rows after the moves."""
        found = starts - self._rows[np.searchsorted(self._starts, starts)]
        place = np.searchsorted(self._before, starts)
        after: Integers = np.where(self._before[place] == starts, self._after[place], found)
        return after


def _moves(holes: _Runs, files: _Runs, end: int) -> _Moves:
    """Fill holes, one after the other, with the last files of a store of ``end`` rows, while that goes without rest.

    ``files`` are the last ones, at least as many rows as the holes have. Both are sorted.
    """
    left, moved = deque(holes), dict[int, int]()
    while left:
        if sum(left[-1]) == end:
            end = left.pop()[0]
            continue
        start, rows = left[0]
        run, holes_before, last = _last_files(files, left, end, rows)
        if sum(count for _, count in run) != rows:
            break
        for place, count in reversed(run):
            moved[place] = start
            start += count
        del files[len(files) - len(run) :]
        while len(left) > holes_before:
            left.pop()
        left.popleft()
        end = last
    return _Moves(moved, list(left))


def _last_files(files: _Runs, holes: deque[tuple[int, int]], end: int, rows: int) -> tuple[_Runs, int, int]:
    """Return the last files of a store, backwards, that have so many rows or more, or all behind the first hole.

    Return also how many holes are before them, and the first of their rows.
    """
    run: _Runs = []
    count = len(holes)
    while rows > 0 and end > sum(holes[0]):
        if sum(holes[count - 1]) == end:
            count -= 1
            end = holes[count][0]
            continue
        run.append(files[-1 - len(run)])
        rows -= run[-1][1]
        end = run[-1][0]
    return run, count, end


def _filled(files: Iterable[Entries], holes: _Runs) -> tuple[Spool[Entries], _Runs]:
    """Give files that have no place yet the first hole of as many rows each; return all files, and the holes left."""
    free: dict[int, deque[int]] = defaultdict(deque)
    for start, rows in holes:
        free[rows].append(start)
    filled = Spool(Entries)
    for part in files:
        starts = part.start.copy()
        for number in np.flatnonzero((starts == NOWHERE) & np.isin(part.rows, list(free))):
            if fitting := free[part.rows[number]]:
                starts[number] = fitting.popleft()
        filled.append(replace(part, start=starts))
    return filled, sorted((start, rows) for rows, starts in free.items() for start in starts)


def _lacking(known: Iterable[Entries], gone: Spool[Entries]) -> Iterator[Entries]:
    """Yield files but for some others; both are sorted by path."""
    for part, without in aligned(known, Entries, gone, Entries):
        yield part[places(part.path, without.path) < 0] if len(without) else part


def _extent(entries: Entries) -> _Runs:
    """Return one run around the rows of files; none where they have no rows."""
    some = entries[entries.rows > 0]
    first = int(some.start.min(initial=np.iinfo(np.int64).max))
    return [(first, int((some.start + some.rows).max()) - first)] if len(some) else []


def _runs(entries: Entries) -> _Runs:
    some = entries[entries.rows > 0]
    return list(zip(some.start.tolist(), some.rows.tolist(), strict=True))
