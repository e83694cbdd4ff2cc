"""HDF5 and NetCDF4 files: rows as h5py and xarray read them; nothing outside a file is ever followed."""

import io
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import xarray as xr

from cvae_dist.errors import MissingExtra
from cvae_dist.sources import hdf5
from cvae_dist.sources.files import BadFile, File
from cvae_dist.sources.hdf5 import hdf5_reader
from cvae_dist.store import Location
from tests import tables
from tests.servers import serve
from tests.tables import listed, read_steps


def read(file: File, array: str | None = None, step: int = 7) -> np.ndarray:
    return read_steps(hdf5_reader(file.root, file, array), file, step)


def refused(path: Path, array: str | None = None) -> BadFile:
    return tables.refused(hdf5_reader, path, array)


@pytest.fixture
def rows() -> np.ndarray:
    return np.random.default_rng(0).normal(1000, 300, (50, 4, 6))


LAYOUTS: list[dict[str, Any]] = [
    {},
    {"chunks": (8, 4, 3)},
    {"chunks": (8, 4, 3), "compression": "gzip", "shuffle": True},
    {"chunks": (50, 4, 6), "compression": "lzf", "fletcher32": True},
    {"chunks": (8, 4, 6), "maxshape": (None, 4, 6)},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=range(len(LAYOUTS)))
@pytest.mark.parametrize("dtype", ["f4", ">f8", "f2", "u1", ">i2"])
def test_rows(tmp_path: Path, rows: np.ndarray, layout: dict[str, Any], dtype: str) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("deep/x", data=rows.astype(dtype), **layout)
        file["numbers"] = np.arange(50)
        expected = file["deep/x"][:].reshape(50, 24)
    for step in (3, 50):
        np.testing.assert_array_equal(read(listed(tmp_path / "a.h5"), step=step), expected)
    np.testing.assert_array_equal(read(listed(tmp_path / "a.h5"), "/deep/x"), expected)
    np.testing.assert_array_equal(read(listed(tmp_path / "a.h5"), "numbers"), np.arange(50)[:, None])


def test_several_files_are_alike(tmp_path: Path) -> None:
    arrays = {"a": np.zeros((2, 3)), "b": np.zeros((4, 3)), "c": np.zeros((2, 4)), "d": np.zeros((2, 3), "f4")}
    for name, array in arrays.items():
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["x"] = array
    reader = hdf5_reader(Location.of(tmp_path), listed(tmp_path / "a.h5"), "x")
    found: list[Any] = []
    for name in arrays:
        try:
            found.append(reader.count_file(listed(tmp_path / f"{name}.h5")))
        except BadFile as error:
            found.append(error.code)
    assert found == [2, 4, "shape", "dtype"]


def netcdf(path: Path, packed: np.ndarray, **attributes: Any) -> None:
    """Write a variable with its dimensions, as the NetCDF library does."""
    with h5py.File(path, "w") as file:
        variable = file.create_dataset("t2m", data=packed, chunks=(3, *packed.shape[1:]), compression="gzip")
        variable.attrs.update(attributes)
        for axis, name in enumerate(("time", "lat", "lon")):
            file[name] = np.arange(packed.shape[axis], dtype="f8")
            file[name].make_scale(name)
            variable.dims[axis].attach_scale(file[name])


@pytest.mark.parametrize("number", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(), (1,)], ids=["number", "array"])
def test_packed_numbers(tmp_path: Path, rows: np.ndarray, number: type, shape: tuple[int, ...]) -> None:
    packed = ((rows - 1000) / 0.5).astype("i2")
    packed[3, 1] = -32767
    scale, offset = np.full(shape, 0.5, number), np.full(shape, 1000, number)
    netcdf(tmp_path / "a.nc", packed, scale_factor=scale, add_offset=offset, _FillValue=np.full(shape, -32767, "i2"))
    raw = xr.Dataset(
        {
            "x": (
                ("a", "b", "c"),
                packed,
                {"scale_factor": number(0.5), "add_offset": number(1000), "_FillValue": -32767},
            )
        }
    )
    expected = xr.decode_cf(raw).x.values.reshape(50, 24)
    found = read(listed(tmp_path / "a.nc"))
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == expected.dtype == number
    assert np.isnan(found).sum() == 6


def test_integers_that_are_missing(tmp_path: Path) -> None:
    netcdf(tmp_path / "a.nc", np.arange(24).reshape(4, 2, 3), missing_value=5)
    problem = refused(tmp_path / "a.nc")
    assert (problem.code, problem.detail.split(",")[0]) == ("values", "has 1 missing values (marked as 5)")
    netcdf(tmp_path / "a.nc", np.arange(24).reshape(4, 2, 3), missing_value=99)
    assert read(listed(tmp_path / "a.nc")).dtype == np.int64
    netcdf(tmp_path / "a.nc", np.arange(24).reshape(4, 2, 3), scale_factor="two")
    assert refused(tmp_path / "a.nc").code == "values"


def test_which_dataset(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"], file["g/y"], file["z"] = np.ones((2, 3)), np.zeros((2, 3)), np.arange(3)
        file["scalar"], file["empty"] = 3.0, h5py.Empty("f4")
        file["flat"] = np.zeros((3, 0))
    assert "2 datasets of numbers with at least two axes" not in refused(tmp_path / "a.h5").detail  # flat is one more
    assert "one has to be named: empty, flat, g/y, scalar, x, z" in refused(tmp_path / "a.h5").detail
    for name in ("none", "g", "x/y", "..", "", "g/../x"):
        assert f"holds no dataset {name!r}" in refused(tmp_path / "a.h5", name).detail
    assert [refused(tmp_path / "a.h5", name).code for name in ("scalar", "empty", "flat")] == ["shape"] * 3


def test_types_that_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["text"] = np.array([["a", "b"]], dtype=h5py.string_dtype())
        file["fixed"] = np.array([[b"a", b"b"]])
        file.create_dataset("ragged", (2, 2), h5py.vlen_dtype(np.int32))
        file.create_dataset("reference", (2, 2), h5py.ref_dtype)
        file["compound"] = np.zeros((2, 2), [("a", "f4"), ("b", "i4")])
        file["complex"] = np.zeros((2, 2), "c8")
        file["truth"] = np.zeros((2, 2), bool)
        names = list(file)
    assert {name: refused(tmp_path / "a.h5", name).code for name in names} == dict.fromkeys(names, "dtype")
    assert "holds 0 datasets of numbers" in refused(tmp_path / "a.h5").detail


def test_other_files_are_never_read(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["x"] = np.ones((4, 3))
    (tmp_path / "secret.bin").write_bytes(np.ones((4, 3)).tobytes())
    virtual = h5py.VirtualLayout((4, 3), "f8")
    virtual[:] = h5py.VirtualSource(str(tmp_path / "secret.h5"), "x", (4, 3))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["real"] = np.zeros((4, 3))
        file["link"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "x")
        file["group"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "/")
        file["soft"] = h5py.SoftLink("/group/x")
        file["dangling"] = h5py.SoftLink("/nothing")
    codes = [refused(tmp_path / "a.h5", name).code for name in ("link", "group/x", "soft", "dangling")]
    assert codes == ["link"] * 4
    assert "secret.h5" in refused(tmp_path / "a.h5", "link").detail
    assert (read(listed(tmp_path / "a.h5")) == 0).all()  # links are not even looked at
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file.create_virtual_dataset("virtual", virtual)
        file.create_dataset("outside", (4, 3), "f8", external=[(str(tmp_path / "secret.bin"), 0, 96)])
    assert [refused(tmp_path / "b.h5", name).code for name in ("virtual", "outside")] == ["external"] * 2


def test_plugins_are_not_loaded(tmp_path: Path) -> None:
    made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    made.set_chunk((2, 3))
    made.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (3,))  # zstd
    with h5py.File(tmp_path / "a.h5", "w") as file:
        space, kind = h5py.h5s.create_simple((4, 3)), h5py.h5t.NATIVE_DOUBLE
        h5py.h5d.create(file.id, b"x", kind, space, made)
        file["x"][:] = 1
    problem = refused(tmp_path / "a.h5")
    assert (problem.code, "plugin 32015" in problem.detail) == ("filter", True)


def test_values_that_were_never_written(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        chunked = file.create_dataset("chunked", (20, 3), "f4", chunks=(5, 3))
        chunked[:12] = 1
        file.create_dataset("plain", (20, 3), "f4")
        file.create_dataset("nan", (20, 3), "f4", chunks=(5, 3), fillvalue=np.nan)[:12] = 1
        file.create_dataset("huge", (10**12, 10**6), "f8", chunks=(5, 3))
        file.create_dataset("wide", (4, 10**9), "f8", chunks=(1, 5 * 10**8))
        file.create_dataset("none", (0, 3), "f8", chunks=(5, 3), maxshape=(None, 3))
        expected = file["nan"][:]
    assert refused(tmp_path / "a.h5", "chunked").detail == "lacks 1 of 4 chunks, which read as the fill value 0.0"
    codes = [refused(tmp_path / "a.h5", name).code for name in ("plain", "huge", "wide")]
    assert codes == ["missing", "missing", "chunks"]
    np.testing.assert_array_equal(read(listed(tmp_path / "a.h5"), "nan"), expected)
    assert read(listed(tmp_path / "a.h5"), "none").shape == (0, 3)


def test_files_that_are_no_hdf5(tmp_path: Path) -> None:
    path = tmp_path / "a.nc"
    codes = []
    for content in (b"", b"CDF\x01" + bytes(100), b"garbage" * 100, b"\x89HDF\r\n\x1a\n"):
        path.write_bytes(content)
        codes.append(refused(path).code)
    assert codes == ["hdf5", "netcdf3", "hdf5", "hdf5"]


@pytest.mark.filterwarnings("ignore:Consolidated metadata:UserWarning")
def test_the_line_that_converts_the_classic_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(6.0).reshape(2, 3)
    xr.Dataset({"x": (("a", "b"), values)}).to_netcdf(tmp_path / "a.nc", engine="scipy")
    line = refused(tmp_path / "a.nc").detail.split("convert it with Python: ")[1]
    monkeypatch.chdir(tmp_path)
    exec(line)
    np.testing.assert_array_equal(xr.open_zarr(tmp_path / "a.zarr", consolidated=False).x.values, values)


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[2]], ids=["plain", "chunks"])
def test_every_truncation_is_refused(tmp_path: Path, rows: np.ndarray, layout: dict[str, Any]) -> None:
    path, memory = tmp_path / "a.h5", io.BytesIO()
    with h5py.File(memory, "w") as file:
        file.create_dataset("x", data=rows, **layout)
    whole = memory.getvalue()
    for length in range(1, len(whole), len(whole) // 40):
        path.write_bytes(whole[:length])
        assert refused(path).code == "hdf5"


def test_flipped_bytes_never_crash(tmp_path: Path) -> None:
    path, memory, rows = tmp_path / "a.h5", io.BytesIO(), np.arange(60.0).reshape(20, 3)
    with h5py.File(memory, "w") as file:
        file.create_dataset("x", data=rows, chunks=(5, 3), fletcher32=True)
    whole, damaged = memory.getvalue(), 0
    for place in range(8, len(whole), 23):
        data = bytearray(whole)
        data[place] ^= 0x41
        path.write_bytes(data)
        try:
            read(listed(path), "x")
        except BadFile:
            damaged += 1
    assert damaged > 10


def test_a_file_that_changes(tmp_path: Path, rows: np.ndarray) -> None:
    path = tmp_path / "a.h5"
    for step in range(2):
        with h5py.File(path, "w") as made:
            made["x"] = rows + step
        if not step:
            file = listed(path)
            reader = hdf5_reader(file.root, file, None)
            assert reader.count_file(file) == 50
    hdf5._kept.content = None  # as on another worker; this thread has what was listed
    with pytest.raises(BadFile, match="a.h5 was changed"):
        reader.read_file(file, 0, np.empty((50, 24)))


def test_h5py_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.h5").write_bytes(b"any")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MissingExtra, match=r"pip install 'cvae-dist\[hdf5\]'"):
        hdf5_reader(Location.of(tmp_path), listed(tmp_path / "a.h5"), None)


@pytest.mark.parametrize("where", ["memory", "weed"])
def test_on_an_object_store(tmp_path: Path, where: str) -> None:
    url, options = ("memory://hdf5", {}) if where == "memory" else serve(where)[:2]
    root, rows = Location.of(url, options), np.random.default_rng(0).normal(size=(1000, 300))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=rows, chunks=(100, 300), compression="gzip")
    (root / "a.h5").write((tmp_path / "a.h5").read_bytes())
    (file,) = (File(root, *entry) for entry in root.list())
    np.testing.assert_array_equal(read(file, step=300), rows)
    (root / "a.h5").write(b"other")
    hdf5._kept.content = None
    with pytest.raises(BadFile, match="a.h5 was changed"):
        read(file)
