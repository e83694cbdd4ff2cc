"""Checkpoints of a training: immutable files, and a small pointer that is moved last."""

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cvae_dist.errors import Corrupt
from cvae_dist.store.lineage import digest_bytes
from cvae_dist.store.urls import Location
from cvae_dist.training.world import as_bytes, from_bytes

_POINTER = "LATEST.json"
_FILE = re.compile(r"step(\d+)-([0-9a-f]+)\.pt")

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """A checkpoint file as the pointer names it."""

    file: str
    digest: str
    size: int


class Checkpoints:
    """The checkpoints below one prefix, of which the last ``keep`` stay.

    A save writes ``step000123-<digest>.pt`` and then ``LATEST.json``, which names it and those before. Killed in
    between, the pointer still names a whole checkpoint. Where the pointer is lost or damaged, the names of the files
    tell which of them are whole. A pointer that names nothing says that the training is over or discarded, whatever
    files are still there.

    States hold only tensors, numbers, strings, lists and dicts, and are read without unpickling anything else. The
    state of a trainer holds the best weights so far beside the last ones. So the last checkpoint is enough, and none is
    kept for the best. ``check`` is called before anything is written or deleted; where it raises, nothing is.
    """

    def __init__(self, place: Location, check: Callable[[], None] = lambda: None, keep: int = 2) -> None:
        self._place = place
        self._check = check
        self._keep = keep

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Store ``state`` as the newest checkpoint, and delete those that are not kept any more."""
        data = as_bytes(state)
        digest = digest_bytes(data)
        entry = Entry(f"step{step:06d}-{digest}.pt", digest, len(data))
        older = [known for known in self._known() if known.file != entry.file]
        self._check()
        (self._place / entry.file).write(data)
        self._point_to([entry, *older][: self._keep])
        for forgotten in older[self._keep - 1 :]:
            self._check()
            (self._place / forgotten.file).delete()

    def load(self, tell: Callable[[str], None] = _LOGGER.warning) -> dict[str, Any] | None:
        """Return the newest whole state, or None when nothing was saved yet.

        A pointer that is lost or damaged, or names nothing whole, is written anew. ``tell`` is told of that, and of
        files that are passed over.

        Raises
        ------
        Corrupt
            Checkpoints were saved, but none that is here is whole.
        """
        pointer, named = self._place / _POINTER, self._named()
        if named == []:
            return None
        trusted = {entry.file for entry in named or []}
        known = [*(named or []), *(found for found in self._found() if found.file not in trusted)]
        for position, entry in enumerate(known):
            data = self._read(entry)
            if data is None:
                tell(f"checkpoint {self._place / entry.file} is missing or damaged and is passed over")
                continue
            if entry.file not in trusted:
                self._point_to(known[position:])
                tell(f"{pointer} names no whole checkpoint; the training goes on from {entry.file} beside it")
            return from_bytes(data)
        if not known and not pointer.exists():
            return None
        names = ", ".join(entry.file for entry in known) or _POINTER
        raise Corrupt(
            f"no checkpoint in {self._place} is whole ({names}: missing or damaged), so the training cannot go on from "
            "there; train with --overwrite to begin anew"
        )

    def sweep(self) -> None:
        """Delete files that the pointer does not name, as a run that was killed while saving leaves them."""
        self._check()
        known = {entry.file for entry in self._known()}
        for name in self._names():
            if name not in known and _FILE.fullmatch(name):
                (self._place / name).delete()
        self._place.sweep_partial()

    def clear(self) -> None:
        """Delete every checkpoint, and the directory when that leaves it empty.

        First the pointer is made to name nothing. Killed after that, no training goes on from what is still there.
        """
        if self.exist:
            self._point_to([])
        self.sweep()
        self._check()
        (self._place / _POINTER).delete()
        if self._place.exists() and not self._names():
            self._place.delete()

    @property
    def exist(self) -> bool:
        """Whether a training wrote here."""
        return any(map(_is_ours, self._names()))

    def foreign(self) -> list[str]:
        """Return the names of files here that no training wrote."""
        return [name for name in self._names() if not _is_ours(name)]

    def _names(self) -> list[str]:
        return sorted({entry.name.partition("/")[0] for entry in self._place.list()})

    def _known(self) -> list[Entry]:
        """Return the checkpoints, the newest first: those that the pointer names, or without it all files."""
        named = self._named()
        return self._found() if named is None else named

    def _named(self) -> list[Entry] | None:
        """Return what the pointer names; None where it is lost or damaged."""
        try:
            named = [Entry(**one) for one in json.loads((self._place / _POINTER).read())["checkpoints"]]
            return named if all(_FILE.fullmatch(one.file) for one in named) else None
        except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def _found(self) -> list[Entry]:
        """Return all files, the newest first, as their names describe them."""
        found = [
            (int(name[1]), Entry(file.name, name[2], file.size))
            for file in self._place.list()
            if (name := _FILE.fullmatch(file.name))
        ]
        return [entry for _, entry in sorted(found, key=lambda one: one[0], reverse=True)]

    def _point_to(self, entries: Sequence[Entry]) -> None:
        self._check()
        (self._place / _POINTER).write(json.dumps({"checkpoints": [asdict(one) for one in entries]}).encode())

    def _read(self, entry: Entry) -> bytes | None:
        try:
            data = (self._place / entry.file).read()
        except FileNotFoundError:
            return None
        return data if len(data) == entry.size and digest_bytes(data) == entry.digest else None


def _is_ours(name: str) -> bool:
    return name == _POINTER or _FILE.fullmatch(name) is not None
