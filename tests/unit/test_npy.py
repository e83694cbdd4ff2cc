"""Trees of .npy files: what is listed, and that rows arrive as NumPy reads them."""

import contextlib
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvae_dist.errors import InvalidInput
from cvae_dist.sources import BadFile, File
from cvae_dist.sources.files import local_version
from cvae_dist.sources.npy_header import read_header
from cvae_dist.store import Location
from cvae_dist.verbs.ingest import ingest
from tests.sources import read_all, scan

DTYPES = ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", ">f2", ">f4", ">f8", ">i2", ">u8"]


def save(path: Path, array: np.ndarray, version: tuple[int, int] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        np.lib.format.write_array(file, array, version=version)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("version", [None, (1, 0), (2, 0), (3, 0)])
def test_one_item_per_file(tmp_path: Path, dtype: str, version: tuple[int, int] | None) -> None:
    rows = np.arange(40).reshape(8, 5).astype(dtype)
    for number, row in enumerate(rows):
        save(tmp_path / f"{number}.npy", row, version)
    reader, pieces = scan(tmp_path)
    assert (reader.schema.one_per_file, reader.schema.item_shape, reader.schema.dtype.isnative) == (True, (5,), True)
    assert pieces.path.tolist() == [f"{n}.npy" for n in range(8)]
    np.testing.assert_array_equal(read_all(reader, pieces), rows)
    np.testing.assert_array_equal(read_all(reader, pieces.cut(3, 5)), rows[3:5])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fortran", [False, True])
def test_many_rows_per_file(tmp_path: Path, dtype: str, fortran: bool) -> None:
    rows = np.arange(60).reshape(10, 2, 3).astype(dtype)
    parts = np.split(rows, [4, 4, 7])
    for number, part in enumerate(parts):
        save(tmp_path / f"{number}.npy", np.asfortranarray(part) if fortran else part)
    reader, pieces = scan(tmp_path)
    assert (reader.schema.one_per_file, reader.schema.item_shape) == (False, (2, 3))
    assert pieces.rows.tolist() == [4, 0, 3, 3]
    np.testing.assert_array_equal(read_all(reader, pieces), rows.reshape(10, 6))
    for start in range(10):
        for stop in range(start + 1, 11):
            part = read_all(reader, pieces.cut(start, stop))
            np.testing.assert_array_equal(part, rows[start:stop].reshape(-1, 6))


def test_mixed_headers_of_one_schema(tmp_path: Path) -> None:
    rows = np.arange(36, dtype=np.float32).reshape(6, 2, 3)
    save(tmp_path / "0.npy", rows[0])
    save(tmp_path / "1.npy", rows[1], (2, 0))
    save(tmp_path / "2.npy", rows[2].astype(">f4"))
    save(tmp_path / "3.npy", np.asfortranarray(rows[3]))
    save(tmp_path / "4.npy", rows[4], (3, 0))
    save(tmp_path / "5.npy", rows[5])
    for first in range(6):  # whichever file comes first is the model
        (tmp_path / f"{first}.npy").rename(tmp_path / "+.npy")
        reader, pieces = scan(tmp_path, rows_per_file="one")
        order = [first, *(n for n in range(6) if n != first)]
        np.testing.assert_array_equal(read_all(reader, pieces), rows.reshape(6, 6)[order])
        (tmp_path / "+.npy").rename(tmp_path / f"{first}.npy")


@pytest.mark.parametrize(
    ("rows_per_file", "item_shape", "one"),
    [("one", (8, 8), True), ("many", (8,), False), ("auto", (8,), False)],
)
def test_images(tmp_path: Path, rows_per_file: str, item_shape: tuple[int, ...], one: bool) -> None:
    for number in range(3):
        save(tmp_path / f"{number}.npy", np.full((8, 8), number, np.uint8))
    reader, pieces = scan(tmp_path, rows_per_file=rows_per_file)
    assert (reader.schema.item_shape, reader.schema.one_per_file, pieces.total) == (item_shape, one, 3 if one else 24)


def test_vectors_as_many_rows_of_one_value(tmp_path: Path) -> None:
    save(tmp_path / "a.npy", np.arange(7.0))
    reader, pieces = scan(tmp_path, rows_per_file="many")
    assert (reader.schema.item_shape, pieces.total) == ((1,), 7)
    np.testing.assert_array_equal(read_all(reader, pieces)[:, 0], np.arange(7.0))


def test_tree_is_nested_sorted_and_follows_links(tmp_path: Path) -> None:
    root = tmp_path / "root"
    names = ["b/x y.npy", "a.npy", "b/ä/日本.npy", "b/x-y.npy", "B.npy", "deep/1/2/3/4.npy"]
    for number, name in enumerate(names):
        save(root / name, np.full(2, number, np.float32))
    save(tmp_path / "elsewhere" / "far.npy", np.full(2, 9, np.float32))
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "file link.npy").symlink_to(tmp_path / "elsewhere" / "far.npy")
    for name in (".hidden.npy", ".cache/c.npy", "notes.txt", "b/data.json"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("no array")
    os.mkfifo(root / "pipe.npy")
    reader, pieces = scan(str(root) + "/")
    assert pieces.path.tolist() == sorted([*names, "link/far.npy", "file link.npy"])
    values = dict(zip(pieces.path, read_all(reader, pieces)[:, 0], strict=True))
    assert values == {**{name: n for n, name in enumerate(names)}, "link/far.npy": 9, "file link.npy": 9}


def test_links_that_lead_nowhere_or_round(tmp_path: Path) -> None:
    save(tmp_path / "a.npy", np.ones(2))
    (tmp_path / "dangling.npy").symlink_to(tmp_path / "gone")
    with pytest.raises(BadFile, match=r"dangling\.npy is a symbolic link to .*gone, which is not there"):
        scan(tmp_path)
    (tmp_path / "dangling.npy").unlink()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    with pytest.raises(InvalidInput, match="up is a symbolic link to a directory it lies in"):
        scan(tmp_path)


def test_name_that_is_not_text(tmp_path: Path) -> None:
    save(tmp_path / "a.npy", np.ones(2))
    os.link(tmp_path / "a.npy", os.fsencode(tmp_path) + b"/\xff.npy")
    with pytest.raises(InvalidInput, match=r"xff\.npy' is not UTF-8"):
        scan(tmp_path)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_change_of_a_header_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.npy"
    save(path, np.arange(6, dtype=np.float32).reshape(2, 3))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(6, 127))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    status = path.stat()
    with contextlib.suppress(BadFile):
        header = read_header(File(Location.of(path.parent), path.name, len(content), local_version(status)))
        assert header.size == len(content)


def test_folders_and_files_are_what_they_are_whatever_their_names(tmp_path: Path) -> None:
    (tmp_path / "tree/folder.npy").mkdir(parents=True)
    np.save(tmp_path / "tree/folder.npy/a.npy", np.ones((2, 3)))
    np.save(tmp_path / "upper.npy", np.ones((4, 3)))
    (tmp_path / "upper.npy").rename(tmp_path / "tree/UPPER.NPY")
    _, pieces = scan(tmp_path / "tree")
    assert pieces.path.tolist() == ["UPPER.NPY", "folder.npy/a.npy"]
    assert pieces.total == 6


def test_a_tree_that_is_deeper_than_python_recurses(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    os.makedirs(root)
    folder = os.open(root, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=folder)
        below = os.open("d", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = below
    with open(os.open("a.npy", os.O_CREAT | os.O_WRONLY, dir_fd=folder), "wb") as file:
        np.save(file, np.ones((2, 3)))
    os.close(folder)
    try:
        assert scan(root)[1].total == 2
    finally:
        subprocess.run(["rm", "-rf", root], check=True)  # what Python has for it recurses


@pytest.mark.parametrize(
    ("header", "refusal"),
    [
        ((9, 7, "(3, 4)"), "format version 9.7"),
        ((1, 5, "(3, 4)"), "format version 1.5"),
        ((1, 0, "(0, 4611686018427387904, 4)"), "bytes each"),
        ((1, 0, "(0, 1099511627776)"), "bytes each"),
    ],
)
def test_headers_that_nobody_writes(tmp_path: Path, header: tuple[int, int, str], refusal: str) -> None:
    major, minor, shape = header
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    rows = bytes(48) if shape == "(3, 4)" else b""
    data = b"\x93NUMPY" + bytes([major, minor]) + len(text).to_bytes(2 if major == 1 else 4, "little") + text + rows
    (tmp_path / "a.npy").write_bytes(data)
    with pytest.raises(InvalidInput, match=refusal):
        ingest(tmp_path, tmp_path / "store", rows_per_file="many")
