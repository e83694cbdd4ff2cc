"""All ranks of a training, generation after generation: watched, ended together, and started again."""

import queue
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from cvae_dist import errors
from cvae_dist.errors import CvaeDistError, RankFailed, RankLost
from cvae_dist.events import Event, OnEvent
from cvae_dist.launch.process import Message
from cvae_dist.launch.rank import event_of
from cvae_dist.training.interruption import Interruption

_LOOK = 0.1  # seconds between looks whether the training is to stop
_GRACE = 15.0  # seconds that the ranks have to end, when one has failed, until they are killed


class Ranks(Protocol):
    """The ranks of one generation."""

    size: int
    messages: "queue.SimpleQueue[tuple[int, Message]]"

    def stop(self) -> None:
        """Ask all to write a checkpoint, together, and end."""

    def close(self) -> None:
        """End those that are still there, at once."""


Start = Callable[[bool], Ranks]  # whether what is there is to be trained anew


def train_together(start: Start, on_event: OnEvent, max_restarts: int) -> dict[str, Any]:
    """Train with the ranks that ``start`` starts, and return the result of rank 0.

    Where a rank is lost, all of them are started again, and go on from the last checkpoint.

    Raises
    ------
    RankFailed
        A rank raised what no restart mends; its last lines are in the text.
    RankLost
        Ranks were lost more often than ``max_restarts`` times.
    CvaeDistError
        What a rank refused to do, in the words of ``train``.
    """
    overwrite = True
    with Interruption(sigterm=True) as interruption:
        for restarts in range(max_restarts + 1):
            with ExitStack() as stack:
                ranks = start(overwrite)
                stack.callback(ranks.close)
                generation = _Generation(ranks, on_event)
                generation.watch(interruption)
            if generation.has_ended(interruption.requested):
                return generation.end()
            generation.require_no_error()
            overwrite = overwrite and not generation.begun
            lost = generation.lost()
            if interruption.requested:
                raise RankLost(f"{lost} while the training was interrupted; the same command goes on")
            if restarts < max_restarts:
                again = (
                    f"{lost}; all ranks start again from the last checkpoint ({restarts + 1} of {max_restarts} times)"
                )
                on_event(Event("train", "note", message=again))
    raise RankLost(
        f"ranks were lost {max_restarts + 1} times, the last time as {lost}. What the last checkpoint holds is kept; "
        "the same command goes on from there"
    )


@dataclass
class _Generation:
    """What is known of some ranks that train together."""

    ranks: Ranks
    on_event: OnEvent
    result: dict[str, Any] | None = None
    last: Event | None = None
    begun: bool = False
    errors: dict[int, dict[str, str]] = field(default_factory=dict)
    exits: dict[int, dict[str, Any]] = field(default_factory=dict)

    def watch(self, interruption: Interruption) -> None:
        """Follow the ranks until all have ended, or must be ended."""
        asked, until = False, float("inf")
        while len(self.exits) < self.ranks.size and time.monotonic() < until:
            with suppress(queue.Empty):
                self._take(*self.ranks.messages.get(timeout=_LOOK))
            if interruption.requested and not asked:
                asked = True
                self.ranks.stop()
            if until == float("inf") and any(one["code"] for one in self.exits.values()):
                until = time.monotonic() + _GRACE

    def _take(self, rank: int, message: Message) -> None:
        if "exit" in message:
            self.exits[rank] = message["exit"]
        elif "error" in message:
            self.errors[rank] = message["error"]
        elif rank == 0 and "result" in message:
            self.result = message["result"]
        elif rank == 0 and "event" in message:
            event = event_of(message["event"])
            self.begun = self.begun or event.kind == "start"
            if event.kind == "done":
                self.last = event
            else:
                self.on_event(event)

    def has_ended(self, asked: bool) -> bool:
        """Whether the training has ended, or was interrupted as ``asked``.

        Else a machine was taken away, and its rank let all others write a checkpoint.
        """
        return self.result is not None and (asked or self.result["stopped_because"] != "interrupted")

    def end(self) -> dict[str, Any]:
        """Tell the end, and return the result."""
        if self.last is not None:
            self.on_event(self.last)
        return self.result or {}

    def require_no_error(self) -> None:
        """Raise what a rank refused, or failed with by itself, and not because others had ended."""
        for error in self.errors.values():
            if error["kind"] != RankLost.__name__:
                raise _error_of(error)
        for rank, end in sorted(self.exits.items()):
            if end["code"] > 0 and rank not in self.errors:
                lines = "\n".join(end["tail"])
                raise RankFailed(
                    f"rank {rank} of {self.ranks.size} failed. What the last checkpoint holds is kept; mend the cause "
                    f"and run the same command again. Its last lines:\n{lines}"
                )

    def lost(self) -> str:
        """Say which rank was lost, and how."""
        for rank, end in sorted(self.exits.items()):
            if end["code"] < 0:
                why = f" ({end['tail'][-1]})" if end["tail"] else ""
                return f"rank {rank} of {self.ranks.size} was killed ({signal.Signals(-end['code']).name}){why}"
        silent = sorted({*range(self.ranks.size)} - {*self.exits})
        if silent:
            return f"rank {silent[0]} of {self.ranks.size} did not answer any more"
        return next(iter(self.errors.values()), {"text": "ranks were told to end"})["text"]


def _error_of(error: dict[str, str]) -> CvaeDistError:
    kind = getattr(errors, error["kind"], CvaeDistError)
    return kind(error["text"])
