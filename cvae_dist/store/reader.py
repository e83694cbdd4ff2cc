"""Rows of one array, fast: any row ranges straight into the caller's memory.

A read through Zarr costs about a millisecond whatever its size: too much for a shuffled read of thousands of small
blocks. Plain shards are therefore read by ranges of bytes, past the checksums between the chunks, right into the
caller's rows. On a mounted file system a block of a few rows costs one system call, in an object store one request.
Compressed shards are read by whole inner chunks, and so are plain ones in an object store that are to be checked.
"""

import contextlib
import itertools
import math
import os
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

import crc32c
import numpy as np

from cvae_dist.errors import Corrupt, InvalidInput, StorageFailed
from cvae_dist.store.layout import ALIGNMENT, Block, decompress_into, shard_key
from cvae_dist.store.ranges import RowNumbers, cut_ranges, expand_ranges
from cvae_dist.store.urls import Location

if TYPE_CHECKING:
    from cvae_dist.store.row_store import RowStore

CHECKSUM_BYTES = 4
_OPEN_SHARDS = 128  # file descriptors kept per reader
_REMOTE_SHARDS = 16_384  # indices kept per reader, of about a kilobyte each
_SHARDS_AT_ONCE = 64
_PLAIN_BYTES = 64_000_000  # plain chunks of a round: they arrive in the caller's memory
_COMPRESSED_BYTES = 16_000_000  # chunks of a round, before compression; two rounds are in memory
_REQUEST_BYTES = 32_000_000  # of neighbouring chunks in an object store: a request more costs as much as some megabytes
_WORTH_A_GAP = 12  # what lies between two ranges is read with them where it is not a larger part of both
_DECODED_BYTES = 8_000_000  # chunks of which a part is still to be asked for, as at the edge of a window
_CHUNKS_PER_CALL = os.sysconf("SC_IOV_MAX") // 2
_NOWAIT: int = getattr(os, "RWF_NOWAIT", 0)  # Linux
_ADVISE: Callable[[int, int, int, int], None] | None = getattr(os, "posix_fadvise", None)  # Linux


class Reader(Protocol):
    """Rows that can be read by ranges."""

    @property
    def n_rows(self) -> int:
        """Number of rows."""

    @property
    def n_features(self) -> int:
        """Values of a row."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of a value as stored."""

    @property
    def block_rows_hint(self) -> int:
        """Rows that are cheap to read together: 1, or a chunk that can only be read whole."""

    def read_into(self, out: Block, starts: RowNumbers, counts: RowNumbers, verify: bool = False) -> None:
        """Read row ranges into ``out``, one after the other."""


class ArrayRows:
    """Rows of an array in memory, shape (n, n_features), with the members of :class:`RowReader`."""

    block_rows_hint = 1

    def __init__(self, array: Block) -> None:
        if array.ndim != 2:
            raise InvalidInput(f"rows are 2-D (sample, feature), this array has shape {array.shape}; reshape it")
        self.array = array
        self.n_rows, self.n_features = array.shape
        self.dtype = array.dtype

    def read_into(self, out: Block, starts: RowNumbers, counts: RowNumbers, verify: bool = False) -> None:
        """Read row ranges into ``out``; see :meth:`RowReader.read_into`."""
        _check_request(self, out, starts, counts)
        np.take(self.array, expand_ranges(starts, counts), axis=0, out=out, mode="clip")


@dataclass(frozen=True)
class ShardedArray:
    """Where the rows of a Zarr array lie: one object per shard, each of whole checksummed inner chunks.

    ``dtype`` is a little-endian NumPy code, ``shape`` that of one row. Inner chunks that are ``compressed`` are zstd
    frames.
    """

    location: Location
    dtype: str
    shape: tuple[int, ...]
    rows: int
    rows_per_shard: int
    rows_per_chunk: int
    compressed: bool = False

    @classmethod
    def of(cls, store: "RowStore", name: str | None = None) -> Self:
        """Describe one numeric array of a store; by default the main one."""
        array = store.layout.array(name or store.main)
        sizes = store.rows, store.layout.rows_per_shard, store.layout.rows_per_chunk
        return cls(store.location / array.name, array.dtype, array.shape, *sizes, array.compressed)

    @property
    def n_features(self) -> int:
        """Values of a row."""
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row before compression."""
        return np.dtype(self.dtype).itemsize * self.n_features

    @property
    def chunk_bytes(self) -> int:
        """Bytes of an inner chunk before compression."""
        return self.row_bytes * self.rows_per_chunk

    @property
    def index_bytes(self) -> int:
        """Bytes of the index at the end of a shard, with its checksum."""
        return self.rows_per_shard // self.rows_per_chunk * 16 + CHECKSUM_BYTES

    def shard(self, number: int) -> Location:
        """Return where a shard lies."""
        return self.location / shard_key(number, 1 + len(self.shape))


class RowReader:
    """Rows of one array of a store, by default the main one.

    Safe to use from several threads. Keeps some files open, and some megabytes of chunks that were read in part.
    """

    def __init__(self, source: "RowStore | ShardedArray", name: str | None = None) -> None:
        array = source if isinstance(source, ShardedArray) else ShardedArray.of(source, name)
        self.n_rows, self.n_features = array.rows, array.n_features
        self.dtype = np.dtype(array.dtype)
        direct = array.location.is_local and not array.compressed
        self.block_rows_hint = array.rows_per_chunk if array.compressed else 1
        self.stored = self._array = array
        self._shards: _OpenShards
        if array.location.is_local:
            self._shards = LocalShards(array)
            self._fill = _DirectRows(array, self._shards).fill if direct else _ChunkRows(array, self._shards).fill
        else:
            self._shards = remote = _RemoteShards(array)
            self._fill = (_ChunkRows if array.compressed else _RangedRows)(array, remote).fill

    def read_into(self, out: Block, starts: RowNumbers, counts: RowNumbers, verify: bool = False) -> None:
        """Read row ranges into ``out``, one after the other, in the given order.

        ``out`` has shape (sum(counts), n_features), or (sum(counts),) for one feature; it is C-contiguous and of the
        reader's dtype. ``verify`` checks the CRC32C of plain chunks too, for which they are read whole. Chunks that are
        compressed are always checked.

        Raises
        ------
        Corrupt
            A shard is missing, torn or changed; the text names it.
        InvalidInput
            A range leaves the array, or ``out`` does not fit.
        StorageFailed
            The storage refused.
        """
        _check_request(self, out, starts, counts)
        if out.size:
            extents = _Extents.of(starts, counts, self._array.rows_per_chunk)
            try:
                self._fill(extents, out.data.cast("B"), verify)
            except (Corrupt, StorageFailed):
                self._shards.close()  # the last shard of a store that grows is rewritten, and is another object then
                self._fill(extents, out.data.cast("B"), verify)

    def read(self, start: int, stop: int) -> Block:
        """Return rows ``start:stop`` in a new array, checked against CRC32C; see :meth:`read_into`."""
        out = np.empty((max(0, stop - start), self.n_features), self.dtype)
        self.read_into(out, np.array([start]), np.array([len(out)]), verify=True)
        return out


@dataclass(frozen=True)
class _Extents:
    """Row ranges cut at the edges of chunks, sorted by row; ``target`` is the row of the output."""

    row: RowNumbers
    count: RowNumbers
    target: RowNumbers

    @classmethod
    def of(cls, starts: RowNumbers, counts: RowNumbers, rows_per_chunk: int) -> Self:
        row, count = cut_ranges(starts, counts, rows_per_chunk)
        target = np.cumsum(count) - count
        order = np.argsort(row, kind="stable")
        return cls(row[order], count[order], target[order])

    def __getitem__(self, part: Any) -> "_Extents":
        return _Extents(self.row[part], self.count[part], self.target[part])

    def by(self, rows_per_part: int) -> Iterator[tuple[int, "_Extents"]]:
        """Yield the number and the extents of every part (shard or chunk) that is touched."""
        part = self.row // rows_per_part
        edges = [0, *(np.flatnonzero(np.diff(part)) + 1).tolist(), len(part)]
        for first, end in zip(edges, edges[1:], strict=False):
            yield int(part[first]), self[first:end]


class _OpenShard:
    """The index of one shard, and its open file where it is local: closed when the last user lets go."""

    def __init__(self, location: Location, index: bytes, array: ShardedArray, descriptor: int = -1) -> None:
        self.location, self.descriptor = location, descriptor
        self.version = ""  # of an object, once a part of it came with it
        table, checksum = index[:-CHECKSUM_BYTES], index[-CHECKSUM_BYTES:]
        if len(index) != array.index_bytes or not _matches(checksum, table):
            raise Corrupt(corrupt(location, "its index is torn or changed"))
        # -1 where a chunk was never written
        self.offset, self.size = np.frombuffer(table, "<i8").reshape(-1, 2).T

    @property
    def is_gone(self) -> bool:
        """Whether its file was deleted or replaced, and can be read only as it is still open."""
        return self.descriptor >= 0 and not os.fstat(self.descriptor).st_nlink

    def __del__(self) -> None:
        if getattr(self, "descriptor", -1) >= 0:
            os.close(self.descriptor)


@dataclass(frozen=True)
class _Encoded:
    """A chunk as it lies in its shard, and the memory that it is read into.

    ``target`` is the caller's memory for a chunk that is wanted whole. A plain one is read right into it.
    """

    shard: _OpenShard
    number: int  # in the shard
    target: memoryview | None
    payload: memoryview
    checksum: memoryview

    @property
    def offset(self) -> int:
        """Byte of the shard that it begins with."""
        return int(self.shard.offset[self.number])

    @property
    def end(self) -> int:
        """Byte of the shard that follows it."""
        return self.offset + int(self.shard.size[self.number])

    def require_whole(self) -> None:
        """Refuse what does not match the checksum."""
        if not _matches(self.checksum, self.payload):
            raise Corrupt(corrupt(self.shard.location, f"chunk {self.number} is torn or has changed"))


class _OpenShards(ABC):
    """The shards used last; one that is dropped closes its file when nobody reads from it any more."""

    def __init__(self, array: ShardedArray) -> None:
        self.array = array
        self._most = _OPEN_SHARDS if array.location.is_local else _REMOTE_SHARDS
        self._shards: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, numbers: Sequence[int]) -> list[_OpenShard]:
        """Return shards, opening those that are not open."""
        with self._lock:
            known = self._shards
            missing = [number for number in numbers if number not in known or known[number].is_gone]
            opened = dict(zip(missing, self._open(missing), strict=True))
            found = [opened.get(number) or known[number] for number in numbers]
            for number, shard in zip(numbers, found, strict=True):
                known[number] = shard
                known.move_to_end(number)
            while len(known) > self._most:
                known.popitem(last=False)
        return found

    def close(self) -> None:
        """Let go of all shards."""
        with self._lock:
            self._shards.clear()

    @abstractmethod
    def _open(self, numbers: Sequence[int]) -> list[_OpenShard]:
        """Open shards and read their indices."""

    @abstractmethod
    def fetch(self, chunks: Sequence[_Encoded]) -> None:
        """Fill the memory of chunks with what the shards hold of them."""


class LocalShards(_OpenShards):
    """Shards on a mounted file system, whose files are kept open."""

    def _open(self, numbers: Sequence[int]) -> list[_OpenShard]:
        return [self._open_one(self.array.shard(number)) for number in numbers]

    def _open_one(self, location: Location) -> _OpenShard:
        try:
            descriptor = os.open(location.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise Corrupt(corrupt(location, "the file is missing")) from error
        except OSError as error:
            raise _storage_failed(location, error) from error
        try:
            start = os.fstat(descriptor).st_size - self.array.index_bytes
            index = os.pread(descriptor, self.array.index_bytes, max(0, start))
        except OSError as error:
            os.close(descriptor)
            raise _storage_failed(location, error) from error
        return _OpenShard(location, index, self.array, descriptor)

    def fetch(self, chunks: Sequence[_Encoded]) -> None:
        """Fill the memory of chunks, after the kernel was told of all of them."""
        for chunk in chunks:
            _advise(chunk.shard, chunk.offset, chunk.end - chunk.offset)
        for chunk in chunks:
            _read_fully(chunk.shard, [chunk.payload, chunk.checksum], chunk.offset)


class _RemoteShards(_OpenShards):
    """Shards in an object store. One that changes while it is read is noticed by its version."""

    def __init__(self, array: ShardedArray) -> None:
        super().__init__(array)
        self._replaced: set[str] = set()

    def were_replaced(self, shards: Sequence[_OpenShard]) -> bool:
        """Whether one of them was another object before, so that its content is to be checked."""
        return not self._replaced.isdisjoint(shard.location.path for shard in shards)

    def _open(self, numbers: Sequence[int]) -> list[_OpenShard]:
        locations = [self.array.shard(number) for number in numbers]
        with self._missing_is_corrupt():
            indices = Location.read_many([(location, -self.array.index_bytes, None) for location in locations])
        return [_OpenShard(at, bytes(index), self.array) for at, index in zip(locations, indices, strict=True)]

    def fetch(self, chunks: Sequence[_Encoded]) -> None:
        runs = [chunks[first:end] for first, end in _neighbours(chunks)]
        self.fill([(run[0].shard, run[0].offset, _joined(run)) for run in runs])

    def fill(self, ranges: Sequence[tuple[_OpenShard, int, list[memoryview]]]) -> None:
        """Fill memory with ranges of shards, (shard, offset, buffers) each, with many requests in flight."""
        with self._missing_is_corrupt():
            filled = Location.fill_many([(shard.location, offset, buffers) for shard, offset, buffers in ranges])
        for (shard, offset, buffers), (size, version) in zip(ranges, filled, strict=True):
            if size < sum(map(len, buffers)):
                raise Corrupt(corrupt(shard.location, f"it ends at byte {offset + size}"))
            if shard.version not in ("", version):
                self._replaced.add(shard.location.path)
                raise Corrupt(corrupt(shard.location, "it was replaced while it was read"))
            shard.version = version

    @contextlib.contextmanager
    def _missing_is_corrupt(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise Corrupt(corrupt(error.filename or str(self.array.location), "the object is missing")) from error


class _DirectRows:
    """Plain shards on a mounted file system: one ``preadv`` per range, into the caller's rows."""

    def __init__(self, array: ShardedArray, shards: _OpenShards) -> None:
        self._array, self._shards = array, shards

    def fill(self, extents: _Extents, view: memoryview, verify: bool) -> None:
        groups = list(extents.by(self._array.rows_per_shard))
        for first in range(0, len(groups), _SHARDS_AT_ONCE):
            batch = groups[first : first + _SHARDS_AT_ONCE]
            shards = self._shards.get([number for number, _ in batch])
            plans = [_Reads.of(self._array, shard, part) for shard, (_, part) in zip(shards, batch, strict=True)]
            if verify:
                for plan in plans:
                    plan.fill_verified(view)
            else:
                self._fill_batch(plans, view)

    def _fill_batch(self, plans: "list[_Reads]", view: memoryview) -> None:
        cached = True
        for number, plan in enumerate(plans):
            done = plan.fill_cached(view) if cached else 0
            if cached and done < len(plan.begin):
                cached = False
                for later in plans[number:]:
                    later.advise()
            plan.fill(view, done)


@dataclass(frozen=True)
class _Reads:
    """What to read from one shard: extents, their byte ranges, and which of them follow each other."""

    array: ShardedArray
    shard: _OpenShard
    chunk: RowNumbers
    offset: RowNumbers
    begin: RowNumbers
    end: RowNumbers

    @classmethod
    def of(cls, array: ShardedArray, shard: _OpenShard, extents: _Extents) -> Self:
        chunk = extents.row % array.rows_per_shard // array.rows_per_chunk
        if (shard.size[chunk] != array.chunk_bytes + CHECKSUM_BYTES).any():
            raise Corrupt(corrupt(shard.location, "chunks are missing or of the wrong size"))
        offset = shard.offset[chunk] + extents.row % array.rows_per_chunk * array.row_bytes
        begin = extents.target * array.row_bytes
        return cls(array, shard, chunk, offset, begin, begin + extents.count * array.row_bytes)

    def runs(self, done: int) -> list[tuple[int, int]]:
        """Return [first, end) of extents that one ``preadv`` can read: neighbours, but for what is between chunks."""
        if done == len(self.begin):
            return []
        low, high, offset = self.begin[done:], self.end[done:], self.offset[done:]
        gap = offset[1:] - offset[:-1] - (high - low)[:-1]
        follows = (gap >= 0) & (gap < CHECKSUM_BYTES + ALIGNMENT) & (low[1:] == high[:-1])
        first = (np.append(0, np.flatnonzero(~follows) + 1) + done).tolist()
        return list(zip(first, [*first[1:], len(self.begin)], strict=True))

    def neighbours(self) -> list[tuple[int, int]]:
        """Return [first, end) of extents that lie side by side, but for a little, and are soon read together."""
        size = self.end - self.begin
        gap = self.offset[1:] - self.offset[:-1] - size[:-1]
        joins = (gap >= 0) & (gap * _WORTH_A_GAP <= size[1:] + size[:-1])
        joins &= self.offset[1:] // _REQUEST_BYTES == self.offset[:-1] // _REQUEST_BYTES
        first = np.append(0, np.flatnonzero(~joins) + 1).tolist()
        return list(zip(first, [*first[1:], len(self.begin)], strict=True))

    def buffers(self, first: int, end: int, view: memoryview) -> list[memoryview]:
        """Return the memory for neighbouring extents, and for what lies between them."""
        begin, stop, offset = self.begin[first:end], self.end[first:end], self.offset[first:end]
        gaps = (offset[1:] - offset[:-1] - (stop - begin)[:-1]).tolist()
        found = []
        for low, high, gap in zip(begin.tolist(), stop.tolist(), [*gaps, 0], strict=True):
            found += [view[low:high], memoryview(bytearray(gap))]
        return found

    def advise(self) -> None:
        """Let the kernel read ahead, so that small random blocks come at the speed of a sequential read."""
        sizes = self.end - self.begin
        for offset, size in zip(self.offset.tolist(), sizes.tolist(), strict=True):
            _advise(self.shard, offset, size)

    def fill_cached(self, view: memoryview) -> int:
        """Read extents for as long as the kernel has them in memory; return how many."""
        descriptor = self.shard.descriptor
        columns = self.offset.tolist(), self.begin.tolist(), self.end.tolist()
        number = 0
        with contextlib.suppress(OSError):  # the reads that wait meet it again, and say what it is
            for offset, begin, end in zip(*columns, strict=True):
                if os.preadv(descriptor, (view[begin:end],), offset, _NOWAIT) != end - begin:
                    break
                number += 1
        return number

    def fill(self, view: memoryview, done: int) -> None:
        """Read what is left after ``done`` extents, waiting for the storage."""
        for first, end in self.runs(done):
            for part in range(first, end, _CHUNKS_PER_CALL):
                self._fill_run(view, part, min(part + _CHUNKS_PER_CALL, end))

    def _fill_run(self, view: memoryview, first: int, end: int) -> None:
        _read_fully(self.shard, self.buffers(first, end, view), int(self.offset[first]))

    def fill_verified(self, view: memoryview) -> None:
        """Read every chunk whole, also where only a part of it is wanted, and check it."""
        columns = self.chunk.tolist(), self.offset.tolist(), self.begin.tolist(), self.end.tolist()
        for chunk, offset, begin, end in zip(*columns, strict=True):
            start = int(self.shard.offset[chunk])
            before = memoryview(bytearray(offset - start))
            after = memoryview(bytearray(self.array.chunk_bytes - len(before) - (end - begin)))
            checksum = memoryview(bytearray(CHECKSUM_BYTES))
            _read_fully(self.shard, [before, view[begin:end], after, checksum], start)
            if not _matches(checksum, before, view[begin:end], after):
                raise Corrupt(corrupt(self.shard.location, f"chunk {chunk} has changed"))


class _RangedRows:
    """Plain chunks in an object store: ranges of bytes inside them, many requests in flight.

    They are past the checksums, which only whole chunks have. Shards that were replaced are read by whole chunks.
    """

    def __init__(self, array: ShardedArray, shards: "_RemoteShards") -> None:
        self._array, self._shards = array, shards
        self._whole = _ChunkRows(array, shards)

    def fill(self, extents: _Extents, view: memoryview, verify: bool) -> None:
        if verify:
            self._whole.fill(extents, view, verify)
            return
        groups = list(extents.by(self._array.rows_per_shard))
        shards = self._shards.get([number for number, _ in groups])
        if self._shards.were_replaced(shards):
            self._whole.fill(extents, view, verify)
            return
        plans = [_Reads.of(self._array, shard, part) for shard, (_, part) in zip(shards, groups, strict=True)]
        self._shards.fill(
            [
                (plan.shard, int(plan.offset[first]), plan.buffers(first, end, view))
                for plan in plans
                for first, end in plan.neighbours()
            ]
        )


_Chunks = list[tuple[int, _Extents]]
_Kept = dict[int, Block]


class _ChunkRows:
    """Chunks that are read whole, as they are compressed, or checked in an object store."""

    def __init__(self, array: ShardedArray, shards: _OpenShards) -> None:
        self._array, self._shards = array, shards
        self._decoded: OrderedDict[int, Block] = OrderedDict()
        self._lock = threading.Lock()

    def fill(self, extents: _Extents, view: memoryview, verify: bool) -> None:
        chunks = list(extents.by(self._array.rows_per_chunk))
        at_once = max(1, (_COMPRESSED_BYTES if self._array.compressed else _PLAIN_BYTES) // self._array.chunk_bytes)
        rounds = [chunks[first : first + at_once] for first in range(0, len(chunks), at_once)]
        if len(rounds) < 2:
            for one in rounds:
                self._unpack(one, *self._fetch_round(one, view), view)
            return
        with ThreadPoolExecutor(1) as ahead:  # the next round is on its way while this one is decoded
            coming = ahead.submit(self._fetch_round, rounds[0], view)
            for one, after in itertools.zip_longest(rounds, rounds[1:]):
                kept, encoded = coming.result()
                if after:
                    coming = ahead.submit(self._fetch_round, after, view)
                self._unpack(one, kept, encoded, view)

    def _fetch_round(self, chunks: _Chunks, view: memoryview) -> tuple[_Kept, dict[int, _Encoded]]:
        """Return chunks that are decoded already, and the others as they lie in their shards."""
        per_shard = self._array.rows_per_shard // self._array.rows_per_chunk
        with self._lock:
            kept = {number: self._decoded[number] for number, _ in chunks if number in self._decoded}
        wanted = {number: self._target(extents, view) for number, extents in chunks if number not in kept}
        numbers = sorted({number // per_shard for number in wanted})
        shards = dict(zip(numbers, self._shards.get(numbers), strict=True))
        encoded = {n: self._encoded(shards[n // per_shard], n % per_shard, target) for n, target in wanted.items()}
        try:
            self._shards.fetch([*encoded.values()])
        except OSError as error:
            raise _storage_failed(self._array.location, error) from error
        return kept, encoded

    def _unpack(self, chunks: _Chunks, kept: _Kept, encoded: dict[int, _Encoded], view: memoryview) -> None:
        for number, extents in chunks:
            chunk = encoded.get(number)
            if chunk and chunk.target is not None:
                self._decode(chunk, chunk.target)
                extents = extents[1:]
            if len(extents.row):
                self._copy(self._keep(number, chunk) if chunk else kept[number], extents, view)

    def _target(self, extents: _Extents, view: memoryview) -> memoryview | None:
        """Return the caller's memory for a chunk that is wanted whole."""
        if int(extents.count[0]) < self._array.rows_per_chunk:
            return None
        begin = int(extents.target[0]) * self._array.row_bytes
        return view[begin : begin + self._array.chunk_bytes]

    def _encoded(self, shard: _OpenShard, number: int, target: memoryview | None) -> _Encoded:
        """Choose the memory of a chunk: the caller's own, where it needs no decoding."""
        if shard.offset[number] < 0:
            raise Corrupt(corrupt(shard.location, f"chunk {number} is missing"))
        size, plain = int(shard.size[number]) - CHECKSUM_BYTES, self._array.chunk_bytes
        largest = plain + plain // 256 + 64 if self._array.compressed else plain  # of what zstd cannot compress
        if not (0 if self._array.compressed else plain) <= size <= largest:
            raise Corrupt(corrupt(shard.location, f"chunk {number} is of the wrong size"))
        payload = np.empty(size, np.uint8).data if self._array.compressed or target is None else target
        return _Encoded(shard, number, target, payload, memoryview(bytearray(CHECKSUM_BYTES)))

    def _keep(self, number: int, chunk: _Encoded) -> Block:
        block = np.empty(self._array.chunk_bytes, np.uint8)
        self._decode(chunk, block.data)
        with self._lock:
            self._decoded[number] = block
            while len(self._decoded) > max(1, _DECODED_BYTES // self._array.chunk_bytes):
                self._decoded.popitem(last=False)
        return block

    def _decode(self, chunk: _Encoded, out: memoryview) -> None:
        chunk.require_whole()
        try:
            if self._array.compressed:
                decompress_into(chunk.payload, out)
            elif chunk.payload is not out:
                out[:] = chunk.payload
        except (ValueError, RuntimeError) as error:
            raise Corrupt(corrupt(chunk.shard.location, f"chunk {chunk.number} cannot be trusted ({error})")) from error

    def _copy(self, block: Block, extents: _Extents, view: memoryview) -> None:
        row_bytes = self._array.row_bytes
        columns = (extents.row % self._array.rows_per_chunk).tolist(), extents.count.tolist(), extents.target.tolist()
        for row, count, target in zip(*columns, strict=True):
            data = block.data[row * row_bytes : (row + count) * row_bytes]
            view[target * row_bytes : (target + count) * row_bytes] = data


def _check_request(reader: Reader, out: Block, starts: RowNumbers, counts: RowNumbers) -> None:
    if len(starts) and (starts.min() < 0 or counts.min() < 0 or (starts + counts).max() > reader.n_rows):
        wrong = int(np.flatnonzero((starts < 0) | (counts < 0) | (starts + counts > reader.n_rows))[0])
        raise InvalidInput(
            f"rows {starts[wrong]} to {starts[wrong] + counts[wrong]} are asked for, of {reader.n_rows} rows"
        )
    rows = int(counts.sum())
    if out.size != rows * reader.n_features or out.dtype != reader.dtype or not out.flags.c_contiguous:
        raise InvalidInput(
            f"{rows} rows of {reader.n_features} {reader.dtype} values do not fit an array of shape "
            f"{out.shape} and type {out.dtype}; give a C-contiguous one of that size and type"
        )


def _neighbours(chunks: Sequence[_Encoded]) -> list[tuple[int, int]]:
    """Return [first, end) of chunks that follow one another in a shard, up to some megabytes together."""
    first = [0]
    for number in range(1, len(chunks)):
        before, chunk = chunks[number - 1], chunks[number]
        follows = before.shard is chunk.shard and 0 <= chunk.offset - before.end < ALIGNMENT
        if not follows or chunk.end - chunks[first[-1]].offset > _REQUEST_BYTES:
            first.append(number)
    return list(zip(first, [*first[1:], len(chunks)], strict=True)) if len(chunks) else []


def _joined(run: Sequence[_Encoded]) -> list[memoryview]:
    """Return the memory for neighbouring chunks, and for what lies between them."""
    buffers: list[memoryview] = []
    for before, chunk in zip(run, run[1:], strict=False):
        between = memoryview(bytearray(chunk.offset - before.end))
        buffers += [before.payload, before.checksum, between]
    return [*buffers, run[-1].payload, run[-1].checksum]


def _advise(shard: _OpenShard, offset: int, size: int) -> None:
    if _ADVISE is not None:
        _ADVISE(shard.descriptor, offset, size, os.POSIX_FADV_WILLNEED)


def _read_fully(shard: _OpenShard, buffers: list[memoryview], offset: int) -> None:
    """Fill all buffers; ``preadv`` may stop short."""
    buffers = [buffer for buffer in buffers if len(buffer)]
    while buffers:
        try:
            done = os.preadv(shard.descriptor, buffers, offset)
        except OSError as error:
            raise _storage_failed(shard.location, error) from error
        if done == 0:
            raise Corrupt(corrupt(shard.location, f"it ends at byte {offset}"))
        offset += done
        while buffers and done >= len(buffers[0]):
            done -= len(buffers[0])
            buffers = buffers[1:]
        if done:
            buffers = [buffers[0][done:], *buffers[1:]]


def _matches(checksum: bytes | memoryview, *parts: bytes | memoryview) -> bool:
    value = 0
    for part in parts:
        value = crc32c.crc32c(part, value)
    return value == int.from_bytes(checksum, "little")


def corrupt(location: Location | str, what: str) -> str:
    """Return the text of an error about a shard."""
    return (
        f"shard {location}: {what}. Its rows cannot be trusted; `cvae-dist verify STORE` names every bad shard. "
        "Put them back from a copy, or make the store anew with --overwrite"
    )


def _storage_failed(location: Location, error: Exception) -> StorageFailed:
    return StorageFailed(f"cannot read {location}: {error}. Mend the cause and run the same command again to go on")
