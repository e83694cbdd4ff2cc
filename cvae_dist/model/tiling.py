"""Rows as tensors, in tiles whose size does not change what becomes of a row.

Hidden state: :func:`keep_freed_memory` changes this process's allocator, once.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cvae_dist.errors import InvalidInput
from cvae_dist.model.threads import side_by_side

Rows = npt.NDArray[np.generic]  # values, (n, width), of any real dtype
Floats = npt.NDArray[np.float32]

BATCH_SIZE = 2048  # rows computed at once, by default

# A matrix kernel treats all rows alike when there are at least this many; for a single row there is another kernel.
_FEWEST = 16
_VECTORS = 64  # values. Activations compute what is left after the last 64 otherwise; multiples leave nothing.
_LEARNED_BYTES = 31 * 2**20
_CACHED_BYTES = 3_200_000
_FEWEST_ROWS = 256  # with fewer, reading the weights would take longer than reading the rows


@functools.cache
def keep_freed_memory() -> None:
    """Let this process keep the memory that a tile or a training step frees, for the next one.

    By default glibc returns it to the system, and the system zeroes every page of it before it is used again. That can
    take a quarter of the time. Glibc keeps up to twice the largest block that it has mapped and got back, 32 MB at most
    (mallopt(3)). The block here is never written, so it takes no memory itself.
    """
    torch.empty(_LEARNED_BYTES, dtype=torch.uint8)


def tensor_of(rows: Rows) -> Tensor:
    """Return ``rows`` as a tensor of the same dtype. It shares their memory where torch can."""
    native = np.ascontiguousarray(rows, dtype=rows.dtype.newbyteorder("="))
    return torch.from_numpy(native if native.flags.writeable else native.copy())


def padded_to(widths: Iterable[int]) -> int:
    """Return the multiple that a tile's number of rows must be, for values (n, width) of each of ``widths``."""
    return max(_FEWEST, _VECTORS // math.gcd(_VECTORS, *widths))


def tiles(rows: Rows, batch_size: int, multiple: int = _VECTORS) -> Iterator[tuple[slice, Tensor]]:
    """Yield every tile and the slice of ``rows`` that it begins with.

    The last tile is padded with rows of zeros to a ``multiple``; see :func:`padded_to`.
    """
    for part in _parts(len(rows), _checked(batch_size)):
        yield part, padded(rows[part], multiple)


def by_tiles(
    function: Callable[..., Tensor], batch_size: int, *arrays: Rows
) -> Iterator[tuple[slice, npt.NDArray[np.generic]]]:
    """Yield, tile by tile, a slice of the rows and what ``function`` makes of them, one value or more a row.

    ``arrays``, (n, width) each, are the arguments of ``function``: a tile of each.
    """
    for part in _parts(len(arrays[0]), _checked(batch_size)):
        computed = function(*(padded(array[part], _VECTORS) for array in arrays))
        yield part, computed[: part.stop - part.start].numpy(force=True)


def padded(rows: Rows, multiple: int) -> Tensor:
    """Return ``rows`` as a tile, with rows of zeros up to a ``multiple``."""
    missing = -len(rows) % multiple
    if missing:
        rows = np.concatenate([rows, np.zeros((missing, rows.shape[1]), rows.dtype)])
    return tensor_of(rows)


def cached_rows(n_features: int, batch_size: int) -> int:
    """Return how many rows of a tile wide layers still find in a cache, at most ``batch_size``."""
    return min(_checked(batch_size), max(_FEWEST_ROWS, _CACHED_BYTES // (4 * n_features) // _VECTORS * _VECTORS))


def check_finite(rows: Tensor, standardised: Tensor) -> None:
    """Refuse rows that hold NaN or infinity.

    ``standardised``, the same rows just computed, are in a cache. Their sum shows whether to look closer.

    Raises
    ------
    InvalidInput
        A value is not finite.
    """
    if not rows.is_floating_point() or math.isfinite(standardised.sum()):
        return
    broken = rows[~rows.isfinite()]
    if len(broken):  # else the sum alone overflowed
        raise InvalidInput(
            f"the rows hold NaN or infinity ({len(broken)} such values among {len(rows)} rows, the first is "
            f"{broken[0]}), and have no latents; drop these rows or fill the gaps"
        )


def _checked(batch_size: int) -> int:
    if not isinstance(batch_size, Integral) or batch_size < 1:
        raise InvalidInput(f"batches of {batch_size!r} rows cannot be computed; give a whole number from 1 on")
    return batch_size


def on_all_threads(work: Callable[[slice], None], n_rows: int, batch_size: int) -> None:
    """Do ``work`` on parts of at most ``batch_size`` rows, as many at a time as torch has threads.

    See :func:`~cvae_dist.model.threads.side_by_side`.
    """
    even = _even_rows(n_rows, torch.get_num_threads(), _checked(batch_size))
    side_by_side(work, list(_parts(n_rows, even)))


def _even_rows(n_rows: int, threads: int, batch_size: int) -> int:
    """Return how many rows a part has, at most ``batch_size``, so that every thread gets as much work."""
    share = max(1, math.ceil(n_rows / threads))
    even = math.ceil(share / math.ceil(share / batch_size))
    return min(batch_size, max(_FEWEST_ROWS, even + -even % _VECTORS))


def _parts(n_rows: int, batch_size: int) -> Iterator[slice]:
    return (slice(start, min(start + batch_size, n_rows)) for start in range(0, n_rows, batch_size))


def cast(rows: Rows, dtype: np.dtype[np.generic]) -> Rows:
    """Return ``rows`` as ``dtype``; integers are rounded and kept within their range."""
    if not np.issubdtype(dtype, np.integer):
        return rows.astype(dtype, copy=False)
    limits: np.iinfo[Any] = np.iinfo(dtype.name)
    return np.clip(np.rint(rows.astype(np.float64)), limits.min, limits.max).astype(dtype)
