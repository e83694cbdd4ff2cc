"""What a running stage tells the outside: verbs emit events, faces render them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

EventKind = Literal["start", "progress", "test", "note", "done"]


@dataclass(frozen=True)
class Event:
    """One report of a running stage.

    Attributes
    ----------
    stage : str
        The verb: ``ingest``, ``train``, ``embed``, ...
    kind : {"start", "progress", "test", "note", "done"}
        ``start`` carries ``total``; ``test`` the figures of a validation; ``note`` only ``message``; ``done`` ends
        the stage.
    done, total : int
        Units finished and to do. Work found finished by an earlier run counts as done.
    unit : str
        What is counted: ``rows`` or ``steps``.
    message : str
        One human sentence, may be empty.
    values : Mapping[str, float | int | str]
        Figures such as ``loss`` or ``rows_per_second``.
    """

    stage: str
    kind: EventKind
    done: int = 0
    total: int = 0
    unit: str = "rows"
    message: str = ""
    values: Mapping[str, float | int | str] = field(default_factory=dict)


OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Discard an event: the default listener."""
