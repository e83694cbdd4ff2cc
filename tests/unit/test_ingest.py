"""Ingest: every accepted kind of tree becomes the rows that NumPy reads."""

from pathlib import Path

import numpy as np
import pytest

from cvae_dist.cluster import StoreResult
from cvae_dist.errors import InvalidInput
from cvae_dist.events import Event
from cvae_dist.store import Layout, RowStore
from cvae_dist.verbs.ingest import ingest
from cvae_dist.verbs.verify import verify

DTYPES = ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", ">f4", ">i8"]


@pytest.fixture(autouse=True)
def _tiny_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Layout, "of", classmethod(lambda cls, arrays, rows=None, **_: cls(4, 2, arrays)))


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)


def opened(path: Path, result: StoreResult) -> RowStore:
    assert verify(str(path)).ok
    store = RowStore.open(str(path))
    assert (store.rows, str(path)) == (result.rows, result.url)
    return store


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_vector_per_file(tmp_path: Path, dtype: str) -> None:
    rows = (np.arange(33).reshape(11, 3) * 3).astype(dtype)
    for number, row in enumerate(rows):
        save(tmp_path / "t" / f"{number % 2}" / f"{number:02d}.npy", row)
    result = ingest(tmp_path / "t", tmp_path / "s", label="folder")
    store = opened(tmp_path / "s", result)
    order = [*range(0, 11, 2), *range(1, 11, 2)]
    assert store.read("x").dtype == np.dtype(dtype).newbyteorder("=")
    np.testing.assert_array_equal(store.read("x"), rows[order])
    assert store.read("id").tolist() == [f"{n % 2}/{n:02d}.npy" for n in order]
    assert store.read("label").tolist() == [str(n % 2) for n in order]
    exact = rows.astype(float)
    np.testing.assert_allclose(store.statistics().mean, exact.mean(0), rtol=1e-12)
    np.testing.assert_allclose(store.statistics().std, exact.std(0), rtol=1e-12)
    assert store.statistics().minimum.tolist() == exact.min(0).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fortran", [False, True])
def test_many_rows_per_file(tmp_path: Path, dtype: str, fortran: bool) -> None:
    rows = np.arange(11 * 6).reshape(11, 2, 3).astype(dtype)
    for number, part in enumerate(np.split(rows, [0, 3, 3, 10, 11])):
        save(tmp_path / "t" / f"{number}.npy", np.asfortranarray(part) if fortran else part)
    store = opened(tmp_path / "s", ingest(tmp_path / "t", tmp_path / "s", label="folder"))
    np.testing.assert_array_equal(store.read("x"), rows.reshape(11, 6).astype(np.dtype(dtype).newbyteorder("=")))
    assert (store.item_shape, store.columns) == ((2, 3), ("label",))
    assert store.read("label").tolist() == [""] * 11


@pytest.mark.parametrize(
    ("rows_per_file", "shape", "rows"), [("one", (8, 8), 5), ("many", (8,), 40), ("auto", (8,), 40)]
)
def test_images(tmp_path: Path, rows_per_file: str, shape: tuple[int, ...], rows: int) -> None:
    for number in range(5):
        save(tmp_path / "t" / f"{number}.npy", np.full((8, 8), number, np.uint8))
    store = opened(tmp_path / "s", ingest(tmp_path / "t", tmp_path / "s", rows_per_file=rows_per_file))
    assert (store.rows, store.item_shape, store.n_features) == (rows, shape, int(np.prod(shape)))
    np.testing.assert_array_equal(store.read("x")[:, 0], np.repeat(np.arange(5), rows // 5))


def test_names_of_any_kind(tmp_path: Path) -> None:
    names = ["a b/ü.npy", "日本/x.npy", "top.npy", "q'\"/%20 #.npy", "n\nl/y.npy"]
    for number, name in enumerate(names):
        save(tmp_path / "my tree é" / name, np.full(2, number, np.float32))
    store = opened(tmp_path / "s ü", ingest(tmp_path / "my tree é", tmp_path / "s ü", label="folder"))
    assert store.read("id").tolist() == sorted(names)
    assert store.read("label").tolist() == [name.rpartition("/")[0] for name in sorted(names)]
    assert store.read("x")[:, 0].tolist() == [names.index(name) for name in sorted(names)]


def test_result_events_and_second_run(tmp_path: Path) -> None:
    save(tmp_path / "t" / "a.npy", np.ones((10, 2), np.float32))
    events: list[Event] = []
    first = ingest(tmp_path / "t", tmp_path / "s", on_event=events.append)
    assert (first.rows, first.rows_written, first.dropped, first.nothing_to_do) == (10, 10, 0, False)
    assert (events[0].kind, events[-1].kind, events[-1].done) == ("start", "done", 10)
    assert [event.total for event in events if event.kind == "progress"] == [10, 10, 10]
    second = ingest(tmp_path / "t", tmp_path / "s")
    assert (second.rows, second.rows_written, second.nothing_to_do) == (10, 0, True)


def test_no_credentials_and_no_absolute_surprises_in_the_attributes(tmp_path: Path) -> None:
    save(tmp_path / "t" / "a.npy", np.ones((3, 2), np.float32))
    ingest(tmp_path / "t", tmp_path / "s")
    document = RowStore.open(str(tmp_path / "s")).document
    assert document["lineage"]["source"] == str(tmp_path / "t")
    assert document["settings"] == {
        "dtype": "float32", "item_shape": [2], "label": None, "nonfinite": "raise", "one_per_file": False
    }  # fmt: skip


def test_moved_tree_is_still_the_same_source(tmp_path: Path) -> None:
    save(tmp_path / "t" / "a.npy", np.ones((3, 2), np.float32))
    ingest(tmp_path / "t", tmp_path / "s")
    (tmp_path / "t").rename(tmp_path / "moved")
    assert ingest(tmp_path / "moved", tmp_path / "s").nothing_to_do


def test_store_inside_its_own_source(tmp_path: Path) -> None:
    save(tmp_path / "a.npy", np.ones((9, 2), np.float32))
    assert ingest(tmp_path, tmp_path / "s").rows == 9
    assert ingest(tmp_path, tmp_path / "s").nothing_to_do


def test_grid_of_a_store_that_is_there_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "t" / "a.npy", np.arange(20, dtype=np.float32).reshape(10, 2))
    ingest(tmp_path / "t", tmp_path / "s")
    monkeypatch.setattr(Layout, "of", classmethod(lambda cls, arrays, rows=None, **_: cls(6, 3, arrays)))
    save(tmp_path / "t" / "b.npy", np.arange(20, 30, dtype=np.float32).reshape(5, 2))
    store = opened(tmp_path / "s", ingest(tmp_path / "t", tmp_path / "s"))
    assert store.layout.rows_per_shard == 4
    assert store.read("x").ravel().tolist() == list(range(30))


def test_images_read_as_matrices_are_mentioned(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    for name in ("a", "b"):
        np.save(tmp_path / "tree" / f"{name}.npy", np.ones((8, 8)))
    said: list[str] = []
    ingest(tmp_path / "tree", tmp_path / "s", on_event=lambda event: said.append(event.message))
    assert (
        "each of 2 files of shape (8, 8) is read as 8 rows; if each is one item, say --rows-per-file one --overwrite"
        in said
    )
    said.clear()
    ingest(tmp_path / "tree", tmp_path / "t", rows_per_file="many", on_event=lambda event: said.append(event.message))
    assert not any("each of" in message for message in said)


@pytest.mark.parametrize("name", ["rows_per_file", "label", "nonfinite"])
def test_choice_that_is_none(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInput, match=f"{name}='x' is none of"):
        ingest(tmp_path, tmp_path / "s", **{name: "x"})


def test_bytes_are_compressed_as_the_first_rows_of_a_store_decide(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (500, 20), np.uint8)
    kinds = {"noise": noise, "sparse": (noise > 240).astype(np.uint8)}
    for first, later in (("noise", "sparse"), ("sparse", "noise")):
        source, store = tmp_path / first / "t", tmp_path / first / "s"
        save(source / "0.npy", kinds[first])
        ingest(source, store)
        save(source / "1.npy", kinds[later])
        grown = opened(store, ingest(source, store))
        assert grown.layout.array("x").compressed == (first == "sparse")
        np.testing.assert_array_equal(grown.read("x"), np.concatenate([kinds[first], kinds[later]]))
