"""The ledger: what is written is read, anything else is no record."""

from pathlib import Path

import numpy as np
import pytest
import zarr

from cvae_dist.errors import Corrupt
from cvae_dist.store import STRING, ArrayLayout, Digest, Layout, Ledger, Location, Moments, Record

LAYOUT = Layout(4, 2, (ArrayLayout("x", "<f4", ("sample", "feature"), (3,)), ArrayLayout("id", STRING, ("sample",))))
BLOCK = np.arange(12, dtype=np.float32).reshape(4, 3)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(Location.of(tmp_path), LAYOUT)


def record(shard: int = 0, rows: int = 4) -> Record:
    return Record(2**64 - 1 - shard, rows, 5, (Digest(2**40, 7), Digest(1, 2**32 - 1)))


def test_written_and_read(ledger: Ledger) -> None:
    assert ledger.read(0) is None
    ledger.write(0, record(), Moments.of(BLOCK))
    found = ledger.read(0)
    assert found is not None
    assert (found.fingerprint, found.rows, found.dropped, found.digests[:2]) == (
        2**64 - 1,
        4,
        5,
        record().digests,
    )
    moments = ledger.read_moments(0, found)
    for name in ("count", "mean", "m2", "minimum", "maximum"):
        np.testing.assert_array_equal(getattr(moments, name), getattr(Moments.of(BLOCK), name))
    assert Record.from_array(found.to_array()) == found


def test_the_record_comes_last(ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    monkeypatch.setattr(Location, "write", lambda self, *buffers: written.append(self.path))
    ledger.write(3, record(), Moments.of(BLOCK))
    assert [path.removeprefix(str(tmp_path)) for path in written] == [
        "/ledger/moments/c/3/0/0", "/ledger/record/c/3/0"
    ]  # fmt: skip


def test_any_changed_byte_makes_it_no_record(ledger: Ledger, tmp_path: Path) -> None:
    ledger.write(0, record(), Moments.of(BLOCK))
    path = tmp_path / "ledger/record/c/0/0"
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert ledger.read(0) is None
    for cut in (b"", data[:3], data[:-8], data + bytes(4)):
        path.write_bytes(cut)
        assert ledger.read(0) is None


def test_moments_that_do_not_belong(ledger: Ledger, tmp_path: Path) -> None:
    ledger.write(0, record(), Moments.of(BLOCK))
    ledger.write(1, record(1), Moments.of(BLOCK + 1))
    first = ledger.read(0)
    assert first is not None
    (tmp_path / "ledger/moments/c/1/0/0").replace(tmp_path / "ledger/moments/c/0/0/0")
    with pytest.raises(Corrupt, match="shard 0 .* do not match"):
        ledger.read_moments(0, first)
    (tmp_path / "ledger/moments/c/0/0/0").unlink()
    with pytest.raises(Corrupt, match="shard 0 are missing"):
        ledger.total_moments([first])


def test_total_is_merged_in_shard_order(ledger: Ledger) -> None:
    rows = np.random.default_rng(0).normal(size=(40, 3))
    parts = np.split(rows, [7, 20])
    for shard in (2, 0, 1):  # whoever comes first
        ledger.write(shard, record(shard, len(parts[shard])), Moments.of(parts[shard]))
    records = [ledger.read(shard) for shard in range(3)]
    total = ledger.total_moments([found for found in records if found is not None])
    expected = Moments.of(parts[0]).merge(Moments.of(parts[1])).merge(Moments.of(parts[2]))
    assert total.mean.tobytes() == expected.mean.tobytes()
    assert total.m2.tobytes() == expected.m2.tobytes()


def test_plain_zarr_reads_it(ledger: Ledger, tmp_path: Path) -> None:
    for shard in range(3):
        ledger.write(shard, record(shard), Moments.of(BLOCK))
    ledger.publish(3)
    group = zarr.open_group(str(tmp_path / "ledger"), mode="r")
    table = group["record"][:]
    fields = group["record"].attrs["fields"]
    assert table.shape == (3, len(fields))
    assert table[:, fields.index("rows")].tolist() == [4, 4, 4]
    np.testing.assert_array_equal(group["moments"][1, 0], BLOCK.mean(0))


@pytest.mark.parametrize("name", ["x", "id"])
def test_digests_tell_shards_of_one_size_apart(name: str) -> None:
    """A CRC32C of bytes that end in their own CRC32C would be the same for all."""
    blocks = {"x": [BLOCK, BLOCK + 1, BLOCK[::-1].copy()]}
    blocks["id"] = [np.array(["a", "b"], object), np.array(["b", "a"], object), np.array(["c", "d"], object)]
    digests = [Digest.of_shard(LAYOUT.encode(name, block)) for block in blocks[name]]
    assert len({digest.size for digest in digests}) == 1
    assert len(set(digests)) == 3
