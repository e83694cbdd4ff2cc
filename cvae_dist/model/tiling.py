"""Numpy rows as tensors, in tiles whose size does not change what a row becomes."""

import functools
import itertools
import math
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cvae_dist.errors import InvalidInput

# Matrix kernels treat every row alike from a few rows on (a single row takes another kernel), and activations
# all values but those beyond the last two full vectors of bfloat16.
_FEWEST = 16
_VECTORS = 64  # values; as many rows end on them whatever the width of a layer
_LEARNED_BYTES = 31 * 2**20
_FAST_BYTES = 8_000_000
_FEWEST_FAST = 256  # fewer would read the weights more often than the rows


@functools.cache
def keep_freed_memory() -> None:
    """Let this process keep what a tile or a training step frees for the next one.

    By default glibc returns it to the system and has every page of it zeroed anew, which can take a quarter of the
    time. What it keeps is twice the largest block that it mapped and got back, up to 32 MB (mallopt(3)); this block is
    never written, so it takes no memory itself.
    """
    torch.empty(_LEARNED_BYTES, dtype=torch.uint8)


def tensor_of(rows: npt.NDArray[np.generic]) -> Tensor:
    """Return ``rows`` as a tensor of the same dtype, sharing memory where torch can."""
    native = np.ascontiguousarray(rows, dtype=rows.dtype.newbyteorder("="))
    return torch.from_numpy(native if native.flags.writeable else native.copy())


def padded_to(widths: Iterable[int]) -> int:
    """Return of what number of rows a tile must be a multiple where values are (n, width) for each of ``widths``."""
    return max(_FEWEST, _VECTORS // math.gcd(_VECTORS, *widths))


def tiles(rows: npt.NDArray[np.generic], batch_rows: int, multiple: int = _VECTORS) -> Generator[tuple[slice, Tensor]]:
    """Yield (rows covered, tile); the last tile is padded with zero rows to a ``multiple``, see :func:`padded_to`."""
    for start in range(0, len(rows), _checked(batch_rows)):
        part = slice(start, min(start + batch_rows, len(rows)))
        yield part, tensor_of(_pad(rows[part], multiple))


def fast_rows(n_rows: int, n_features: int, batch_rows: int) -> int:
    """Return at most ``batch_rows`` rows of a tile: no more than a cache holds, and as much work for every thread."""
    most = min(_checked(batch_rows), max(_FEWEST_FAST, _FAST_BYTES // (4 * n_features) // _VECTORS * _VECTORS))
    share = max(1, math.ceil(n_rows / torch.get_num_threads()))
    even = math.ceil(share / math.ceil(share / most))
    return min(most, max(_FEWEST_FAST, even + -even % _VECTORS))


def _checked(batch_rows: int) -> int:
    if not isinstance(batch_rows, Integral) or batch_rows < 1:
        raise InvalidInput(f"batches of {batch_rows!r} rows cannot be computed; give a whole number from 1 on")
    return batch_rows


def on_all_threads(work: Callable[[slice, Tensor], None], parts: Generator[tuple[slice, Tensor]]) -> None:
    """Do ``work`` on every one of :func:`tiles`, as many at a time as torch has threads, each on one thread.

    Threads that divide every single operation, as torch's do, wait for one another at its end: where another process
    takes a core, ten times as long as the work takes. What one thread computes depends on no number of threads either.
    """
    threads = torch.get_num_threads()
    first = list(itertools.islice(parts, 2))
    remaining = itertools.chain(first, parts)
    try:
        torch.set_num_threads(1)
        if threads == 1 or len(first) < 2:
            for taken in remaining:
                work(*taken)
            return
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            lock = threading.Lock()
            try:
                for done in [pool.submit(_work_off, work, remaining, lock) for _ in range(threads)]:
                    done.result()
            finally:
                with lock:
                    parts.close()  # after an error or an interrupt nothing more is begun
    finally:
        torch.set_num_threads(threads)


def _work_off(
    work: Callable[[slice, Tensor], None], parts: Iterator[tuple[slice, Tensor]], lock: threading.Lock
) -> None:
    """Do ``work`` on what is left of ``parts``, which other threads take from too, one at a time."""
    while True:
        with lock:
            taken = next(parts, None)
        if taken is None:
            return
        work(*taken)


def _pad(rows: npt.NDArray[np.generic], multiple: int) -> npt.NDArray[np.generic]:
    missing = -len(rows) % multiple
    if not missing:
        return rows
    return np.concatenate([rows, np.zeros((missing, rows.shape[1]), rows.dtype)])


def cast(rows: npt.NDArray[np.generic], dtype: np.dtype[np.generic]) -> npt.NDArray[np.generic]:
    """Return ``rows`` as ``dtype``; integers are rounded and kept within their range."""
    if not np.issubdtype(dtype, np.integer):
        return rows.astype(dtype, copy=False)
    limits: np.iinfo[Any] = np.iinfo(dtype.name)
    return np.clip(np.rint(rows.astype(np.float64)), limits.min, limits.max).astype(dtype)
