"""The ledger: what is written is read, anything else is no pack."""

from pathlib import Path

import numpy as np
import pytest

from cvae_dist.store import STRING, ArrayLayout, Digest, Layout, Location, Moments, Pack, Records, Sample
from cvae_dist.store.ledger import Journal, record_fields, record_width

LAYOUT = Layout(4, 2, (ArrayLayout("x", "<f4", ("sample", "feature"), (3,)), ArrayLayout("id", STRING, ("sample",))))
BLOCK = np.arange(12, dtype=np.float32).reshape(4, 3)
SAMPLE = Sample(np.array([2**40, 2**62]), BLOCK[1:3])


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(Location.of(tmp_path), LAYOUT)


def record(shard: int = 0, rows: int = 4) -> Records:
    return Records.one(2**64 - 1 - shard, rows, (Digest(2**40, 7), Digest(1, 2**32 - 1 - shard)))


def test_records_of_neighbouring_shards() -> None:
    records = Records.joined([Records.none(LAYOUT), record(0), Records.joined([record(1), record(2, 3)])])
    assert (len(records), records.rows) == (3, 11)
    assert records.fingerprints.tolist() == [2**64 - 1, 2**64 - 2, 2**64 - 3]
    assert (records.sizes(0).tolist(), records.sizes(1).tolist()) == ([2**40] * 3, [1] * 3)
    assert (records.digest(2, 0), records.digest(2, 1)) == (Digest(2**40, 7), Digest(1, 2**32 - 3))
    assert records[1:].table.tolist() == records.table[1:].tolist()
    assert records.table.dtype == np.uint64
    fields = record_fields(LAYOUT)
    assert fields == ["fingerprint", "rows", "x_bytes", "x_digest", "id_bytes", "id_digest"]
    assert records.table.shape == (3, record_width(LAYOUT)) == (3, len(fields))


@pytest.mark.parametrize("moments", [Moments.of(BLOCK), Moments.empty(3)])
def test_written_and_read(journal: Journal, moments: Moments) -> None:
    assert (journal.read(0), journal.numbers()) == (None, [])
    records = Records.joined([record(), record(1)])
    journal.write(3, Pack(records, moments, SAMPLE))
    journal.write(12, Pack(record(9), moments, Sample.none(LAYOUT)))
    assert journal.numbers() == [3, 12]
    found = journal.read(3)
    assert found is not None
    np.testing.assert_array_equal(found.records.table, records.table)
    for name in ("count", "mean", "m2", "minimum", "maximum"):
        np.testing.assert_array_equal(getattr(found.moments, name), getattr(moments, name))
    np.testing.assert_array_equal(found.sample.rows, SAMPLE.rows)
    np.testing.assert_array_equal(found.sample.values, SAMPLE.values)
    other = journal.read(12)
    assert other is not None
    assert (len(other.sample.rows), other.sample.values.shape, other.sample.values.dtype) == (0, (0, 3), np.float32)
    journal.forget(3)
    assert journal.numbers() == [12]
    journal.delete()
    assert (journal.read(12), journal.numbers()) == (None, [])


def test_any_changed_byte_makes_it_no_pack(journal: Journal, tmp_path: Path) -> None:
    journal.write(0, Pack(Records.joined([record(), record(1)]), Moments.of(BLOCK), SAMPLE))
    path = tmp_path / "journal/0"
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert journal.read(0) is None
    for cut in (b"", data[:3], data[:19], data[:-8], data + bytes(4), bytes(len(data))):
        path.write_bytes(cut)
        assert journal.read(0) is None


def test_a_whole_pack_of_other_arrays_is_none(journal: Journal, tmp_path: Path) -> None:
    narrow = Journal(Location.of(tmp_path), Layout(4, 2, LAYOUT.arrays[:1]))
    narrow.write(0, Pack(Records.one(1, 4, [Digest(5, 6)]), Moments.of(BLOCK), SAMPLE))
    assert narrow.read(0) is not None
    assert journal.read(0) is None


def test_a_journal_that_is_no_folder_and_names_that_are_no_numbers(journal: Journal, tmp_path: Path) -> None:
    journal.write(0, Pack(record(), Moments.of(BLOCK), SAMPLE))
    (tmp_path / "journal/notes").write_text("mine")
    assert journal.numbers() == [0]
    journal.delete()
    (tmp_path / "journal").write_text("mine")
    assert (journal.read(0), journal.numbers()) == (None, [])


@pytest.mark.parametrize("name", ["x", "id"])
def test_digests_tell_shards_of_one_size_apart(name: str) -> None:
    """A CRC32C of bytes that end in their own CRC32C would be the same for all."""
    blocks = {"x": [BLOCK, BLOCK + 1, BLOCK[::-1].copy()]}
    blocks["id"] = [np.array(["a", "b"], object), np.array(["b", "a"], object), np.array(["c", "d"], object)]
    digests = [Digest.of_shard(LAYOUT.encode(name, block)) for block in blocks[name]]
    assert len({digest.size for digest in digests}) == 1
    assert len(set(digests)) == 3
