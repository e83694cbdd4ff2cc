"""A rank as who started it sees it: its messages, its last lines, and its end."""

import collections
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from cvae_dist.launch.rank import Task

Message = dict[str, Any]  # one of ``event``, ``result``, ``error`` and ``exit``
OnMessage = Callable[[int, Message], None]

_TAIL_LINES = 200


class RankProcess:
    """A started rank.

    ``on_message`` is called, by a thread, with the rank's number and each of its messages. The last one is ``exit``:
    the ``code`` of its end, negative where a signal ended it, and the ``tail`` of what it printed.
    """

    def __init__(self, task: Task, number: int, environment: Mapping[str, str], on_message: OnMessage) -> None:
        reader, writer = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cvae_dist.launch.rank", str(writer)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, pass_fds=[writer],
                env={**os.environ, **environment}, start_new_session=True,  # Ctrl-C is for who started it
            )  # fmt: skip
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        self.number = number
        self._tail: collections.deque[str] = collections.deque(maxlen=_TAIL_LINES)
        self._listens = threading.Thread(target=self._listen, args=(reader, on_message), daemon=True)
        self._logs = threading.Thread(target=self._log, daemon=True)
        self._logs.start()
        self._listens.start()
        assert self._process.stdin is not None
        with self._process.stdin as stdin:
            pickle.dump(task, stdin)

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    def stop(self) -> None:
        """Ask it to write a checkpoint, with all others, and end."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once, and wait until it has."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

    def _listen(self, reader: int, on_message: OnMessage) -> None:
        with os.fdopen(reader) as messages:
            for line in messages:
                on_message(self.number, json.loads(line))
        code = self._process.wait()
        self._logs.join()
        on_message(self.number, {"exit": {"code": code, "tail": list(self._tail)}})

    def _log(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._tail.append(line.decode(errors="replace").rstrip("\n"))
