"""``.npz`` files: one array of each. What is not compressed is read by range, the rest is inflated as far as needed."""

import struct
import threading
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from cvae_dist.errors import StorageFailed
from cvae_dist.sources.files import BadFile, File
from cvae_dist.sources.npy_header import Header, parse_header
from cvae_dist.sources.source import ArrayReader, FileReader, require_rows, schema_of
from cvae_dist.store.layout import Block
from cvae_dist.store.urls import Buffer, Location

_LOCAL = struct.Struct("<4s22x2H")  # before a member: signature, ..., bytes of its name, bytes of what is extra
_HEADER_BYTES = 16_384  # NumPy writes 128, and never reads more than 10,000
_PIECE = 4_000_000  # bytes that are asked for, or inflated, at a time
_MOST_WHOLE = 256_000_000  # bytes of an array in column-major order, whose rows are everywhere
_NAMED = 10
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 0x1

_kept = threading.local()


def npz_reader(root: Location, model: File, array: str | None) -> FileReader:
    """Return what reads one array of each file, all of which have to be like that of ``model``.

    ``array`` is its name, without ``.npy``; by default it is the only one.

    Raises
    ------
    BadFile
        The model is no such file, or has no such array, or several and no name was given.
    """
    header = _look(model, array).header
    return NpzReader(root, schema_of(model, header.shape, header.dtype), array)


class NpzReader(ArrayReader):
    """Reads an array of each ``.npz`` file."""

    def count_file(self, file: File) -> int:
        """Return the rows of the array; a few small reads."""
        return self._member(file).header.shape[0]

    def read_file(self, file: File, first: int, out: Block) -> Mapping[str, Block]:
        """Read rows into ``out``; the array's checksum is compared where it was read from beginning to end."""
        member = self._member(file)
        require_rows(file, member.header.shape[0], first + len(out))
        if not len(out):
            return {}
        header = member.header
        if header.fortran and len(header.shape) > 1:
            out[:] = _whole(file, member)[first : first + len(out)].reshape(out.shape)
            return {}
        start = header.offset + first * self.schema.row_bytes
        if header.dtype.isnative and out.flags.c_contiguous:
            _stream(file, member).read_into(start, out.reshape(-1).view(np.uint8).data)
        else:
            stored = np.empty(out.shape, header.dtype)
            _stream(file, member).read_into(start, stored.reshape(-1).view(np.uint8).data)
            out[:] = stored
        return {}

    def _member(self, file: File) -> "_Member":
        member = _look(file, self.array)
        self.require_like(file, member.header.shape, member.header.dtype.newbyteorder("="))
        return member


class _Member(NamedTuple):
    """One array in a file: where its bytes begin, how many there are, packed and not, and their CRC-32."""

    name: str
    deflated: bool
    start: int
    packed: int
    size: int
    crc: int
    header: Header


@lru_cache(maxsize=256)
def _look(file: File, array: str | None) -> _Member:
    """Find an array in a file and read its header: two small reads, one where the file is smaller than 1 MB."""
    with file.open() as stream:
        try:
            with zipfile.ZipFile(stream) as archive:
                found, end = archive.infolist(), archive.start_dir
        except BadFile:
            raise
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, EOFError, OverflowError) as error:
            if isinstance(error.__context__, StorageFailed):  # which zipfile takes for a fault of the file
                raise error.__context__ from None
            what = "is empty" if not file.size else f"is no whole .npz file ({error})"
            raise BadFile(file.path, "zip", what) from None
        info = _chosen(file, found, array)
        _require_apart(file, found, end)
        stream.seek(info.header_offset)
        head = stream.read(_LOCAL.size) or b""
        if len(head) < _LOCAL.size or not head.startswith(b"PK\3\4"):
            raise BadFile(file.path, "zip", f"has a directory that points to no member {info.filename}")
        _, name, extra = _LOCAL.unpack(head)
        start = info.header_offset + _LOCAL.size + name + extra
        if start + info.compress_size > min([end, *(one.header_offset for one in found if one.header_offset > start)]):
            raise BadFile(file.path, "zip", f"has a member {info.filename} that overlaps what follows it")
        stream.seek(start)
        packed = stream.read(min(_HEADER_BYTES, info.compress_size)) or b""
    deflated = info.compress_type == zipfile.ZIP_DEFLATED
    text = _inflated(file, packed) if deflated else packed
    if not text.startswith(b"\x93NUMPY"):
        raise BadFile(
            file.path, "header", f"has a member {info.filename} that is no .npy file: it starts with {text[:8]!r}"
        )
    header = parse_header(file.path, text)
    if header.size != info.file_size or (not deflated and info.compress_size != info.file_size):
        raise BadFile(
            file.path,
            "size",
            f"says that {info.filename} has {info.file_size:,} bytes, but shape {header.shape} and {header.dtype} take "
            f"{header.size:,}",
        )
    return _Member(info.filename, deflated, start, info.compress_size, info.file_size, info.CRC, header)


def _chosen(file: File, found: list[zipfile.ZipInfo], array: str | None) -> zipfile.ZipInfo:
    """Return the member that is asked for, which has to be one that can be read."""
    names = [info.filename.removesuffix(".npy") for info in found]
    if array is None and len(found) != 1:
        raise BadFile(file.path, "array", f"holds {len(found):,} arrays, so one has to be named: {_listed(names)}")
    if array is not None and array not in names:
        raise BadFile(file.path, "array", f"holds no array {array!r} but: {_listed(names)}")
    if array is not None and names.count(array) > 1:
        raise BadFile(file.path, "array", f"holds {names.count(array)} arrays named {array!r}")
    info = found[0 if array is None else names.index(array)]
    if info.flag_bits & _ENCRYPTED:
        raise BadFile(file.path, "encrypted", f"has an encrypted member {info.filename}")
    if info.compress_type not in _METHODS:
        said = f"has a member {info.filename} compressed by method {info.compress_type}; deflate is read"
        raise BadFile(file.path, "method", said)
    return info


def _listed(names: list[str]) -> str:
    return ", ".join(sorted(names)[:_NAMED]) + (", ..." if len(names) > _NAMED else "") if names else "none"


def _require_apart(file: File, found: list[zipfile.ZipInfo], end: int) -> None:
    """Refuse members that share bytes: that is how a small file claims to hold a huge one."""
    ordered = sorted(found, key=lambda info: info.header_offset)
    for info, limit in zip(ordered, [*(info.header_offset for info in ordered[1:]), end], strict=True):
        if info.header_offset + _LOCAL.size + info.compress_size > limit:
            raise BadFile(file.path, "zip", f"has a member {info.filename} that overlaps what follows it")


def _inflated(file: File, packed: bytes) -> bytes:
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, _HEADER_BYTES)
    except zlib.error as error:
        raise BadFile(file.path, "zip", f"cannot be inflated ({error})") from None


def _whole(file: File, member: _Member) -> Block:
    """Return a whole array in column-major order; this thread keeps it for the rows that are asked for next."""
    header = member.header
    size = header.size - header.offset
    if size > _MOST_WHOLE:
        raise BadFile(
            file.path,
            "order",
            f"holds {size:,} bytes in column-major order, which is read whole, up to {_MOST_WHOLE:,} bytes. Save the "
            "array in row-major order: numpy.ascontiguousarray",
        )
    if getattr(_kept, "array", None) is None or _kept.array[0] != (file, member.name):
        data = bytearray(size)
        _stream(file, member).read_into(header.offset, memoryview(data))
        _kept.array = (file, member.name), np.frombuffer(data, header.dtype).reshape(header.shape, order="F")
    whole: Block = _kept.array[1]
    return whole


def _stream(file: File, member: _Member) -> "_Stream":
    """Return what reads a member on from where this thread stopped, if that was this one."""
    kept: _Stream | None = getattr(_kept, "stream", None)
    if kept is None or (kept.file, kept.member) != (file, member):
        kept = _kept.stream = (_Deflated if member.deflated else _Stored)(file, member)
    return kept


class _Stream(ABC):
    """The bytes of one member, and their CRC-32 for as long as they are read without a gap."""

    def __init__(self, file: File, member: _Member) -> None:
        self.file, self.member = file, member
        self._restart()

    def read_into(self, start: int, out: memoryview) -> None:
        """Fill ``out`` from a position in the member, whose checksum is compared at its end."""
        try:
            self._read_into(start, out)
            if self._position == self.member.size:
                self._end()
        except BaseException as error:
            _kept.stream = None  # nothing goes on from where this stopped
            if isinstance(error, zlib.error):
                raise self._bad(f"cannot be inflated ({error})") from None
            raise

    def _restart(self) -> None:
        self._position = self.member.header.offset
        self._crc = zlib.crc32(self.member.header.text)

    @abstractmethod
    def _read_into(self, start: int, out: memoryview) -> None: ...

    def _end(self) -> None:
        if self._crc != self.member.crc:
            raise self._bad(
                f"was damaged: the CRC-32 of {self.member.name} is {self._crc:08x}, not {self.member.crc:08x}"
            )

    def _bad(self, detail: str) -> BadFile:
        return BadFile(self.file.path, "corrupt", detail)


class _Stored(_Stream):
    """A member that lies in the file as it is."""

    def _read_into(self, start: int, out: memoryview) -> None:
        self.file.read_into(self.member.start + start, out)
        if start == self.member.header.offset:
            self._restart()
        if start == self._position:
            self._crc = zlib.crc32(out, self._crc)
            self._position += len(out)


class _Deflated(_Stream):
    """A compressed member, of which only what was asked for is inflated, a piece at a time."""

    def _restart(self) -> None:
        self._position, self._crc = 0, 0
        self._next, self._stop = self.member.start, self.member.start + self.member.packed
        self._inflate = zlib.decompressobj(-zlib.MAX_WBITS)

    def _read_into(self, start: int, out: memoryview) -> None:
        if start < self._position:
            self._restart()
        while self._position < start:
            self._piece(start - self._position)
        done = 0
        while done < len(out):
            piece = self._piece(len(out) - done)
            out[done : done + len(piece)] = piece
            done += len(piece)

    def _piece(self, most: int) -> bytes:
        """Return the next bytes, not more than that and at least one."""
        piece = self._inflated(most)
        if not piece:
            said = f"{self.member.name} inflates to {self._position:,} bytes, not {self.member.size:,}"
            raise self._bad(f"is truncated: {said}")
        self._position += len(piece)
        self._crc = zlib.crc32(piece, self._crc)
        return piece

    def _inflated(self, most: int) -> bytes:
        """Return the next bytes, none at the end."""
        piece = b""
        while not piece and not self._inflate.eof:
            packed: Buffer = self._inflate.unconsumed_tail
            if not packed:
                first, self._next = self._next, min(self._next + _PIECE, self._stop)
                packed = self.file.read(first, self._next)
            piece = self._inflate.decompress(packed, min(most, _PIECE))
            if not packed:
                break
        return piece

    def _end(self) -> None:
        if self._inflated(1):
            raise self._bad(
                f"is longer than it says: {self.member.name} inflates to more than {self.member.size:,} bytes"
            )
        super()._end()
