"""How rows lie on disk: Zarr v3 arrays on one shard grid, and the bytes of one shard or chunk.

Zarr itself writes every metadata document. Shards are assembled here because that is where the time goes: one
``writev`` of the caller's block, no copy. They are also taken apart here, so that what a store says of its codecs is
never run.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property, lru_cache
from typing import Any, Self

import crc32c
import numpy as np
import numpy.typing as npt
import zarr
from numcodecs import zstd
from numcodecs.vlen import VLenUTF8
from numcodecs.zstd import Zstd
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.buffer import Buffer as ZarrBuffer
from zarr.storage import MemoryStore

from cvae_dist.store.urls import Buffer, Location

Block = npt.NDArray[Any]
Objects = dict[str, ZarrBuffer]  # the content of a Zarr MemoryStore

STRING = "string"
_SHARD_BYTES = 16_000_000  # larger shards leave the allocator's and the cache's comfortable range
_REMOTE_SHARD_BYTES = 64_000_000  # a request costs as much as some megabytes
# A store keeps to the packs and tiles it was made with: other numbers are another version of the format.
_PACK_BYTES = 1_000_000_000  # what a killed driver may have to repeat
_PACK_SHARE = 0.02  # of a pack's data: as much may its moments take in the ledger
_MOMENT_BYTES = 32  # of one feature: mean, m2, minimum and maximum
_TILE_SHARDS = 16  # whose moments are merged before they travel, where they are large
_LARGE_MOMENTS = 1_000_000
_KEY = re.compile(r"c\.(\d+)(\.0)*")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
DTYPES = ("<f2", "<f4", "<f8", "|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8")
_BYTES = ("|u1", "|i1")
_TRIED_ROWS_BYTES = 262_144
_WORTH_SAVING = 1 / 3  # of the bytes: reading what is compressed takes ten times as long
_MOST_STRING_BYTES = 2**31  # that a chunk of strings may claim to hold
_CHUNK_BYTES = 1_000_000
_STEP_BYTES = 4_000_000
_COMPRESSED_CHUNK_BYTES = 65_536  # a shuffled read decodes a whole chunk, so it must be small
_ABSENT = np.uint64(2**64 - 1)
ALIGNMENT = 64  # bytes, a line of the cache: chunks that begin with one are written in half the time


@dataclass(frozen=True)
class ArrayLayout:
    """One array over ``sample``.

    Attributes
    ----------
    name : str
        Name in the group.
    dtype : str
        Little-endian NumPy code such as ``"<f4"`` or ``"|u1"``, or ``"string"``.
    dims : tuple of str
        Dimension names, ``sample`` first.
    shape : tuple of int
        Shape of one row.
    attributes : Mapping
        Zarr attributes of the array.
    raw : bool
        Bytes are stored as they are.
    """

    name: str
    dtype: str
    dims: tuple[str, ...]
    shape: tuple[int, ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)
    raw: bool = False

    @property
    def compressed(self) -> bool:
        """Whether inner chunks are compressed: strings and most bytes gain, floats do not."""
        return self.dtype == STRING or (self.dtype in _BYTES and not self.raw)

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one row before compression; strings are counted as 64."""
        return 64 if self.dtype == STRING else np.dtype(self.dtype).itemsize * int(np.prod(self.shape))

    def key(self, shard: int) -> str:
        """Return the object key of a shard inside the group."""
        return f"{self.name}/{shard_key(shard, 1 + len(self.shape))}"


@dataclass(frozen=True)
class Layout:
    """Arrays that share one shard grid: shard ``i`` of each holds rows ``[i, i + 1) * rows_per_shard``."""

    rows_per_shard: int
    rows_per_chunk: int
    arrays: tuple[ArrayLayout, ...]

    @classmethod
    def of(
        cls, arrays: tuple[ArrayLayout, ...], rows_per_shard: int | None = None, shard_bytes: int = _SHARD_BYTES
    ) -> Self:
        """Choose chunks of about 1 MB (64 kB compressed) and shards of at most ``shard_bytes`` for the widest array."""
        numeric = max((array for array in arrays if array.dtype != STRING), key=lambda array: array.row_bytes)
        target = _COMPRESSED_CHUNK_BYTES if numeric.compressed else _CHUNK_BYTES
        chunk = max(1, target // numeric.row_bytes)
        if rows_per_shard is None:
            widest = max(array.row_bytes for array in arrays)
            rows_per_shard = max(1, shard_bytes // (chunk * widest)) * chunk
        elif rows_per_shard <= chunk:
            chunk = rows_per_shard
        else:
            chunk = _largest_divisor(rows_per_shard, chunk)
        return cls(rows_per_shard, chunk, arrays)

    def array(self, name: str) -> ArrayLayout:
        """Return the array of that name; ``KeyError`` when there is none."""
        return {array.name: array for array in self.arrays}[name]

    @property
    def shard_bytes(self) -> int:
        """Bytes of one full shard of every array together, before compression."""
        return sum(array.row_bytes for array in self.arrays) * self.rows_per_shard

    @cached_property
    def n_features(self) -> int:
        """Values of one row of the first array, which the moments describe."""
        return math.prod(self.arrays[0].shape)

    @property
    def rows_per_step(self) -> int:
        """Rows that are read, added up and written at a time: about 4 MB, as more leaves the processor's cache.

        What Python does between two steps takes as long as 0.2 MB of it.
        """
        return self.rows_per_chunk * max(1, _STEP_BYTES // (self.rows_per_chunk * self.arrays[0].row_bytes))

    @property
    def moments_bytes(self) -> int:
        """Bytes of the moments of the first array."""
        return _MOMENT_BYTES * self.n_features

    @property
    def shards_per_pack(self) -> int:
        """Shards that the ledger records together: about 1 GB, and enough for their moments to weigh little."""
        light = math.ceil(self.moments_bytes / (_PACK_SHARE * self.shard_bytes))
        tiles = math.ceil(max(light, _PACK_BYTES // self.shard_bytes, 1) / self.shards_per_tile)
        return tiles * self.shards_per_tile

    @property
    def shards_per_tile(self) -> int:
        """Shards whose moments are merged where the shards are made. The sums' order is fixed, and so their bits."""
        return _TILE_SHARDS if self.moments_bytes > _LARGE_MOMENTS else 1

    def shards(self, rows: int) -> int:
        """Return how many shards hold ``rows`` rows."""
        return -(-rows // self.rows_per_shard)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON document that :meth:`from_json` reads back."""
        document: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """Read what :meth:`to_json` wrote.

        Raises
        ------
        ValueError
            It is something else, such as a name that leads out of the group or a type that is no number.
        """
        arrays = tuple(
            ArrayLayout(a["name"], a["dtype"], tuple(a["dims"]), tuple(a["shape"]), dict(a["attributes"]), a["raw"])
            for a in document["arrays"]
        )
        layout = cls(document["rows_per_shard"], document["rows_per_chunk"], arrays)
        layout._require_sane()
        return layout

    def _require_sane(self) -> None:
        """Refuse what no writer of ours makes; the text names it."""
        for array in self.arrays:
            if not is_name(array.name):
                raise ValueError(f"an array is named {array.name!r}")
            if array.dtype not in (STRING, *DTYPES):
                raise ValueError(f"the array {array.name!r} has dtype {array.dtype!r}")
            if not isinstance(array.raw, bool):
                raise ValueError(f"of the array {array.name!r} it is said to be raw: {array.raw!r}")
            if not _are_positive(*array.shape) or len(array.dims) != 1 + len(array.shape):
                raise ValueError(f"the array {array.name!r} has shape {array.shape} and dimensions {array.dims}")
        if len({array.name for array in self.arrays}) < len(self.arrays) or self.arrays[0].dtype == STRING:
            raise ValueError(f"the arrays are {[array.name for array in self.arrays]}")
        if not _are_positive(self.rows_per_shard, self.rows_per_chunk) or self.rows_per_shard % self.rows_per_chunk:
            raise ValueError(f"shards of {self.rows_per_shard!r} rows are cut into chunks of {self.rows_per_chunk!r}")

    def metadata(self, name: str, rows: int) -> bytes:
        """Return the ``zarr.json`` of an array holding ``rows`` rows."""
        array = self.array(name)
        if array.dtype == STRING:
            return array_metadata(array, rows, self.rows_per_shard, compressed=True)
        return array_metadata(array, rows, self.rows_per_chunk, self.rows_per_shard, array.compressed)

    def encode(self, name: str, block: Block) -> list[Buffer]:
        """Return the bytes of one shard, as buffers to be written one after the other.

        Every second buffer begins with the CRC32C of the one before it. ``block`` has shape
        (n <= rows_per_shard, *shape), is C-contiguous and of the array's dtype, or holds strings.
        """
        array = self.array(name)
        if array.dtype == STRING:
            return encode_chunk(block, self.rows_per_shard)
        encoder = ShardEncoder(self, name)
        return [*encoder.add(block), *encoder.finish()]

    def split(self, name: str, data: bytes) -> list[Buffer]:
        """Return the buffers that :meth:`encode` made, from the bytes of one shard.

        Raises
        ------
        ValueError
            The bytes are not whole, or a CRC32C does not match.
        """
        view = memoryview(data)
        if self.array(name).dtype == STRING:
            return _checked(view[:-4], view[-4:], "the chunk")
        table_bytes = self.rows_per_shard // self.rows_per_chunk * 16
        body, table = view[: -table_bytes - 4], view[-table_bytes - 4 : -4]
        last = _checked(table, view[-4:], "the index")
        buffers: list[Buffer] = []
        offset = 0
        for number, (start, size) in enumerate(np.frombuffer(table, "<u8").reshape(-1, 2).tolist()):
            if start != _ABSENT:
                if start != offset or size < 4:
                    raise ValueError(f"chunk {number} is not where it was written")
                stop = start + size
                offset = aligned(stop)
                buffers += _checked(body[start : stop - 4], body[stop - 4 : offset], f"chunk {number}")
        if offset != len(body):
            raise ValueError("there are bytes between the chunks and the index")
        return buffers + last

    def payloads(self, array: ArrayLayout, block: Block) -> Iterator[Buffer]:
        """Yield the bytes of every chunk of a block, compressed where the array is; the last chunk is padded."""
        compress = Zstd(level=1).encode if array.compressed else None
        for start in range(0, len(block), self.rows_per_chunk):
            rows = block[start : start + self.rows_per_chunk]
            if len(rows) < self.rows_per_chunk:
                rows = np.concatenate([rows, np.zeros((self.rows_per_chunk - len(rows), *array.shape), block.dtype)])
            raw = np.ascontiguousarray(rows).data.cast("B") if rows.size else memoryview(b"")
            yield compress(raw) if compress else raw


def rows_to_try(dtype: np.dtype[Any], row_bytes: int) -> int:
    """Return how many of the first rows decide whether a new store is compressed; 0 where its type does."""
    return _TRIED_ROWS_BYTES // row_bytes if dtype.str in _BYTES else 0


def is_worth_compressing(rows: Block) -> bool:
    """Whether rows of bytes become so much smaller that slower reads are worth it."""
    raw = rows.reshape(-1).data
    parts = (raw[start : start + _COMPRESSED_CHUNK_BYTES] for start in range(0, len(raw), _COMPRESSED_CHUNK_BYTES))
    return sum(len(Zstd(level=1).encode(part)) for part in parts) <= (1 - _WORTH_SAVING) * len(raw)


def is_name(text: str) -> bool:
    """Whether an array may be called so: a word that leads out of no folder and that no reader mistakes."""
    return _NAME.fullmatch(text) is not None


class ShardEncoder:
    """Encodes a numeric shard whose rows come in blocks, so that one small block of memory serves for all of them.

    The buffers are those of :meth:`Layout.encode`: bytes, and their CRC32C. They must be used up before the next ones
    are taken.

    Attributes
    ----------
    size : int
        Bytes encoded so far.
    checksums : list of bytes
        The CRC32C of each chunk, and of the index at last.
    """

    def __init__(self, layout: Layout, name: str) -> None:
        self._layout, self._array = layout, layout.array(name)
        self._index = np.full((layout.rows_per_shard // layout.rows_per_chunk, 2), _ABSENT, dtype="<u8")
        self.size = 0
        self.checksums: list[bytes] = []

    def add(self, block: Block) -> list[Buffer]:
        """Encode whole chunks, and a part of one only at the end of the shard; for ``block`` see `Layout.encode`."""
        buffers: list[Buffer] = []
        for payload in self._layout.payloads(self._array, block):
            size = len(payload) + 4
            self._index[len(self.checksums)] = self.size, size
            buffers += self._checksummed(payload, aligned(size) - size)
        return buffers

    def finish(self) -> list[Buffer]:
        """Encode the index of the chunks."""
        return self._checksummed(self._index.tobytes(), 0)

    def _checksummed(self, payload: Buffer, padding: int) -> list[Buffer]:
        checksum = _checksum(payload)
        self.size += len(payload) + len(checksum) + padding
        self.checksums.append(checksum)
        return [payload, checksum + bytes(padding)]


def shard_key(shard: int, ndim: int) -> str:
    """Return the key, inside an array of ``ndim`` dimensions, of the object that holds a shard of whole rows.

    All shards lie in one folder: on a disk a folder for each takes twice as long as its file, and most of the deletion.
    """
    return f"c.{shard}" + ".0" * (ndim - 1)


def shard_number(key: str) -> int | None:
    """Return the number of the shard that has a key inside its array; None where the key is another object's."""
    found = _KEY.fullmatch(key)
    return int(found[1]) if found else None


def aligned(size: int) -> int:
    """Return the bytes that a chunk of a shard takes: what follows it begins at a multiple of 64."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def checksummed(payload: Buffer) -> list[Buffer]:
    """Return bytes and their CRC32C."""
    return [payload, _checksum(payload)]


def _checksum(payload: Buffer) -> bytes:
    return crc32c.crc32c(payload).to_bytes(4, "little")


def _checked(payload: memoryview, tail: memoryview, what: str) -> list[Buffer]:
    """Return a part and what follows it: its CRC32C, and zeros."""
    if _checksum(payload) != tail[:4] or any(tail[4:]):
        raise ValueError(f"{what} does not match its CRC32C")
    return [payload, tail]


def array_metadata(
    array: ArrayLayout, rows: int, chunk: int, shard: int | None = None, compressed: bool = False
) -> bytes:
    """Return the ``zarr.json`` of an array in chunks (and shards) of so many rows. Every chunk ends in its CRC32C."""
    document = json.loads(_empty_array(array.dtype, array.dims, array.shape, chunk, shard, compressed))
    return json.dumps({**document, "shape": [rows, *array.shape], "attributes": dict(array.attributes)}).encode()


@lru_cache(64)
def _empty_array(
    dtype: str, dims: tuple[str, ...], shape: tuple[int, ...], chunk: int, shard: int | None, compressed: bool
) -> bytes:
    """Return what Zarr writes of an array without rows: it takes its time."""
    objects: Objects = {}
    zarr.create_array(
        MemoryStore(objects),
        shape=(0, *shape),
        chunks=(chunk, *shape),
        shards=None if shard is None else (shard, *shape),
        dtype=dtype,
        chunk_key_encoding={"name": "default", "separator": "."},
        filters=None,
        compressors=[*([ZstdCodec(level=1)] if compressed else []), Crc32cCodec()],
        fill_value="" if dtype == STRING else 0,
        dimension_names=dims,
        config={"write_empty_chunks": True},
    )
    return objects["zarr.json"].to_bytes()


def encode_chunk(block: Block, rows: int) -> list[Buffer]:
    """Return the bytes of one compressed chunk of ``rows`` rows, and their CRC32C; a shorter block is padded."""
    if block.dtype.kind in "OUT":
        padded = np.full(rows, "", dtype=object)  # Zarr pads the last chunk to its full shape
        padded[: len(block)] = block
        raw = VLenUTF8().encode(padded)
    else:
        raw = np.concatenate([block, np.zeros((rows - len(block), *block.shape[1:]), block.dtype)])
    return checksummed(Zstd(level=1).encode(np.ascontiguousarray(raw)))


def decode_chunk(data: bytes, dtype: str, shape: tuple[int, ...]) -> Block:
    """Return the block of ``shape`` that :func:`encode_chunk` padded and encoded.

    Raises
    ------
    ValueError
        The bytes are not whole, or hold something else.
    """
    payload, _ = _checked(memoryview(data)[:-4], memoryview(data)[-4:], "the chunk")
    if dtype != STRING:
        block = np.empty(shape, dtype)
        decompress_into(memoryview(payload), block.reshape(-1).data.cast("B"))
        return block
    if _claimed_bytes(memoryview(payload)) > _MOST_STRING_BYTES:  # memory for them would be taken before they are seen
        raise ValueError("the chunk claims to hold more than 2 GB of strings")
    strings = VLenUTF8().decode(zstd.decompress(payload))
    if strings.shape != shape:
        raise ValueError(f"the chunk holds {len(strings)} strings, not {shape[0]}")
    return np.asarray(strings, dtype=object)


def decompress_into(frame: memoryview, out: memoryview) -> None:
    """Decompress a zstd frame that fills a buffer to the last byte.

    Raises
    ------
    ValueError, RuntimeError
        It holds more or less, or is none.
    """
    if _claimed_bytes(frame) != out.nbytes:
        raise ValueError(f"the chunk holds {_claimed_bytes(frame):,} bytes, not {out.nbytes:,}")
    if out.nbytes:
        zstd.decompress(frame, out)


def _claimed_bytes(frame: memoryview) -> int:
    """Return how many bytes a zstd frame says that it holds (RFC 8878, section 3.1.1); 0 when it does not say."""
    if len(frame) < 5:
        return 0
    single = bool(frame[4] & 0x20)
    start = 5 + (not single) + (0, 1, 2, 4)[frame[4] & 3]
    width = (int(single), 2, 4, 8)[frame[4] >> 6]
    return int.from_bytes(frame[start : start + width], "little") + (256 if width == 2 else 0)


def _are_positive(*numbers: object) -> bool:
    return all(isinstance(number, int) and not isinstance(number, bool) and number > 0 for number in numbers)


@cache
def group_metadata() -> bytes:
    """Return the ``zarr.json`` of an empty group."""
    objects: Objects = {}
    zarr.create_group(MemoryStore(objects))
    return objects["zarr.json"].to_bytes()


def shard_bytes_at(place: Location) -> int:
    """Return how large shards should be at a location: larger in object stores."""
    return _SHARD_BYTES if place.is_local else _REMOTE_SHARD_BYTES


def _largest_divisor(number: int, limit: int) -> int:
    return next(divisor for divisor in range(min(limit, number), 0, -1) if number % divisor == 0)
