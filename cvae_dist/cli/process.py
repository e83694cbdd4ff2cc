"""The process around a command: signals, and the exit code and message of what went wrong."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from cvae_dist.cli.parser import app
from cvae_dist.cli.results import BROKEN_PIPE, DONE, FAILED, INTERRUPTED, TERMINATED, WRONG_USAGE
from cvae_dist.errors import CvaeDistError, InvalidPipeline
from cvae_dist.progress import error_text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    with _signals() as arrived:
        try:
            code = app(arguments)
            sys.stdout.flush()
            return code if isinstance(code, int) else DONE
        except BrokenPipeError:
            # The reader went away (`cvae-dist info ... | head`), of which Python would complain again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return BROKEN_PIPE
        except KeyboardInterrupt:
            terminated = signal.SIGTERM in arrived()
            _complain(f"{'terminated' if terminated else 'interrupted'}; the same command goes on from here")
            return TERMINATED if terminated else INTERRUPTED
        except (CvaeDistError, OSError) as error:
            _complain(error_text(error))
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


def _complain(message: str) -> None:
    print(f"cvae-dist: {message}", file=sys.stderr, flush=True)
