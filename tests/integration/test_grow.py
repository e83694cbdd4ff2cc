"""Stores that grow: appended, not rewritten; like a store of the same rows made at once, as far as rows go."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from cvae_dist.errors import InvalidInput, SettingsChanged
from cvae_dist.pipeline import run
from cvae_dist.store import Layout, RowStore
from cvae_dist.verbs.ingest import ingest
from cvae_dist.verbs.train import train
from cvae_dist.verbs.verify import verify
from tests.faults.drivers import SHARDS_PER_PACK, item, small_grid, snapshot, stamps, write_items


@pytest.fixture(autouse=True)
def _tiny_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Layout, "of", small_grid())
    monkeypatch.setattr(Layout, "shards_per_pack", SHARDS_PER_PACK)


def numbers(store: Path) -> list[int]:
    """Return the numbers of the items in stored order, after checking rows, labels and statistics."""
    opened = RowStore.open(str(store))
    found = [int(name[-8:-4]) for name in opened.read("id")]
    rows = np.array([item(number) for number in found])
    np.testing.assert_array_equal(opened.read("x"), rows)
    assert opened.read("label").tolist() == [f"class {number % 3}" for number in found]
    np.testing.assert_allclose(opened.statistics().mean, rows.mean(0, dtype=float), rtol=1e-12)
    np.testing.assert_allclose(opened.statistics().std, rows.std(0, dtype=float), rtol=1e-9)
    assert verify(str(store)).ok
    return found


@pytest.mark.parametrize("steps", [(1, 2, 3), (4, 8, 12), (3, 4, 5, 9), (10, 11, 30), (2, 40)])
def test_growth_over_shard_boundaries(tmp_path: Path, steps: tuple[int, ...]) -> None:
    tree, store = tmp_path / "tree", tmp_path / "store"
    before = 0
    seen: list[int] = []
    for rows in steps:
        write_items(tree, before, rows)
        full = list(range(before // 4))
        stamped = stamps(store, full)
        partial = stamps(store, [before // 4]) if before % 4 else {}
        result = ingest(tree, store, label="folder")
        assert result.rows == rows
        assert result.rows_written == rows - 4 * len(full)
        assert stamps(store, full) == stamped, "a full shard was written again"
        after = stamps(store, [before // 4])
        assert all(after[name] != partial[name] for name in partial), "the partial shard was not completed"
        found = numbers(store)
        assert found[:before] == seen, "published rows moved"
        assert sorted(found) == list(range(rows))
        before, seen = rows, found
    assert ingest(tree, store, label="folder").nothing_to_do
    assert len(RowStore.open(str(store)).history.splitlines()) == len(steps)


def test_files_deleted_after_they_were_published(tmp_path: Path) -> None:
    tree, store = tmp_path / "tree", tmp_path / "store"
    write_items(tree, 0, 10)
    ingest(tree, store, label="folder")
    published = numbers(store)
    for path in list(tree.rglob("*.npy"))[::2]:
        path.unlink()
    write_items(tree, 20, 27)
    with pytest.raises(SettingsChanged, match=r"not as they were: 5 deleted: class 0/item"):
        ingest(tree, store, label="folder")
    assert numbers(store) == published


def test_file_changed_after_it_was_published(tmp_path: Path) -> None:
    tree, store = tmp_path / "tree", tmp_path / "store"
    write_items(tree, 0, 10)
    ingest(tree, store, label="folder")
    write_items(tree, 10, 12)
    victim = next(tree.rglob("*0003.npy"))
    os.utime(victim, ns=(1, 1))
    with pytest.raises(SettingsChanged, match=r"1 changed: .*item 0003\.npy"):
        ingest(tree, store, label="folder")
    assert sorted(numbers(store)) == list(range(10))


def test_many_row_files_and_dropped_rows_grow_together(tmp_path: Path) -> None:
    tree, store = tmp_path / "tree", tmp_path / "store"
    tree.mkdir()
    kept = []
    for number, rows in enumerate([5, 3, 8, 1, 6]):
        block = np.arange(rows * 2, dtype=np.float16).reshape(rows, 2) + 100 * number
        block[rows // 2] = np.inf
        np.save(tree / f"{number}.npy", block)
        kept.append(np.delete(block, rows // 2, axis=0))
        result = ingest(tree, store, nonfinite="drop")
        assert (result.rows, result.dropped <= number + 1) == (sum(map(len, kept)), True)
        np.testing.assert_array_equal(RowStore.open(str(store)).read("x"), np.concatenate(kept))
        assert verify(str(store)).ok


def test_interrupted_growth_is_named_by_verify_and_finished_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, store = tmp_path / "tree", tmp_path / "store"
    write_items(tree, 0, 10)
    ingest(tree, store, label="folder")
    write_items(tree, 10, 21)

    def interrupted(self: RowStore, *arguments: object) -> RowStore:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RowStore, "publish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ingest(tree, store, label="folder")
    opened = RowStore.open(str(store))
    assert (opened.rows, len(opened.read("x"))) == (10, 10)
    problems = verify(str(store)).problems
    assert [(problem.array, problem.shard) for problem in problems] == [("x", 2), ("id", 2), ("label", 2)]
    for problem in problems:
        assert "interrupted: the published rows are untouched then; run it again" in str(problem)
    result = ingest(tree, store, label="folder")
    assert (result.rows, result.rows_written) == (21, 0)
    assert len(numbers(store)) == 21


def test_a_nightly_pipeline_goes_on_when_files_come(tmp_path: Path) -> None:
    """The model of a store that has grown stays good: only the new rows are ingested and embedded."""
    rows = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    (tmp_path / "tree").mkdir()
    for number in range(50):
        np.save(tmp_path / f"tree/{number:02}.npy", rows[number])
    store, model, latents = (str(tmp_path / name) for name in ("rows.zarr", "model", "latents.zarr"))
    pipeline = tmp_path / "nightly.yaml"
    stages = [
        {"ingest": {"source": str(tmp_path / "tree"), "store": store}},
        {"train": {"store": store, "model": model, "num_steps": 20}},
        {"embed": {"store": store, "model": model, "latents": latents}},
    ]
    pipeline.write_text(json.dumps({"stages": stages}))
    run(str(pipeline))
    weights = (tmp_path / "model/model.safetensors").read_bytes()
    before = RowStore.open(latents).read("z")
    for number in range(50, 60):
        np.save(tmp_path / f"tree/{number:02}.npy", rows[number])
    notes: list[str] = []
    run(str(pipeline), on_event=lambda event: notes.append(event.message))
    assert "already trained, on 50 of what are now 60 rows; --overwrite trains anew on all of them" in notes
    assert (tmp_path / "model/model.safetensors").read_bytes() == weights
    after = RowStore.open(latents).read("z")
    assert len(after) == 60
    np.testing.assert_array_equal(after[:50], before)
    with pytest.raises(SettingsChanged, match="dim_latent: 2 there, 3 asked for"):
        train(store, model, num_steps=20, dim_latent=3)


def test_another_tree_is_not_appended(tmp_path: Path) -> None:
    for folder, name in (("one", "a"), ("two", "b")):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / f"{name}.npy", np.ones(3))
    ingest(tmp_path / "one", tmp_path / "s")
    with pytest.raises(SettingsChanged, match=r"was made from .*one, and .*two holds none of its files"):
        ingest(tmp_path / "two", tmp_path / "s")
    assert RowStore.open(str(tmp_path / "s")).rows == 1


def test_interrupted_growth_is_taken_back_when_its_files_vanish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, store = tmp_path / "tree", tmp_path / "store"
    write_items(tree, 0, 10)
    ingest(tree, store, label="folder")
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    write_items(tree, 10, 21)

    def interrupted(self: RowStore, *arguments: object) -> RowStore:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RowStore, "publish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ingest(tree, store, label="folder")
    for number in range(10, 21):
        next(tree.rglob(f"*{number:04d}.npy")).unlink()
    assert ingest(tree, store, label="folder").nothing_to_do
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before
    assert len(numbers(store)) == 10


def test_statistics_that_overflow_as_a_store_grows(tmp_path: Path) -> None:
    """Each append alone has a variance that float64 can hold."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for number, value in enumerate([1e154, -1e154]):
        np.save(tree / f"{number}.npy", np.array([[1.0, value]] * 9))
        if not number:
            ingest(tree, tmp_path / "store")
            before = snapshot(tmp_path / "store")
    with pytest.raises(
        InvalidInput, match=r"feature 1 of .*store go from -1e\+154 to 1e\+154, and the variance of all 18"
    ):
        ingest(tree, tmp_path / "store")
    assert RowStore.open(str(tmp_path / "store")).rows == 9
    (tree / "1.npy").unlink()
    ingest(tree, tmp_path / "store")
    assert snapshot(tmp_path / "store") == before
