"""The header of a ``.npy`` file: read and checked, never trusted."""

import io
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from cvae_dist.sources.files import BadFile, File

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


@lru_cache(maxsize=4096)
def read_header(file: File) -> Header:
    """Read and check the header of one file.

    Raises
    ------
    BadFile
        It is not a whole ``.npy`` file of real numbers.
    """
    head = bytes(file.read(0, _HEADER_BYTES))
    if not head.startswith(b"\x93NUMPY"):
        what = f"is not a .npy file (it starts with {head[:8]!r})" if head else "is empty"
        raise BadFile(file.path, "header", what)
    header = parse_header(file.path, head)
    if header.size != file.size:
        how = "is truncated" if file.size < header.size else "is longer than its header says"
        said = f"{how}: {file.size:,} bytes, {header.size:,} expected for shape {header.shape}"
        raise BadFile(file.path, "truncated" if file.size < header.size else "size", said)
    return header


_VERSIONS = (b"\x01\x00", b"\x02\x00", b"\x03\x00")


@lru_cache(maxsize=64)
def _parse_cached(head: bytes) -> Header:
    stream = io.BytesIO(head)
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    return Header(shape, dtype, fortran, head)


def parse_header(path: str, head: bytes) -> Header:
    """Return what the first bytes of a ``.npy`` file say, or raise :class:`BadFile`, which names ``path``."""
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
        raise BadFile(path, "header", f"has an unusable .npy header ({why})") from error
    if header.dtype.hasobject:
        raise BadFile(path, "dtype", "holds pickled Python objects, which are never loaded: they could run code")
    if header.dtype.kind not in "iuf" or header.dtype.itemsize > 8:
        accepted = "float16, float32, float64 and integers are accepted"
        raise BadFile(path, "dtype", f"has dtype {header.dtype}; {accepted}")
    if not header.shape or any(type(n) is not int or n < 0 for n in header.shape):
        raise BadFile(path, "shape", f"has shape {header.shape}, which holds no rows")
    return header
