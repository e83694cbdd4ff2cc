"""Ctrl-C and SIGTERM as a request that the training loop answers between two steps."""

import signal
import threading
from types import FrameType
from typing import Any, Self


class Interruption:
    """While entered, SIGINT sets :attr:`requested`, and so does SIGTERM if asked; a second SIGINT interrupts at once.

    Afterwards SIGTERM does what it did before. With ``lasting`` it does nothing any more: of several ranks that are to
    end, one may hear of it from another before its own signal comes, and has a checkpoint to write.

    Handlers can only be set in the main thread; elsewhere signals are left to whoever handles them.
    """

    def __init__(self, *, sigterm: bool, lasting: bool = False) -> None:
        self.requested = False
        self._lasting = lasting
        self._signals = (signal.SIGINT, signal.SIGTERM) if sigterm else (signal.SIGINT,)
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._request) for number in self._signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            lasts = self._lasting and number == signal.SIGTERM
            signal.signal(number, signal.SIG_IGN if lasts else handler)
        self._previous = {}

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
