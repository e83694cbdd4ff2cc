"""The course of a training: ``history.jsonl`` and TensorBoard scalars."""

import json
import logging
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from cvae_dist.store.urls import Location

Record = dict[str, float | int]

log = logging.getLogger(__name__)

_NOT_PLOTTED = frozenset({"step", "epoch", "time"})


class History:
    """Records of a training, one per validation.

    The whole file is written each time: it is small (validations grow rarer), and so it can live on an object
    store and never disagrees with the checkpoint that a resumed run starts from.

    Parameters
    ----------
    place : Location or None
        ``history.jsonl``; None keeps the records in memory only.
    records : Sequence
        What an interrupted run had recorded up to its checkpoint.
    """

    def __init__(self, place: Location | None, records: Sequence[Record] = ()) -> None:
        self._place = place
        self.records: list[Record] = list(records)

    @classmethod
    def read(cls, place: Location) -> Self:
        """Return what a finished training recorded: nothing where its model was copied without the file."""
        try:
            lines = place.read().splitlines()
        except FileNotFoundError:
            lines = []
        return cls(place, [json.loads(line) for line in lines])

    def append(self, record: Record) -> None:
        """Add a record and write the file."""
        self.records.append(record)
        self.write()

    def write(self) -> None:
        """Write the file, dropping what a killed run wrote after its last checkpoint."""
        if self._place is not None:
            self._place.write("".join(json.dumps(record) + "\n" for record in self.records).encode())


def _writer(folder: str, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and optional
    except ImportError:
        log.info("no TensorBoard scalars are written: pip install 'cvae-dist[tensorboard]'")
        return None
    return SummaryWriter(folder, purge_step=first_step)


class Scalars:
    """TensorBoard scalars below ``logs``; none without a local directory or TensorBoard."""

    def __init__(self, logs: Location | None, first_step: int) -> None:
        self._writer: Any = None
        if logs is not None and logs.is_local:
            self._writer = _writer(logs.path, first_step)

    def add(self, record: Mapping[str, float | int]) -> None:
        """Write the figures of a record at its step."""
        if self._writer is not None:
            for name in record.keys() - _NOT_PLOTTED:
                self._writer.add_scalar(name, record[name], record["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()
