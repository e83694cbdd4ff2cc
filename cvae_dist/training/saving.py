"""When a training is saved, and how: by a thread, while the training goes on."""

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

from cvae_dist.training.checkpoint import Checkpoints
from cvae_dist.training.world import to_cpu


class Saving:
    """Writes checkpoints by one thread, one at a time; without ``checkpoints`` it writes nothing.

    A checkpoint is due every so many steps (``every``), and when so many ``minutes`` have passed since the last one.
    What goes wrong in the thread is raised by the next call. Left as a context, it waits for the thread: nothing is
    written any more when the lease is given back.
    """

    def __init__(self, checkpoints: Checkpoints | None, every: int, minutes: float) -> None:
        self._checkpoints = checkpoints
        self._every, self._seconds = every, 60 * minutes
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._saved_at = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is due after ``step`` steps."""
        return step % self._every == 0 or time.monotonic() - self._saved_at >= self._seconds

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Begin to write a copy of ``state``, once the checkpoint before is written."""
        self.wait()
        if self._checkpoints is not None:
            kept = to_cpu(state, copy=True)  # which later steps leave alone
            self._pending = self._thread.submit(self._checkpoints.save, step, kept)
        self._saved_at = time.monotonic()

    def wait(self) -> None:
        """Wait until the checkpoint is written, if one is being written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()
