"""Rows of Parquet files: what is read equals what pandas and pyarrow read, and what is wrong is told of the file."""

import datetime
import decimal
import io
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cvae_dist.sources import parquet
from cvae_dist.sources.files import BadFile, File
from cvae_dist.sources.options import TableOptions
from cvae_dist.sources.parquet import ParquetReader, parquet_reader, read_footer
from cvae_dist.sources.source import Column
from cvae_dist.store.urls import Location
from tests.servers import serve
from tests.tables import found as find
from tests.tables import listed, read


def write(path: Path, table: "pa.Table | dict[str, Any]", **settings: Any) -> File:
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), path, **settings)
    return listed(path)


def reader(file: File, *columns: str, id: str | None = None, carry: tuple[str, ...] = ()) -> ParquetReader:
    return parquet_reader(file.root, file, TableOptions(columns, id, carry))


def lists(rows: np.ndarray, kind: str = "fixed") -> pa.Array:
    if kind == "fixed":
        return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])
    make = pa.large_list if kind == "large" else pa.list_
    return pa.array(list(rows), type=make(pa.from_numpy_dtype(rows.dtype)))


def refused(code: str, file: File, *columns: str, **options: Any) -> str:
    """Return what is said of a file that is refused as the first one, while counted, or while read."""
    with pytest.raises(BadFile) as caught:
        read(reader(file, *columns, **options), file)
    assert (caught.value.code, caught.value.path) == (code, file.path), caught.value.detail
    return caught.value.detail


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(100, 5)).astype(np.float32)


@pytest.mark.parametrize("kind", ["fixed", "list", "large"])
@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", "|u1", "<i8"])
def test_lists(tmp_path: Path, rows: np.ndarray, kind: str, dtype: str) -> None:
    rows = (rows * 20).clip(0).astype(dtype)
    file = write(tmp_path / "a.parquet", {"embedding": lists(rows, kind), "url": ["u"] * 100}, row_group_size=30)
    found = reader(file)
    assert found.schema.to_json() == {"item_shape": [5], "dtype": rows.dtype.name, "one_per_file": False}
    np.testing.assert_array_equal(read(found, file)[0], rows)


def test_lists_as_pandas_writes_them(tmp_path: Path, rows: np.ndarray) -> None:
    pd.DataFrame({"v": list(rows)}, index=np.arange(100) * 2).to_parquet(tmp_path / "a.parquet")
    file = listed(tmp_path / "a.parquet")
    np.testing.assert_array_equal(read(reader(file), file)[0], rows)


def test_tensors_are_lists_with_a_label(tmp_path: Path) -> None:
    images = np.arange(24, dtype=np.int16).reshape(4, 2, 3)
    file = write(tmp_path / "a.parquet", {"image": pa.FixedShapeTensorArray.from_numpy_ndarray(images)})
    np.testing.assert_array_equal(read(reader(file), file)[0], images.reshape(4, 6))


def test_numeric_columns(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"a": np.arange(2500, dtype=np.int32), "flag": np.arange(2500) % 2 == 0, "b": np.float32(0.5), "n": "text"},
        index=np.arange(2500) + 7,
    )
    frame.to_parquet(tmp_path / "a.parquet", row_group_size=900)
    file = listed(tmp_path / "a.parquet")
    found = reader(file, carry=("n",))
    assert found.schema.features == ("a", "flag", "b")
    assert found.schema.dtype == np.result_type(np.int32, np.uint8, np.float32)
    rows, carried = read(found, file)
    np.testing.assert_array_equal(rows, frame[["a", "flag", "b"]].to_numpy(dtype=float))
    assert carried["n"].tolist() == ["text"] * 2500
    np.testing.assert_array_equal(read(reader(file, "b", "a"), file)[0], frame[["b", "a"]].to_numpy(dtype=float))


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i1", "u8", "?"])
def test_one_column_keeps_its_type(tmp_path: Path, dtype: str) -> None:
    values = np.arange(10).astype(dtype)
    file = write(tmp_path / "a.parquet", {"a": values, "b": values})
    rows, _ = read(reader(file), file)
    assert rows.dtype == (np.uint8 if dtype == "?" else np.dtype(dtype))
    np.testing.assert_array_equal(rows, np.stack([values, values], axis=1))


def test_nan_is_a_value(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", {"a": [1.0, float("nan")]})
    np.testing.assert_array_equal(read(reader(file), file)[0], [[1.0], [np.nan]])


def test_ids_and_carried_columns(tmp_path: Path, rows: np.ndarray) -> None:
    when = pa.array([datetime.datetime(2026, 1, 2, 3, 4, 5)] * 100, pa.timestamp("s", tz="UTC"))
    table = {
        "x": lists(rows), "key": np.arange(100, dtype=np.uint16), "label": np.arange(100, dtype=np.int8),
        "text": [None, "é"] * 50, "sort": pa.array(["a", "b"] * 50).dictionary_encode(), "when": when,
        "day": pa.array([datetime.date(2026, 1, 2)] * 100), "price": pa.array([decimal.Decimal("1.50")] * 100),
        "flag": [True, False] * 50, "view": pa.array(["v"] * 100, pa.string_view()),
    }  # fmt: skip
    file = write(tmp_path / "a.parquet", table, row_group_size=33)
    names = ("label", "text", "sort", "when", "day", "price", "flag", "view")
    found = reader(file, id="key", carry=names)
    assert found.schema.columns == (
        Column("id", "<i8"), Column("label", "|i1"), Column("text", "string"), Column("sort", "string"),
        Column("when", "string"), Column("day", "string"), Column("price", "string"), Column("flag", "|u1"),
        Column("view", "string"),
    )  # fmt: skip
    _, carried = read(found, file, 1, 98)
    assert {name: values.dtype.str for name, values in carried.items()} == {
        name: "|O" if dtype == "string" else dtype
        for name, dtype in ((column.name, column.dtype) for column in found.schema.columns)
    }
    first = {name: values[0] for name, values in carried.items()}
    assert first == {
        "id": 1, "label": 1, "text": "é", "sort": "b", "when": "2026-01-02 03:04:05.000Z", "day": "2026-01-02",
        "price": "1.50", "flag": 0, "view": "v",
    }  # fmt: skip
    assert carried["text"][1] == ""
    assert read(reader(file, id="sort", carry=("label",)), file, 1, 1)[1]["id"].tolist() == ["b"]


@pytest.mark.parametrize(
    ("column", "options", "code", "said"),
    [
        ({"s": ["a", "b"]}, {}, "dtype", "--carry"),
        ({"s": [[1.0], [2.0]]}, {"columns": ("x", "s")}, "dtype", "lists in 's'"),
        ({"s": [[[1.0]], [[2.0]]]}, {"columns": ("s",)}, "dtype", "list<"),
        ({"s": [{"a": 1}, {"a": 2}]}, {}, "dtype", "struct<a: int64>"),
        ({"s": [decimal.Decimal("1.5")] * 2}, {}, "dtype", "decimal"),
        ({"s": [datetime.date(2026, 1, 2)] * 2}, {"columns": ("s",)}, "dtype", "date32"),
        ({"s": pa.array(["a", "b"]).dictionary_encode()}, {}, "dtype", "dictionary"),
        ({"s": [None, None]}, {}, "dtype", "null"),
        ({"s": [b"a", b"b"]}, {"carry": ("s",)}, "dtype", "binary"),
        ({"s": [1.0, 2.0]}, {"id": "s"}, "dtype", "whole numbers or text"),
        ({"s": [1, 2]}, {"columns": ("xs",)}, "schema", "did you mean"),
        ({"s": [1, 2]}, {"columns": ("s", "s")}, "schema", "twice"),
        ({"s": [1, 2], "id": [1, 2]}, {"id": "s", "carry": ("id",)}, "schema", "--id id"),
        ({"s": ["a", None]}, {"id": "s"}, "nulls", "a missing value in column 's'"),
        ({"s": [1, None]}, {"carry": ("s",)}, "nulls", "a missing value in column 's'"),
        ({"s": [1.5, None]}, {}, "nulls", "a missing value in column 's'"),
        ({"s": [[1.0, 2.0], None]}, {}, "nulls", "a missing value in column 's'"),
        ({"s": [[1.0, 2.0], [1.0, None]]}, {}, "nulls", "a missing value in column 's'"),
        ({"s": [[1.0, 2.0], [3.0]]}, {}, "ragged", "a list of 1 in column 's', row 1"),
        ({"s": [[1.0], [2.0, 3.0, 4.0]]}, {}, "ragged", "a list of 3 in column 's', row 1"),
        ({"s": pa.array([[], []], pa.list_(pa.float32()))}, {}, "shape", "no values in the lists"),
        ({"s": pa.array([1, 2**64 - 1], pa.uint64())}, {"id": "s"}, "values", "<i8 cannot hold"),
    ],
)  # fmt: skip
def test_columns_that_cannot_be_used(
    tmp_path: Path, column: dict[str, Any], options: dict[str, Any], code: str, said: str
) -> None:
    file = write(tmp_path / "a.parquet", {"x": [1.0, 2.0], **column})
    options = dict(options)
    assert said in refused(code, file, *options.pop("columns", ()), **options)


def test_where_missing_values_are(tmp_path: Path) -> None:
    values = [None if row in (70, 75) else float(row) for row in range(100)]
    table = {"a": values, "b": lists(np.ones((100, 2)), "list")}
    file = write(tmp_path / "a.parquet", table, row_group_size=40)
    assert "2 missing values in column 'a', the first in row 70" in refused("nulls", file, "a")
    inner = pa.array([[1.0, 1.0]] * 50 + [[1.0, None]] + [[1.0, 1.0]] * 49)
    file = write(tmp_path / "b.parquet", {"b": inner}, row_group_size=40)
    assert "column 'b', the first in row 50" in refused("nulls", file)


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", pa.table([[1.0], [2.0]], names=["a", "a"]))
    assert "2 columns named 'a'" in refused("schema", file)


def test_names_with_dots(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", {"a.b": [1.0, 2.0], "a": [3.0, 4.0]})
    np.testing.assert_array_equal(read(reader(file), file)[0], [[1, 3], [2, 4]])
    np.testing.assert_array_equal(read(reader(file, "a"), file)[0], [[3], [4]])


def test_later_files_have_the_same_columns(tmp_path: Path, rows: np.ndarray) -> None:
    first = write(tmp_path / "a.parquet", {"a": [1.0], "b": [2]})
    found = reader(first)
    other = write(tmp_path / "b.parquet", {"b": [3], "a": [4.0]})
    np.testing.assert_array_equal(read(found, other)[0], [[4, 3]])
    for table, said in [
        ({"a": [1.0]}, "lacks 'b'"),
        ({"a": [1.0], "b": [1], "c": [2]}, "has 'c' besides"),
        ({"a": [1.0], "b": [1.5]}, "has <f8 in 'b', not <i8"),
    ]:
        with pytest.raises(BadFile, match=said) as caught:
            found.count_file(write(tmp_path / "c.parquet", table))
        assert caught.value.code == "schema"
    found = reader(write(tmp_path / "l.parquet", {"v": lists(rows)}))
    with pytest.raises(BadFile, match="lists of 4 values, the first file has 5") as caught:
        found.count_file(write(tmp_path / "m.parquet", {"v": lists(rows[:, :4])}))
    assert caught.value.code == "shape"


def test_no_rows(tmp_path: Path, rows: np.ndarray) -> None:
    empty = {"v": lists(rows[:0]), "s": pa.array([], pa.string())}
    file = write(tmp_path / "empty.parquet", empty)
    full = write(tmp_path / "full.parquet", {"v": lists(rows), "s": ["a"] * 100})
    for model in (file, full):
        found = reader(model, carry=("s",))
        assert found.count_file(file) == 0
        out, carried = read(found, file)
        assert out.shape == (0, 5)
        assert carried["s"].tolist() == []


def test_no_columns(tmp_path: Path) -> None:
    assert "no column of numbers" in refused("schema", write(tmp_path / "a.parquet", pa.table({})))


def test_files_that_are_none(tmp_path: Path, rows: np.ndarray) -> None:
    data = (write(tmp_path / "a.parquet", {"v": lists(rows)}).root / "a.parquet").read()
    length = int.from_bytes(data[-8:-4], "little")
    for content, code, said in [
        (b"", "header", "is empty"),
        (b"no table at all", "header", "no Parquet file"),
        (data[:-20], "truncated", "no footer at its end"),
        (b"PAR1", "truncated", ""),
        (data[:4] + data[-100:], "truncated", f"footer of {length:,} bytes"),
        (data[:-4] + b"PARE", "header", "encrypted"),
        (data[: -8 - length] + bytes(length) + data[-8:], "header", "footer that cannot be read"),
        (data[:4] + bytes(len(data) - 12 - length) + data[-8 - length :], "values", "cannot be decoded"),
    ]:
        (tmp_path / "bad.parquet").write_bytes(content)
        assert said in refused(code, listed(tmp_path / "bad.parquet"))


def test_flipped_bits_are_noticed_where_pages_have_checksums(tmp_path: Path, rows: np.ndarray) -> None:
    file = write(tmp_path / "a.parquet", {"v": lists(rows)}, write_page_checksum=True, compression="none")
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[data.index(rows[3].tobytes())] ^= 1
    (tmp_path / "a.parquet").write_bytes(data)
    file = listed(tmp_path / "a.parquet")
    assert "CRC" in refused("values", file)


def test_every_byte_of_the_footer_may_lie(tmp_path: Path, rows: np.ndarray) -> None:
    """Whatever a damaged footer says, the file is read or is a bad one; nothing else is raised."""
    data = (write(tmp_path / "a.parquet", {"v": lists(rows), "s": ["a"] * 100}).root / "a.parquet").read()
    length = int.from_bytes(data[-8:-4], "little")
    random = np.random.default_rng(0)
    bad = 0
    for _ in range(150):
        damaged = bytearray(data)
        for position in random.integers(len(data) - 8 - length, len(data) - 8, size=2):
            damaged[position] = random.integers(256)
        (tmp_path / "bad.parquet").write_bytes(damaged)
        file = listed(tmp_path / "bad.parquet")
        try:
            read(reader(file, carry=("s",)), file, 0, 10)
        except BadFile:
            bad += 1
    assert 0 < bad < 150


def test_rows_that_no_file_of_this_size_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.parquet", {"a": np.zeros(100_000)})
    found = reader(file)
    assert found.count_file(file) == 100_000
    footer = read_footer(file)
    forged = footer._replace(starts=np.array([0, 2**60]))
    monkeypatch.setattr(parquet, "read_footer", lambda file: forged)
    with pytest.raises(BadFile, match="claims 1,152,921,504,606,846,976 rows") as caught:
        found.count_file(file)
    assert caught.value.code == "header"
    forged = footer._replace(starts=np.array([0, 100_001]))
    with pytest.raises(BadFile, match="ends after row 100,000, where 100,001 rows were counted") as caught:
        read(found, file)
    assert caught.value.code == "truncated"


def test_a_dictionary_of_long_text_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = pa.DictionaryArray.from_arrays(np.zeros(50_000, np.int32), ["x" * 1_000_000])
    file = write(tmp_path / "a.parquet", {"a": np.zeros(50_000), "s": text})
    assert file.size < 1_000_000
    before = pa.total_allocated_bytes()
    assert "50,000,000,000 bytes of text" in refused("values", file, carry=("s",))
    assert pa.total_allocated_bytes() - before < 50_000_000


class Bomb:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_extension_types_run_no_code(tmp_path: Path) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "executed"))
    label = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": bomb}
    field = pa.field("a", pa.float64(), metadata=label)
    file = write(tmp_path / "a.parquet", pa.table([[1.0, 2.0]], schema=pa.schema([field])))
    np.testing.assert_array_equal(read(reader(file), file)[0], [[1.0], [2.0]])
    assert not (tmp_path / "executed").exists()


@pytest.fixture(scope="module")
def ranged(tmp_path_factory: pytest.TempPathFactory) -> tuple[ParquetReader, File, pa.Table]:
    rows = np.arange(3000, dtype=np.float32).reshape(1000, 3)
    table = pa.table({"v": lists(rows), "n": np.arange(1000), "s": [f"s{n % 7}" for n in range(1000)]})
    file = write(tmp_path_factory.mktemp("ranged") / "a.parquet", table, row_group_size=170)
    return reader(file, id="n", carry=("s",)), file, table


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cuts=st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000)), min_size=1, max_size=5), small=st.booleans()
)
def test_any_rows_in_any_order(
    ranged: tuple[ParquetReader, File, pa.Table], cuts: list[tuple[int, int]], small: bool
) -> None:
    found, file, table = ranged
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "_BATCH_ROWS", 64 if small else 1000)
        patch.setattr(parquet, "_GROUP_BYTES", 100 if small else 10**9)
        for first, stop in map(sorted, cuts):
            rows, carried = read(found, file, first, stop - first)
            assert rows.ravel().tolist() == table["v"].slice(first, stop - first).combine_chunks().flatten().to_pylist()
            assert carried["id"].tolist() == table["n"][first:stop].to_pylist()
            assert carried["s"].tolist() == table["s"][first:stop].to_pylist()


def test_successive_reads_decode_every_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.parquet", {"a": np.arange(10_000.0)})
    monkeypatch.setattr(parquet, "_BATCH_ROWS", 100)
    found, decoded = reader(file), []
    batches = ParquetReader.batches

    def counted(self: ParquetReader, file: File, start: int) -> Any:
        for batch in batches(self, file, start):
            decoded.append(len(batch))
            yield batch

    monkeypatch.setattr(ParquetReader, "batches", counted)
    for first in range(0, 10_000, 250):
        np.testing.assert_array_equal(read(found, file, first, 250)[0][:, 0], np.arange(first, first + 250))
    assert sum(decoded) == 10_000
    thread = threading.Thread(target=read, args=(found, file, 5_050, 50))
    thread.start()
    thread.join()
    assert sum(decoded) == 10_000 + 5_100


def test_readers_travel(ranged: tuple[ParquetReader, File, pa.Table]) -> None:
    found, _, _ = ranged
    assert pickle.loads(pickle.dumps(found)) == found
    assert len(pickle.dumps(found)) < 2000


def test_a_file_that_changed(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", {"a": np.arange(100.0)})
    found = reader(file)
    os.utime(tmp_path / "a.parquet", ns=(1, 1))
    with pytest.raises(BadFile) as caught:
        read(found, file, 0, 10)
    assert caught.value.code == "changed"


def remote(url: str, options: dict[str, Any], rows: np.ndarray) -> File:
    root = Location.of(url, options)
    data = io.BytesIO()
    pq.write_table(pa.table({"v": lists(rows), "s": [str(n) for n in range(len(rows))]}), data, row_group_size=1000)
    (root / "a.parquet").write(data.getvalue())
    return find(root, "a.parquet")


@pytest.mark.parametrize("server", ["memory", "weed"])
def test_anywhere(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request for the footer, one for what is needed of a row group."""
    rows = np.arange(6000, dtype=np.float32).reshape(2000, 3)
    served = serve("weed") if server == "weed" else None
    file = remote(*((served.url, served.options) if served else ("memory://parquet", {})), rows)
    requests = []
    fetch = File.read

    def counted(self: File, start: int = 0, stop: int | None = None) -> Any:
        requests.append((start, stop))
        return fetch(self, start, stop)

    monkeypatch.setattr(File, "read", counted)
    found = reader(file)
    assert found.count_file(file) == 2000
    assert len(requests) == 1
    out, carried = read(found, file, 1500, 100)
    np.testing.assert_array_equal(out, rows[1500:1600])
    assert len(requests) == 2
    assert carried == {}


def test_a_first_file_without_rows_does_not_say_how_long_lists_are(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", {"v": pa.array([], pa.list_(pa.float32()))})
    assert "does not say how long rows are" in refused("shape", file)
