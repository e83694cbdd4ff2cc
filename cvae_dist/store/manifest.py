"""The manifest of a publication: every file that its rows came from, and every file that was set aside."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from cvae_dist.errors import Corrupt
from cvae_dist.store.columns import Columns, ColumnsDigest, Integers, Texts, regrouped
from cvae_dist.store.layout import STRING
from cvae_dist.store.publication import Publication
from cvae_dist.store.urls import Location

_PREFIX = "manifest_"  # how the names of its arrays begin
_CHUNK_ROWS = 65_536  # a chunk of long paths has about 8 MB
NOWHERE = -1  # the first row of a file that has no place in the store yet
_SPANS = re.compile(r"[0-9]{1,18}(-[0-9]{1,18})?(,[0-9]{1,18}(-[0-9]{1,18})?)*")


@dataclass(frozen=True)
class Entries(Columns):
    """What is known of some files; each attribute is an array of shape (n,).

    Attributes
    ----------
    path : object (str)
        Relative to the root of the source, with slashes.
    size : int64
        Bytes.
    version : object (str)
        As it was listed; empty where the storage has none.
    start, rows : int64
        First row in the store, and rows stored of the file. Where files of many rows were shuffled, it is the first
        row that they would have without it, which is also the `id` that their rows got if they had none.
    dropped : object (str)
        Numbers of the rows of the file that were left out, such as "3,17-20"; see :func:`as_spans`.
    status : object (str)
        Empty where the rows are in the store. Else one word for why the file was set aside; it has no rows then.
    detail : object (str)
        The same for a person.
    """

    path: Texts
    size: Integers
    version: Texts
    start: Integers
    rows: Integers
    dropped: Texts
    status: Texts
    detail: Texts


COLUMNS = {name: "<i8" if name in ("size", "start", "rows") else STRING for name in Entries.names()}  # dtype by name
_DTYPES = {_PREFIX + name: dtype for name, dtype in COLUMNS.items()}

Batches = Callable[[], Iterable[Entries]]  # yields the same entries whenever it is called, sorted by path


class Manifest:
    """The entries of a published store, sorted by path, read in batches.

    Parameters
    ----------
    publication : Publication
        Where they are.
    rows : int
        Rows of the store.
    """

    def __init__(self, publication: Publication, rows: int) -> None:
        self._publication, self._rows = publication, rows

    def __len__(self) -> int:
        return self._publication.arrays[f"{_PREFIX}path"].shape[0]

    def batches(self) -> Iterator[Entries]:
        """Yield all entries in order, at most 65,536 at a time.

        Raises
        ------
        Corrupt
            An object is missing, torn or changed, or says what no driver of ours wrote.
        """
        before = ""
        step = self._publication.arrays[f"{_PREFIX}path"].chunk
        for start in range(0, len(self), step):
            entries = self._read(start, min(start + step, len(self)))
            if before >= entries.path[0] or not (entries.path[1:] > entries.path[:-1]).all():
                raise forged(self._publication.store, "its paths are not sorted")
            if min(map(np.min, (entries.size, entries.start, entries.rows))) < 0:
                raise forged(self._publication.store, "it has negative numbers")
            if (entries.start > self._rows - entries.rows).any() or entries.rows[entries.status != ""].any():
                raise forged(self._publication.store, "it has rows that the store has not")
            before = entries.path[-1]
            yield entries

    def _read(self, start: int, stop: int) -> Entries:
        return Entries(*self._publication.read_columns(_DTYPES, start, stop))


def forged(store: Location, what: str) -> Corrupt:
    """Return the error that says so of the manifest of a store."""
    return Corrupt(
        f"the manifest of {store} is damaged or forged: {what}. Nothing was changed; restore the store from a copy, or "
        "make it anew with --overwrite"
    )


def manifest_of(publication: Publication, rows: int) -> Manifest | None:
    """Return the manifest of a publication whose store has so many rows; None where it has none.

    Raises
    ------
    ValueError
        Its arrays are not those of a manifest.
    """
    found = {name: stored for name, stored in publication.arrays.items() if name.startswith(_PREFIX)}
    if not found:
        return None
    if {name: stored.dtype for name, stored in found.items()} != _DTYPES:
        raise ValueError(f"the arrays of its manifest are {found}")
    shapes = {(stored.shape, stored.chunk) for stored in found.values()}
    if len(shapes) > 1 or len(next(iter(shapes))[0]) != 1:
        raise ValueError(f"the arrays of its manifest have shapes and chunks {shapes}")
    return Manifest(publication, rows)


def write_manifest(publication: Publication, batches: Iterable[Entries]) -> None:
    """Write entries, sorted by path, as they come."""
    publication.write_columns(_DTYPES, regrouped(batches, _CHUNK_ROWS), "file")


def digest_of(batches: Iterable[Entries]) -> str:
    """Return a digest of entries, however they are cut into batches."""
    digest = ColumnsDigest(*Entries.names())
    for entries in batches:
        digest.add(entries)
    return digest.digest().hex()


def as_spans(numbers: Integers) -> str:
    """Return ascending numbers as text, such as "3,17-20"."""
    if not len(numbers):
        return ""
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    return ",".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def read_spans(text: str) -> Integers:
    """Return what :func:`as_spans` wrote: first number and the one after the last of every run, shape (n_runs, 2).

    Raises
    ------
    ValueError
        It is something else.
    """
    if not text:
        return np.zeros((0, 2), np.int64)
    if not _SPANS.fullmatch(text):
        raise ValueError(f"{text[:80]!r} are no row numbers")
    ends = [(int(first), int(last or first) + 1) for first, _, last in (run.partition("-") for run in text.split(","))]
    spans = np.array(ends, np.int64)
    if (np.diff(spans.ravel()) <= 0).any():
        raise ValueError(f"the row numbers {text[:80]!r} do not ascend")
    return spans


def dropped_count(text: str) -> int:
    """Return how many numbers :func:`as_spans` wrote."""
    return int(np.diff(read_spans(text)).sum()) if text else 0
