"""Files that change or go: the store holds the rows of the files that are there, and only what must be is written."""

import io
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvae_dist.cli.results import wrote_rows
from cvae_dist.errors import Corrupt, OutputLocked, SettingsChanged
from cvae_dist.events import Event
from cvae_dist.store import Layout, Location, RowStore
from cvae_dist.store.manifest import Manifest
from cvae_dist.verbs.embed import embed
from cvae_dist.verbs.ingest import IngestResult, ingest
from cvae_dist.verbs.train import train
from cvae_dist.verbs.verify import verify
from tests.faults.drivers import SHARDS_PER_PACK, small_grid, snapshot, stamps
from tests.servers import Served

Tree = dict[str, tuple[int, int]]  # path: rows of the file, and what they hold


@pytest.fixture(autouse=True)
def _tiny_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Layout, "of", small_grid())
    monkeypatch.setattr(Layout, "shards_per_pack", SHARDS_PER_PACK)


def block(path: str, rows: int, content: int) -> np.ndarray:
    """Rows that tell their file, its content and their number in it."""
    return np.array([[int.from_bytes(path.encode()) % 65521, content, row] for row in range(rows)], np.float32).reshape(
        rows, 3
    )


@dataclass
class Bench:
    """A tree of .npy files and the store that is made of it."""

    root: Path
    one: bool = False

    @property
    def tree(self) -> Path:
        return self.root / "tree"

    @property
    def store(self) -> Path:
        return self.root / "store"

    def put(self, files: Mapping[str, tuple[int, int] | None]) -> None:
        """Write files, or delete those of None; every write has a time of its own."""
        for path, what in files.items():
            place = self.tree / path
            if what is None:
                place.unlink()
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            values = block(path, *what)
            np.save(place, values[0] if self.one else values)
            os.utime(place, ns=(what[1] * 10**9, what[1] * 10**9))

    def ingest(self, changed: str = "rewrite", **options: Any) -> IngestResult:
        rows = "one" if self.one else "many"
        return ingest(self.tree, self.store, changed=changed, rows_per_file=rows, label="folder", **options)  # type: ignore[arg-type]

    def check(self, files: Tree) -> None:
        """Require the rows of just these files, each once, with their ids, labels and statistics."""
        store = RowStore.open(str(self.store))
        rows = store.read("x")
        expected = {
            tuple(row): path for path, (count, content) in files.items() for row in block(path, count, content).tolist()
        }
        assert Counter(map(tuple, rows.tolist())) == Counter(expected.keys())
        paths = [expected[tuple(row)] for row in rows.tolist()]
        assert store.read("label").tolist() == [path.split("/")[0] for path in paths]
        if self.one:
            assert store.read("id").tolist() == paths
        sample = store.sample()
        np.testing.assert_array_equal(sample.values, rows[sample.rows], "the sample is of rows that are there")
        assert len(sample.rows) == len(rows), "all of a few"
        statistics = store.statistics()
        for found, wanted in (
            (statistics.mean, rows.mean(0, dtype=float)),
            (statistics.std, rows.std(0, dtype=float)),
            (statistics.minimum, rows.min(0)),
            (statistics.maximum, rows.max(0)),
        ):
            np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9)
        assert verify(str(self.store)).problems == ()
        assert not (self.store / "journal").exists() or not any((self.store / "journal").rglob("*"))


@pytest.fixture
def items(tmp_path: Path) -> Bench:
    """Eighteen files of one row: five shards, the last of two rows."""
    bench = Bench(tmp_path, one=True)
    bench.put(ITEMS)
    bench.ingest()
    bench.check(ITEMS)
    return bench


ITEMS: Tree = {f"{number % 2}/{number:02d}.npy": (1, 1) for number in range(18)}
ORDER = sorted(ITEMS)


def after(files: Tree, edits: Mapping[str, tuple[int, int] | None]) -> Tree:
    return {path: what for path, what in {**files, **edits}.items() if what is not None}


def written(bench: Bench, run: Callable[[], Any]) -> list[int]:
    """Return the shards whose objects are others after a run."""
    before = stamps(bench.store, range(40))
    run()
    now = stamps(bench.store, range(40))
    changed = {path for path in before.keys() | now.keys() if before.get(path) != now.get(path)}
    return sorted({int(path.split("/c.")[1].split(".")[0]) for path in changed})


@pytest.mark.parametrize(
    ("edits", "shards"),
    [
        ({ORDER[5]: (1, 2)}, [1]),
        ({ORDER[0]: (1, 2), ORDER[17]: (1, 2)}, [0, 4]),
        ({ORDER[5]: None}, [1, 4]),  # the last file takes its place
        ({ORDER[5]: None, "1/new.npy": (1, 3)}, [1]),  # a new one does
        ({ORDER[5]: None, "1/new.npy": (1, 3), "1/newer.npy": (1, 3)}, [1, 4]),
        ({ORDER[17]: None}, [4]),
        ({path: None for path in ORDER[16:]}, [4]),  # to a whole shard: nothing is read
        ({path: None for path in ORDER[14:]}, [3, 4]),
        ({path: None for path in ORDER[:16]}, [0, 1, 2, 3, 4]),
        ({"0/new.npy": (1, 3)}, [4]),
    ],
)
def test_only_the_shards_of_changed_files_are_written(
    items: Bench, edits: dict[str, tuple[int, int] | None], shards: list[int]
) -> None:
    items.put(edits)
    results: list[IngestResult] = []
    assert written(items, lambda: results.append(items.ingest())) == shards
    now = after(ITEMS, edits)
    items.check(now)
    assert results[0].rows == len(now)
    assert results[0].deleted == sum(what is None for what in edits.values())
    assert results[0].changed == sum(what is not None and path in ITEMS for path, what in edits.items())
    assert results[0].files == len(edits.keys() - ITEMS.keys())
    assert not results[0].nothing_to_do
    assert written(items, lambda: results.append(items.ingest())) == []
    assert results[1].nothing_to_do


BLOCKS: Tree = {"a/0": (5, 1), "a/1": (3, 1), "b/2": (3, 1), "b/3": (6, 1), "b/4": (2, 1), "b/5": (1, 1)}
BLOCKS = {f"{path}.npy": what for path, what in BLOCKS.items()}


@pytest.mark.parametrize(
    ("edits", "shards"),
    [
        ({"a/1.npy": (3, 2)}, [1]),  # rows 5-7
        ({"a/1.npy": None}, [1, 4]),  # the last two files have three rows
        ({"a/1.npy": (4, 2)}, [1, 4, 5]),  # so, and the new version follows
        ({"b/3.npy": None}, [2, 3, 4]),  # what follows moves up
        ({"b/3.npy": (6, 2), "a/0.npy": (6, 2)}, [0, 1, 2, 3, 4, 5]),
        ({"b/4.npy": None, "b/5.npy": None}, [4]),
        ({"b/4.npy": (0, 2)}, [4]),
    ],
)
def test_blocks_of_rows(tmp_path: Path, edits: dict[str, tuple[int, int] | None], shards: list[int]) -> None:
    bench = Bench(tmp_path)
    bench.put(BLOCKS)
    bench.ingest()
    bench.check(BLOCKS)
    bench.put(edits)
    assert written(bench, bench.ingest) == shards
    bench.check(after(BLOCKS, edits))
    assert bench.ingest().nothing_to_do


PATHS = st.sampled_from([f"{letter}/{number}.npy" for letter in "ab" for number in range(8)])
EDITS = st.dictionaries(PATHS, st.none() | st.integers(0, 6), max_size=10)


@pytest.mark.parametrize("one", [False, True])
@settings(max_examples=6, deadline=None)
@given(runs=st.lists(EDITS, min_size=2, max_size=4))
def test_any_changes(tmp_path_factory: pytest.TempPathFactory, one: bool, runs: list[dict[str, int | None]]) -> None:
    bench = Bench(tmp_path_factory.mktemp("any"), one)
    files: Tree = {"c/0.npy": (1, 1)}  # no store is without rows
    bench.put(files)
    for number, edits in enumerate(runs, 2):
        some = {
            path: None if rows is None else (1 if one else rows, number)
            for path, rows in edits.items()
            if rows is not None or path in files
        }
        bench.put(some)
        files = after(files, some)
        bench.ingest()
        bench.check(files)
        assert bench.ingest().nothing_to_do
    bench.check(files)


def test_rows_that_move_up_are_told(tmp_path: Path) -> None:
    bench, notes = Bench(tmp_path), list[str]()
    bench.put(BLOCKS)
    bench.ingest()
    bench.put({"b/3.npy": None})
    bench.ingest(on_event=lambda event: notes.append(event.message))
    assert "3 rows move up, as no files have as many rows as those that went" in notes


def test_dropped_rows_are_counted_anew(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    values = block("a/0.npy", 6, 1)
    (bench.tree / "a").mkdir(parents=True)
    for number in range(3):
        np.save(bench.tree / f"a/{number}.npy", np.where(np.arange(6)[:, None] == number, np.nan, values))
    assert bench.ingest(nonfinite="drop").dropped == 3
    np.save(bench.tree / "a/1.npy", np.where(np.arange(6)[:, None] > 3, np.inf, values))
    result = bench.ingest(nonfinite="drop")
    assert (result.rows, result.dropped) == (14, 4)
    (bench.tree / "a/0.npy").unlink()
    result = bench.ingest(nonfinite="drop")
    assert (result.rows, result.dropped) == (9, 3)
    assert verify(str(bench.store)).ok


def test_a_changed_file_that_is_bad_is_set_aside_and_comes_back(items: Bench) -> None:
    victim = items.tree / ORDER[3]
    victim.write_bytes(b"no array")
    assert items.ingest(bad="skip").bad_files == 1
    items.check(after(ITEMS, {ORDER[3]: None}))
    items.put({ORDER[3]: (1, 5)})
    items.ingest()
    items.check(after(ITEMS, {ORDER[3]: (1, 5)}))


def test_a_touched_file_is_refused_with_what_to_do_and_makes_the_same_bytes(items: Bench) -> None:
    before = snapshot(items.store)
    for path in ORDER[:7]:
        os.utime(items.tree / path, ns=(7, 7))
    notes: list[str] = []
    with pytest.raises(
        SettingsChanged, match=r"7 changed: 0/00.npy, .*0/08.npy and 2 more. Nothing .*--changed rewrite"
    ):
        items.ingest("raise", on_event=lambda event: notes.append(event.message))
    assert sum(note.startswith("changed: ") for note in notes) == 7
    assert "files: 11 unchanged, 7 changed" in notes
    assert snapshot(items.store) == before
    assert items.ingest().rows_written == 8
    shards = {name: data for name, data in before.items() if "/c." in name and not name.startswith("publ")}
    assert {name: (items.store / name).read_bytes() for name in shards} == shards


def test_a_manifest_whose_files_share_rows(items: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Manifest._read
    monkeypatch.setattr(Manifest, "_read", lambda *of: replace(real(*of), start=np.zeros(of[2] - of[1], np.int64)))
    items.put({ORDER[5]: None})
    with pytest.raises(Corrupt, match=rf"manifest of {items.store} is damaged or forged: its files share rows"):
        items.ingest()


def test_rows_that_are_only_taken_away_are_told(items: Bench) -> None:
    items.put(dict.fromkeys(ORDER[16:]))
    result, said = items.ingest(), list[str]()
    wrote_rows(SimpleNamespace(result=lambda line, document: said.append(line)), "ingest", result)  # type: ignore[arg-type]
    assert (result.rows, result.rows_written, result.rows_removed) == (16, 0, 2)
    assert said == [f"ingest: took 2 rows away from {items.store}, which has 16 now"]
    items.put(dict.fromkeys(ORDER[:3]))
    result = items.ingest()
    wrote_rows(SimpleNamespace(result=lambda line, document: said.append(line)), "ingest", result)  # type: ignore[arg-type]
    assert result.rows_written > 0
    assert said[1].endswith("which has 3 rows fewer than before")
    assert items.ingest().rows_removed == 0


def test_names_beside_a_source_that_is_one_file(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.put({"a.npy": (3, 1), "b.npy": (4, 1)})
    ingest(bench.tree, bench.store)
    notes: list[str] = []
    with pytest.raises(SettingsChanged, match="1 deleted: b.npy"):
        ingest(bench.tree / "a.npy", bench.store, on_event=lambda event: notes.append(event.message))
    assert f"deleted: {bench.tree}/b.npy" in notes


def test_rewritten_rows_are_told(items: Bench) -> None:
    items.put({ORDER[5]: (1, 2), ORDER[6]: None})
    notes: list[str] = []
    items.ingest(on_event=lambda event: notes.append(event.message))
    assert "files: 16 unchanged, 1 changed, 1 deleted" in notes
    assert any("6 of 18 published rows are in 2 shards that are made again" in note for note in notes)


# ------------------------------------------------------------------------------------- what is made from the rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of rows of three features."""
    root = tmp_path_factory.mktemp("model")
    np.save(root / "rows.npy", np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32))
    ingest(root / "rows.npy", root / "store")
    train(str(root / "store"), str(root / "model"), num_steps=5)
    return root / "model"


@pytest.mark.parametrize(
    "edits",
    [
        {ORDER[5]: (1, 2)},
        {ORDER[5]: None},
        {path: None for path in ORDER[3:12]},
        {ORDER[17]: (1, 2), "1/x.npy": (1, 2), "1/y.npy": (1, 2), "1/z.npy": (1, 2)},
    ],
)
def test_latents_follow(items: Bench, model: Path, edits: dict[str, tuple[int, int] | None]) -> None:
    latents, anew = items.root / "latents", items.root / "anew"
    embed(items.store, model, latents)
    items.put(edits)
    items.ingest()
    notes: list[str] = []
    result = embed(items.store, model, latents, on_event=lambda event: notes.append(event.message))
    assert 0 < result.rows_written <= result.rows
    assert any("published rows are in" in note for note in notes)
    embed(items.store, model, anew)
    for name in ("z", "id", "label"):
        found, expected = (RowStore.open(str(place)).read(name) for place in (latents, anew))
        np.testing.assert_array_equal(found, expected)
    assert verify(str(latents)).ok
    assert embed(items.store, model, latents).nothing_to_do


def test_latents_of_rows_that_stay_are_not_made_again(items: Bench, model: Path) -> None:
    latents = items.root / "latents"
    embed(items.store, model, latents)
    items.put({ORDER[5]: (1, 2)})
    items.ingest()
    before = stamps(latents, range(10))
    assert embed(items.store, model, latents).rows_written == 4
    now = stamps(latents, range(10))
    assert {path for path in before if before[path] != now[path]} == {path for path in before if "/c.1" in path}


def test_an_append_replaces_no_latent(items: Bench, model: Path) -> None:
    latents = items.root / "latents"
    embed(items.store, model, latents)
    items.put({"1/x.npy": (1, 2)})
    items.ingest()
    notes: list[str] = []
    assert embed(items.store, model, latents, on_event=lambda e: notes.append(e.message)).rows_written == 3
    assert not any("made again" in note for note in notes)


def test_a_training_says_that_its_rows_were_replaced(items: Bench) -> None:
    place = str(items.root / "model")
    train(items.store, place, num_steps=5)
    items.put({ORDER[5]: (1, 2)})
    items.ingest()
    messages: list[Event] = []
    assert train(items.store, place, num_steps=5, on_event=messages.append).nothing_to_do
    assert (
        "on 18 rows, some of which were replaced since, of what are now 18; --overwrite trains anew"
        in messages[-1].message
    )
    with pytest.raises(SettingsChanged, match="dim_latent: 2 there, 3 asked for"):
        train(items.store, place, num_steps=5, dim_latent=3)
    ingest(items.tree, items.store, label=None, overwrite=True)
    with pytest.raises(SettingsChanged, match="other settings or rows"):
        train(items.store, place, num_steps=5)


# --------------------------------------------------------------------------------------------- interruptions


def stop_while_moving(monkeypatch: pytest.MonkeyPatch, moved: int) -> None:
    """Let a driver be interrupted after it moved so many objects."""
    real, count = Location.move, [0]

    def move(self: Location, target: Location) -> None:
        if count[0] == moved:
            raise KeyboardInterrupt
        count[0] += 1
        real(self, target)

    monkeypatch.setattr(Location, "move", move)


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_an_interrupted_replacement_is_finished_by_the_next_run(
    items: Bench, monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    edits: dict[str, tuple[int, int] | None] = {ORDER[5]: (1, 2), ORDER[6]: None, ORDER[17]: None}
    reader = RowStore.open(str(items.store))
    items.put(edits)
    with monkeypatch.context() as patch:
        stop_while_moving(patch, moved)
        with pytest.raises(KeyboardInterrupt):
            items.ingest()
    with pytest.raises(OutputLocked, match="rows of .* are being replaced just now"):
        RowStore.open(str(items.store))
    with pytest.raises(OutputLocked):
        verify(str(items.store))
    with pytest.raises(Corrupt, match="were replaced while they were read"):
        reader.require_unchanged()
    assert items.ingest("raise").nothing_to_do, "what was published is finished whatever is asked for"
    items.check(after(ITEMS, edits))


def test_a_verify_under_way_does_not_call_replaced_rows_damaged(items: Bench) -> None:
    items.put({ORDER[5]: (1, 2)})

    def rewrite(event: Event) -> None:
        if event.kind == "start":
            items.ingest()

    with pytest.raises(Corrupt, match="were replaced while they were read"):
        verify(str(items.store), on_event=rewrite)
    assert verify(str(items.store)).ok


def test_an_interrupted_rewrite_leaves_the_published_rows(items: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(items.store)
    edits: dict[str, tuple[int, int] | None] = {ORDER[5]: (1, 2), ORDER[12]: (1, 2), "1/x.npy": (1, 2)}
    times = {path: (items.tree / path).stat().st_mtime_ns for path in ORDER}
    items.put(edits)

    def interrupted(self: RowStore, *arguments: object) -> RowStore:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RowStore, "publish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            items.ingest()
    assert (items.store / "journal/shards/x/c.1.0").exists()
    found = RowStore.open(str(items.store))
    np.testing.assert_array_equal(found.read("x")[:, 1], 1)
    items.put({**{path: (1, 1) for path in (ORDER[5], ORDER[12])}, "1/x.npy": None})
    for path, time in times.items():
        os.utime(items.tree / path, ns=(time, time))
    assert items.ingest().nothing_to_do
    after_all = snapshot(items.store)
    assert {name: data for name, data in after_all.items() if name != "zarr.json"} == {
        name: data for name, data in before.items() if name != "zarr.json"
    }


def test_an_append_that_was_interrupted_and_then_a_rewrite(items: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    items.put({"1/x.npy": (1, 2)})

    def interrupted(self: RowStore, *arguments: object) -> RowStore:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RowStore, "publish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            items.ingest()
    edits: dict[str, tuple[int, int] | None] = {"1/x.npy": None, ORDER[5]: (1, 3)}
    items.put(edits)
    items.ingest()
    items.check(after(ITEMS, edits))


# ------------------------------------------------------------------------------------------------ object stores


@pytest.mark.parametrize(
    "storage",
    ["weed", *(pytest.param(name, marks=pytest.mark.heavy) for name in ("moto", "azurite", "gcs"))],
    indirect=True,
)
def test_files_and_store_in_an_object_store(storage: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    options = storage.options
    tree, store = (Location.of(f"{storage.url}/{name}", options) for name in ("tree", "store"))

    def put(path: str, content: int) -> None:
        data = io.BytesIO()
        np.save(data, block(path, 1, content)[0])
        (tree / path).write(data.getvalue())

    def run(changed: str) -> IngestResult:
        return ingest(str(tree), str(store), changed=changed, storage_options=options)  # type: ignore[arg-type]

    def rows() -> list[list[float]]:
        return sorted(RowStore.open(store).read("x").tolist())

    for path in ORDER:
        put(path, 1)
    run("raise")
    put(ORDER[2], 1)  # the same bytes have the same ETag
    has_etags = storage.url.startswith(("s3", "az"))
    assert run("raise" if has_etags and not storage.url.startswith("az") else "rewrite").rows == 18
    put(ORDER[5], 2)
    (tree / ORDER[9]).delete()
    with monkeypatch.context() as patch:
        stop_while_moving(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            run("rewrite")
    with pytest.raises(OutputLocked):
        RowStore.open(store)
    assert run("raise").nothing_to_do
    assert rows() == sorted(
        block(path, 1, 2 if path == ORDER[5] else 1)[0].tolist() for path in ORDER if path != ORDER[9]
    )
    assert verify(str(store), storage_options=options).ok
    put(ORDER[5], 3)
    assert run("rewrite").rows_written == 4
    assert [row[1] for row in rows() if row[1] > 2] == [3.0]
