"""One rank: a process that trains together with others, and tells who started it how that goes.

Started as ``python -m cvae_dist.launch.rank FD`` with a pickled :class:`Task` on its standard input. It writes messages
to the file descriptor, one JSON object a line: ``event``, ``result`` or ``error``. What else it prints is its log.
"""

import ctypes
import json
import os
import pickle
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TextIO

from cvae_dist.config import TrainConfig
from cvae_dist.errors import CvaeDistError
from cvae_dist.events import Event, OnEvent
from cvae_dist.store import Location, RowStore
from cvae_dist.store.urls import StorageOptions
from cvae_dist.training.device import choose_device
from cvae_dist.training.history import Figures
from cvae_dist.training.prepare import Training, TrainingData
from cvae_dist.training.resume import train_in
from cvae_dist.training.world import Membership, World

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


@dataclass(frozen=True)
class Task:
    """What to train, the same for every rank.

    Attributes
    ----------
    store, model : str
        URLs of the rows and of the model directory.
    config : TrainConfig
        The settings that were asked for.
    overwrite : bool
        Train anew.
    storage_options : Mapping or None
        Options of the file system, for fsspec.
    timeout : float
        Seconds after which a rank that does not answer counts as lost.
    """

    store: str
    model: str
    config: TrainConfig
    overwrite: bool
    storage_options: StorageOptions | None = field(repr=False)
    timeout: float

    def run(
        self, membership: Membership | None, on_event: OnEvent, store: RowStore | None = None
    ) -> tuple[Figures, bool]:
        """Train in this process, and return how it ended, and whether it had ended before.

        The process is a rank, or the only one. An open ``store`` need not be opened again.
        """
        device = choose_device(self.config.device, membership.local_rank if membership else 0)
        rows = store or RowStore.open(Location.of(self.store, self.storage_options))
        training = Training.of(TrainingData.of(rows), self.config)
        world = World(membership, self.timeout, device)
        place = Location.of(self.model, self.storage_options)
        trained, nothing_to_do = train_in(place, training, self.overwrite, on_event, world)
        return trained.figures, nothing_to_do


class Tell:
    """Writes messages, one a line."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def __call__(self, **message: Any) -> None:
        """Write one, by its kind."""
        print(json.dumps(message), file=self._file, flush=True)


def event_of(fields: Mapping[str, Any]) -> Event:
    """Return an event that a rank has told."""
    return Event(**fields)


def main(descriptor: int) -> int:
    """Be a rank; return the exit code."""
    end_with_parent()
    with os.fdopen(descriptor, "w") as file:
        tell = Tell(file)
        task: Task = pickle.load(sys.stdin.buffer)  # noqa: S301 - of the process that started this one
        try:
            membership = Membership.of(os.environ)
            figures, nothing_to_do = task.run(membership, lambda event: tell(event=asdict(event)))
            tell(result={**asdict(figures), "nothing_to_do": nothing_to_do})
        except CvaeDistError as error:
            tell(error={"kind": type(error).__name__, "text": str(error)})
            return 1
        except BrokenPipeError:
            return 1  # who started this rank has gone
    return 0


def end_with_parent() -> None:
    """Let Linux end this process, by SIGTERM, when the thread that started it ends, however it does.

    A training answers with a checkpoint.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
