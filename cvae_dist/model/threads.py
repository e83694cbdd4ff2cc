"""How many threads torch computes with: changed here alone, by whoever owns the process, and put back."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch compute with ``count`` threads in this thread, and in those that begin while the context lasts."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)  # also for threads that begin later: they take the number that was set last
