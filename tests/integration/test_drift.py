"""Drift of appends: told, written, and refused, with what was written kept for the next run."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from cvae_dist.cli import main
from cvae_dist.errors import DriftTooLarge, InvalidInput
from cvae_dist.events import Event
from cvae_dist.store import Layout, RowStore
from cvae_dist.store.drift import stability_index
from cvae_dist.store.sample import level_of, sampled_rows
from cvae_dist.verbs.info import info
from cvae_dist.verbs.ingest import ingest
from cvae_dist.verbs.verify import verify
from tests.faults.drivers import Drivers, require_same, small_grid, snapshot

MOST = 64  # sampled rows


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 20 rows, two a pack."""
    monkeypatch.setattr(Layout, "of", small_grid(20))
    monkeypatch.setattr(Layout, "shards_per_pack", 2)
    monkeypatch.setattr("cvae_dist.store.sample._MOST_ROWS", MOST)


@pytest.fixture(scope="module")
def drivers() -> Iterator[Drivers]:
    drivers = Drivers()
    yield drivers
    drivers.close()


def rows(number: int, count: int, shift: float = 0) -> np.ndarray:
    """Return rows of four features, the third of which is shifted."""
    block = np.random.default_rng(number).normal(size=(count, 4)).astype(np.float32)
    block[:, 2] += shift
    return block


def add(tree: Path, number: int, block: np.ndarray) -> np.ndarray:
    tree.mkdir(exist_ok=True)
    np.save(tree / f"{number:03}.npy", block)
    return block


def notes(tree: Path, store: Path, **options: Any) -> list[str]:
    """Ingest, and return what was told of drift."""
    events: list[Event] = []
    ingest(tree, store, on_event=events.append, **options)
    return [event.message for event in events if "drift" in event.values]


def objects(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def test_shifted_rows_are_told_with_the_feature_first(tmp_path: Path) -> None:
    tree, store = tmp_path / "tree", tmp_path / "store"
    before = add(tree, 0, rows(0, 210))
    assert notes(tree, store) == []
    assert RowStore.open(str(store)).drift() is None
    assert "drift" not in info(store)
    new = add(tree, 1, rows(1, 105, shift=3))
    told = notes(tree, store)
    assert len(told) == 1
    assert told[0].startswith("105 new rows drift by ")
    assert " from the 210 rows before. Largest: feature 2: mean +" in told[0]

    shift = (new.mean(0, np.float64) - before.mean(0, np.float64)) / before.std(0, dtype=np.float64)
    ratio = new.std(0, dtype=np.float64) / before.std(0, dtype=np.float64)
    picked, added = sampled_rows(0, 210, 2), sampled_rows(210, 315, 1)
    assert len(picked) <= MOST
    assert len(added) <= MOST
    everything = np.concatenate([before, new])
    opened = RowStore.open(str(store))
    with xr.open_zarr(store, group=opened.publication.path) as described:
        np.testing.assert_allclose(described["drift_mean_shift"], shift, rtol=1e-9)
        np.testing.assert_allclose(described["drift_sd_ratio"], ratio, rtol=1e-9)
        np.testing.assert_array_equal(described["drift_psi"], stability_index(everything[picked], everything[added]))
        assert described["drift_psi"].dims == ("feature",)
        assert described["drift_rows"].values.tolist() == [210, 105]
    assert info(store)["drift"].startswith(f"{opened.drift().largest:.2g} of the last 105 rows; feature 2: mean +")
    assert verify(store).ok
    assert notes(tree, store) == []


def test_equal_rows_drift_little_and_files_without_rows_change_nothing_of_it(tmp_path: Path) -> None:
    tree, store = tmp_path / "tree", tmp_path / "store"
    add(tree, 0, rows(0, 400))
    notes(tree, store)
    add(tree, 1, rows(1, 300))
    notes(tree, store, max_drift=0.25)
    found = RowStore.open(str(store)).drift()
    assert found is not None
    assert found.largest < 0.2
    (tree / "bad.npy").write_bytes(b"no array")
    assert notes(tree, store, bad="skip") == []  # the manifest is published anew
    opened = RowStore.open(str(store))
    assert opened.drift().mean_shift.tolist() == found.mean_shift.tolist()
    np.testing.assert_array_equal(opened.sample().values, opened.read("x")[opened.sample().rows])
    assert len(opened.sample().rows) > MOST // 2


@pytest.mark.parametrize("steps", [(300,), (60, 64, 65, 300), (1, 2, 130, 131, 299, 300)])
def test_the_sample_does_not_depend_on_appends(tmp_path: Path, steps: tuple[int, ...]) -> None:
    tree, store, everything = tmp_path / "tree", tmp_path / "store", rows(0, 300)
    start = 0
    for number, stop in enumerate(steps):
        add(tree, number, everything[start:stop])
        ingest(tree, store, rows_per_file="many")
        start = stop
    opened = RowStore.open(str(store))
    level = level_of(300, opened.layout)
    assert level == 3
    np.testing.assert_array_equal(opened.sample().rows, sampled_rows(0, 300, level))
    np.testing.assert_array_equal(opened.sample().values, everything[opened.sample().rows])


def test_too_much_drift_publishes_nothing_and_keeps_what_was_written(tmp_path: Path) -> None:
    tree, store, whole = tmp_path / "tree", tmp_path / "store", tmp_path / "whole"
    add(tree, 0, rows(0, 210))
    ingest(tree, store)
    ingest(tree, whole)
    add(tree, 1, rows(1, 105, shift=3))
    for _ in range(2):
        with pytest.raises(DriftTooLarge, match=r"by more than max_drift=1 \(feature 2: mean \+.* Nothing was publish"):
            ingest(tree, store, max_drift=1)
        assert RowStore.open(str(store)).rows == 210
    result = ingest(tree, store, max_drift=100)
    assert (result.rows, result.rows_written) == (315, 0)
    ingest(tree, whole)
    require_same(store, snapshot(whole))


def test_too_much_drift_is_taken_back_with_its_files(tmp_path: Path) -> None:
    tree, store = tmp_path / "tree", tmp_path / "store"
    add(tree, 0, rows(0, 210))
    ingest(tree, store)
    before = objects(store)
    add(tree, 1, rows(1, 105, shift=3))
    with pytest.raises(DriftTooLarge):
        ingest(tree, store, max_drift=1)
    (tree / "001.npy").unlink()
    assert ingest(tree, store, max_drift=1).nothing_to_do
    assert objects(store) == before


@pytest.mark.parametrize("asked", [-1, float("nan")])
def test_a_drift_that_none_can_have(tmp_path: Path, asked: float) -> None:
    add(tmp_path / "tree", 0, rows(0, 4))
    with pytest.raises(InvalidInput, match=r"max_drift=.* allows no rows at all"):
        ingest(tmp_path / "tree", tmp_path / "store", max_drift=asked)
    assert not (tmp_path / "store").exists()


def test_a_refused_command_ends_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tables").mkdir()
    for number, more in enumerate((0, 60)):
        lines = (f"{row % 7},{row % 5 + more}\n" for row in range(100))
        Path(f"tables/{number}.csv").write_text("age,weight\n" + "".join(lines))
        assert main(["ingest", "tables", "s.zarr", "--max-drift", "0.5"]) == number
    shown = capsys.readouterr().err
    assert "100 new rows drift by 42 from the 100 rows before. Largest: weight: mean +42 sd, sd x 1, PSI " in shown
    assert "Nothing was published" in shown
    assert main(["ingest", "tables", "s.zarr", "--max-drift", "50"]) == 0
    assert main(["info", "s.zarr"]) == 0
    assert "of the last 100 rows; weight: mean +42 sd" in capsys.readouterr().out


def test_killed_in_an_append(drivers: Drivers, tmp_path: Path) -> None:
    """What a killed driver had recorded is compared by the next one."""
    tree, whole = tmp_path / "tree", tmp_path / "whole"
    add(tree, 0, rows(0, 30))
    drivers.run("ingest", tree, whole).require_done()
    stores = [shutil.copytree(whole, tmp_path / name) for name in ("a", "b")]
    add(tree, 1, rows(1, 25, shift=3))
    changes = drivers.run("ingest", tree, whole, _below=str(whole)).require_done().changes
    for store, change in zip(stores, (changes // 3, changes // 2), strict=True):
        assert drivers.run("ingest", tree, store, _below=str(store), _die_at=change).signal == 9
        drivers.run("ingest", tree, store).require_done()
        require_same(store, snapshot(whole))
    assert RowStore.open(str(whole)).drift().order()[0] == 2
