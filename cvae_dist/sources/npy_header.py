"""The header of a ``.npy`` file: read and checked, never trusted."""

import io
import os
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from cvae_dist.errors import InvalidInput

_HEADER_BYTES = 4096


class Header(NamedTuple):
    """What the header of a ``.npy`` file says.

    Attributes
    ----------
    shape : tuple of int
    dtype : numpy.dtype
        As stored, possibly big-endian.
    fortran : bool
        Column-major order.
    text : bytes
        The header itself, up to the data.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    text: bytes

    @property
    def offset(self) -> int:
        """Bytes before the data."""
        return len(self.text)

    @property
    def size(self) -> int:
        """Bytes a whole file with this header has."""
        return self.offset + self.dtype.itemsize * int(np.prod(self.shape, dtype=object))

    @property
    def plain(self) -> bool:
        """Whether rows lie in the file just as they lie in memory."""
        return self.dtype.isnative and (not self.fortran or len(self.shape) < 2)


def read_header(path: str) -> Header:
    """Read and check the header of one file.

    Raises
    ------
    InvalidInput
        It is not a whole ``.npy`` file of real numbers.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            head = file.read(_HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}") from error
    if not head.startswith(b"\x93NUMPY"):
        what = "is empty" if not size else "is not a .npy file"
        raise InvalidInput(f"{path} {what} (it starts with {head[:8]!r})")
    header = _parse_header(path, head)
    if header.size != size:
        how = "truncated" if size < header.size else "longer than its header says"
        raise InvalidInput(f"{path} is {how}: {size:,} bytes, {header.size:,} expected for shape {header.shape}")
    return header


_VERSIONS = (b"\x01\x00", b"\x02\x00", b"\x03\x00")


@lru_cache(maxsize=64)
def _parse_cached(head: bytes) -> Header:
    stream = io.BytesIO(head)
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    return Header(shape, dtype, fortran, head)


def _parse_header(path: str, head: bytes) -> Header:
    start = 10 if head[6:7] == b"\x01" else 12
    end = start + int.from_bytes(head[8:start], "little")
    try:
        if head[6:8] not in _VERSIONS:
            raise ValueError(f"format version {head[6]}.{head[7]}; NumPy writes 1.0, 2.0 and 3.0")
        if end > len(head):
            raise ValueError("too long")
        header = _parse_cached(head[:end])
    except Exception as error:  # NumPy's parser lets several kinds of error through when the text is garbage
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise InvalidInput(f"{path} has an unusable .npy header ({why})") from error
    if header.dtype.hasobject:
        raise InvalidInput(f"{path} holds pickled Python objects, which are never loaded: they could run code")
    if header.dtype.kind not in "iuf" or header.dtype.itemsize > 8:
        raise InvalidInput(f"{path} has dtype {header.dtype}; float16, float32, float64 and integers are accepted")
    if not header.shape or any(n < 0 for n in header.shape):
        raise InvalidInput(f"{path} has shape {header.shape}, which holds no rows")
    return header
