"""Ctrl-C and SIGTERM as a request that the training loop answers between two steps."""

import signal
import threading
from types import FrameType
from typing import Any, Self


class Interruption:
    """While entered, SIGINT sets :attr:`requested`, and so does SIGTERM if asked; a second SIGINT interrupts at once.

    Handlers can only be set in the main thread; elsewhere signals are left to whoever handles them.
    """

    def __init__(self, *, sigterm: bool) -> None:
        self.requested = False
        self._signals = (signal.SIGINT, signal.SIGTERM) if sigterm else (signal.SIGINT,)
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._request) for number in self._signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
