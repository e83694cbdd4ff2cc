"""Memory that is used again for every shard."""

import threading
from typing import Any

import numpy as np

from cvae_dist.store.layout import Block

_reused = threading.local()


def reused_block(shape: tuple[int, int], dtype: np.dtype[Any]) -> Block:
    """Return an array of this thread that its next call reuses: fresh memory costs a page fault every 4 kB."""
    size = shape[0] * shape[1] * dtype.itemsize
    buffer: Block | None = getattr(_reused, "buffer", None)
    if buffer is None or len(buffer) < size:
        buffer = _reused.buffer = np.empty(size, dtype=np.uint8)
    return buffer[:size].view(dtype).reshape(shape)
