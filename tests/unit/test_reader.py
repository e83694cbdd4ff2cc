import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import crc32c
import fsspec
import numpy as np
import numpy.typing as npt
import pytest
import zarr
from numcodecs import zstd
from zarr.codecs import Crc32cCodec, ZstdCodec

from cvae_dist.errors import Corrupt, InvalidInput
from cvae_dist.store import Location, RowStore
from cvae_dist.store import reader as reader_module
from cvae_dist.store.layout import ArrayLayout, Layout
from cvae_dist.store.reader import ArrayRows, RowReader, ShardedArray

Array = npt.NDArray[Any]
Writer = Callable[..., ShardedArray]

ROWS, CHUNK, SHARD = 1003, 16, 64  # ragged last chunk, ragged last shard
LAST = ROWS // SHARD


def values(dtype: str, width: int) -> Array:
    return np.random.default_rng(1).integers(0, 200, (ROWS, width)).astype(dtype)


def write(url: str, rows: Array, compressed: bool = False) -> ShardedArray:
    """Write rows with zarr itself."""
    array = zarr.create_array(
        url,
        shape=rows.shape,
        dtype=rows.dtype,
        chunk_key_encoding={"name": "default", "separator": "."},
        chunks=(CHUNK, *rows.shape[1:]),
        shards=(SHARD, *rows.shape[1:]),
        filters=None,
        compressors=[*([ZstdCodec(level=1)] if compressed else []), Crc32cCodec()],
        fill_value=0,
        config={"write_empty_chunks": True},
    )
    array[:] = rows
    return ShardedArray(Location.of(url), rows.dtype.str, rows.shape[1:], ROWS, SHARD, CHUNK, compressed)


def write_shards(url: str, rows: Array, compressed: bool = False) -> ShardedArray:
    """Write rows as the product does."""
    axes = ("sample", "feature")[: rows.ndim]
    layout = Layout(SHARD, CHUNK, (ArrayLayout("x", rows.dtype.str, axes, rows.shape[1:], raw=not compressed),))
    array = ShardedArray(Location.of(url), rows.dtype.str, rows.shape[1:], len(rows), SHARD, CHUNK, compressed)
    for shard in range(layout.shards(len(rows))):
        array.shard(shard).write(*layout.encode("x", rows[shard * SHARD : (shard + 1) * SHARD]))
    return array


def ranges(seed: int, longest: int) -> tuple[Array, Array]:
    random = np.random.default_rng(seed)
    starts = random.integers(0, ROWS, 60)
    return starts, np.minimum(random.integers(0, longest, 60), ROWS - starts)


def read(reader: RowReader | ArrayRows, starts: Array, counts: Array, verify: bool = False) -> Array:
    out = np.full((int(counts.sum()), reader.n_features), 77, reader.dtype)
    reader.read_into(out, starts, counts, verify)
    return out


def expected(rows: Array, starts: Array, counts: Array) -> Array:
    return np.concatenate([rows[start : start + count] for start, count in zip(starts, counts, strict=True)])


def flip_byte(path: str, position: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)
        file.seek(position)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("longest", [3, 20, 300])
@pytest.mark.parametrize(
    ("dtype", "width", "compressed", "writer"),
    [
        ("<f4", 5, False, write), ("<f2", 3, False, write), ("|u1", 40, True, write), ("<f8", 1, True, write),
        ("<f4", 5, False, write_shards), ("<f2", 3, False, write_shards), ("|u1", 40, True, write_shards),
        ("|u1", 64, False, write_shards),
    ],
)  # fmt: skip
def test_any_ranges_are_read_in_the_given_order(
    tmp_path: Path, dtype: str, width: int, compressed: bool, writer: Writer, longest: int, verify: bool
) -> None:
    rows = values(dtype, width)
    reader = RowReader(writer(str(tmp_path / "x"), rows, compressed))
    starts, counts = ranges(longest, longest)
    assert np.array_equal(read(reader, starts, counts, verify), expected(rows, starts, counts))
    assert (reader.n_rows, reader.n_features, reader.dtype) == (ROWS, width, np.dtype(dtype))
    assert reader.block_rows_hint == (CHUNK if compressed else 1)


@pytest.mark.parametrize("writer", [write, write_shards])
@pytest.mark.parametrize("compressed", [False, True])
def test_object_stores_are_read_by_ranges_or_chunks(compressed: bool, writer: Writer) -> None:
    rows = values("|u1", 7)
    reader = RowReader(writer(f"memory://reader-{compressed}/x", rows, compressed))
    assert reader.block_rows_hint == (CHUNK if compressed else 1)
    for verify, longest in ((False, 70), (True, 70), (False, 2)):
        starts, counts = ranges(5, longest)
        assert np.array_equal(read(reader, starts, counts, verify), expected(rows, starts, counts))
    fsspec.filesystem("memory").rm(f"/reader-{compressed}/x/c.3.0")
    with pytest.raises(Corrupt, match=r"x/c.3.0: the object is missing"):
        RowReader(reader._array).read(190, 200)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("offset", "size", "said"),
    [(None, 2**50, "chunk 1 is of the wrong size"), (None, 3, "chunk 1 is"), (10**6, None, "it ends at byte")],
)
def test_an_index_that_claims_too_much_is_refused(
    compressed: bool, offset: int | None, size: int | None, said: str
) -> None:
    path = f"memory://claims-{compressed}-{offset}-{size}/x"
    array = write(path, values("<f4", 5), compressed)
    files = fsspec.filesystem("memory")
    data = files.cat(f"{path}/c.1.0")
    index = np.frombuffer(data[-array.index_bytes : -4], "<i8").reshape(-1, 2).copy()
    index[1] = [place if claimed is None else claimed for place, claimed in zip(index[1], (offset, size), strict=True)]
    table = index.tobytes()
    files.pipe(f"{path}/c.1.0", data[: -array.index_bytes] + table + crc32c.crc32c(table).to_bytes(4, "little"))
    for start in (SHARD, SHARD + CHUNK + 1):
        with pytest.raises(Corrupt, match=f"x/c.1.0: {said}"):
            RowReader(array).read(start, start + 40)


def test_ranges_in_an_object_store_are_joined_only_where_little_lies_between(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = values("<f4", 5)
    reader = RowReader(write("memory://reader-ranges/x", rows))
    reader.read(0, ROWS)  # the indices
    asked: list[int] = []
    fill_many = Location.fill_many

    def counted(wanted: Any) -> Any:
        asked.extend(sum(map(len, buffers)) for _, _, buffers in wanted)
        return fill_many(wanted)

    monkeypatch.setattr(Location, "fill_many", staticmethod(counted))
    starts, counts = np.array([300, 0, 16, 40, 128]), np.array([3, 16, 16, 2, 64])
    assert np.array_equal(read(reader, starts, counts), expected(rows, starts, counts))
    assert sorted(asked) == [40, 60, 2 * 320 + 4, 4 * 320 + 3 * 4]


@pytest.mark.parametrize("compressed", [False, True])
def test_many_rounds_of_chunks_are_read(monkeypatch: pytest.MonkeyPatch, compressed: bool) -> None:
    monkeypatch.setattr(reader_module, "_COMPRESSED_BYTES" if compressed else "_PLAIN_BYTES", 3 * 16 * 20)
    rows = values("<f4", 5)
    reader = RowReader(write(f"memory://reader-rounds-{compressed}/x", rows, compressed))
    starts, counts = np.array([500, 7, 0]), np.array([ROWS - 500, 300, 0])
    assert np.array_equal(read(reader, starts, counts, verify=True), expected(rows, starts, counts))
    fsspec.filesystem("memory").rm(f"/reader-rounds-{compressed}/x/c.3.0")
    with pytest.raises(Corrupt, match=r"x/c.3.0: the object is missing"):
        RowReader(reader._array).read(0, ROWS)


def test_whole_chunks_of_an_object_store_arrive_where_they_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = values("<f4", 5)
    reader = RowReader(write("memory://reader-in-place/x", rows))
    out = np.empty((ROWS - ROWS % CHUNK, 5), "<f4")
    filled = []
    fill_many = Location.fill_many

    def noted(wanted: Any) -> Any:
        filled.extend(np.frombuffer(part, np.uint8) for _, _, parts in wanted for part in parts if len(part) > 4)
        return fill_many(wanted)

    monkeypatch.setattr(Location, "fill_many", staticmethod(noted))
    reader.read_into(out, np.array([0]), np.array([len(out)]), verify=True)
    assert np.array_equal(out, rows[: len(out)])
    assert sum(map(len, filled)) == out.nbytes
    assert all(np.shares_memory(part, out) for part in filled)


def test_an_object_that_is_replaced_is_checked_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, files, shard = values("<f4", 5), fsspec.filesystem("memory"), "/reader-replaced/x/c.1.0"
    array = write("memory://reader-replaced/x", rows)
    reader, version, fill_many = RowReader(array), "before", Location.fill_many
    monkeypatch.setattr(
        Location, "fill_many", staticmethod(lambda wanted: [(size, version) for size, _ in fill_many(wanted)])
    )
    starts, counts = np.array([3, SHARD + 3]), np.array([5, 5])
    assert np.array_equal(read(reader, starts, counts), expected(rows, starts, counts))
    data = bytearray(files.cat(shard))
    data[array.chunk_bytes + 4] ^= 1  # in the chunk after the one that is read
    files.pipe(shard, bytes(data))
    version = "after"
    assert np.array_equal(read(reader, starts, counts), expected(rows, starts, counts))
    with pytest.raises(Corrupt, match=r"x/c.1.0: chunk 1 is torn or has changed"):
        read(reader, starts + CHUNK, counts)


@pytest.mark.parametrize("size", [0, 100])
def test_a_cut_object_is_named(size: int) -> None:
    array = write(f"memory://reader-cut-{size}/x", values("<f4", 5))
    reader = RowReader(array)
    reader.read(0, ROWS)
    files = fsspec.filesystem("memory")
    files.pipe(f"/reader-cut-{size}/x/c.3.0", files.cat(f"/reader-cut-{size}/x/c.3.0")[:size])
    with pytest.raises(Corrupt, match=r"x/c.3.0"):
        read(reader, np.array([230]), np.array([9]))


def test_one_dimensional_arrays_are_one_feature_wide(tmp_path: Path) -> None:
    rows = values("<f4", 1)[:, 0]
    reader = RowReader(write(str(tmp_path / "x"), rows))
    out = np.empty(100, np.float32)
    reader.read_into(out, np.array([850]), np.array([100]))
    assert np.array_equal(out, rows[850:950])


def test_a_reader_opens_the_arrays_of_a_store(tmp_path: Path) -> None:
    layout = Layout((SHARD), CHUNK, (ArrayLayout("x", "<f4", ("sample", "feature"), (3,)),))
    location = Location.of(str(tmp_path / "rows.zarr"))
    store = RowStore.create(location, "rows", layout, {})
    store = RowStore(location, {**store.document, "rows": 50})
    rows = values("<f4", 3)[:50]
    (location / "x/c.0.0").write(*layout.encode("x", rows))
    assert np.array_equal(RowReader(store).read(0, 50), rows)
    assert np.array_equal(RowReader(store, "x").read(7, 9), rows[7:9])


def test_arrays_in_memory_have_the_same_members() -> None:
    rows = values("<f4", 5)
    reader = ArrayRows(np.asfortranarray(rows))
    starts, counts = ranges(1, 30)
    assert np.array_equal(read(reader, starts, counts), expected(rows, starts, counts))
    assert (reader.n_rows, reader.n_features, reader.dtype, reader.block_rows_hint) == (
        ROWS,
        5,
        rows.dtype,
        1,
    )
    with pytest.raises(InvalidInput, match="2-D"):
        ArrayRows(rows[0])


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("row", [0, 20, 1002])
def test_a_flipped_bit_is_found(tmp_path: Path, compressed: bool, row: int) -> None:
    array = write(str(tmp_path / "x"), values("<f4", 5), compressed)
    shard, chunk = row // SHARD, row % SHARD // CHUNK
    path = tmp_path / f"x/c.{shard}.0"
    index = np.frombuffer(path.read_bytes()[-array.index_bytes : -4], "<u8")
    flip_byte(str(path), int(index[2 * chunk]) + 9)
    for start, stop in ((0, ROWS), (row, row + 1)):
        with pytest.raises(Corrupt, match=rf"x/c.{shard}.0: chunk {chunk} "):
            RowReader(array).read(start, stop)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_missing_a_cut_and_a_foreign_shard_are_named(tmp_path: Path, compressed: bool) -> None:
    array = write(str(tmp_path / "x"), values("<f4", 5), compressed)
    os.unlink(tmp_path / "x/c.1.0")
    os.truncate(tmp_path / "x/c.2.0", 100)
    (tmp_path / "x/c.3.0").write_bytes(b"abc")
    reader = RowReader(array)
    with pytest.raises(Corrupt, match=r"x/c.1.0: the file is missing"):
        reader.read(64, 65)
    for row in (128, 192):
        with pytest.raises(Corrupt, match=rf"x/c.{row // SHARD}.0: its index"):
            reader.read(row, row + 1)
    assert reader.read(0, 64).shape == (64, 5)


def test_a_chunk_that_was_never_written_is_corrupt_not_zero(tmp_path: Path) -> None:
    rows = values("<f4", 5)
    rows[:CHUNK] = 0
    array = write(str(tmp_path / "x"), rows)
    zarr.open_array(str(tmp_path / "x"), config={"write_empty_chunks": False})[:] = rows
    with pytest.raises(Corrupt, match="chunks are missing"):
        RowReader(array).read(0, 10)


def test_chunks_in_any_order_are_found_by_the_index(tmp_path: Path) -> None:
    rows = values("<f4", 5)
    array = write(str(tmp_path / "x"), rows)
    path = tmp_path / "x/c.0.0"
    size = array.chunk_bytes + 4
    data = path.read_bytes()
    chunks = [data[number * size : (number + 1) * size] for number in (2, 0, 3, 1)]
    index = np.array([[1, size], [3, size], [0, size], [2, size]], "<u8") * np.array([[size, 1]], "<u8")
    table = index.tobytes()
    checksum = crc32c.crc32c(table).to_bytes(4, "little")
    path.write_bytes(b"".join([*chunks, table, checksum]))
    assert np.array_equal(RowReader(array).read(0, ROWS), rows)


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (1000, 4), (5000, 1), (3, -1)])
def test_ranges_outside_the_rows_are_refused(tmp_path: Path, start: int, count: int) -> None:
    array = write(str(tmp_path / "x"), values("<f4", 5))
    for reader in (RowReader(array), ArrayRows(values("<f4", 5))):
        with pytest.raises(InvalidInput, match=rf"rows {start} to"):
            reader.read_into(np.empty((max(count, 0), 5), "<f4"), np.array([start]), np.array([count]))


@pytest.mark.parametrize("out", [np.empty((3, 5), "<f4"), np.empty((4, 5), "<f8"), np.empty((4, 10), "<f4")[:, ::2]])
def test_outputs_that_do_not_fit_are_refused(tmp_path: Path, out: Array) -> None:
    reader = RowReader(write(str(tmp_path / "x"), values("<f4", 5)))
    with pytest.raises(InvalidInput, match="4 rows of 5 float32 values do not fit"):
        reader.read_into(out, np.array([0]), np.array([4]))


@pytest.mark.parametrize("dropped", ["_NOWAIT", "_ADVISE"])
def test_reads_work_without_what_only_linux_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropped: str) -> None:
    monkeypatch.setattr(reader_module, dropped, 0 if dropped == "_NOWAIT" else None)
    rows = values("<f4", 5)
    starts, counts = ranges(2, 30)
    reader = RowReader(write(str(tmp_path / "x"), rows))
    assert np.array_equal(read(reader, starts, counts), expected(rows, starts, counts))


@pytest.mark.parametrize("most", [1, 7, 50])
def test_reads_that_stop_short_or_are_not_cached_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    rows = values("<f4", 5)
    array = write(str(tmp_path / "x"), rows)
    preadv, calls, advised = os.preadv, [0], []

    def short(descriptor: int, buffers: Any, offset: int, flags: int = 0) -> int:
        calls[0] += 1
        if flags and calls[0] % 5 == 0:
            raise BlockingIOError
        return preadv(descriptor, [buffers[0][:most]], offset, flags)

    monkeypatch.setattr(os, "preadv", short)
    monkeypatch.setattr(reader_module, "_ADVISE", lambda *range: advised.append(range))
    starts, counts = ranges(2, 40)
    assert np.array_equal(read(RowReader(array), starts, counts), expected(rows, starts, counts))
    assert advised
    assert np.array_equal(RowReader(array).read(0, ROWS), rows)


def test_open_files_are_bounded_and_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "_OPEN_SHARDS", 3)
    monkeypatch.setattr(reader_module, "_SHARDS_AT_ONCE", 2)
    rows = values("<f4", 5)
    array = write(str(tmp_path / "x"), rows)

    def open_files() -> int:
        links = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
        return sum(link.startswith(str(tmp_path)) for link in links)

    reader = RowReader(array)
    assert np.array_equal(reader.read(0, ROWS), rows)
    gc.collect()
    assert 0 < open_files() <= 3
    del reader
    gc.collect()
    assert open_files() == 0


@pytest.mark.parametrize("compressed", [False, True])
def test_several_threads_share_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compressed: bool) -> None:
    monkeypatch.setattr(reader_module, "_OPEN_SHARDS", 2)
    rows = values("<f4", 5)
    reader = RowReader(write(str(tmp_path / "x"), rows, compressed))
    right = []

    def work(seed: int) -> None:
        for number in range(5):
            starts, counts = ranges(10 * seed + number, 40)
            right.append(np.array_equal(read(reader, starts, counts), expected(rows, starts, counts)))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 20


def test_a_chunk_read_in_parts_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = values("|u1", 40)
    reader = RowReader(write(str(tmp_path / "x"), rows, compressed=True))
    decoded = []

    def decompress(source: bytes, out: memoryview) -> None:
        decoded.append(len(out))
        zstd.decompress(source, out)

    monkeypatch.setattr(reader_module, "decompress_into", decompress)
    starts = np.arange(0, ROWS - 4, 4)
    for part in np.array_split(starts, 7):
        read(reader, part, np.full(len(part), 4))
    assert len(decoded) == -(-ROWS // CHUNK)
