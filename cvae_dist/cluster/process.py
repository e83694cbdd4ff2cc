"""What a process keeps between the tasks it runs: memory, and what was opened or loaded once."""

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from cvae_dist.store.layout import Block

Key = TypeVar("Key")
Value = TypeVar("Value")

_thread = threading.local()


def reused_block(shape: tuple[int, int], dtype: np.dtype[Any]) -> Block:
    """Return an array of this thread that its next call reuses: fresh memory costs a page fault every 4 kB."""
    size = shape[0] * shape[1] * dtype.itemsize
    buffer: Block | None = getattr(_thread, "buffer", None)
    if buffer is None or len(buffer) < size:
        buffer = _thread.buffer = np.empty(size, dtype=np.uint8)
    return buffer[:size].view(dtype).reshape(shape)


def kept(count: int) -> Callable[[Callable[[Key], Value]], Callable[[Key], Value]]:
    """Let a process keep the last ``count`` results of a function, and its threads wait for one call of it."""

    def decorate(function: Callable[[Key], Value]) -> Callable[[Key], Value]:
        cached, lock = functools.lru_cache(count)(function), threading.Lock()

        @functools.wraps(function)
        def locked(key: Key) -> Value:
            with lock:
                return cached(key)

        return locked

    return decorate
