"""Numpy rows as tensors, in tiles whose size does not change what a row becomes."""

import contextvars
import functools
import math
from collections.abc import Callable, Iterable, Iterator
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
_CACHED_BYTES = 3_200_000
_FEWEST_ROWS = 256  # fewer would read the weights more often than the rows


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


def tiles(rows: npt.NDArray[np.generic], batch_rows: int, multiple: int = _VECTORS) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows covered, tile); the last tile is padded with zero rows to a ``multiple``, see :func:`padded_to`."""
    for part in _parts(len(rows), _checked(batch_rows)):
        yield part, padded(rows[part], multiple)


def padded(rows: npt.NDArray[np.generic], multiple: int) -> Tensor:
    """Return a tile of ``rows``, and of zero rows up to a ``multiple``."""
    missing = -len(rows) % multiple
    if missing:
        rows = np.concatenate([rows, np.zeros((missing, rows.shape[1]), rows.dtype)])
    return tensor_of(rows)


def cached_rows(n_features: int, batch_rows: int) -> int:
    """Return at most ``batch_rows`` rows of a tile: few enough that wide layers find them in a cache."""
    return min(_checked(batch_rows), max(_FEWEST_ROWS, _CACHED_BYTES // (4 * n_features) // _VECTORS * _VECTORS))


def check_finite(rows: Tensor, standardised: Tensor) -> None:
    """Refuse rows that hold NaN or infinity; it takes no time where ``standardised``, just computed, shows none.

    Raises
    ------
    InvalidInput
        They hold some.
    """
    if not rows.is_floating_point() or math.isfinite(standardised.sum()):
        return
    broken = rows[~rows.isfinite()]
    if len(broken):  # else the sum alone overflowed
        raise InvalidInput(
            f"the rows hold NaN or infinity ({len(broken)} such values among {len(rows)} rows, the first is "
            f"{broken[0]}), and have no latents; drop these rows or fill the gaps"
        )


def _checked(batch_rows: int) -> int:
    if not isinstance(batch_rows, Integral) or batch_rows < 1:
        raise InvalidInput(f"batches of {batch_rows!r} rows cannot be computed; give a whole number from 1 on")
    return batch_rows


def on_all_threads(work: Callable[[slice], None], n_rows: int, batch_rows: int) -> None:
    """Do ``work`` on parts of at most ``batch_rows`` rows, as many at a time as torch has threads, each on one thread.

    It finds the context variables and the inference mode of the caller.

    Threads that divide every single operation, as torch's do, wait for one another at its end: where another process
    takes a core, ten times as long as the work takes. What one thread computes depends on no number of threads either.
    """
    threads = torch.get_num_threads()
    parts = list(_parts(n_rows, _even_rows(n_rows, threads, _checked(batch_rows))))
    try:
        torch.set_num_threads(1)
        if threads == 1 or len(parts) < 2:
            for part in parts:
                work(part)
            return
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                for done in [pool.submit(_in_this_context(work), part) for part in parts]:
                    done.result()
            finally:
                pool.shutdown(cancel_futures=True)  # after an error or an interrupt nothing more is begun
    finally:
        torch.set_num_threads(threads)


def _in_this_context(work: Callable[[slice], None]) -> Callable[[slice], None]:
    """Return ``work`` with the context variables and the inference mode that are this thread's now."""
    context, mode = contextvars.copy_context(), torch.is_inference_mode_enabled()

    def inherited(part: slice) -> None:
        with torch.inference_mode(mode):
            context.run(work, part)

    return inherited


def _even_rows(n_rows: int, threads: int, batch_rows: int) -> int:
    """Return at most ``batch_rows`` rows of a part: as many that every thread gets as much work."""
    share = max(1, math.ceil(n_rows / threads))
    even = math.ceil(share / math.ceil(share / batch_rows))
    return min(batch_rows, max(_FEWEST_ROWS, even + -even % _VECTORS))


def _parts(n_rows: int, batch_rows: int) -> Iterator[slice]:
    return (slice(start, min(start + batch_rows, n_rows)) for start in range(0, n_rows, batch_rows))


def cast(rows: npt.NDArray[np.generic], dtype: np.dtype[np.generic]) -> npt.NDArray[np.generic]:
    """Return ``rows`` as ``dtype``; integers are rounded and kept within their range."""
    if not np.issubdtype(dtype, np.integer):
        return rows.astype(dtype, copy=False)
    limits: np.iinfo[Any] = np.iinfo(dtype.name)
    return np.clip(np.rint(rows.astype(np.float64)), limits.min, limits.max).astype(dtype)
