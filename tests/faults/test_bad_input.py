"""Files and options that cannot be used: refused by name, and nothing that was there is lost."""

import io
import os
import pickle
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cvae_dist.errors import Corrupt, CvaeDistError, InvalidInput, SettingsChanged, SourceNotFound
from cvae_dist.sources import Files, Reader, RowsPerFile
from cvae_dist.sources.formats import FileSource
from cvae_dist.store import RowStore
from cvae_dist.verbs.ingest import ingest
from cvae_dist.verbs.verify import verify
from tests.faults.drivers import Drivers, recorded, snapshot, stamps, write_items

pytestmark = pytest.mark.usefixtures("tiny_shards")
GOOD = np.arange(5, dtype=np.float32)


def npy(array: np.ndarray, **options: bool) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def npz() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, a=GOOD)
    return stream.getvalue()


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("x", "y")
    return stream.getvalue()


HEAD = npy(GOOD)[:-20]
BAD: dict[str, tuple[bytes, str]] = {
    "wrong shape": (npy(GOOD[:4]), r"shape \(4,\)"),
    "more axes": (npy(np.zeros((2, 5), np.float32)), r"shape \(2, 5\)"),
    "wrong shape of the same size": (npy(np.zeros((5, 1), np.float32)), r"shape \(5, 1\)"),
    "other float": (npy(GOOD.astype(np.float64)), "float64"),
    "other type of the same size": (npy(GOOD.astype(np.int32)), "int32"),
    "bool": (npy(GOOD > 2), "bool"),
    "complex": (npy(GOOD.astype(np.complex64)), "complex64"),
    "date": (npy(np.zeros(5, "M8[s]")), "datetime64"),
    "text array": (npy(np.array(["abc"])), "<U3"),
    "structured": (npy(np.zeros(5, [("a", "f4")])), "dtype"),
    "truncated data": (npy(GOOD)[:-1], "truncated"),
    "no data": (HEAD, "truncated"),
    "truncated header": (HEAD[:40], "header"),
    "magic only": (HEAD[:6], "header"),
    "trailing bytes": (npy(GOOD) + b"\0", "longer"),
    "pickled objects": (npy(np.array([{}], object), allow_pickle=True), "pickled"),
    "pickle": (pickle.dumps(GOOD), "not a .npy file"),
    "zero-length": (b"", "is empty"),
    "npz": (npz(), "not a .npy file"),
    "zip": (zipped(), "not a .npy file"),
    "text": (b"1 2 3 4 5\n", "not a .npy file"),
    "no axis": (npy(np.float32(3)), r"shape \(\)"),
    "no values": (npy(GOOD[:0]), r"\(0,\)"),
    "garbage header": (HEAD[:10] + b"\xff" * (len(HEAD) - 10) + bytes(20), "header"),
    "header of code": (HEAD[:10] + b"__import__('os')".ljust(len(HEAD) - 11) + b"\n" + bytes(20), "header"),
    "endless header": (b"\x93NUMPY\x02\x00\xff\xff\xff\x7f{", "too long"),
    "negative shape": (HEAD.replace(b"(5,), } ", b"(-5,), }") + bytes(20), "shape"),
}  # fmt: skip


def write_tree(root: Path, count: int = 12) -> Path:
    root.mkdir()
    for number in range(count):
        np.save(root / f"{number:02d}.npy", GOOD + number)
    return root


@pytest.mark.parametrize("case", BAD)
def test_bad_file_in_a_later_place(tmp_path: Path, case: str) -> None:
    content, words = BAD[case]
    tree = write_tree(tmp_path / "tree")
    (tree / "09.npy").write_bytes(content)
    with pytest.raises(InvalidInput, match=words) as caught:
        ingest(tree, tmp_path / "store")
    assert str(tree / "09.npy") in str(caught.value)
    assert "00.npy" in str(caught.value) or "first file" not in str(caught.value)
    done = recorded(tmp_path / "store")
    before = stamps(tmp_path / "store", done)
    np.save(tree / "09.npy", GOOD)
    assert ingest(tree, tmp_path / "store").rows == 12
    assert stamps(tmp_path / "store", done) == before
    assert verify(str(tmp_path / "store")).ok


@pytest.mark.parametrize("case", [case for case in BAD if case != "wrong shape of the same size"])  # all are rows
def test_bad_file_in_the_first_place(tmp_path: Path, case: str) -> None:
    content, _ = BAD[case]
    tree = write_tree(tmp_path / "tree")
    (tree / "00.npy").write_bytes(content)
    with pytest.raises(InvalidInput) as caught:
        ingest(tree, tmp_path / "store")
    assert "00.npy" in str(caught.value), "the file that is unlike the others is named, as the first one"
    assert not verify_ok(tmp_path / "store")


@pytest.mark.parametrize("place", [8, 9, 11])
def test_bad_file_at_the_start_of_a_shard_is_not_taken_for_the_model(tmp_path: Path, place: int) -> None:
    """All files of a shard may have the same wrong header, of the right length."""
    tree = write_tree(tmp_path / "tree")
    for number in range(8, place + 1):
        np.save(tree / f"{number:02d}.npy", np.full(5, number, np.int32))
    with pytest.raises(InvalidInput, match=r"08\.npy has dtype int32, the first file, 00\.npy, has float32"):
        ingest(tree, tmp_path / "store")
    assert recorded(tmp_path / "store") == [0, 1]


def verify_ok(store: Path) -> bool:
    try:
        return verify(str(store)).ok
    except CvaeDistError:
        return False


@pytest.mark.parametrize("case", [case for case in BAD if case not in ("no axis", "no values", "more axes")])
@pytest.mark.parametrize("place", ["a", "z"])
def test_bad_file_among_files_of_many_rows(tmp_path: Path, case: str, place: str) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    rows = np.arange(45, dtype=np.float32).reshape(9, 5)
    np.save(tree / "m.npy", rows)
    np.save(tree / "n.npy", rows)
    (tree / f"{place}.npy").write_bytes(BAD[case][0])
    with pytest.raises(InvalidInput, match=f"{place}.npy"):
        ingest(tree, tmp_path / "store", rows_per_file="many")
    assert not (tmp_path / "store").exists()


def test_many_bad_files_are_counted_and_a_few_named(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree")
    for number in range(3, 12):
        (tree / f"{number:02d}.npy").write_bytes(b"")
    with pytest.raises(InvalidInput, match=r"9 unusable files: .*03\.npy is empty.*and 4 more"):
        ingest(tree, tmp_path / "store")


def after_listing(monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    """Let something happen to files between the listing and the first look at one."""
    real = FileSource.reader

    def change_and_read(source: FileSource, model: Files) -> Reader:
        reader = real(source, model)
        change()
        return reader

    monkeypatch.setattr(FileSource, "reader", change_and_read)


@pytest.mark.parametrize("rows_per_file", ["one", "many"])
def test_file_cut_while_it_is_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_per_file: RowsPerFile
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in "abc":
        np.save(tree / f"{name}.npy", np.ones((9, 5), np.float32))
    after_listing(monkeypatch, lambda: (tree / "b.npy").write_bytes((tree / "b.npy").read_bytes()[:-1]))
    with pytest.raises(InvalidInput, match=r"b\.npy became shorter while it was read"):
        ingest(tree, tmp_path / "store", rows_per_file=rows_per_file)


@pytest.mark.parametrize("rows_per_file", ["one", "many"])
def test_file_that_is_replaced_by_one_of_the_same_size_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_per_file: RowsPerFile
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in "abc":
        np.save(tree / f"{name}.npy", np.ones((9, 5), np.float32))
    time.sleep(0.02)  # a clock of the file system that is read more often than it ticks
    after_listing(monkeypatch, lambda: np.save(tree / "b.npy", np.zeros((9, 5), np.float32)))
    with pytest.raises(InvalidInput, match=r"b\.npy was changed after it was listed"):
        ingest(tree, tmp_path / "store", rows_per_file=rows_per_file)


def test_file_that_vanishes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = write_tree(tmp_path / "tree")
    after_listing(monkeypatch, lambda: (tree / "10.npy").unlink())
    with pytest.raises(InvalidInput, match=r"10\.npy was deleted after it was listed"):
        ingest(tree, tmp_path / "store")


def test_unreadable_file_and_folder(drivers: Drivers, tmp_path: Path) -> None:
    if os.getuid():
        pytest.skip("only root can become a user that may not read")
    ours = tmp_path.relative_to(tempfile.gettempdir()).parts
    for depth in range(1, len(ours) + 1):
        Path(tempfile.gettempdir(), *ours[:depth]).chmod(0o755)
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(0o777)
    tree = write_tree(tmp_path / "tree")
    (tree / "05.npy").chmod(0)
    ended = drivers.run("ingest", tree, tmp_path / "out" / "store", _user=65534)
    assert ended.error[0] == "InvalidInput", ended.trace
    assert "05.npy cannot be read: Permission denied" in ended.error[1]
    (tree / "05.npy").chmod(0o644)
    (tree / "sub").mkdir(mode=0)
    ended = drivers.run("ingest", tree, tmp_path / "out" / "store2", _user=65534)
    assert ended.error[0] == "InvalidInput", ended.trace
    assert "sub cannot be read: Permission denied" in ended.error[1]


BAD_ROWS = [np.nan, np.inf, -np.inf]


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4"])
@pytest.mark.parametrize("bad", BAD_ROWS)
def test_nonfinite_row_in_a_file_of_many(tmp_path: Path, dtype: str, bad: float) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    rows = np.arange(60, dtype=dtype).reshape(20, 3)
    np.save(tree / "a.npy", rows)
    rows[13, 2] = bad
    np.save(tree / "b.npy", rows)
    with pytest.raises(InvalidInput, match=r"tree/b\.npy, row 13, holds NaN or infinity.*--nonfinite drop"):
        ingest(tree, tmp_path / "store")
    result = ingest(tree, tmp_path / "dropped", nonfinite="drop")
    assert (result.rows, result.dropped) == (39, 1)
    kept = np.concatenate([np.load(tree / "a.npy"), np.delete(rows, 13, axis=0)]).astype(dtype[-2:])
    np.testing.assert_array_equal(RowStore.open(str(tmp_path / "dropped")).read("x"), kept)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_nonfinite_row_of_its_own_file(tmp_path: Path, dtype: str) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    good = [number for number in range(15) if number not in (10, 14)]
    for number in range(15):
        np.save(tree / f"{number:02d}.npy", np.full(3, number if number in good else np.nan, dtype))
    with pytest.raises(InvalidInput, match=r"tree/10\.npy, row 0, holds NaN"):
        ingest(tree, tmp_path / "store")
    assert recorded(tmp_path / "store") == [0, 1]
    with pytest.raises(SettingsChanged, match="nonfinite: 'raise' there, 'drop' asked for"):
        ingest(tree, tmp_path / "store", nonfinite="drop")
    result = ingest(tree, tmp_path / "store", nonfinite="drop", overwrite=True)
    store = RowStore.open(str(tmp_path / "store"))
    assert (result.rows, result.dropped, store.document["dropped"]) == (13, 2, 2)
    assert store.read("x")[:, 0].tolist() == good
    assert store.read("id").tolist() == [f"{number:02d}.npy" for number in good]


def test_dropped_rows_are_counted_once_as_a_store_grows(tmp_path: Path) -> None:
    """At every boundary there is one: last of a full shard, first of a new file, in a partial shard."""
    tree = tmp_path / "tree"
    tree.mkdir()
    bad = np.full((1, 2), np.nan, np.float32)
    kept = []
    for number, good in enumerate([4, 4, 2, 3, 5]):
        rows = np.full((good, 2), number, np.float32)
        kept.append(rows)
        np.save(tree / f"{number}.npy", np.concatenate([bad, rows, bad]))
        result = ingest(tree, tmp_path / "store", nonfinite="drop")
        store = RowStore.open(str(tmp_path / "store"))
        assert result.dropped == 2 * (number + 1)
        assert store.document["dropped"] == result.dropped
        np.testing.assert_array_equal(store.read("x"), np.concatenate(kept))
        assert verify(str(tmp_path / "store")).ok
    assert ingest(tree, tmp_path / "store", nonfinite="drop").nothing_to_do


def test_only_bad_rows(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    np.save(tree / "a.npy", np.full((9, 2), np.nan))
    with pytest.raises(InvalidInput, match="holds 1 files but no usable rows"):
        ingest(tree, tmp_path / "store", nonfinite="drop")
    assert not (tmp_path / "store").exists()


def test_only_files_without_rows(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    np.save(tree / "a.npy", np.zeros((0, 2)))
    with pytest.raises(InvalidInput, match="no usable rows"):
        ingest(tree, tmp_path / "store")


def test_finite_values_whose_variance_overflows(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    np.save(tree / "a.npy", np.array([[1e200], [-1e200]]))
    with pytest.raises(InvalidInput, match=r"a\.npy .* as large as 1e\+200"):
        ingest(tree, tmp_path / "store")


def test_missing_source_and_empty_tree(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound, match="there is no directory or file .*nowhere"):
        ingest(tmp_path / "nowhere", tmp_path / "store")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceNotFound, match=r"no file below .* that can be read"):
        ingest(tmp_path / "empty", tmp_path / "store")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InvalidInput, match=r"notes.txt is no file of a kind that can be read"):
        ingest(tmp_path / "notes.txt", tmp_path / "store")
    with pytest.raises(SourceNotFound, match="there is no directory or file memory://.*nowhere"):
        ingest("memory://nowhere", tmp_path / "store")
    assert not (tmp_path / "store").exists()
    assert not list(tmp_path.glob("*.lease"))


CHANGES: dict[str, tuple[dict[str, object], str]] = {
    "label": ({"label": "folder"}, "label: None there, 'folder' asked for"),
    "nonfinite": ({"nonfinite": "drop"}, "nonfinite: 'raise' there, 'drop' asked for"),
    "rows_per_file": ({"rows_per_file": "many"}, "one_per_file: True there, False asked for"),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("published", [True, False])
def test_other_settings(drivers: Drivers, tmp_path: Path, name: str, published: bool) -> None:
    options, words = CHANGES[name]
    tree, store = write_tree(tmp_path / "tree"), tmp_path / "store"
    drivers.run("ingest", tree, store, _below=str(store), _die_at=10**6 if published else 25)
    before = snapshot(store)
    with pytest.raises(SettingsChanged, match=words):
        ingest(tree, store, **options)
    assert snapshot(store) == before
    ingest(tree, store, overwrite=True, **options)
    ingest(tree, tmp_path / "fresh", **options)
    assert snapshot(store) == snapshot(tmp_path / "fresh")


def test_other_dtype_or_shape_of_the_source(tmp_path: Path) -> None:
    store = tmp_path / "store"
    ingest(write_tree(tmp_path / "tree"), store)
    before = snapshot(store)
    for name, array in {"dtype": GOOD.astype(np.float16), "item_shape": GOOD[:3]}.items():
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "a.npy", array)
        with pytest.raises(SettingsChanged, match=f"{name}: .* there, .* asked for"):
            ingest(tmp_path / name, store)
    assert snapshot(store) == before


def foreign_file(path: Path) -> None:
    path.write_text("precious")


def foreign_folder(path: Path) -> None:
    (path / "sub").mkdir(parents=True)
    (path / "sub" / "precious").write_text("x")


def foreign_zarr(path: Path) -> None:
    import zarr

    zarr.create_array(str(path / "x"), shape=(3,), dtype="f4")[:] = 1
    zarr.open_group(str(path))


@pytest.mark.parametrize("make", [foreign_file, foreign_folder, foreign_zarr])
@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_output(tmp_path: Path, make: Callable[[Path], None], overwrite: bool) -> None:
    make(tmp_path / "out")
    before = {path: path.is_file() and path.read_bytes() for path in (tmp_path / "out").rglob("*")}
    with pytest.raises(InvalidInput, match="not a store made by cvae-dist, so it is neither read nor replaced"):
        ingest(write_tree(tmp_path / "tree"), tmp_path / "out", overwrite=overwrite)
    assert {path: path.is_file() and path.read_bytes() for path in (tmp_path / "out").rglob("*")} == before
    assert not list(tmp_path.glob("*.lease"))


def test_empty_output_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    assert ingest(write_tree(tmp_path / "tree"), tmp_path / "store").rows == 12


def test_overwrite_with_a_useless_source_keeps_the_store(tmp_path: Path) -> None:
    store = tmp_path / "store"
    ingest(write_tree(tmp_path / "tree"), store)
    before = snapshot(store)
    (tmp_path / "bad").mkdir()
    np.save(tmp_path / "bad" / "a.npy", np.full((9, 2), np.nan))
    with pytest.raises(InvalidInput, match="no usable rows"):
        ingest(tmp_path / "bad", store, nonfinite="drop", overwrite=True)
    assert snapshot(store) == before


def test_changed_source_file(tmp_path: Path) -> None:
    tree, store = write_tree(tmp_path / "tree"), tmp_path / "store"
    ingest(tree, store)
    before = snapshot(store)
    np.save(tree / "03.npy", GOOD - 1)
    with pytest.raises(SettingsChanged, match=r"are not as they were: 1 changed: 03\.npy"):
        ingest(tree, store)
    assert snapshot(store) == before
    ingest(tree, store, overwrite=True)
    np.testing.assert_array_equal(RowStore.open(str(store)).read("x", 3, 4), [GOOD - 1])


def test_a_lost_column_is_never_read_as_empty_text(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    write_items(tree, 0, 10)
    ingest(tree, tmp_path / "store", label="folder")
    (tmp_path / "store" / "label" / "c.1").unlink()
    with pytest.raises(Corrupt, match="shard 1 of label is missing"):
        RowStore.open(str(tmp_path / "store")).read("label", 5, 6)
