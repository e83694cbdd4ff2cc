"""The sums of moments as numba compiles them. Imported by ``compiled`` alone, as numba takes long to import."""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba.extending import overload

from cvae_dist.store.compiled import SIGN_AND_HALF

Array = npt.NDArray[Any]

_TOGETHER = 4  # rows that are added to a lane while its sums are in registers


def _jit(function: Callable[..., Any]) -> Any:
    """Compile on the first call, and keep the code for other processes where there is a folder for it."""
    try:
        return numba.njit(function, nogil=True, cache=True)
    except RuntimeError:
        return numba.njit(function, nogil=True)


def _widen(value: Any) -> Any:
    """Return the bits of a float16 as a float32 in units of 2**112, and other values as they are."""
    raise NotImplementedError


@overload(_widen, inline="always", strict=False)
def _(value: Any) -> Any:
    if value == numba.int16:
        return lambda value: np.int32((np.int32(value) << np.int32(13)) & SIGN_AND_HALF).view(np.float32)
    return lambda value: value


@_jit
def _add_rows(rows: Array, shift: Array, first: Array, second: Array, low: Array, high: Array) -> None:
    count, width = rows.shape
    whole = count // _TOGETHER * _TOGETHER
    for start in range(0, whole, _TOGETHER):
        for lane in range(width):
            one, two, least, most = first[lane], second[lane], low[lane], high[lane]
            for row in range(_TOGETHER):
                value = _widen(rows[start + row, lane])
                least, most = min(least, value), max(most, value)
                deviation = np.float64(value) - shift[lane]
                one += deviation
                two += deviation * deviation
            first[lane], second[lane], low[lane], high[lane] = one, two, least, most
    for row in range(whole, count):
        for lane in range(width):
            value = _widen(rows[row, lane])
            low[lane], high[lane] = min(low[lane], value), max(high[lane], value)
            deviation = np.float64(value) - shift[lane]
            first[lane] += deviation
            second[lane] += deviation * deviation


@_jit
def add_vectors(vectors: Array, tile: int, shift: Array, first: Array, second: Array, low: Array, high: Array) -> None:
    """Add vectors, shape (n, width), to sums of shape (width,). int16 are the bits of float16, in units of 2**112.

    ``tile`` is an argument because kept code is only renewed when this file changes, not with another one's constants.
    """
    one, two = np.zeros_like(first), np.zeros_like(second)
    for start in range(0, len(vectors), tile):
        _add_rows(vectors[start : start + tile], shift, one, two, low, high)
        for lane in range(len(first)):
            first[lane] += one[lane]
            second[lane] += two[lane]
        one[:] = 0.0
        two[:] = 0.0
