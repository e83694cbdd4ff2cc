"""``.npz`` files: rows arrive as NumPy reads them, and nothing that a file claims is believed."""

import io
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from cvae_dist.sources import npz
from cvae_dist.sources.files import BadFile, File
from cvae_dist.sources.npz import npz_reader
from cvae_dist.store import Location
from tests import tables
from tests.servers import serve
from tests.tables import listed, read_steps

DTYPES = ["f2", "f4", "f8", "i1", "u1", "i4", "u8", ">f4", ">i2"]


def read(file: File, array: str | None = None, step: int = 3) -> np.ndarray:
    return read_steps(npz_reader(file.root, file, array), file, step)


def refused(path: Path, array: str | None = None) -> BadFile:
    return tables.refused(npz_reader, path, array)


@pytest.fixture
def rows() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 100, (10, 2, 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_rows(tmp_path: Path, rows: np.ndarray, dtype: str, save: object, order: str) -> None:
    rows = np.asarray(rows.astype(dtype), order=order)
    save(tmp_path / "a.npz", rows)  # type: ignore[operator]
    for step in (1, 3, 10):
        np.testing.assert_array_equal(read(listed(tmp_path / "a.npz"), step=step), rows.reshape(10, 6))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_any_order_of_reads(tmp_path: Path, rows: np.ndarray, save: object) -> None:
    save(tmp_path / "a.npz", x=rows, y=rows[:, 0] * 2)  # type: ignore[operator]
    file = listed(tmp_path / "a.npz")
    readers = {name: npz_reader(file.root, file, name) for name in "xy"}
    expected = {"x": rows.reshape(10, 6), "y": rows[:, 0] * 2}
    for name, first, stop in ["x04", "y57", "x57", "x9:", "x03", "y0:", "x0:", "x22"]:
        stop = 10 if stop == ":" else int(stop)
        out = np.empty((stop - int(first), readers[name].schema.n_features), rows.dtype)
        readers[name].read_file(file, int(first), out)
        np.testing.assert_array_equal(out, expected[name][int(first) : stop])


def test_large_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npz, "_PIECE", 1000)
    rows = np.random.default_rng(0).normal(size=(100, 64)).astype("f4")
    np.savez_compressed(tmp_path / "a.npz", rows)
    np.testing.assert_array_equal(read(listed(tmp_path / "a.npz"), step=17), rows)


def test_vectors_and_empty_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", np.arange(7.0))
    np.testing.assert_array_equal(read(listed(tmp_path / "v.npz")), np.arange(7.0)[:, None])
    np.savez(tmp_path / "e.npz", np.zeros((0, 3)))
    assert read(listed(tmp_path / "e.npz")).shape == (0, 3)
    np.savez(tmp_path / "0.npz", np.zeros((3, 0)))
    assert refused(tmp_path / "0.npz").code == "shape"
    np.savez(tmp_path / "s.npz", np.float32(3))
    assert "holds no rows" in refused(tmp_path / "s.npz").detail


def test_which_array(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **{"a/b": np.ones((2, 3)), "c": np.zeros((4, 3)), "..": np.full((1, 3), 5.0)})
    for name, value in [("a/b", 1), ("c", 0), ("..", 5)]:  # names are names: nothing is unpacked
        assert (read(listed(tmp_path / "a.npz"), name) == value).all()
    assert "one has to be named: .., a/b, c" in refused(tmp_path / "a.npz").detail
    assert "holds no array 'd' but: .., a/b, c" in refused(tmp_path / "a.npz", "d").detail


def test_all_files_are_alike(tmp_path: Path) -> None:
    for name, array in {"a": np.zeros((2, 3)), "b": np.zeros((2, 4)), "c": np.zeros((2, 3), "f4")}.items():
        np.savez(tmp_path / f"{name}.npz", array)
    reader = npz_reader(Location.of(tmp_path), listed(tmp_path / "a.npz"), None)
    codes = []
    for name in "bc":
        with pytest.raises(BadFile) as caught:
            reader.count_file(listed(tmp_path / f"{name}.npz"))
        codes.append(caught.value.code)
    assert codes == ["shape", "dtype"]


def test_objects_are_never_loaded(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path}/executed",)

    np.savez(tmp_path / "a.npz", np.array([Bomb(), None], dtype=object))
    assert "pickled Python objects" in refused(tmp_path / "a.npz").detail
    assert not (tmp_path / "executed").exists()


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def archive(path: Path, *members: tuple[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    with zipfile.ZipFile(path, "w", method) as made:
        for name, data in members:
            made.writestr(name, data)
    return path.read_bytes()


def directory(data: bytes) -> int:
    """Return where the first entry of the directory is."""
    return data.rindex(b"PK\1\2")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_flipped_bytes_are_noticed(tmp_path: Path, method: int) -> None:
    path, rows = tmp_path / "a.npz", np.arange(400.0).reshape(20, 20)
    whole, accepted = archive(path, ("x.npy", npy(rows)), method=method), 0
    for place in range(35, len(whole) - 76, len(whole) // 60):
        data = bytearray(whole)
        data[place] ^= 1
        path.write_bytes(data)
        try:
            np.testing.assert_array_equal(read(listed(path), step=20), rows)
            accepted += 1
        except BadFile:
            continue
    assert accepted <= 1  # bits that fill the last byte of a deflated member mean nothing


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_every_truncation_is_refused(tmp_path: Path, method: int) -> None:
    path = tmp_path / "a.npz"
    whole = archive(path, ("x.npy", npy(np.arange(20.0).reshape(10, 2))), method=method)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert refused(path).code == "zip"


def test_a_bomb_is_not_inflated(tmp_path: Path) -> None:
    path, header = tmp_path / "a.npz", npy(np.zeros((2, 4)))[:128]
    archive(path, ("x.npy", header + bytes(20_000_000)))
    assert path.stat().st_size < 30_000
    assert refused(path).code == "size"  # by what the directory says
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, directory(data) + 24, 128 + 64)
    path.write_bytes(data)
    assert "inflates to more than 192 bytes" in refused(path).detail
    archive(path, ("x.npy", header.replace(b"(2, 4)", b"(2,9**9)"[:6])))
    assert refused(path).code == "header"


def test_a_claim_that_is_too_large_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    header = npy(np.zeros((2, 4)))[:128].replace(b"(2, 4), }         ", b"(2, 9999999999), }")
    data = bytearray(archive(path, ("x.npy", header + bytes(1000))))
    assert refused(path).code == "size"
    struct.pack_into("<I", data, directory(data) + 24, 2**32 - 2)
    path.write_bytes(data)
    assert refused(path).code == "size"


def test_too_short_for_what_it_claims(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    data = bytearray(archive(path, ("x.npy", npy(np.zeros((2, 4)))[:-8])))
    struct.pack_into("<I", data, directory(data) + 24, 128 + 64)
    path.write_bytes(data)
    assert "inflates to 184 bytes, not 192" in refused(path).detail


def test_members_that_overlap(tmp_path: Path) -> None:
    path, data = tmp_path / "a.npz", npy(np.zeros((2, 4)))
    made = bytearray(archive(path, ("x.npy", data), ("y.npy", data), method=zipfile.ZIP_STORED))
    struct.pack_into("<I", made, directory(made) + 42, 1)
    path.write_bytes(made)
    assert refused(path, "x").code == "zip"
    struct.pack_into("<I", made, directory(made) + 42, 10_000)
    path.write_bytes(made)
    assert refused(path, "x").code == "zip"


@pytest.mark.parametrize(("offset", "value", "code"), [(8, 1, "encrypted"), (10, 12, "method"), (10, 99, "method")])
def test_members_that_cannot_be_read(tmp_path: Path, offset: int, value: int, code: str) -> None:
    path = tmp_path / "a.npz"
    data = bytearray(archive(path, ("x.npy", npy(np.zeros((2, 4))))))
    struct.pack_into("<H", data, directory(data) + offset, value)
    path.write_bytes(data)
    assert refused(path).code == code


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_other_archives(tmp_path: Path) -> None:
    path, data = tmp_path / "a.npz", npy(np.arange(8.0).reshape(4, 2))
    archive(path, ("x.npy", data), ("x.npy", data))
    assert "2 arrays named 'x'" in refused(path, "x").detail
    archive(path, ("notes.txt", b"text"))
    assert refused(path).code == "header"
    archive(path)
    assert "holds 0 arrays" in refused(path).detail
    path.write_bytes(b"")
    assert refused(path).detail == "is empty"
    path.write_bytes(data)
    assert refused(path).code == "zip"
    path.write_bytes(b"before" + archive(path, ("x.npy", data)) + b"after")  # as in a self-extracting archive
    np.testing.assert_array_equal(read(listed(path)), np.arange(8.0).reshape(4, 2))


def test_zip64_and_sizes_after_the_data(tmp_path: Path) -> None:
    path, array = tmp_path / "a.npz", np.arange(8.0).reshape(4, 2)

    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def tell(self) -> int:
            raise OSError

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w") as made, made.open("x.npy", "w", force_zip64=True) as member:
        member.write(npy(array))
    path.write_bytes(pipe.getvalue())
    np.testing.assert_array_equal(read(listed(path)), array)


def test_column_major_arrays_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npz, "_MOST_WHOLE", 100)
    np.savez(tmp_path / "a.npz", np.asfortranarray(np.zeros((5, 3))))
    assert "numpy.ascontiguousarray" in refused(tmp_path / "a.npz").detail


def test_a_file_that_changes(tmp_path: Path, rows: np.ndarray) -> None:
    np.savez(tmp_path / "a.npz", rows)
    file = listed(tmp_path / "a.npz")
    reader = npz_reader(file.root, file, None)
    np.savez(tmp_path / "a.npz", rows + 1)
    os.utime(tmp_path / "a.npz", ns=(1, 1))
    with pytest.raises(BadFile, match="was changed"):
        reader.read_file(file, 0, np.empty((10, 6), rows.dtype))


@pytest.mark.parametrize("where", ["memory", "weed"])
def test_on_an_object_store(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url, options = ("memory://npz", {}) if where == "memory" else serve(where)[:2]
    root = Location.of(url, options)
    rows = np.random.default_rng(0).normal(size=(1000, 500))
    requests, plain = [], File.read
    monkeypatch.setattr(File, "read", lambda *arguments: requests.append(arguments) or plain(*arguments))
    for name, save in [("a.npz", np.savez), ("b.npz", np.savez_compressed)]:
        save(tmp_path / name, rows)
        (root / name).write((tmp_path / name).read_bytes())
        (entry,) = (File(root, *entry) for entry in root.list() if entry.name == name)
        requests.clear()
        assert npz_reader(root, entry, None).count_file(entry) == 1000
        assert len(requests) <= 2  # the directory, and the header of the array
        np.testing.assert_array_equal(read(entry, step=300), rows)
    (root / "b.npz").write(zlib.compress(b"other"))
    with pytest.raises(BadFile, match="was changed"):
        npz_reader(root, entry, None).read_file(entry, 0, np.empty((1000, 500)))
