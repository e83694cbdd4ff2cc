"""How a running verb shows itself: live bars, occasional lines, JSON lines, log records, or nothing."""

import json
import logging
import math
import multiprocessing
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from pydantic_core import to_jsonable_python
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column, Table
from rich.text import Text

from cvae_dist.events import Event

SECONDS_BETWEEN_LINES = 5.0
MEASURED_HERE = frozenset({"rows_per_second", "steps_per_second", "seconds"})  # shown from the counts instead
_NOTEBOOK_BAR = 30  # characters
_LOGGED = ("loss", "validation_loss")  # figures of a validation

_LOGGER = logging.getLogger(__name__)


class Display:
    """Where a command's events go while it runs, and its outcome at the end. This one is quiet on the way."""

    def __call__(self, event: Event) -> None:
        """Show one event."""

    def note(self, message: str) -> None:
        """Show one sentence that belongs to no stage."""

    def result(self, line: str, values: Mapping[str, Any]) -> None:
        """Show the outcome: a line for people, the same as values for programs."""
        print(line, flush=True)

    def table(self, heading: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Show rows of text under a heading, aligned, after an empty line."""
        table = Table(*heading, box=None, pad_edge=False, header_style="bold")
        for row in rows:
            table.add_row(*map(Text, row))
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = 160  # a log file has no width; a folded path could not be copied
        console.print("", table, sep="\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None: ...


def open_display(*, as_json: bool = False, quiet: bool = False) -> Display:
    """Return the display that fits where the output goes."""
    if as_json:
        return JsonLines()
    if quiet:
        return Display()
    return LiveBars() if sys.stderr.isatty() else PlainLines()


def open_python_display() -> Display:
    """Return the display of a call from Python: a bar where a person looks, or else log records of level INFO."""
    if _notebook_shell() is not None:
        return NotebookBar()
    # Processes that a parameter search starts share one terminal, where their bars would overwrite each other.
    alone = multiprocessing.parent_process() is None
    return LiveBars() if alone and sys.stderr.isatty() else LogRecords()


@dataclass
class Pace:
    """How fast a stage advances, counting only what this run did itself."""

    started: float = field(default_factory=time.monotonic)
    first_done: int | None = None

    def rate(self, done: int) -> float:
        """Return units per second since the first event; NaN before there is anything to measure."""
        if self.first_done is None:
            self.first_done = done
        seconds = time.monotonic() - self.started
        advanced = done - self.first_done
        return advanced / seconds if advanced > 0 and seconds > 0 else math.nan


class PlainLines(Display):
    """Occasional lines on stderr, for log files and schedulers."""

    def __init__(self) -> None:
        self._paces: dict[str, Pace] = {}
        self._last_line = 0.0

    def __call__(self, event: Event) -> None:
        """Print the first and the last event of a stage, its notes, and its progress every few seconds."""
        if event.kind == "test":
            return
        pace = self._paces.setdefault(event.stage, Pace())
        pace.rate(event.done)
        if event.kind == "progress" and time.monotonic() - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._last_line = time.monotonic()
        self.note(f"{event.stage}: {_sentence(event, pace)}")
        if event.kind == "done":
            del self._paces[event.stage]

    def note(self, message: str) -> None:
        """Print the sentence on stderr."""
        print(message, file=sys.stderr, flush=True)


class LiveBars(Display):
    """One bar per stage on a terminal: rows per second, time left and figures such as the loss.

    Where nothing happens nothing is drawn, as by those ranks of a training that hear of no event.
    """

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[figures]}", markup=False, table_column=Column()),
            console=Console(stderr=True, highlight=False),
            redirect_stdout=False,  # results belong to stdout, whatever is drawn on stderr
        )
        self._bars: dict[str, tuple[TaskID, Pace]] = {}

    def __call__(self, event: Event) -> None:
        """Draw the event."""
        if event.kind == "test":
            return
        if event.kind == "note":
            self.note(f"{event.stage}: {event.message}")
            return
        if event.stage not in self._bars:
            self._bars[event.stage] = self._progress.add_task(event.stage, figures=""), Pace()
            self._progress.start()
        bar, pace = self._bars[event.stage]
        figures = ", ".join(_figures(event, pace))
        if event.kind == "done":  # a full bar, also where nothing was counted
            full = event.done or 1
            self._progress.update(bar, total=full, completed=full, figures=figures)
            self._progress.stop_task(bar)
            del self._bars[event.stage]
        else:
            self._progress.update(bar, completed=event.done, total=event.total or None, figures=figures)

    def note(self, message: str) -> None:
        """Print the sentence above the bars."""
        self._progress.console.print(Text(message))

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if self._progress.tasks:
            self._progress.stop()


class NotebookBar(Display):
    """One line of text for each stage below the cell of a notebook, which is replaced as the stage advances."""

    def __init__(self) -> None:
        self._lines: dict[str, tuple[Any, Pace]] = {}

    def __call__(self, event: Event) -> None:
        """Show the event."""
        if event.kind == "note":
            print(f"{event.stage}: {event.message}")
        elif event.kind != "test":
            self._draw(event)

    def _draw(self, event: Event) -> None:
        from IPython.display import display  # there, as this is a notebook

        if event.stage not in self._lines:
            self._lines[event.stage] = display({"text/plain": ""}, raw=True, display_id=True), Pace()  # type: ignore[no-untyped-call]
        line, pace = self._lines[event.stage]
        full = event.kind == "done" or not event.total
        filled = _NOTEBOOK_BAR if full else round(_NOTEBOOK_BAR * event.done / event.total)
        bar = "\u2588" * filled + "\u2591" * (_NOTEBOOK_BAR - filled)
        line.update({"text/plain": f"{event.stage} {bar} {_sentence(event, pace)}"}, raw=True)
        if event.kind == "done":
            del self._lines[event.stage]


class LogRecords(Display):
    """Log records of level INFO: one for the start and the end of a stage, each note and each validation."""

    def __init__(self) -> None:
        self._paces: dict[str, Pace] = {}

    def __call__(self, event: Event) -> None:
        """Log the event."""
        pace = self._paces.setdefault(event.stage, Pace())
        pace.rate(event.done)
        if event.kind == "test":
            told = {name: event.values[name] for name in _LOGGED if name in event.values}
            event = replace(event, values=told)
        if event.kind != "progress":
            _LOGGER.info("%s: %s", event.stage, _sentence(event, pace))


def _notebook_shell() -> Any:
    """Return the shell of the notebook that this process computes for, or None."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell if hasattr(shell, "kernel") else None


class JsonLines(Display):
    """One JSON object per event on stdout; ``event`` says which, the last is ``result`` or ``error``."""

    def __call__(self, event: Event) -> None:
        """Print the event as one line."""
        values = asdict(event)
        self._print({"event": values.pop("kind"), **values})

    def note(self, message: str) -> None:
        """Print the sentence as one line."""
        self._print({"event": "note", "message": message})

    def result(self, line: str, values: Mapping[str, Any]) -> None:
        """Print the outcome as one line."""
        self._print({"event": "result", "message": line, **values})

    def table(self, heading: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Discard the table: its values are in the result."""

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, BrokenPipeError):
            self._print({"event": "error", "kind": type(error).__name__, "message": error_text(error)})

    def _print(self, values: Mapping[str, Any]) -> None:
        """Print strict JSON, which has no NaN and no infinity: they become null."""
        print(json.dumps(to_jsonable_python(values, inf_nan_mode="null", fallback=str), allow_nan=False), flush=True)


def error_text(error: BaseException) -> str:
    """Return what an error says to a person, after where it happened; of a system's error, without its number."""
    said = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        said = f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror)
    return ": ".join([*getattr(error, "__notes__", []), said])  # a pipeline notes its stage


def duration(seconds: float) -> str:
    """Return seconds in words of fitting precision: ``0.8 s``, ``42 s``, ``3:05 min``, ``2:07 h``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def figure(value: object) -> str:
    """Return a number with thousands separators or four significant digits; other values as they are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _figures(event: Event, pace: Pace) -> list[str]:
    """Return what an event says in numbers: count, rate, time left, values."""
    parts = [f"{event.done:,}/{event.total:,} {event.unit}"] if event.total else []
    rate = pace.rate(event.done)
    if math.isfinite(rate):
        parts.append(f"{rate:,.0f} {event.unit}/s")
        if event.done < event.total:
            parts.append(f"{duration((event.total - event.done) / rate)} left")
    shown = ((name, value) for name, value in event.values.items() if name not in MEASURED_HERE)
    return parts + [f"{name.replace('_', ' ')} {figure(value)}" for name, value in shown]


def _sentence(event: Event, pace: Pace) -> str:
    if event.kind == "note":
        return event.message
    return ", ".join([*_figures(event, pace), *([event.message] if event.message else [])])
