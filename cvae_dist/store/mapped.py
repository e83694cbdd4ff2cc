"""All plain shards of an array on a disk as one stretch of memory, so that scattered rows are one gather.

The shards lie at equal distances in a reserved range of addresses. The address of a row is arithmetic then, and rows
of any shards are copied by one call, without a system call for each. The kernel's cache is the only buffer.
"""

import ctypes
import errno
import mmap
import os
import sys
import weakref
from itertools import groupby
from pathlib import Path
from typing import Any

import crc32c
import numpy as np

from cvae_dist.errors import Corrupt
from cvae_dist.store.layout import Block, aligned
from cvae_dist.store.ranges import RowNumbers, cut_ranges
from cvae_dist.store.reader import CHECKSUM_BYTES, LocalShards, ShardedArray, corrupt

_MOST_SHARDS = 30_000  # the kernel allows a process 65,530 mappings
_ALIGNMENT = 2**21  # of large shards, as the kernel maps pages of this size where it has them
_PROT_NONE, _RESERVE, _FIXED = 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000, 0x10
_RANDOM, _WILLNEED, _POPULATE_READ = 1, 3, 22
_BEYOND = (errno.EFAULT, 133)  # EHWPOISON: what an access would be killed for
_SHARE_OF_MEMORY = 2  # a store that takes at most half of the free memory is expected to stay there


def _load() -> Any:
    """Return the C library, where it can map and advise as Linux does."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64)
    library.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return library


_LIBRARY = _load()
_FAILED = ctypes.c_void_p(-1).value


def _map(address: int | None, size: int, protection: int, flags: int, descriptor: int) -> int:
    start: int = _LIBRARY.mmap(address, size, protection, flags, descriptor, 0)
    if start == _FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return start


class MappedRows:
    """The rows of an array whose shards are plain and on a disk.

    A shard that another file replaces stays as it was when it was mapped. A shard that is cut short in place is
    noticed by :meth:`bring` and :meth:`check`; the system ends a process that touches rows which are cut off later.

    Attributes
    ----------
    chunks : int
        Chunks that hold rows.
    stays : bool
        Whether the rows are expected to stay in memory once they were read.
    """

    def __init__(self, array: ShardedArray, sizes: list[int], opened: LocalShards) -> None:
        self._array = array
        self._row_bytes = array.row_bytes
        self._word_bytes = next(size for size in (4, 2, 1) if not array.row_bytes % size)
        self._words = array.row_bytes // self._word_bytes
        self._chunk_bytes = aligned(array.chunk_bytes + CHECKSUM_BYTES)
        self.chunks = -(-array.rows // array.rows_per_chunk)
        self.stays = sum(sizes) * _SHARE_OF_MEMORY <= free_memory()
        unit = _ALIGNMENT if max(sizes) >= _ALIGNMENT else mmap.PAGESIZE
        self._stride = -(-max(sizes) // unit) * unit
        reserved = self._stride * len(sizes) + unit
        start = _map(None, reserved, _PROT_NONE, _RESERVE, -1)
        # not at exit: a thread may still read then, and the system takes it back by itself
        weakref.finalize(self, _LIBRARY.munmap, start, reserved).atexit = False
        self._base = -(-start // unit) * unit
        for number, size in enumerate(sizes):
            (shard,) = opened.get([number])
            _map(self._base + number * self._stride, size, mmap.PROT_READ, mmap.MAP_SHARED | _FIXED, shard.descriptor)
        self._sizes = sizes
        extent = self._stride * len(sizes)
        self._memory = memoryview((ctypes.c_char * extent).from_address(self._base)).cast("B")
        rows = (extent - self._row_bytes) // self._word_bytes + 1  # one that begins at every word
        self._rows = np.ndarray((rows,), f"V{self._row_bytes}", self._memory, strides=(self._word_bytes,))
        if not self.stays:
            self._advise(0, extent, _RANDOM)

    @classmethod
    def of(cls, array: ShardedArray) -> "MappedRows | None":
        """Map an array; None where that cannot be: it is remote, compressed, or laid out by another writer.

        Raises
        ------
        Corrupt
            A shard is missing or too short.
        """
        shards = -(-array.rows // array.rows_per_shard)
        if not array.location.is_local or array.compressed or not 0 < shards <= _MOST_SHARDS or _LIBRARY is None:
            return None
        opened = LocalShards(array)
        sizes = [_size_in_order(array, opened, number) for number in range(shards)]
        if not all(sizes):
            return None
        try:
            return cls(array, [size for size in sizes if size], opened)
        except OSError:  # a limit of the system on addresses
            return None

    def locate(self, starts: RowNumbers, counts: RowNumbers) -> RowNumbers:
        """Return where every row of some ranges lies, for :meth:`gather`."""
        starts, counts = cut_ranges(starts, counts, self._array.rows_per_chunk)
        before = np.cumsum(counts) - counts
        words = np.repeat(self._offset(starts) // self._word_bytes - before * self._words, counts)
        words += np.arange(0, len(words) * self._words, self._words)
        return words

    def gather(self, words: RowNumbers) -> Block:
        """Return located rows, (n, n_features), in a new array."""
        rows: Block = self._rows[words].view(self._array.dtype)
        return rows.reshape(len(words), self._array.n_features)

    def bring(self, starts: RowNumbers, counts: RowNumbers) -> None:
        """Read row ranges into memory, all at once, so that they are there when they are gathered.

        Raises
        ------
        Corrupt
            A shard was cut short, or its disk cannot read it.
        """
        starts, counts = cut_ranges(starts, counts, self._array.rows_per_shard)
        begin = self._offset(starts)
        end = self._offset(starts + counts - 1) + self._row_bytes
        begin -= begin % mmap.PAGESIZE
        apart = (begin[1:] < begin[:-1]) | (begin[1:] > end[:-1] + mmap.PAGESIZE)  # not only by a row that is left out
        first = np.flatnonzero(np.append(True, apart))
        last = np.append(first[1:], len(begin)) - 1
        extents = list(zip(begin[first].tolist(), (end[last] - begin[first]).tolist(), strict=True))
        for advice in (_WILLNEED, _POPULATE_READ):
            for offset, size in extents:
                self._advise(offset, size, advice)

    def expect(self, first: int, end: int) -> None:
        """Let the system begin to read chunks ``first:end``."""
        rows = np.arange(first, end) * self._array.rows_per_chunk
        for offset in self._offset(rows).tolist():
            begin = offset - offset % mmap.PAGESIZE
            self._advise(begin, offset + self._chunk_bytes - begin, _WILLNEED)

    def check(self, first: int, end: int) -> None:
        """Compare chunks ``first:end`` with their checksums, or where they do not stay only the sizes of their shards.

        Raises
        ------
        Corrupt
            A shard is gone, was cut short or has changed; the text names it.
        """
        per_shard = self._array.rows_per_shard // self._array.rows_per_chunk
        for shard, numbers in groupby(range(first, end), lambda chunk: chunk // per_shard):
            self._require_whole(shard)
            for number in numbers if self.stays else ():
                self._check_chunk(shard, number % per_shard)

    def _require_whole(self, shard: int) -> None:
        place = self._array.shard(shard)
        try:
            size = os.stat(place.path).st_size
        except FileNotFoundError:
            raise Corrupt(corrupt(place, "the file is missing")) from None
        if size < self._sizes[shard]:
            raise Corrupt(corrupt(place, f"it has {size:,} of {self._sizes[shard]:,} bytes"))

    def _check_chunk(self, shard: int, chunk: int) -> None:
        offset = shard * self._stride + chunk * self._chunk_bytes
        begin = offset - offset % mmap.PAGESIZE
        self._advise(begin, offset + self._chunk_bytes - begin, _POPULATE_READ)
        data = self._memory[offset : offset + self._array.chunk_bytes + CHECKSUM_BYTES]
        if crc32c.crc32c(data[:-CHECKSUM_BYTES]) != int.from_bytes(data[-CHECKSUM_BYTES:], "little"):
            raise Corrupt(corrupt(self._array.shard(shard), f"chunk {chunk} has changed"))

    def _offset(self, rows: RowNumbers) -> RowNumbers:
        """Return the distance of rows from the first, in bytes."""
        array = self._array
        chunk = rows % array.rows_per_shard // array.rows_per_chunk
        inside: RowNumbers = chunk * self._chunk_bytes + rows % array.rows_per_chunk * self._row_bytes
        return rows // array.rows_per_shard * self._stride + inside

    def _advise(self, offset: int, size: int, advice: int) -> None:
        if _LIBRARY.madvise(self._base + offset, size, advice) and ctypes.get_errno() in _BEYOND:
            shard = self._array.shard(offset // self._stride)
            raise Corrupt(corrupt(shard, "it was cut short, or its disk cannot read it"))


def free_memory() -> int:
    """Return how many bytes this process may take, the kernel's cache of files among them."""
    free = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines()}
    limits = [free["MemAvailable"]]
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, kinds, path = line.split(":", 2)
        name = "memory.limit_in_bytes" if kinds else "memory.max"
        for root in (f"/sys/fs/cgroup/{kinds}", "/sys/fs/cgroup/unified"):
            limit = Path(f"{root}{path}", name)
            if kinds in ("", "memory") and limit.exists() and limit.read_text().strip().isdigit():
                limits.append(int(limit.read_text()))
    return min(limits)


def _size_in_order(array: ShardedArray, opened: LocalShards, number: int) -> int:
    """Return the bytes of a shard whose chunks follow one another; 0 for one whose chunks lie elsewhere."""
    (shard,) = opened.get([number])
    chunks = -(-min(array.rows_per_shard, array.rows - number * array.rows_per_shard) // array.rows_per_chunk)
    size = array.chunk_bytes + CHECKSUM_BYTES
    if (shard.size[:chunks] != size).any():
        raise Corrupt(corrupt(shard.location, "chunks are missing or of the wrong size"))
    if (shard.offset[:chunks] != np.arange(chunks) * aligned(size)).any():
        return 0
    if os.fstat(shard.descriptor).st_size < chunks * aligned(size):
        raise Corrupt(corrupt(shard.location, "it is cut short"))
    return chunks * aligned(size)
