"""What a run takes from a source: a reader that suits its files, how many rows each has, and which are bad."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np

from cvae_dist.errors import InvalidInput, SettingsChanged
from cvae_dist.sources.batch import Batch
from cvae_dist.sources.changes import Changes
from cvae_dist.sources.file_table import FileTable
from cvae_dist.sources.files import BadFile, BadFiles, Files, Integers, file_name
from cvae_dist.sources.pieces import Pieces
from cvae_dist.sources.source import Reader, Source
from cvae_dist.sources.spool import Spool
from cvae_dist.store import RowStore
from cvae_dist.store.lineage import without_credentials
from cvae_dist.store.manifest import NOWHERE, Entries

_MOST_ROW_BYTES = 1_000_000_000
_LOOK_BYTES = 16_000_000  # of rows that are read at a time to see whether they can be
_MODELS = 1000  # files that are tried, if need be, until one can be used
_NAMED = 5  # files in one message
_LISTED = 100  # files in a list of messages
_KEPT = (
    "Nothing of it was used and rows recorded before are kept; mend or remove the file and run the same command again"
)


class Intake:
    """The files of a source as one run takes them.

    Parameters
    ----------
    source : Source
    skip : bool
        Bad files are left out; otherwise they are refused, all at once.
    max_bad : int, optional
        How many bad files may be left out.
    note : callable
        Takes what a person should be told.

    Attributes
    ----------
    listed : FileTable
    """

    def __init__(self, source: Source, skip: bool, max_bad: int | None, note: Callable[[str], None]) -> None:
        self._source, self._skip, self._max_bad, self._note = source, skip, max_bad, note
        self.listed = source.list()
        self._folder = source.url
        if len(self.listed) == 1:  # a source that is this file, perhaps: others would lie beside it
            (files,) = self.listed.batches()
            self._folder = source.url.removesuffix(f"/{files.path[0]}")

    def name(self, path: str) -> str:
        """Return path or URL of a file, also of one that is listed no more."""
        return file_name(self._folder, path)

    def reader(self, known: Iterable[Entries]) -> Reader:
        """Return what reads the files: one that was read before decides how, or else the first that can be used.

        Raises
        ------
        InvalidInput
            None can be used, or their rows are too large to be held.
        """
        problems: list[BadFile] = []
        for model in self._models(known):
            try:
                return self._checked(self._source.reader(model))
            except BadFile as error:
                problems.append(error)
        raise self.refusal(problems)

    def report(self, changes: Changes, grown: RowStore, rewrite: bool) -> None:
        """Say what became of the files, and refuse changed and deleted ones where they are not to be rewritten.

        Raises
        ------
        SettingsChanged
            There are some; or all files of the ``grown`` store are gone, as it was made from another source.
        """
        before, now = grown.document["lineage"].get("source"), without_credentials(self._source.url)
        if before != now and not changes.unchanged and not len(changes.changed):
            raise SettingsChanged(
                f"{grown.location} was made from {before}, and {now} holds none of its files. Nothing was changed; "
                "name the same source, write to another store, or use --overwrite to make it anew"
            )
        gone = (("changed", changes.changed), ("deleted", changes.deleted))
        for what, files in gone:
            for path in islice(_paths(files), _LISTED):
                self._note(f"{what}: {self.name(path)}")
        counts = {"new": len(changes.new), "unchanged": changes.unchanged, **{what: len(files) for what, files in gone}}
        if changes.unchanged < sum(counts.values()) > counts["new"]:
            self._note("files: " + ", ".join(f"{count:,} {what}" for what, count in counts.items() if count))
        named = "; ".join(f"{len(files):,} {what}: {_some(files)}" for what, files in gone if len(files))
        if named and not rewrite:
            raise SettingsChanged(
                f"files that {grown.location} was made from are not as they were: {named}. Nothing was changed; "
                "--changed rewrite reads the shards with their rows anew (a file that was only touched makes the same "
                "bytes again), --overwrite the whole store"
            )

    def take(
        self, reader: Reader, files: FileTable, skipped: Mapping[str, BadFile], known: Iterable[Entries], first: bool
    ) -> tuple[Batch, list[BadFile]]:
        """Return files with the rows of each, which have no place in the store yet, and those files that are bad.

        Files of ``skipped`` turned out bad before in this run, and files that the ``known`` ones set aside did in an
        earlier one. The ``first`` files of a store decide what all others have to be like.

        Raises
        ------
        InvalidInput
            There are more bad files than allowed.
        """
        bad: list[BadFile] = []
        batch = Batch(_counted(reader, files, skipped, _aside(known), bad))
        self.tell(bad)
        allowed = 0 if not self._skip else len(bad) if self._max_bad is None else self._max_bad
        if len(bad) > allowed:
            raise self.refusal(bad)
        strange = [problem for problem in bad if problem.code in ("shape", "dtype", "schema")]
        if first and len(strange) > batch.files - len(bad):
            raise InvalidInput(
                f"most files of {self._source.url} differ from those that decide ({self.name(strange[0].path)} "
                f"{strange[0].detail}). Nothing was written; take away what does not belong there"
            )
        return batch, bad

    def tell(self, problems: Iterable[BadFile]) -> None:
        """Name bad files."""
        for problem in problems:
            self._note(f"unusable file: {self.name(problem.path)} {problem.detail}")

    def refusal(self, problems: Sequence[BadFile]) -> InvalidInput:
        """Return the error that says what is wrong with files."""
        said = [f"{self.name(problem.path)} {problem.detail}" for problem in problems[:_NAMED]]
        more = f"; and {len(problems) - _NAMED:,} more" if len(problems) > _NAMED else ""
        count = f"{len(problems):,} unusable files: " if len(problems) > 1 else ""
        remedy = f", or accept so many with --max-bad {len(problems)}" if self._max_bad is not None else ""
        remedy = remedy if self._skip else ", or leave such files out with --bad skip"
        return InvalidInput(f"{count}{'; '.join(said)}{more}. {_KEPT}{remedy}")

    def _models(self, known: Iterable[Entries]) -> Iterator[Files]:
        for entries in known:
            read = entries[entries.rows > 0]
            if len(read):
                yield Files(read.path, read.size, read.version)[:1]
                break
        looked = 0
        for files in self.listed.batches():
            for number in range(min(len(files), _MODELS - looked)):
                yield files[number : number + 1]
            looked += len(files)

    def _checked(self, reader: Reader) -> Reader:
        if reader.schema.row_bytes > _MOST_ROW_BYTES:
            raise InvalidInput(
                f"{self._source.url} has items of shape {reader.schema.item_shape}, {reader.schema.row_bytes:,} bytes "
                f"each. A row has {_MOST_ROW_BYTES:,} bytes at most. Nothing was written"
            )
        return reader


def is_news(batch: Batch, known: Iterable[Entries]) -> bool:
    """Whether files make the manifest another one: they have rows, or are bad or empty and were not known as such."""
    if batch.rows:
        return True
    before = {row for entries in known for row in _without_rows(entries)}
    return any(row not in before for entries in batch for row in _without_rows(entries))


def _counted(
    reader: Reader, new: FileTable, skipped: Mapping[str, BadFile], aside: set[str], bad: list[BadFile]
) -> Iterator[Entries]:
    """Yield files with their rows, and collect the bad ones.

    Those that an earlier run set ``aside`` are read at once: where they are as they were, nothing is to be written.
    """
    for files in new.batches():
        rows, problems = reader.count(files)
        if aside:
            again = np.fromiter((path in aside for path in files.path), bool, len(files))
            problems += _still_bad(reader, files[again], rows[again]) if again.any() else []
        known = {problem.path: problem for problem in problems}
        known |= {path: skipped[path] for path in skipped.keys() & set(files.path.tolist())}
        status, detail = (np.full(len(files), "", dtype=object) for _ in range(2))
        if known:
            bad.extend(known[path] for path in sorted(known))
            for number in np.flatnonzero([path in known for path in files.path]):
                problem = known[files.path[number]]
                rows[number], status[number], detail[number] = 0, problem.code, problem.detail
        starts, dropped = np.full(len(files), NOWHERE), np.full(len(files), "", dtype=object)
        yield Entries(files.path, files.size, files.version, starts, rows, dropped, status, detail)


def _aside(known: Iterable[Entries]) -> set[str]:
    """Return the files that an earlier run set aside."""
    return {path for entries in known for path in entries.path[entries.status != ""]}


def _still_bad(reader: Reader, files: Files, rows: Integers) -> list[BadFile]:
    """Read files and return what is wrong with them."""
    pieces = Pieces(files.path, files.size, files.version, np.zeros_like(rows), rows)
    step = max(1, _LOOK_BYTES // reader.schema.row_bytes)
    problems: dict[str, BadFile] = {}
    for start in range(0, pieces.total, step):
        part = pieces.cut(start, min(start + step, pieces.total))
        try:
            reader.read(part, np.empty((part.total, reader.schema.n_features), reader.schema.dtype))
        except BadFiles as error:
            problems |= {problem.path: problem for problem in error.problems}
    return list(problems.values())


def _without_rows(entries: Entries) -> Iterator[tuple[str, int, str, str]]:
    """Yield path, size, version and status of files that have no rows in the store."""
    empty = entries[entries.rows == 0]
    return zip(empty.path, empty.size.tolist(), empty.version, empty.status, strict=True)


def _paths(files: Iterable[Entries]) -> Iterator[str]:
    return chain.from_iterable(part.path.tolist() for part in files)


def _some(files: Spool[Any]) -> str:
    """Name the first few files."""
    more = f" and {len(files) - _NAMED:,} more" if len(files) > _NAMED else ""
    return ", ".join(islice(_paths(files), _NAMED)) + more
