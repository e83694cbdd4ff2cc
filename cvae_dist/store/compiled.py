"""The sums of moments by compiled code, where numba is installed and there is enough to add up.

The compiled code adds in the order of :class:`~cvae_dist.store.moments.RunningMoments`, without fused or reordered
operations. So it gives NumPy's bits. A process may change over at any block, and workers with and without numba agree.
"""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]
Values = npt.NDArray[Any]

TILE_ROWS = 64  # vectors that are added up before their sum is
SIGN_AND_HALF = np.int32(-0x70002000)  # 0x8FFFE000: sign, and exponent and fraction of a half in their new place
HALF_UNIT = 2.0**-112  # the difference of the exponents' biases: a half whose bits are moved is so much smaller

_WORTH_BYTES = 1_000_000_000  # to add up in one process, before it pays to import numba, which takes about a second
_CODES = ("f2", "f4", "f8", "u1", "i1")  # other types are rare

_changing = threading.Lock()
_seen: dict[str, int] = {}  # bytes of each type
_ready: dict[str, Callable[..., None] | None] = {}


def add_values(values: Values, shift: Vector, first: Vector, second: Vector, minimum: Vector, maximum: Vector) -> bool:
    """Add contiguous values, shape (n,), to sums of shape (width,), lane by lane; False where no compiled code did.

    ``shift`` and sums of float16 are in units of 2**112. What is infinite or NaN makes ``first`` so.
    """
    code = values.dtype.str[1:]
    add = _compiled(code, values) if code in _CODES and values.dtype.isnative and values.flags.aligned else None
    if add is None:
        return False
    half = code == "f2"
    unit = HALF_UNIT if half else 1.0
    add(values.view(np.int16) if half else values, TILE_ROWS, unit, shift, first, second, minimum, maximum)
    return True


def _compiled(code: str, values: Values) -> Callable[..., None] | None:
    """Return the compiled function, or None as long as there is none for this type."""
    if code in _ready:
        return _ready[code]
    _seen[code] = _seen.get(code, 0) + values.nbytes  # threads may lose some of it
    if _seen[code] > _WORTH_BYTES and _changing.acquire(blocking=False):  # others go on without it
        try:
            _ready[code] = _ready.get(code) or _compile(code)
        finally:
            _changing.release()
    return _ready.get(code)


def _compile(code: str) -> Callable[..., None] | None:
    try:
        import numba

        from cvae_dist.store import moments_numba
    except ImportError:  # not installed, or not for this NumPy
        return None
    values = numba.int16 if code == "f2" else numba.from_dtype(np.dtype(code))
    vector = numba.float64[::1]
    function: Any = moments_numba.add_values
    function.compile((values[::1], numba.intp, numba.float64, *[vector] * 5))
    return function  # type: ignore[no-any-return]
