import gc
import os
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
import numpy.typing as npt
import pytest

from cvae_dist.errors import Corrupt
from cvae_dist.store import mapped as mapped_module
from cvae_dist.store.layout import aligned
from cvae_dist.store.mapped import MappedRows, free_memory
from tests.unit.test_reader import CHUNK, ROWS, SHARD, expected, ranges, values, write, write_shards

Array = npt.NDArray[Any]


def gathered(rows: MappedRows, starts: Array, counts: Array) -> Array:
    rows.bring(starts[counts > 0], counts[counts > 0])
    return rows.gather(rows.locate(starts, counts))


@pytest.mark.parametrize("stays", [True, False])
@pytest.mark.parametrize(("dtype", "width"), [("<f4", 5), ("<f2", 3), ("|u1", 7), ("<f8", 1), ("<f4", 1), ("<i8", 3)])
def test_any_rows_are_gathered_in_the_given_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, width: int, stays: bool
) -> None:
    monkeypatch.setattr(mapped_module, "free_memory", lambda: 10**9 if stays else 0)
    values_ = values(dtype, width)
    rows = MappedRows.of(write_shards(str(tmp_path / "x"), values_))
    assert rows is not None
    assert rows.stays == stays
    assert rows.chunks == -(-ROWS // CHUNK)
    for longest in (3, 70):
        starts, counts = ranges(longest, longest)
        found = gathered(rows, starts, counts)
        assert found.dtype == values_.dtype
        assert np.array_equal(found, expected(values_, starts, counts))
    rows.check(0, rows.chunks)
    assert rows.gather(np.empty(0, np.int64)).shape == (0, width)


def test_chunks_that_lie_elsewhere_and_other_storage_are_not_mapped(tmp_path: Path) -> None:
    assert MappedRows.of(write_shards(str(tmp_path / "z"), values("|u1", 4), compressed=True)) is None
    assert MappedRows.of(write_shards("memory://mapped/x", values("<f4", 4))) is None
    assert MappedRows.of(write(str(tmp_path / "y"), values("<f4", 5))) is None, "zarr leaves no room between chunks"
    array = write_shards(str(tmp_path / "x"), values("<f4", 5))
    path, step = tmp_path / "x/c.0.0", aligned(array.chunk_bytes + 4)
    data = path.read_bytes()
    index = np.array([[step, array.chunk_bytes + 4], [0, array.chunk_bytes + 4]], "<u8").tobytes()
    index += data[4 * step + len(index) : -4]
    checksum = crc32c.crc32c(index).to_bytes(4, "little")
    path.write_bytes(data[step : 2 * step] + data[:step] + data[2 * step : 4 * step] + index + checksum)
    assert MappedRows.of(array) is None


def test_what_the_system_refuses_to_map_is_read_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = write_shards(str(tmp_path / "x"), values("<f4", 5))

    def refused(*_: object) -> int:
        raise OSError("no addresses")

    monkeypatch.setattr(mapped_module, "_map", refused)
    assert MappedRows.of(array) is None
    monkeypatch.undo()
    monkeypatch.setattr(mapped_module, "_LIBRARY", None)
    assert MappedRows.of(array) is None


def test_a_missing_and_a_short_shard_are_named_before_they_are_mapped(tmp_path: Path) -> None:
    array = write_shards(str(tmp_path / "x"), values("<f4", 5))
    path = tmp_path / "x/c.3.0"
    data = path.read_bytes()
    path.write_bytes(data[200:])
    with pytest.raises(Corrupt, match=r"x/c.3.0: it is cut short"):
        MappedRows.of(array)
    os.truncate(path, 100)
    with pytest.raises(Corrupt, match=r"x/c.3.0: its index"):
        MappedRows.of(array)
    path.unlink()
    with pytest.raises(Corrupt, match=r"x/c.3.0: the file is missing"):
        MappedRows.of(array)


def test_a_shard_that_is_replaced_stays_as_it_was(tmp_path: Path) -> None:
    values_ = values("<f4", 5)
    rows = MappedRows.of(write_shards(str(tmp_path / "x"), values_))
    assert rows is not None
    path = tmp_path / "x/c.2.0"
    (tmp_path / "other").write_bytes(bytes(path.stat().st_size))
    os.replace(tmp_path / "other", path)
    starts, counts = np.array([2 * SHARD]), np.array([SHARD])
    assert np.array_equal(gathered(rows, starts, counts), expected(values_, starts, counts))
    rows.check(0, rows.chunks)


def test_a_shard_that_is_cut_is_named_and_ends_no_process(tmp_path: Path) -> None:
    rows = MappedRows.of(write_shards(str(tmp_path / "x"), np.zeros((ROWS, 300), "<f8")))
    assert rows is not None
    os.truncate(tmp_path / "x/c.4.0", 5000)
    with pytest.raises(Corrupt, match=r"x/c.4.0: it was cut short"):
        rows.bring(np.array([5 * SHARD - 3]), np.array([2]))
    with pytest.raises(Corrupt, match=r"x/c.4.0: it has 5,000 of"):
        rows.check(0, rows.chunks)
    rows.check(0, 4 * SHARD // CHUNK)


def test_the_mapping_ends_with_its_rows(tmp_path: Path) -> None:
    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count(str(tmp_path))

    rows = MappedRows.of(write_shards(str(tmp_path / "x"), values("<f4", 5)))
    assert mappings() == -(-ROWS // SHARD)
    del rows
    gc.collect()
    assert mappings() == 0


def test_free_memory_is_that_of_the_machine_or_less() -> None:
    assert 10**6 < free_memory() < 10**14
