"""Rows of CSV and TSV files: as pandas reads them, or refused by column, row and value."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cvae_dist.sources import csv
from cvae_dist.sources.csv import CsvReader, csv_reader
from cvae_dist.sources.files import BadFile, File
from cvae_dist.sources.options import TableOptions
from cvae_dist.sources.source import Column
from cvae_dist.store.urls import Location
from tests.servers import serve
from tests.tables import found as find
from tests.tables import listed, read


def write(path: Path, text: str | bytes) -> File:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return listed(path)


def reader(file: File, *columns: str, id: str | None = None, carry: tuple[str, ...] = ()) -> CsvReader:
    return csv_reader(file.root, file, TableOptions(columns, id, carry))


def refused(code: str, file: File, *columns: str, **options: Any) -> str:
    with pytest.raises(BadFile) as caught:
        reader(file, *columns, **options).count_file(file)
    assert (caught.value.code, caught.value.path) == (code, file.path), caught.value.detail
    return caught.value.detail


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.TSV", "\t")])
def test_like_pandas(tmp_path: Path, name: str, delimiter: str) -> None:
    random = np.random.default_rng(0)
    frame = pd.DataFrame(random.normal(size=(300, 4)), columns=list("abcd"))
    frame["key"] = [f"{number:05}" for number in range(300)]
    frame["label"] = np.arange(300) % 3
    frame["caption"] = 'two\nlines, and a "quote"'
    frame.to_csv(tmp_path / name, sep=delimiter)  # with its index, a column without a name
    file = listed(tmp_path / name)
    found = reader(file, id="key", carry=("label", "caption"))
    assert found.schema.features == tuple("abcd")
    assert found.schema.dtype == np.float64
    assert found.schema.columns == (Column("id", "string"), Column("label", "<i8"), Column("caption", "string"))
    rows, carried = read(found, file)
    np.testing.assert_array_equal(rows, frame[list("abcd")])
    assert {name: values.tolist() for name, values in carried.items()} == {
        "id": frame["key"].tolist(), "label": frame["label"].tolist(), "caption": frame["caption"].tolist()
    }  # fmt: skip
    np.testing.assert_array_equal(read(reader(file, "c", "a"), file)[0], frame[["c", "a"]])


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("a,b\n1,2\n3,4\n", [[1, 2], [3, 4]]),
        ("a,b\n1,2\n3,4", [[1, 2], [3, 4]]),
        ("a,b\r\n1,2\r\n", [[1, 2]]),
        ("\ufeffa,b\n1,2\n", [[1, 2]]),
        ('"a","b"\n"1","2"\n', [[1, 2]]),
        ("a,b\n1,2\n\n3,4\n\n", [[1, 2], [3, 4]]),
        ("a,b\n 1, 2\n", [[1, 2]]),
        ("a,b\n1,2.5\n", [[1, 2.5]]),
        ("a,b\nnan,-inf\n1,NaN\n", [[np.nan, -np.inf], [1, np.nan]]),
        ("a\n1\n", [[1]]),
    ],
)
def test_ways_to_write(tmp_path: Path, text: str, rows: list[list[float]]) -> None:
    file = write(tmp_path / "a.csv", text)
    found = reader(file)
    np.testing.assert_array_equal(read(found, file)[0], rows)
    whole = all(isinstance(value, int) for row in rows for value in row)
    assert found.schema.dtype == (np.int64 if whole else np.float64)


@pytest.mark.parametrize(
    ("text", "options", "code", "said"),
    [
        ("", {}, "values", "Empty CSV file"),
        ("a,b\n", {}, "header", "no values below its header"),
        ("a,b", {}, "values", "Empty CSV file"),
        ("1.5,2\n3,4\n", {}, "header", "put a line of names"),
        ("a,a\n1,2\n", {}, "schema", "2 columns named 'a'"),
        ("a,b\n1,2\n3\n", {}, "ragged", "1 values in row 3 (1 is the header), where 2 are needed"),
        ("a,b\n1,2,3\n", {}, "ragged", "3 values in row 2"),
        ("a,b\n1,x\n", {}, "dtype", "no single numbers in 'b' (string)"),
        ("a,b\n1,true\n", {}, "dtype", "no single numbers in 'b' (string)"),
        ("a,b\n1,2\n3,x\n", {"columns": ("a", "b")}, "values", "has 'x' in column 'b' of row 3 (1 is the header)"),
        ("a,b\n1,2\n3,\n", {}, "nulls", "a missing value in column 'b', the first in row 1"),
        ("a,b\n1,2\n3,NA\n", {}, "nulls", "a missing value in column 'b'"),
        ("a,b\n1,2\n3,\0\n", {"columns": ("b",)}, "values", "in column 'b' of row 3"),
        (b"a,b\n1,\xff\n", {"carry": ("b",)}, "values", "invalid UTF8"),
        (b"a,\xff\n1,2\n", {}, "values", "utf-8"),
        ('a,b\n1,"x\n2,y\n', {"carry": ("b",)}, "values", 'quote (") that is not closed'),
        ("a,b\n1,2\n", {"id": "c"}, "schema", "no column 'c'"),
        ("a\n123456789012345678901234567890\n", {"columns": ("a",)}, "", ""),
        ("s\nx\n", {"carry": ("s",)}, "schema", "no column of numbers"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str | bytes, options: dict[str, Any], code: str, said: str) -> None:
    file = write(tmp_path / "a.csv", text)
    options = dict(options)
    columns = options.pop("columns", ())
    if code:
        assert said in refused(code, file, *columns, **options)
    else:
        assert reader(file, *columns).count_file(file) == 1


def test_later_files(tmp_path: Path) -> None:
    first = write(tmp_path / "a.csv", "a,b,n\n1,2,3\n")
    found = reader(first, carry=("n",))
    other = write(tmp_path / "b.csv", "n,b,a\n6,5,4\n")
    rows, carried = read(found, other)
    assert (rows.tolist(), carried["n"].tolist()) == ([[4, 5]], [6])
    assert found.count_file(write(tmp_path / "c.csv", "a,b,n\n")) == 0
    for text, code, said in [
        ("a,n\n1,2\n", "schema", "lacks 'b'"),
        ("a,b,c,n\n1,2,3,4\n", "dtype", "'c'"),
        ("a,b,n\n1,2.5,3\n", "values", "has '2.5' in column 'b' of row 2 (1 is the header): no whole number"),
        ("a,b,n\n1,2,z\n", "values", "has 'z' in column 'n' of row 2"),
        ("a,b,n\n1,2,\n", "nulls", "column 'n'"),
    ]:
        file = write(tmp_path / "d.csv", text)
        with pytest.raises(BadFile) as caught:
            found.count_file(file)
        assert caught.value.code == code
        assert said in caught.value.detail
    some = reader(first, "a")
    assert read(some, write(tmp_path / "e.csv", "z,a\nx,9\n"))[0].tolist() == [[9]]


def test_a_row_longer_than_what_is_parsed_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv, "_BLOCK_BYTES", 1000)
    file = write(tmp_path / "a.csv", "a,s\n1,x\n2," + "y" * 5000 + "\n")
    assert "a row of more than 1,000 bytes" in refused("values", file, carry=("s",))


@pytest.fixture(scope="module")
def ranged(tmp_path_factory: pytest.TempPathFactory) -> tuple[CsvReader, File]:
    lines = [f"{row},{row / 2},text {row % 7}" for row in range(1000)]
    file = write(tmp_path_factory.mktemp("ranged") / "a.csv", "\n".join(["a,b,s", *lines]))
    return reader(file, id="a", carry=("s",)), file


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000)), min_size=1, max_size=4))
def test_any_rows_in_any_order(ranged: tuple[CsvReader, File], cuts: list[tuple[int, int]]) -> None:
    found, file = ranged
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csv, "_BLOCK_BYTES", 1000)
        for first, stop in map(sorted, cuts):
            rows, carried = read(found, file, first, stop - first)
            assert rows[:, 0].tolist() == [row / 2 for row in range(first, stop)]
            assert carried["id"].tolist() == [str(row) for row in range(first, stop)]
            assert carried["s"].tolist() == [f"text {row % 7}" for row in range(first, stop)]


def test_a_file_that_became_shorter_than_counted(ranged: tuple[CsvReader, File]) -> None:
    found, file = ranged
    with pytest.raises(BadFile, match="ends after row 1,000, where 1,001 rows were counted") as caught:
        read(found, file, 900, 101)
    assert caught.value.code == "truncated"


def test_readers_travel(ranged: tuple[CsvReader, File]) -> None:
    found, _ = ranged
    assert pickle.loads(pickle.dumps(found)) == found


@pytest.mark.parametrize("server", ["memory", "weed"])
def test_anywhere(server: str) -> None:
    served = serve("weed") if server == "weed" else None
    root = Location.of(served.url, served.options) if served else Location.of("memory://csv")
    (root / "a.csv").write(b"a,b\n" + b"1.5,2\n" * 1000)
    file = find(root, "a.csv")
    found = reader(file)
    np.testing.assert_array_equal(read(found, file, 990)[0], [[1.5, 2]] * 10)
