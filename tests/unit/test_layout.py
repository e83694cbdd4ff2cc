"""Shards assembled here, read back by plain Zarr; and the grid that is chosen."""

import itertools
import json
import re
from pathlib import Path

import crc32c
import numpy as np
import pytest
import zarr
from numcodecs import zstd

from cvae_dist.store import STRING, ArrayLayout, Layout, Location
from cvae_dist.store.layout import (
    ShardEncoder,
    decode_chunk,
    encode_chunk,
    group_metadata,
    is_worth_compressing,
    rows_to_try,
    shard_bytes_at,
)

DTYPES = ["<f2", "<f4", "<f8", "|i1", "<i2", "<i4", "<i8", "|u1", "<u2", "<u4", "<u8"]


def write(root: Path, layout: Layout, name: str, values: np.ndarray) -> None:
    group = Location.of(root)
    for shard in range(layout.shards(len(values))):
        part = values[shard * layout.rows_per_shard : (shard + 1) * layout.rows_per_shard]
        (group / layout.array(name).key(shard)).write(*layout.encode(name, part))
    (group / name / "zarr.json").write(layout.metadata(name, len(values)))


# every type on one grid, and one type on every grid, by default
GRIDS = itertools.product(DTYPES, [(), (3,)], [(8, 8), (8, 4), (8, 2), (6, 3), (1, 1)], [1, 5, 8, 19])
CASES = [
    pytest.param(
        dtype, shape, *grid, rows, marks=() if dtype == "<f4" or (*grid, rows) == (8, 4, 19) else pytest.mark.heavy
    )
    for dtype, shape, grid, rows in GRIDS
]


@pytest.mark.parametrize(("dtype", "shape", "rows_per_shard", "rows_per_chunk", "rows"), CASES)
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


def test_bytes_are_compressed_where_a_third_of_them_is_saved() -> None:
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (1000, 100), np.uint8)
    assert is_worth_compressing(np.where(noise < 200, 0, noise).astype(np.uint8))
    assert not is_worth_compressing(noise)
    assert not is_worth_compressing(generator.normal(128, 20, noise.shape).astype(np.uint8))  # that saves a fifth
    assert rows_to_try(np.dtype("u1"), 100) == 2621
    assert rows_to_try(np.dtype("f4"), 400) == rows_to_try(np.dtype("u1"), 10_000_000) == 0


def test_bytes_may_be_stored_as_they_are(tmp_path: Path) -> None:
    packed, raw = (
        Layout.of((ArrayLayout("x", "|u1", ("sample", "feature"), (100,), raw=raw),)) for raw in (False, True)
    )
    assert Layout.from_json(raw.to_json()) == raw != packed
    assert raw.rows_per_chunk > 10 * packed.rows_per_chunk
    rows = np.random.default_rng(0).integers(0, 9, (20_000, 100), np.uint8)
    for layout, name in ((packed, "packed"), (raw, "raw")):
        data = b"".join(map(bytes, layout.encode("x", rows)))
        assert (len(data) > rows.nbytes) == (layout is raw)
        write(Location.of(tmp_path / name), layout, "x", rows)
        np.testing.assert_array_equal(zarr.open_array(tmp_path / name / "x", mode="r")[:], rows)
    document = raw.to_json()
    document["arrays"][0]["raw"] = 1
    with pytest.raises(ValueError, match="raw: 1"):
        Layout.from_json(document)


def test_rows_per_shard_may_be_given() -> None:
    arrays = (ArrayLayout("x", "<f4", ("sample", "feature"), (784,)),)
    for rows in (1, 7, 318, 319, 1000, 3180, 997):
        layout = Layout.of(arrays, rows_per_shard=rows)
        assert layout.rows_per_shard == rows
        assert rows % layout.rows_per_chunk == 0
        assert layout.rows_per_chunk * 784 * 4 <= 1_000_000


def test_packs_are_a_gigabyte_and_their_moments_weigh_little() -> None:
    def layout(features: int, dtype: str = "<f4", **options: int) -> Layout:
        return Layout.of((ArrayLayout("x", dtype, ("sample", "feature"), (features,)),), **options)

    for features, options in (
        (784, {}),
        (784, {"shard_bytes": 64_000_000}),
        (3_000_000, {}),
        (1, {"rows_per_shard": 1}),
    ):
        found = layout(features, **options)
        pack = found.shards_per_pack * found.shard_bytes
        assert found.moments_bytes == 32 * features
        assert found.moments_bytes <= 0.02 * pack
        assert found.shards_per_pack % found.shards_per_tile == 0
        assert pack <= 1_000_000_000 or found.moments_bytes > 0.02 * (pack - found.shards_per_tile * found.shard_bytes)
    assert (layout(784).shards_per_tile, layout(3_000_000).shards_per_tile) == (1, 16)


def test_shards_are_larger_in_object_stores(tmp_path: Path) -> None:
    assert shard_bytes_at(Location.of(tmp_path)) < shard_bytes_at(Location.of("memory://bucket"))
    x = ArrayLayout("x", "<f4", ("sample", "feature"), (784,))
    small, large = (Layout.of((x,), shard_bytes=size) for size in (16_000_000, 64_000_000))
    assert large.rows_per_shard * x.row_bytes <= 64_000_000
    assert large.rows_per_shard > 3 * small.rows_per_shard


FORGED: dict[str, tuple[dict[str, object], dict[str, object], str]] = {
    "a name that leads out": ({}, {"name": "../x"}, "named '../x'"),
    "an absolute name": ({}, {"name": "/etc/passwd"}, "named '/etc"),
    "no name": ({}, {"name": ""}, "named ''"),
    "two names": ({}, {"name": "id"}, "the arrays are"),
    "a type of objects": ({}, {"dtype": "|O"}, "dtype '|O'"),
    "a structured type": ({}, {"dtype": "<f4,<f4"}, "dtype"),
    "big endian": ({}, {"dtype": ">f4"}, "dtype"),
    "strings first": ({}, {"dtype": "string"}, "the arrays are"),
    "a negative shape": ({}, {"shape": [-3]}, "shape"),
    "no values": ({}, {"shape": [0]}, "shape"),
    "a fraction": ({}, {"shape": [1.5]}, "shape"),
    "more dimensions than axes": ({}, {"dims": ["sample", "feature", "more"]}, "dimensions"),
    "no rows": ({"rows_per_shard": 0}, {}, "0 rows"),
    "negative rows": ({"rows_per_shard": -4, "rows_per_chunk": -2}, {}, "-4 rows"),
    "rows as text": ({"rows_per_shard": "4"}, {}, "'4' rows"),
    "chunks that do not fit": ({"rows_per_chunk": 3}, {}, "chunks of 3"),
    "true": ({"rows_per_chunk": True}, {}, "chunks of True"),
}  # fmt: skip


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_description_is_refused_by_name(case: str) -> None:
    layout_change, array_change, words = FORGED[case]
    arrays = (ArrayLayout("x", "<f4", ("sample", "feature"), (3,)), ArrayLayout("id", STRING, ("sample",)))
    document = Layout(4, 2, arrays).to_json()
    assert Layout.from_json(document).to_json() == document
    document |= layout_change
    document["arrays"][0] |= array_change
    with pytest.raises(ValueError, match=re.escape(words)):
        Layout.from_json(document)


@pytest.mark.parametrize(
    "values", [np.arange(5.0), np.array(["a", ""], object), np.zeros(0), np.arange(6, dtype="<u8").reshape(3, 2)]
)
def test_a_chunk_is_padded_and_read_back(values: np.ndarray) -> None:
    dtype = STRING if values.dtype == object else values.dtype.str
    data = b"".join(map(bytes, encode_chunk(values, 7)))
    block = decode_chunk(data, dtype, (7, *values.shape[1:]))
    assert block[: len(values)].tolist() == values.tolist()
    assert not any(block[len(values) :].ravel())
    for shape in ((6, *values.shape[1:]), (8, *values.shape[1:])):
        with pytest.raises((ValueError, RuntimeError)):
            decode_chunk(data, dtype, shape)


@pytest.mark.parametrize("descriptor", [0x20 | 0xC0, 0xC0, 0x20 | 0x80, 0x20 | 0xC0 | 3])
def test_a_chunk_that_claims_gigabytes_of_strings_is_refused(descriptor: int) -> None:
    """Nothing is allocated: memory is asked for before the bytes are looked at (RFC 8878, section 3.1.1)."""
    single = bool(descriptor & 0x20)
    size = (2**32 - 1).to_bytes(4, "little") if descriptor & 0xC0 == 0x80 else (2**62).to_bytes(8, "little")
    frame = b"\x28\xb5\x2f\xfd" + bytes([descriptor]) + bytes(not single) + bytes(4 * (descriptor & 3 == 3)) + size
    payload = frame + zstd.compress(b"x")[6:]
    data = payload + crc32c.crc32c(payload).to_bytes(4, "little")
    with pytest.raises(ValueError, match="more than 2 GB"):
        decode_chunk(data, STRING, (2,))


def test_an_empty_group() -> None:
    assert json.loads(group_metadata())["node_type"] == "group"


@pytest.mark.parametrize("dtype", ["<f4", "|u1"])
@pytest.mark.parametrize("rows", [1, 4, 7, 8])
def test_a_shard_may_be_encoded_through_one_small_block(dtype: str, rows: int) -> None:
    layout = Layout(8, 2, (ArrayLayout("x", dtype, ("sample", "feature"), (5,)),))
    block = np.arange(5 * rows).reshape(rows, 5).astype(dtype)
    small, encoder, data = np.empty((4, 5), dtype), ShardEncoder(layout, "x"), b""
    for start in range(0, rows, 4):
        part = small[: min(4, rows - start)]
        part[:] = block[start : start + 4]
        data += b"".join(map(bytes, encoder.add(part)))
    data += b"".join(map(bytes, encoder.finish()))
    whole = layout.encode("x", block)
    assert data == b"".join(map(bytes, whole))
    assert encoder.size == len(data)
    assert encoder.checksums == [bytes(tail[:4]) for tail in whole[1::2]]
