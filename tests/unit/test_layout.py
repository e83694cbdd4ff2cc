"""Shards assembled here, read back by plain Zarr; and the grid that is chosen."""

from pathlib import Path

import numpy as np
import pytest
import zarr

from cvae_dist.store import STRING, ArrayLayout, Layout, Location
from cvae_dist.store.layout import write_small_array

DTYPES = ["<f2", "<f4", "<f8", "|i1", "<i2", "<i4", "<i8", "|u1", "<u2", "<u4", "<u8"]


def write(root: Path, layout: Layout, name: str, values: np.ndarray) -> None:
    group = Location.of(root)
    for shard in range(layout.shards(len(values))):
        part = values[shard * layout.rows_per_shard : (shard + 1) * layout.rows_per_shard]
        (group / layout.array(name).key(shard)).write(*layout.encode(name, part))
    (group / name / "zarr.json").write(layout.metadata(name, len(values)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,)])
@pytest.mark.parametrize(("rows_per_shard", "rows_per_chunk"), [(8, 8), (8, 4), (8, 2), (6, 3), (1, 1)])
@pytest.mark.parametrize("rows", [1, 5, 8, 19])
def test_read_back_by_zarr(
    tmp_path: Path, dtype: str, shape: tuple[int, ...], rows_per_shard: int, rows_per_chunk: int, rows: int
) -> None:
    dims = ("sample", "feature")[: 1 + len(shape)]
    layout = Layout(rows_per_shard, rows_per_chunk, (ArrayLayout("x", dtype, dims, shape),))
    values = np.random.default_rng(0).integers(0, 100, (rows, *shape)).astype(dtype)
    write(tmp_path, layout, "x", values)
    array = zarr.open_array(str(tmp_path / "x"), mode="r")
    assert (array.shape, array.dtype.str) == (values.shape, dtype)
    assert (array.shards[0], array.chunks[0]) == (rows_per_shard, rows_per_chunk)
    np.testing.assert_array_equal(array[:], values)
    assert array.metadata.dimension_names == dims


@pytest.mark.parametrize("rows", [1, 4, 11])
def test_strings_read_back_by_zarr(tmp_path: Path, rows: int) -> None:
    layout = Layout(4, 2, (ArrayLayout("id", STRING, ("sample",)),))
    names = np.array(["", "ä/日本 x.npy", "a" * 1000, *map(str, range(20))][:rows], dtype=object)
    write(tmp_path, layout, "id", names)
    array = zarr.open_array(str(tmp_path / "id"), mode="r")
    assert array[:].tolist() == names.tolist()
    assert not layout.array("id").key(0).endswith("/0/0")


@pytest.mark.parametrize("dtype", ["<f4", "|u1", STRING])
@pytest.mark.parametrize("rows", [1, 4, 6, 8])
def test_split_undoes_encode_and_refuses_any_change(dtype: str, rows: int) -> None:
    layout = Layout(8, 2, (ArrayLayout("x", dtype, ("sample",)),))
    values = np.arange(rows)
    block = np.array(list(map(str, values)), object) if dtype == STRING else values.astype(dtype)
    buffers = layout.encode("x", block)
    data = b"".join(bytes(buffer) for buffer in buffers)
    assert [bytes(b) for b in layout.split("x", data)] == [bytes(b) for b in buffers]
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 4
        with pytest.raises(ValueError, match="CRC32C|not where it was written"):
            layout.split("x", bytes(changed))
    for cut in (b"", data[:-1], data[: len(data) // 2], data + b"\0", data[1:], bytes(len(data))):
        with pytest.raises(ValueError, match=r"."):
            layout.split("x", cut)


def test_the_same_rows_give_the_same_bytes() -> None:
    layout = Layout(8, 4, (ArrayLayout("x", "|u1", ("sample", "feature"), (50,)),))
    block = np.random.default_rng(0).integers(0, 9, (7, 50)).astype("u1")
    once, again = (b"".join(map(bytes, layout.encode("x", part))) for part in (block, block.copy()))
    assert once == again


@pytest.mark.parametrize("features", [1, 2, 64, 784, 768, 150_528, 3_000_000])
@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", "|u1"])
def test_sizes_of_shards_and_chunks(features: int, dtype: str) -> None:
    x = ArrayLayout("x", dtype, ("sample", "feature"), (features,))
    layout = Layout.of((x, ArrayLayout("id", STRING, ("sample",))))
    assert layout.rows_per_shard % layout.rows_per_chunk == 0
    row = np.dtype(dtype).itemsize * features
    limit = 65_536 if dtype == "|u1" else 1_000_000
    assert layout.rows_per_chunk == 1 or layout.rows_per_chunk * row <= limit
    assert (
        layout.rows_per_shard == 1
        or layout.rows_per_shard * max(row, 64) <= 16_000_000
        or (layout.rows_per_shard == layout.rows_per_chunk)
    )
    assert Layout.from_json(layout.to_json()).to_json() == layout.to_json()


def test_rows_per_shard_may_be_given() -> None:
    arrays = (ArrayLayout("x", "<f4", ("sample", "feature"), (784,)),)
    for rows in (1, 7, 318, 319, 1000, 3180, 997):
        layout = Layout.of(arrays, rows_per_shard=rows)
        assert layout.rows_per_shard == rows
        assert rows % layout.rows_per_chunk == 0
        assert layout.rows_per_chunk * 784 * 4 <= 1_000_000


@pytest.mark.parametrize(
    "values", [np.arange(5.0), np.array(["a", ""], object), np.zeros(0), np.arange(3, dtype=">i4")]
)
def test_small_array(tmp_path: Path, values: np.ndarray) -> None:
    write_small_array(Location.of(tmp_path), "a", values, ("feature",), long_name="what")
    array = zarr.open_array(str(tmp_path / "a"), mode="r")
    assert array[:].tolist() == values.tolist()
    assert dict(array.attrs) == {"long_name": "what"}
