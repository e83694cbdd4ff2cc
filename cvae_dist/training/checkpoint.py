"""Checkpoints of a training: immutable files, and a small pointer that is moved last."""

import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cvae_dist.errors import Corrupt
from cvae_dist.store.lineage import digest_bytes
from cvae_dist.store.urls import Location
from cvae_dist.training.world import as_bytes, from_bytes

_POINTER = "LATEST.json"
_OURS = re.compile(r"step\d+-[0-9a-f]+\.pt|LATEST\.json")
_KEPT = 2

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """A checkpoint file as the pointer names it."""

    file: str
    digest: str
    size: int


class Checkpoints:
    """The checkpoints below one prefix.

    A save writes ``step000123-<digest>.pt`` and then ``LATEST.json``, which names it and the one before.
    Killed in between, the pointer still names a whole checkpoint. States hold only tensors, numbers, strings,
    lists and dicts, and are read without unpickling anything else. ``check`` is called before anything is replaced or
    deleted; where it raises, nothing is.
    """

    def __init__(self, place: Location, check: Callable[[], None] = lambda: None) -> None:
        self._place = place
        self._check = check

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Store ``state`` as the newest checkpoint, and delete all but the last two."""
        data = as_bytes(state)
        entry = Entry(f"step{step:06d}-{digest_bytes(data)}.pt", digest_bytes(data), len(data))
        older = [known for known in self._entries() if known.file != entry.file]
        kept = [entry, *older][:_KEPT]
        (self._place / entry.file).write(data)
        self._check()
        (self._place / _POINTER).write(json.dumps({"checkpoints": [asdict(one) for one in kept]}).encode())
        for forgotten in older[_KEPT - 1 :]:
            self._check()
            (self._place / forgotten.file).delete()

    def load(self) -> dict[str, Any] | None:
        """Return the newest whole state, or None when nothing was saved yet.

        Raises
        ------
        Corrupt
            Checkpoints were saved, but none of those still named is whole.
        """
        entries = self._entries()
        for entry in entries:
            data = self._read(entry)
            if data is not None:
                return from_bytes(data)
            _LOGGER.warning("checkpoint %s is missing or damaged and is passed over", self._place / entry.file)
        if not entries:
            return None
        names = ", ".join(entry.file for entry in entries)
        raise Corrupt(
            f"no checkpoint in {self._place} is whole ({names} are missing or do not match their digests), "
            "so the training cannot go on from there; train with --overwrite to begin anew"
        )

    def sweep(self) -> None:
        """Delete files that the pointer does not name, as a run that was killed while saving leaves them."""
        self._check()
        named = {_POINTER, *(entry.file for entry in self._entries())}
        for name in self._names():
            if name not in named and _OURS.fullmatch(name):
                (self._place / name).delete()
        self._place.sweep_partial()

    def clear(self) -> None:
        """Delete every checkpoint, the pointer first, and the directory when that leaves it empty."""
        self._check()
        (self._place / _POINTER).delete()
        self.sweep()
        if self._place.exists() and not self._names():
            self._place.delete()

    @property
    def exist(self) -> bool:
        """Whether a checkpoint was saved here."""
        return (self._place / _POINTER).exists()

    def foreign(self) -> list[str]:
        """Return the names of files here that no training wrote."""
        return [name for name in self._names() if not _OURS.fullmatch(name)]

    def _names(self) -> list[str]:
        return sorted({entry.name.partition("/")[0] for entry in self._place.list()})

    def _entries(self) -> list[Entry]:
        try:
            text = (self._place / _POINTER).read()
        except FileNotFoundError:
            return []
        try:
            return [Entry(**entry) for entry in json.loads(text)["checkpoints"]]
        except (ValueError, KeyError, TypeError) as error:
            raise Corrupt(
                f"{self._place / _POINTER} does not name a checkpoint ({error}), so the training cannot go "
                "on from there; train with --overwrite to begin anew"
            ) from None

    def _read(self, entry: Entry) -> bytes | None:
        try:
            data = (self._place / entry.file).read()
        except FileNotFoundError:
            return None
        return data if len(data) == entry.size and digest_bytes(data) == entry.digest else None
