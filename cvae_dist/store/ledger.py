"""The ledger: what is known of every finished shard. Resume, statistics and ``verify`` all read it.

A shard has a record: one row of unsigned integers. Records are kept in packs of neighbouring shards, with the moments
of all rows of the pack and a sample of them. While a store is written, each finished pack is one object of its
``journal``. A publication then holds all records as one array.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import crc32c
import numpy as np
import numpy.typing as npt

from cvae_dist.store.layout import Layout
from cvae_dist.store.moments import STATISTICS, Moments
from cvae_dist.store.sample import Sample, sample_width
from cvae_dist.store.urls import Buffer, Location

Table = npt.NDArray[np.uint64]

JOURNAL = "journal"
SHUFFLED = "shuffled"  # rows on their way, below the journal; see cluster/shuffle.py
STAGED = f"{JOURNAL}/shards"  # shards that will replace published ones, by their keys in the group


@dataclass(frozen=True)
class Digest:
    """Length in bytes and a checksum of one stored object."""

    size: int
    checksum: int

    @classmethod
    def of_shard(cls, buffers: Sequence[Buffer]) -> Self:
        """Digest a shard, given as :meth:`Layout.encode` returns it, by the checksums in it.

        The CRC32C of the whole would say nothing: for bytes followed by their own CRC32C it is a constant.
        """
        size = sum(memoryview(buffer).nbytes for buffer in buffers)
        return cls.of_checksums(size, [bytes(tail[:4]) for tail in buffers[1::2]])

    @classmethod
    def of_checksums(cls, size: int, checksums: Sequence[bytes]) -> Self:
        """Digest a shard of so many bytes by the checksums in it."""
        return cls(size, crc32c.crc32c(b"".join(checksums)))


@dataclass(frozen=True)
class Records:
    """What some neighbouring shards are.

    Attributes
    ----------
    table : numpy.ndarray, shape (n_shards, 2 + 2 * n_arrays), uint64
        Of each shard: the fingerprint of what it was made from; rows stored; length in bytes and digest of its object
        in each array.
    """

    table: Table

    @classmethod
    def one(cls, fingerprint: int, rows: int, digests: Iterable[Digest]) -> "Records":
        """Return the record of one shard."""
        numbers = [number for digest in digests for number in (digest.size, digest.checksum)]
        return cls(np.array([[fingerprint, rows, *numbers]], dtype=np.uint64))

    @classmethod
    def none(cls, layout: Layout) -> "Records":
        """Return the records of no shards."""
        return cls(np.zeros((0, record_width(layout)), np.uint64))

    @classmethod
    def joined(cls, parts: Iterable["Records"]) -> "Records":
        """Return the records of some parts, one part after the other."""
        return cls(np.concatenate([part.table for part in parts]))

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, part: slice) -> "Records":
        return Records(self.table[part])

    @property
    def fingerprints(self) -> Table:
        """What each shard was made from, shape (n_shards,)."""
        return self.table[:, 0]

    @property
    def rows(self) -> int:
        """Rows of all shards."""
        return int(self.table[:, 1].sum())

    def sizes(self, array: int) -> Table:
        """Return the bytes of each shard's object in an array, given by its place in the layout."""
        return self.table[:, 2 + 2 * array]

    def digest(self, shard: int, array: int) -> Digest:
        """Return the digest of one shard's object in an array, both given by their place."""
        size, checksum = self.table[shard, 2 + 2 * array : 4 + 2 * array].tolist()
        return Digest(size, checksum)


def record_width(layout: Layout) -> int:
    """Return the numbers in a record."""
    return 2 + 2 * len(layout.arrays)


def record_fields(layout: Layout) -> list[str]:
    """Name the numbers of a record."""
    digests = [f"{array.name}_{what}" for array in layout.arrays for what in ("bytes", "digest")]
    return ["fingerprint", "rows", *digests]


@dataclass(frozen=True)
class Pack:
    """Neighbouring shards that were finished together: their records; of the rows that are new, moments and sample."""

    records: Records
    moments: Moments
    sample: Sample


class Journal:
    """The packs that were finished since the last publication of the store at ``group``."""

    def __init__(self, group: Location, layout: Layout) -> None:
        self._place, self._layout = group / JOURNAL, layout
        self._dtype = np.dtype(layout.arrays[0].dtype)

    def write(self, number: int, pack: Pack) -> None:
        """Record a pack whose shards are all written."""
        rows = pack.sample.rows
        counts = np.array([pack.moments.count, len(pack.records), len(rows)])
        numbers = [values.astype("<u8") for values in (counts, pack.records.table, rows)]
        vectors = [getattr(pack.moments, name).astype("<f8", copy=False) for name in STATISTICS]
        sampled = pack.sample.values.astype(self._dtype, copy=False)
        parts = [array.reshape(-1).view(np.uint8).data for array in (*numbers, *vectors, sampled)]
        checksum = 0
        for part in parts:  # wide rows have long vectors: none is copied
            checksum = crc32c.crc32c(part, checksum)
        (self._place / str(number)).write(*parts, checksum.to_bytes(4, "little"))

    def read(self, number: int) -> Pack | None:
        """Return a pack, or None when there is none that is whole.

        The records and the sample, which are kept, do not hold the moments of wide rows in memory.
        """
        try:
            data = (self._place / str(number)).read()
        except (FileNotFoundError, NotADirectoryError):
            return None
        body = memoryview(data)[:-4]
        width, features = record_width(self._layout), self._layout.n_features
        if len(data) < 28 or crc32c.crc32c(body) != int.from_bytes(data[-4:], "little"):
            return None
        count, shards, sampled = np.frombuffer(body[:24], "<u8").tolist()
        sizes = (24, 8 * shards * width, 8 * sampled, 8 * len(STATISTICS) * features)
        parts = [body[stop - size : stop] for size, stop in zip(sizes, itertools.accumulate(sizes), strict=True)]
        values_wide = (sampled, sample_width(self._layout))
        if len(body) != sum(sizes) + math.prod(values_wide) * self._dtype.itemsize:
            return None
        table = np.frombuffer(parts[1], "<u8").reshape(shards, width).copy()
        statistics = np.frombuffer(parts[3], "<f8").reshape(len(STATISTICS), features)
        values = np.frombuffer(body[sum(sizes) :], self._dtype).reshape(values_wide)
        sample = Sample(np.frombuffer(parts[2], "<i8").copy(), values.copy())
        return Pack(Records(table), Moments(count, *statistics), sample)

    def numbers(self) -> list[int]:
        """Return the numbers of the packs that are there, by one listing."""
        return sorted(int(entry.name) for entry in self._place.list() if entry.name.isdecimal())

    def is_begun(self) -> bool:
        """Whether there is work that a later run may go on with."""
        return any(entry.name.isdecimal() or entry.name.startswith(f"{SHUFFLED}/") for entry in self._place.list())

    def forget(self, number: int) -> None:
        """Forget one pack, so that its shards are made anew."""
        (self._place / str(number)).delete()

    def delete(self) -> None:
        """Forget all packs."""
        self._place.delete()
