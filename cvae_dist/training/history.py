"""The course of a training: ``history.jsonl``, TensorBoard scalars, and the figures of its end.

Rank 0 makes a record at every validation. TensorBoard and MLflow get the same figures by the same names.

- ``step``, ``epoch``: steps done, and passes over the training rows.
- ``loss``: mean training loss since the last record, the sum of ``reconstruction`` and ``kl``. All three are in nats
  per row. ``reconstruction`` is the distortion: the negative log-likelihood of a row given its latent. ``kl`` is the
  rate: the divergence of the latent from the prior.
- ``validation_loss``, ``validation_reconstruction``, ``validation_kl``: the same of the rows that validate, with the
  averaged weights. The rate is weighted here as at the end of the training.
- ``gradient_norm``, ``largest_gradient_norm``: mean and maximum since the last record, before gradients are clipped.
- ``learning_rate``, ``kl_weight``: those of the next step.
- ``skipped_steps``: steps that were left out, since the first one, as their gradient was not finite.
- ``rows_per_second``: rows of all ranks, over the time since the last record without its validation.
- ``waiting_share``: share of that time in which rank 0 waited for its rows, or copied them into a batch.
- ``time``: seconds of training, over all runs.

A training that was killed and went on has the same figures, bit for bit, but for the last three. Its first
``rows_per_second`` and ``waiting_share`` are of the time since it went on.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from cvae_dist.store.urls import Location

HistoryRecord = dict[str, float | int]
StoppedBecause = Literal["finished", "no improvement", "interrupted", "out of time", "diverged"]

GOES_ON = ("interrupted", "out of time")  # endings after which the same command goes on

_NOT_PLOTTED = frozenset({"step", "epoch", "time"})


@dataclass(frozen=True)
class Figures:
    """How a training ended.

    Attributes
    ----------
    steps : int
        Gradient steps done, in this run and those it went on from.
    epochs : float
        Passes over the training rows.
    loss : float
        Mean training loss per row since the last validation before the end, in nats.
    validation_loss : float or None
        Best validation -ELBO per row, in nats; None without validation rows.
    stopped_because : {"finished", "no improvement", "interrupted", "out of time", "diverged"}
        An interrupted training goes on when it is run again, and so does one that stopped after its ``max_time``.
    seconds : float
        Time spent training, over all runs.
    """

    steps: int
    epochs: float
    loss: float
    validation_loss: float | None
    stopped_because: StoppedBecause
    seconds: float


def finite(figures: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures that are finite numbers."""
    return {name: value for name, value in figures.items() if isinstance(value, int | float) and math.isfinite(value)}


def plotted(record: HistoryRecord) -> dict[str, float]:
    """Return the figures of a record that are drawn against its step."""
    return {name: value for name, value in record.items() if name not in _NOT_PLOTTED}


class History:
    """Records of a training, one per validation.

    The whole file is written each time. It is small, as validations grow rarer. So it can live on an object store, and
    it never disagrees with the checkpoint that a resumed run starts from. Without a ``place`` it is in memory only.
    ``check`` is called before the file is written; where it raises, it is not.
    """

    def __init__(
        self, place: Location | None, records: Sequence[HistoryRecord] = (), check: Callable[[], None] = lambda: None
    ) -> None:
        self._place, self._check = place, check
        self.records = list(records)

    @classmethod
    def read(cls, place: Location) -> Self:
        """Return what a finished training recorded: nothing where its model was copied without the file."""
        try:
            lines = place.read().splitlines()
        except FileNotFoundError:
            lines = []
        return cls(place, [json.loads(line) for line in lines])

    def append(self, record: HistoryRecord) -> None:
        """Add a record and write the file."""
        self.records.append(record)
        self.write()

    def write(self) -> None:
        """Write the file, without what a killed run wrote after its last checkpoint."""
        if self._place is not None:
            self._check()
            self._place.write("".join(json.dumps(record) + "\n" for record in self.records).encode())

    @property
    def next_step(self) -> int:
        """The first step that no record covers."""
        return int(self.records[-1]["step"]) + 1 if self.records else 0


class Scalars:
    """TensorBoard scalars below ``logs``; ``notes`` tell why there are none."""

    def __init__(self, logs: Location | None, first_step: int) -> None:
        self.notes: tuple[str, ...] = ()
        self._writer: Any = None
        if logs is None:
            return
        if not logs.is_local:
            self.notes = (f"no TensorBoard logs are written, as {logs} is not on a disk; history.jsonl has all of it",)
            return
        try:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and optional

            self._writer = SummaryWriter(logs.path, purge_step=first_step)
        except ImportError:
            remedy = "pip install 'cvae-dist[tensorboard]'"
            self.notes = (f"no TensorBoard logs are written, as it is not installed: {remedy}",)

    def add(self, record: HistoryRecord) -> None:
        """Write the figures of a record at its step."""
        if self._writer is not None:
            for name, value in plotted(record).items():
                self._writer.add_scalar(name, value, record["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()
