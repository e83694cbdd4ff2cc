"""Zarr arrays as sources: rows as Zarr and xarray read them, blocks that keep their versions, and harmful metadata."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from numcodecs import Zlib
from zarr.codecs import BloscCodec, GzipCodec, TransposeCodec, ZstdCodec

from cvae_dist.errors import InvalidInput, SettingsChanged, SourceNotFound
from cvae_dist.sources.cf import BadValues, Packing
from cvae_dist.sources.files import BadFile, Files
from cvae_dist.sources.pieces import Pieces
from cvae_dist.sources.zarr_array import ZarrReader, ZarrSource, fits
from cvae_dist.store import Location, RowStore
from cvae_dist.verbs.ingest import ingest
from tests.servers import serve

pytestmark = [
    pytest.mark.filterwarnings("ignore:The codec:UserWarning"),
    pytest.mark.filterwarnings("ignore:Consolidated metadata:UserWarning"),
    pytest.mark.filterwarnings("ignore:Numcodecs codecs:UserWarning"),
]


def opened(source: ZarrSource) -> tuple[ZarrReader, Files]:
    (files,) = source.list().batches()
    return pickle.loads(pickle.dumps(source.reader(files[:1]))), files


def pieces(reader: ZarrReader, files: Files, step: int) -> list[Pieces]:
    """Return the rows of all files, at most ``step`` at a time, across the borders of files."""
    counts, bad = reader.count(files)
    if bad:
        raise bad[0]
    place = [(number, row) for number, count in enumerate(counts) for row in range(count)]
    found = []
    for first in range(0, len(place), step):
        part = np.array(place[first : first + step])
        numbers, starts, rows = np.unique(part[:, 0], return_index=True, return_counts=True)
        chosen = files[numbers]
        found.append(Pieces(chosen.path, chosen.size, chosen.version, part[starts, 1], rows))
    return found


def read(source: ZarrSource, step: int = 7) -> np.ndarray:
    reader, files = opened(source)
    blocks = []
    for part in pieces(reader, files, step):
        out = np.full((int(part.rows.sum()), reader.schema.n_features), 99, reader.schema.dtype)
        reader.read(part, out)
        blocks.append(out)
    return np.concatenate(blocks) if blocks else np.zeros((0, reader.schema.n_features))


def refused(source: ZarrSource) -> BadFile:
    with pytest.raises(BadFile) as caught:
        read(source)
    return caught.value


def source(path: Path, array: str | None = None, **options: Any) -> ZarrSource:
    return ZarrSource(Location.of(path), array, **options)


@pytest.fixture
def rows() -> np.ndarray:
    return np.random.default_rng(0).normal(1000, 300, (50, 4, 6))


LAYOUTS: list[dict[str, Any]] = [
    {"zarr_format": 2},
    {"zarr_format": 2, "compressors": Zlib(1), "chunk_key_encoding": {"name": "v2", "separator": "/"}},
    {"zarr_format": 2, "order": "F", "compressors": None},
    {"zarr_format": 3},
    {"zarr_format": 3, "shards": (24, 4, 6), "compressors": ZstdCodec()},
    {"zarr_format": 3, "shards": (16, 4, 6), "compressors": None},
    {"zarr_format": 3, "compressors": [BloscCodec()], "filters": [TransposeCodec(order=(2, 0, 1))]},
    {"zarr_format": 3, "compressors": [GzipCodec()], "chunk_key_encoding": {"name": "default", "separator": "."}},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=range(len(LAYOUTS)))
@pytest.mark.parametrize("dtype", ["f4", ">f8", "u1", "i2"])
def test_rows(tmp_path: Path, rows: np.ndarray, layout: dict[str, Any], dtype: str) -> None:
    made = zarr.create_array(tmp_path / "a", shape=rows.shape, chunks=(8, 4, 3), dtype=dtype, **layout)
    made[:] = rows.astype(dtype)
    expected = zarr.open_array(tmp_path / "a")[:].reshape(50, 24)
    for step in (3, 8, 100):
        np.testing.assert_array_equal(read(source(tmp_path / "a"), step), expected)
    reader, files = opened(source(tmp_path / "a"))
    assert reader.schema.item_shape == (4, 6)
    assert reader.schema.dtype == np.dtype(dtype).newbyteorder("=")
    assert files.path[:2].tolist() == ["rows/000000000000000", f"rows/{made.shards[0] if made.shards else 8:015d}"]


def test_vectors_and_no_rows(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "v", data=np.arange(9.0), chunks=(4,))
    np.testing.assert_array_equal(read(source(tmp_path / "v")), np.arange(9.0)[:, None])
    zarr.create_array(tmp_path / "e", shape=(0, 3), chunks=(4, 3), dtype="f4")
    assert len(source(tmp_path / "e").list()) == 0
    for name, shape in [("0", (4, 0)), ("s", ())]:
        zarr.create_array(tmp_path / name, shape=shape, dtype="f4")
        with pytest.raises(InvalidInput, match="has shape"):
            opened(source(tmp_path / name))


@pytest.mark.parametrize("form", [2, 3])
def test_a_data_set_of_xarray(tmp_path: Path, rows: np.ndarray, form: int) -> None:
    place, data = tmp_path / "d.zarr", rows.copy()
    data[3, 1] = np.nan
    values = xr.Dataset(
        {
            "t2m": (("time", "lat", "lon"), data),
            "whole": (("time", "lat"), rows[:, :, 0].astype("i4")),
            "name": ("time", np.array([f"day {n}" for n in range(50)], dtype=object)),
        },
        {"time": np.arange(50), "lat": np.arange(4.0)},
    )
    packed = {"dtype": "i2", "scale_factor": 0.1, "add_offset": 1000.0, "_FillValue": -32768}
    values.to_zarr(place, zarr_format=form, encoding={"t2m": {**packed, "chunks": (20, 4, 6)}})
    read_back = xr.open_zarr(place, decode_times=False)
    np.testing.assert_array_equal(read(source(place, "t2m")), read_back.t2m.values.reshape(50, 24))
    np.testing.assert_array_equal(read(source(place, "whole")), read_back.whole.values)
    assert "as number * 0.1 + 1000.0, and -32768 as missing" in opened(source(place, "t2m"))[0].remark(1, 1)
    with pytest.raises(InvalidInput, match="give --array one of lat, name, t2m, time, whole"):
        opened(source(place))
    with pytest.raises(InvalidInput, match="holds no array 'none'"):
        opened(source(place, "none"))
    reader, files = opened(source(place, "t2m", id="time", carry=("name",)))
    assert [(one.name, one.dtype) for one in reader.schema.columns] == [("id", "<i8"), ("name", "string")]
    (part,) = pieces(reader, files, 100)
    found = reader.read(part, np.empty((50, 24)))
    assert (found["id"].tolist(), found["name"].tolist()) == (list(range(50)), values.name.values.tolist())


ENCODINGS: list[dict[str, Any]] = [
    {},
    {"dtype": "f4", "_FillValue": -999.0},
    {"dtype": "f8", "_FillValue": 1e20, "missing_value": 1e20},
    {"dtype": "f4", "scale_factor": 0.5, "_FillValue": None},
    {"dtype": "i2", "scale_factor": 0.01, "_FillValue": -1},
    {"dtype": "i4", "add_offset": 3.5, "_FillValue": -9999},
    {"dtype": "u1", "scale_factor": 8.0, "_FillValue": 255},
]


@pytest.mark.parametrize("encoding", ENCODINGS, ids=range(len(ENCODINGS)))
@pytest.mark.parametrize("form", [2, 3])
def test_values_are_those_of_xarray(tmp_path: Path, encoding: dict[str, Any], form: int) -> None:
    values = np.random.default_rng(0).normal(500, 300, (12, 5)).clip(1, 1000)
    missing = encoding.get("_FillValue") is not None
    if missing:
        values[2, 3] = np.nan
    raw = xr.Dataset({"x": (("n", "f"), values)})
    raw.to_zarr(tmp_path / "x", zarr_format=form, encoding={"x": {**encoding, "chunks": (5, 5)}})
    expected = xr.open_zarr(tmp_path / "x").x.values
    found = read(source(tmp_path / "x"))
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == expected.dtype
    assert np.isnan(found).sum() == missing


def test_integers_that_are_missing(tmp_path: Path) -> None:
    made = zarr.create_array(tmp_path / "a", data=np.arange(20).reshape(10, 2), chunks=(5, 2))
    made.attrs["missing_value"] = 99
    assert read(source(tmp_path / "a")).dtype == np.int64
    made[7] = 99
    problem = refused(source(tmp_path / "a"))
    assert (problem.path, problem.code) == ("rows/000000000000005", "values")
    assert "has 2 missing values (marked as 99)" in problem.detail


@pytest.mark.parametrize("form", [2, 3])
def test_a_growing_array_keeps_its_blocks(tmp_path: Path, form: int) -> None:
    place = tmp_path / "a"
    made = zarr.create_array(place, data=np.arange(46.0).reshape(23, 2), chunks=(5, 2), zarr_format=form)
    (before,) = source(place).list().batches()
    made.append(np.arange(20.0).reshape(10, 2))
    (after,) = source(place).list().batches()
    assert after.path[:5].tolist() == before.path.tolist()
    assert (after.version[:5] == before.version).tolist() == [True] * 4 + [False]  # the last one was not full
    assert opened(source(place))[0].count(after)[0].tolist() == [5] * 6 + [3]
    made.resize((34, 2))  # a row more in a block whose object stays as it is
    (longer,) = source(place).list().batches()
    assert (longer.version == after.version).tolist() == [True] * 6 + [False]
    made.resize((33, 2))
    made[7] = 5
    (changed,) = source(place).list().batches()
    assert (changed.version == after.version).tolist() == [True, False] + [True] * 5
    made.attrs["scale_factor"] = 2.0
    (other,) = source(place).list().batches()
    assert not (other.version == changed.version).any()


def test_a_column_is_part_of_the_rows_it_travels_with(tmp_path: Path) -> None:
    group = zarr.open_group(tmp_path / "g", mode="w")
    group.create_array("x", data=np.arange(40.0).reshape(20, 2), chunks=(5, 2))
    for name in ("label", "number"):
        group.create_array(name, data=np.arange(20), chunks=(10,))
    given = {"format": "zarr", "array": "x", "id": "number", "carry": ("label",)}
    ingest(tmp_path / "g", tmp_path / "s", **given)
    (without,) = source(tmp_path / "g", "x").list().batches()
    reader, before = opened(source(tmp_path / "g", "x", id="number", carry=("label",)))
    for name in ("label", "number"):
        group[name][13] = 5
        (after,) = source(tmp_path / "g", "x", id="number", carry=("label",)).list().batches()
        assert (after.version == before.version).tolist() == [True, True, False, False]
        with pytest.raises(BadFile, match="rows/000000000000010 (has an object c/1, which )?was changed after"):
            reader.read(parts_of(reader, before), np.empty((20, 2)))
        reader, before = opened(source(tmp_path / "g", "x", id="number", carry=("label",)))
    (still,) = source(tmp_path / "g", "x").list().batches()
    assert (still.version == without.version).all()
    with pytest.raises(SettingsChanged, match="2 changed: rows/000000000000010, rows/000000000000015"):
        ingest(tmp_path / "g", tmp_path / "s", **given)
    ingest(tmp_path / "g", tmp_path / "s", changed="rewrite", **given)
    assert RowStore.open(str(tmp_path / "s")).read("label").tolist() == [*range(13), 5, *range(14, 20)]


def test_changes_after_the_listing(tmp_path: Path) -> None:
    made = zarr.create_array(tmp_path / "a", data=np.arange(40.0).reshape(20, 2), chunks=(5, 2))
    reader, files = opened(source(tmp_path / "a"))
    made[7] = 5
    parts = pieces(reader, files, 100)
    with pytest.raises(BadFile, match="rows/000000000000005 was changed"):
        reader.read(parts[0], np.empty((20, 2)))
    reader, files = opened(source(tmp_path / "a"))
    reader.read(parts_of(reader, files), np.empty((20, 2)))
    made[12] = 5  # after the objects of every block were looked up
    with pytest.raises(BadFile, match="rows/000000000000010 has an object c/2/0, which (was changed|became)"):
        reader.read(parts_of(reader, files), np.empty((20, 2)))
    shutil.rmtree(tmp_path / "a" / "c" / "3")
    with pytest.raises(BadFile):
        reader.read(parts_of(reader, files), np.empty((20, 2)))


def parts_of(reader: ZarrReader, files: Files) -> Pieces:
    (part,) = pieces(reader, files, 10**6)
    return part


def test_chunks_that_were_never_written(tmp_path: Path) -> None:
    made = zarr.create_array(tmp_path / "a", shape=(20, 4), chunks=(5, 2), dtype="f4")
    made[:12] = 1
    reader, files = opened(source(tmp_path / "a"))
    counts, bad = reader.count(files)
    assert counts.tolist() == [5, 5, 5, 0]
    assert str(bad[0]) == (
        "rows/000000000000015 lacks 2 of 2 objects (c/3/0 first), which would read as the fill value 0.0"
    )
    made = zarr.create_array(tmp_path / "n", shape=(20, 4), chunks=(5, 2), dtype="f4", fill_value=np.nan)
    made[:12] = 1
    np.testing.assert_array_equal(read(source(tmp_path / "n")), made[:])
    zarr.create_array(tmp_path / "h", shape=(10**15, 4), chunks=(5, 2), dtype="f4")
    with pytest.raises(InvalidInput, match="400,000,000,000,000 objects, but 1 are listed"):
        source(tmp_path / "h").list()


def test_damaged_chunks_are_named(tmp_path: Path) -> None:
    data = np.random.default_rng(0).normal(size=(20, 50))
    zarr.create_array(tmp_path / "a", data=data, chunks=(5, 50), compressors=[ZstdCodec(checksum=True)])
    for number, content in [(1, b""), (2, b"garbage"), (3, None)]:
        chunk = tmp_path / "a" / "c" / str(number) / "0"
        whole = chunk.read_bytes()
        damaged = bytearray(whole)
        damaged[len(whole) // 2] ^= 1
        chunk.write_bytes(damaged if content is None else content)
        problem = refused(source(tmp_path / "a"))
        assert (problem.path, problem.code) == (f"rows/{5 * number:015d}", "corrupt")
        chunk.write_bytes(whole)


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (self.path,)  # type: ignore[return-value]


@pytest.mark.parametrize(
    "change",
    [
        {"filters": [{"id": "pickle"}]},
        {"compressor": {"id": "pickle"}},
        {"filters": [{"id": "json2"}], "dtype": "|O"},
        {"filters": [{"id": "no such codec"}]},
        {"dtype": "|O"},
        {"dtype": [["a", "<f4"], ["b", "<f4"]]},
        {"dtype": "<c16"},
        {"dtype": "nonsense"},
        {"shape": [4, -2]},
        {"chunks": [0, 2]},
        {"chunks": [2, 2, 2]},
        {"chunks": [2, 2**40]},
        {"shape": "four"},
        {"compressor": 7},
    ],
    ids=str,
)
def test_metadata_of_format_2_that_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    zarr.create_array(tmp_path / "a", data=np.zeros((4, 2)), chunks=(2, 2), zarr_format=2, compressors=None)
    document = json.loads((tmp_path / "a/.zarray").read_text())
    (tmp_path / "a/.zarray").write_text(json.dumps({**document, **change}))
    (tmp_path / "a/0.0").write_bytes(pickle.dumps(_Bomb(tmp_path / "executed")))
    with pytest.raises(InvalidInput):
        read(source(tmp_path / "a"))
    assert not (tmp_path / "executed").exists()


def codecs(*names: str) -> list[dict[str, Any]]:
    return [{"name": name, "configuration": {}} for name in names]


@pytest.mark.parametrize(
    "change",
    [
        {"codecs": codecs("bytes", "numcodecs.pickle")},
        {"codecs": codecs("numcodecs.pickle")},
        {"codecs": [{"name": "sharding_indexed", "configuration": {"codecs": codecs("bytes", "evil")}}]},
        {"codecs": []},
        {"codecs": ["pickle"]},
        {"data_type": "complex64"},
        {"data_type": "bool"},
        {"data_type": {"name": "struct"}},
        {"chunk_grid": {"name": "rectilinear"}},
        {"fill_value": "many"},
        {"zarr_format": 9},
        {"shape": None},
    ],
    ids=str,
)
def test_metadata_of_format_3_that_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    zarr.create_array(tmp_path / "a", data=np.ones((4, 2)), chunks=(2, 2))
    document = json.loads((tmp_path / "a/zarr.json").read_text())
    (tmp_path / "a/zarr.json").write_text(json.dumps({**document, **change}))
    with pytest.raises(InvalidInput):
        read(source(tmp_path / "a"))


def test_what_is_no_array(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound):
        source(tmp_path).list()
    for text in (b"", b"{", b"[]", b"[" * 100_000, b'{"node_type": "array"}'):
        (tmp_path / "zarr.json").write_bytes(text)
        with pytest.raises(InvalidInput):
            source(tmp_path).list()
    group = zarr.create_group(tmp_path / "g")
    group.create_array("inner/x", data=np.ones((4, 2)))
    with pytest.raises(InvalidInput, match="give --array one of inner/x"):
        source(tmp_path / "g").list()
    assert read(source(tmp_path / "g", "inner/x")).shape == (4, 2)
    for name in ("../g/inner/x", "/inner/x", "inner//x", ""):
        with pytest.raises(InvalidInput):
            source(tmp_path / "g", name).list()


def test_columns_have_to_fit(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "g")
    group.create_array("x", data=np.ones((6, 2)), chunks=(2, 2))
    group.create_array("short", data=np.arange(5), chunks=(2,))
    group.create_array("wide", data=np.ones((6, 2)))
    label = group.create_array("label", shape=(6,), chunks=(4,), dtype="i4")
    for name in ("short", "wide", "none"):
        with pytest.raises(InvalidInput):
            opened(source(tmp_path / "g", "x", carry=(name,)))
    reader, files = opened(source(tmp_path / "g", "x", id="label"))
    with pytest.raises(BadFile, match="label lacks c/0"):
        reader.read(parts_of(reader, files), np.empty((6, 2)))
    label[:] = np.arange(1, 7)
    reader, files = opened(source(tmp_path / "g", "x", id="label"))
    for part, expected in zip(pieces(reader, files, 4), ([1, 2, 3, 4], [5, 6]), strict=True):
        assert reader.read(part, np.empty((len(expected), 2)))["id"].tolist() == expected


@pytest.mark.parametrize("where", ["memory", "weed"])
@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[4]], ids=["chunks", "shards"])
def test_on_an_object_store(tmp_path: Path, rows: np.ndarray, where: str, layout: dict[str, Any]) -> None:
    url, options = ("memory://zarr-source", {}) if where == "memory" else serve(where)[:2]
    zarr.create_array(tmp_path / "a", shape=rows.shape, chunks=(8, 4, 3), dtype="f8", **layout)[:] = rows
    root = Location.of(url, options) / layout.get("shards", "chunks").__class__.__name__
    for path in (tmp_path / "a").rglob("*"):
        if path.is_file():
            (root / str(path.relative_to(tmp_path / "a"))).write(path.read_bytes())
    np.testing.assert_array_equal(read(ZarrSource(root), 30), rows.reshape(50, 24))
    reader, files = opened(ZarrSource(root))
    part = parts_of(reader, files)
    reader.read(part, np.empty((50, 24)))
    name = next(entry.name for entry in root.list() if entry.name[-1].isdigit())
    (root / name).write(b"other")
    with pytest.raises(BadFile, match="was changed"):
        reader.read(part, np.empty((50, 24)))


def test_our_own_store_needs_no_ingest(tmp_path: Path, digits_tree: Path) -> None:
    store = Location.of(tmp_path / "store")
    assert fits(store, None) is None
    ingest(digits_tree, tmp_path / "store", rows_per_file="one")
    assert f"{store} is a store of 300 rows already" in str(fits(store, None))
    assert fits(store, "id") is None
    reader, files = opened(ZarrSource(store, id="id"))  # it can be a source all the same
    out = np.empty((300, 64), np.uint8)
    found = reader.read(parts_of(reader, files), out)
    opened_store = RowStore.open(store)
    np.testing.assert_array_equal(out, opened_store.read("x"))
    assert found["id"].tolist() == opened_store.read("id").tolist()
    zarr.create_array(tmp_path / "a", data=np.ones((4, 2)))
    assert fits(Location.of(tmp_path / "a"), None) is None


def test_signed_and_unsigned() -> None:
    """As the NetCDF library and OPeNDAP write them."""
    packing = Packing.of({"_Unsigned": "true", "_FillValue": np.int8(-1), "scale_factor": 2.0}, np.dtype("i1"))
    assert packing == Packing.of({"_Unsigned": "true", "_FillValue": 255, "scale_factor": 2.0}, np.dtype("i1"))
    np.testing.assert_array_equal(packing.decode(np.array([1, -2, -1], "i1")), [2, 508, np.nan])
    packing = Packing.of({"_Unsigned": "false", "missing_value": -1}, np.dtype("u1"))
    assert packing.decode(np.array([1, 254], "u1")).tolist() == [1, -2]
    for attributes in (
        {"scale_factor": "2"},
        {"add_offset": [1.0, 2.0]},
        {"scale_factor": np.inf},
        {"_FillValue": "x"},
    ):
        with pytest.raises(BadValues, match="has the attribute"):
            Packing.of(attributes, np.dtype("i2"))
    marks = {"_FillValue": -99999, "missing_value": [0.5, np.nan, 7]}  # those that no number can be mark nothing
    assert Packing.of(marks, np.dtype("i2")).missing == (7,)
