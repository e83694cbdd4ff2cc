"""The files of a source, however many there are."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from cvae_dist.sources.files import Files
from cvae_dist.sources.spool import Sorter, Spool
from cvae_dist.store.columns import regrouped

_BATCH = 16_384  # files
_MOST_KINDS = 1_000  # suffixes that are told apart: names that end in dates or numbers have no end of them


class FileTable:
    """Files, sorted by the UTF-8 bytes of their paths. What does not fit a batch lies on a temporary file.

    Attributes
    ----------
    kinds : dict
        For every suffix in lower case, also of files that were seen and not taken: how many, and the first path.
    """

    def __init__(self, files: Spool[Files], kinds: Mapping[str, tuple[int, str]]) -> None:
        self._files = files
        self.kinds = dict(kinds)

    @classmethod
    def of(cls, files: Files) -> "FileTable":
        """Make a table of files in any order; ``InvalidInput`` where a path is there twice."""
        table = Collected()
        table.see(files.path.tolist())
        table.take(files)
        return table.finish()

    def __len__(self) -> int:
        return len(self._files)

    def batches(self) -> Iterator[Files]:
        """Yield all files in order, at most 16,384 at a time."""
        return regrouped(self._files, _BATCH)

    def only(self, keep: Callable[[str], bool]) -> "FileTable":
        """Return the table of those files whose path ``keep`` is true of."""
        kept = Spool(Files)
        for files in self.batches():
            kept.append(files[np.fromiter(map(keep, files.path), bool, len(files))])
        return FileTable(kept, self.kinds)


class Collected:
    """A table while its files are found, in any order."""

    def __init__(self) -> None:
        self._files = Sorter(Files, "path", unique=True)
        self._kinds: dict[str, tuple[int, str]] = {}

    def see(self, paths: list[str]) -> list[str]:
        """Count paths by their suffixes, and return these."""
        suffixes = _suffixes(paths)
        firsts = dict(zip(reversed(suffixes), reversed(paths), strict=True))
        for kind, count in Counter(suffixes).items():
            name = kind if kind in self._kinds or len(self._kinds) < _MOST_KINDS else ""
            before, first = self._kinds.get(name, (0, firsts[kind]))
            self._kinds[name] = before + count, first
        return suffixes

    def take(self, files: Files) -> None:
        """Add files to the table; ``InvalidInput`` where a path is there twice."""
        self._files.append(files)

    def finish(self) -> FileTable:
        """Return the table; ``InvalidInput`` where a path is there twice."""
        return FileTable(self._files.finish(), self._kinds)


def suffix(path: str) -> str:
    """Return the suffix of a path in lower case, with its dot; empty where there is none."""
    dot = path.rfind(".")
    return path[dot:].lower() if dot > path.rfind("/") else ""


def _suffixes(paths: list[str]) -> list[str]:
    """Return the suffix of each path; mostly all have the same one, which is seen sooner than each is found."""
    kind = suffix(paths[0]) if paths else ""
    if kind and all(map(str.endswith, paths, itertools.repeat(kind))):
        return [kind] * len(paths)
    return list(map(suffix, paths))
