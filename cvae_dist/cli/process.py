"""The process around a command: signals, and the exit code and message of what went wrong."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from cyclopts.exceptions import CycloptsError

from cvae_dist.cli.parser import VARIABLES, app, usage_error
from cvae_dist.cli.results import BROKEN_PIPE, DONE, FAILED, INTERRUPTED, OUT_OF_TIME, TERMINATED, WRONG_USAGE
from cvae_dist.errors import CvaeDistError, InvalidPipeline, OutOfTime
from cvae_dist.progress import error_text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # where results and JSON go
    with _signals() as arrived:
        try:
            code = _run(given, arrived)
            sys.stdout.flush()
            return code
        except BrokenPipeError:
            # The reader went away (`cvae-dist info ... | head`), of which Python would complain again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return BROKEN_PIPE


def _run(arguments: list[str], arrived: Callable[[], set[int]]) -> int:
    """Run one command. What fails while it works is in its JSON already; how else it ends is told here."""
    try:
        code = app(arguments)
        return code if isinstance(code, int) else DONE
    except CycloptsError as error:
        _end(arguments, "WrongUsage", usage_error(error))
        return WRONG_USAGE
    except KeyboardInterrupt:
        code, word = (TERMINATED, "terminated") if signal.SIGTERM in arrived() else (INTERRUPTED, "interrupted")
        _end(arguments, word.capitalize(), f"{word}; the same command goes on from here")
        return code
    except BrokenPipeError:
        raise
    except (CvaeDistError, OSError) as error:
        _complain(error_text(error))
        if isinstance(error, OutOfTime):
            return OUT_OF_TIME
        return WRONG_USAGE if isinstance(error, InvalidPipeline) else FAILED


@contextmanager
def _signals() -> Iterator[Callable[[], set[int]]]:
    """Make SIGTERM interrupt like Ctrl-C, and yield a function that returns the signals that arrived.

    Python writes the number of every signal to the pipe, even of one that a verb handles itself.
    """
    reader, writer = os.pipe()
    for end in (reader, writer):
        os.set_blocking(end, False)
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def arrived() -> set[int]:
        with suppress(BlockingIOError):  # none did
            return set(os.read(reader, 64))
        return set()

    try:
        yield arrived
    finally:
        signal.set_wakeup_fd(descriptor)
        signal.signal(signal.SIGTERM, handler)
        os.close(reader)
        os.close(writer)


def _end(arguments: Sequence[str], kind: str, message: str) -> None:
    """Tell how a command ended; in JSON too where that was asked for, though the other arguments may make no sense."""
    if "--json" in arguments or os.environ.get(f"{VARIABLES}JSON", "0").lower() not in ("0", "false", "no"):
        print(json.dumps({"event": "error", "kind": kind, "message": message}), flush=True)
    _complain(message)


def _complain(message: str) -> None:
    print(f"cvae-dist: {message}", file=sys.stderr, flush=True)
