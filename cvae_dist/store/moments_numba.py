"""The sums of moments as numba compiles them. Imported by ``compiled`` alone, as numba takes long to import."""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba.extending import overload

from cvae_dist.store.compiled import SIGN_AND_HALF

Array = npt.NDArray[Any]

_TOGETHER = 8  # rows that are added to a lane while its sums are in registers
_BYTES = (numba.uint8, numba.int8)
_HALF_LIMIT = 2.0**16  # the bits of infinity and NaN are worth this and more


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
    if value in _BYTES:
        return lambda value: np.int32(value)
    return lambda value: value


def _deviation(value: Any, shift: Any) -> Any:
    """Return how far a widened value is from the shift; bytes have none."""
    raise NotImplementedError


@overload(_deviation, inline="always", strict=False)
def _(value: Any, shift: Any) -> Any:
    if value == numba.int32:
        return lambda value, shift: value
    return lambda value, shift: np.float64(value) - shift


def _nothing(values: Array, width: int) -> Any:
    """Return sum, sum of squares, least and largest value of no vectors: integers where the values are bytes."""
    raise NotImplementedError


@overload(_nothing, strict=False)
def _(values: Any, width: int) -> Any:
    small = values.dtype in _BYTES  # 64 squares are less than 2**31
    sums: Any = np.int32 if small else np.float64
    ends: Any = np.int32 if small else np.float64 if values.dtype == numba.float64 else np.float32
    beyond = 2**16 if small else np.inf
    return lambda values, width: (
        np.zeros(width, sums),
        np.zeros(width, sums),
        np.full(width, beyond, ends),
        np.full(width, -beyond, ends),
    )


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
                deviation = _deviation(value, shift[lane])
                one += deviation
                two += deviation * deviation
            first[lane], second[lane], low[lane], high[lane] = one, two, least, most
    for row in range(whole, count):
        for lane in range(width):
            value = _widen(rows[row, lane])
            low[lane], high[lane] = min(low[lane], value), max(high[lane], value)
            deviation = _deviation(value, shift[lane])
            first[lane] += deviation
            second[lane] += deviation * deviation


@_jit
def add_values(
    values: Array, tile: int, unit: float, shift: Array, first: Array, second: Array, minimum: Array, maximum: Array
) -> None:
    """Add values, shape (n,), to sums of shape (width,). int16 are the bits of float16.

    What is no argument is fixed for good: kept code is renewed when this file changes, but not with another one.
    """
    width = len(first)
    one, two, low, high = _nothing(values, width)
    full = len(values) // width
    vectors = values[: full * width].reshape(full, width)
    for start in range(0, full, tile):
        _add_rows(vectors[start : start + tile], shift, one, two, low, high)
        for lane in range(width):
            first[lane] += one[lane]
            second[lane] += two[lane]
        one[:] = 0
        two[:] = 0
    rest = values[full * width :]
    _add_rows(rest.reshape(1, len(rest)), shift, one, two, low, high)
    for lane in range(len(rest)):
        first[lane] += one[lane]
        second[lane] += two[lane]
    for lane in range(width):
        least, most = low[lane] / unit, high[lane] / unit
        if unit != 1.0 and (least <= -_HALF_LIMIT or most >= _HALF_LIMIT):
            first[lane] = np.nan
        minimum[lane], maximum[lane] = min(minimum[lane], least), max(maximum[lane], most)
