"""What became of the files that a store was made from: the listing of now beside the manifest of then."""

import itertools
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from cvae_dist.sources.file_table import FileTable
from cvae_dist.sources.files import Files
from cvae_dist.sources.spool import Spool
from cvae_dist.store.columns import Columns, Integers, Texts
from cvae_dist.store.manifest import Entries

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ChangedFiles(Entries):
    """Entries of files that have another size or version by now.

    Attributes
    ----------
    size_now : int64
        Bytes.
    version_now : object (str)
        As it was listed.
    """

    size_now: Integers
    version_now: Texts

    @property
    def known(self) -> Entries:
        """The entries."""
        return self.as_kind(Entries)

    @property
    def files(self) -> Files:
        """The files as they are now."""
        return Files(self.path, self.size_now, self.version_now)


@dataclass(frozen=True)
class Changes:
    """What is to be done about the files of a source.

    Attributes
    ----------
    new : FileTable
        Files to read: not known, or set aside before, to be tried again.
    changed : Spool of ChangedFiles
        Known files of another size or version.
    deleted : Spool of Entries
        Known files that are not listed any more. What was set aside has no rows in the store, and is not named.
    unchanged : int
        Known files that are as they were.
    """

    new: FileTable
    changed: Spool[ChangedFiles]
    deleted: Spool[Entries]
    unchanged: int


def compare(listed: FileTable, known: Iterable[Entries]) -> Changes:
    """Compare files with entries, both sorted by path, in one pass.

    A file has changed where size or version differ; where one of the versions is empty, the size decides.
    """
    new, changed, deleted, unchanged = Spool(Files), Spool(ChangedFiles), Spool(Entries), 0
    for files, entries in aligned(listed.batches(), Files, known, Entries):
        stored = entries[entries.status == ""]
        place = places(files.path, stored.path)
        there = place >= 0
        new.append(files[~there])
        before, now = stored[place[there]], files[there]
        differs = _differ(before, now)
        as_now: dict[str, Any] = {"size_now": now.size[differs], "version_now": now.version[differs]}
        changed.append(ChangedFiles(**as_now, **before[differs].columns()))
        gone = np.ones(len(stored), bool)
        gone[place[there]] = False
        deleted.append(stored[gone])
        unchanged += len(now) - int(differs.sum())
    return Changes(FileTable(new, listed.kinds), changed, deleted, unchanged)


def merged(known: Iterable[Entries], new: Iterable[Entries]) -> Iterator[Entries]:
    """Yield known and new entries, each sorted by path, as one table sorted by path.

    New entries replace known ones of the same path. What was set aside is tried again by every run, so its entry comes
    with the new ones, or the file is gone.
    """
    for before, now in aligned(known, Entries, new, Entries):
        kept = before[(before.status == "") & (places(before.path, now.path) < 0)]
        both = Entries.join([kept, now])
        yield both[np.argsort(both.path, kind="stable")] if len(kept) and len(now) else both


Left = TypeVar("Left", bound=Columns)
Right = TypeVar("Right", bound=Columns)


def aligned(
    left: Iterable[Left], left_kind: type[Left], right: Iterable[Right], right_kind: type[Right]
) -> Iterator[tuple[Left, Right]]:
    """Cut two tables that are sorted by path at the same paths, and yield the parts that belong together."""
    one, other = _Head(left_kind, left), _Head(right_kind, right)
    while lasts := [head.rows.path[-1] for head in (one, other) if len(head.rows)]:
        yield one.take(min(lasts)), other.take(min(lasts))


class _Head(Generic[Left]):
    """The next rows of a table that is sorted by path; none when it has ended."""

    def __init__(self, kind: type[Left], batches: Iterable[Left]) -> None:
        self._none = kind.none()
        self._batches = filter(len, batches)
        self.rows: Any = next(self._batches, self._none)

    def take(self, bound: str) -> Left:
        """Return and leave out the rows up to a path, of those that are here."""
        cut = bisect_right(self.rows.path, bound)
        taken: Left = self.rows[:cut]
        self.rows = self.rows[cut:] if cut < len(self.rows) else next(self._batches, self._none)
        return taken


def places(paths: Texts, others: Texts) -> Integers:
    """Return where each path is among others, -1 where it is not."""
    if not len(paths) or not len(others):
        return np.full(len(paths), -1)
    numbers = dict(zip(others, range(len(others)), strict=True))
    return np.fromiter(map(numbers.get, paths, itertools.repeat(-1)), np.int64, len(paths))


def _differ(before: Entries, now: Files) -> Mask:
    versions = (before.version != now.version) & (before.version != "") & (now.version != "")
    differs: Mask = (before.size != now.size) | versions
    return differs
