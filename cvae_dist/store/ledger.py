"""The ledger: what is known of every finished shard. Resume, statistics and ``verify`` all read it.

It is two Zarr arrays in the subgroup ``ledger``, with one chunk per shard. After a shard itself its ``moments`` are
written, and last its ``record``, which marks it as finished. Only a rewrite of the shard changes them.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import crc32c
import numpy as np
import numpy.typing as npt
import zarr
from zarr.storage import MemoryStore

from cvae_dist.errors import Corrupt
from cvae_dist.store.layout import ArrayLayout, Layout, Objects, checksummed, create_array, shard_key
from cvae_dist.store.moments import Moments
from cvae_dist.store.urls import Buffer, Location

_READERS = 16  # threads
_STATISTICS = ("mean", "m2", "minimum", "maximum")


@dataclass(frozen=True)
class Digest:
    """Length in bytes and a checksum of one stored object."""

    size: int
    checksum: int

    @classmethod
    def of(cls, data: bytes) -> "Digest":
        """Digest a whole object."""
        return cls(len(data), crc32c.crc32c(data))

    @classmethod
    def of_shard(cls, buffers: Sequence[Buffer]) -> "Digest":
        """Digest a shard, given as :meth:`Layout.encode` returns it, by the checksums in it.

        The CRC32C of the whole would say nothing: for bytes followed by their own CRC32C it is a constant.
        """
        size = sum(memoryview(buffer).nbytes for buffer in buffers)
        return cls(size, crc32c.crc32c(b"".join(bytes(checksum) for checksum in buffers[1::2])))


@dataclass(frozen=True)
class Record:
    """What one finished shard is.

    Attributes
    ----------
    fingerprint : int
        64-bit digest of everything the shard was made from.
    rows, dropped : int
        Rows stored, and rows of the source left out before them.
    digests : tuple of Digest
        One per array in the order of the layout, then one of the moments.
    """

    fingerprint: int
    rows: int
    dropped: int
    digests: tuple[Digest, ...]

    def to_array(self) -> npt.NDArray[np.uint64]:
        """Return the record as one row of the ``record`` array."""
        digests = [number for digest in self.digests for number in (digest.size, digest.checksum)]
        return np.array([self.fingerprint, self.rows, self.dropped, *digests], dtype="<u8")

    @classmethod
    def from_array(cls, row: npt.NDArray[np.uint64]) -> "Record":
        """Read what :meth:`to_array` wrote."""
        fingerprint, rows, dropped, *digests = (int(number) for number in row)
        pairs = zip(digests[::2], digests[1::2], strict=True)
        return cls(fingerprint, rows, dropped, tuple(Digest(*pair) for pair in pairs))


class Ledger:
    """The ledger of the store at ``group``; the moments are those of the first array of its layout."""

    def __init__(self, group: Location, layout: Layout) -> None:
        self._group = group
        self._fields = ["fingerprint", "rows", "dropped"]
        for name in [*(array.name for array in layout.arrays), "moments"]:
            self._fields += [f"{name}_bytes", f"{name}_digest"]
        self._n_features = int(np.prod(layout.arrays[0].shape))

    def write(self, shard: int, record: Record, moments: Moments) -> None:
        """Record a shard whose objects are all written. ``record`` gains the digest of the moments."""
        table = np.stack([getattr(moments, name) for name in _STATISTICS]).astype("<f8")
        complete = replace(record, digests=(*record.digests, Digest.of(table.tobytes())))
        self._moments(shard).write(*checksummed(table.tobytes()))
        self._record(shard).write(*checksummed(complete.to_array().tobytes()))

    def read(self, shard: int) -> Record | None:
        """Return the record of a shard, or None when it has none that is whole."""
        try:
            row = np.frombuffer(_verified(self._record(shard).read()), dtype="<u8")
        except (FileNotFoundError, Corrupt):
            return None
        return Record.from_array(row) if len(row) == len(self._fields) else None

    def read_all(self, shards: int) -> list[Record | None]:
        """Return the records of the first ``shards`` shards, many read at a time; see :meth:`read`."""
        with ThreadPoolExecutor(_READERS) as pool:
            return list(pool.map(self.read, range(shards)))

    def read_moments(self, shard: int, record: Record) -> Moments:
        """Return the moments of a recorded shard.

        Raises
        ------
        Corrupt
            They are missing or do not match the record.
        """
        try:
            data = _verified(self._moments(shard).read())
        except FileNotFoundError:
            raise Corrupt(f"the moments of shard {shard} are missing from {self._group}/ledger") from None
        if Digest.of(data) != record.digests[-1]:
            raise Corrupt(f"the moments of shard {shard} in {self._group}/ledger do not match its record")
        table = np.frombuffer(data, dtype="<f8").reshape(len(_STATISTICS), self._n_features)
        return Moments(record.rows, *table)

    def total_moments(self, records: Iterable[Record]) -> Moments:
        """Merge the moments of all shards, in shard order: the same bits whoever wrote them, and when."""
        total = Moments.empty(self._n_features)
        for shard, record in enumerate(records):
            total = total.merge(self.read_moments(shard, record))
        return total

    def publish(self, shards: int) -> None:
        """Write the metadata of the ledger's arrays for ``shards`` shards."""
        objects: Objects = {}
        zarr.create_group(MemoryStore(objects), path="ledger")
        record = ArrayLayout("ledger/record", "<u8", ("shard", "field"), (len(self._fields),), {"fields": self._fields})
        dims, shape = ("shard", "statistic", "feature"), (len(_STATISTICS), self._n_features)
        moments = ArrayLayout("ledger/moments", "<f8", dims, shape, {"statistics": _STATISTICS})
        for array in (record, moments):
            create_array(objects, array, shards, chunk=1)
        for key, value in objects.items():
            if key.startswith("ledger/"):
                (self._group / key).write(value.to_bytes())

    def _record(self, shard: int) -> Location:
        return self._group / "ledger/record" / shard_key(shard, 2)

    def _moments(self, shard: int) -> Location:
        return self._group / "ledger/moments" / shard_key(shard, 3)


def _verified(data: bytes) -> bytes:
    body, checksum = data[:-4], data[-4:]
    if len(data) < 4 or crc32c.crc32c(body).to_bytes(4, "little") != checksum:
        raise Corrupt(f"{len(data)} bytes do not match their CRC32C")
    return body
