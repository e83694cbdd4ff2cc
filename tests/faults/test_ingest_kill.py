"""Ingest killed with SIGKILL, at every change it makes and at any time: readers and the next run must not notice."""

import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import xarray as xr
import zarr

from tests.faults.drivers import (
    Drivers,
    item,
    recorded,
    require_same,
    running,
    snapshot,
    stamps,
    wait_until,
    write_items,
)

FIRST, ALL = 10, 15  # rows before and after the append: a shard boundary lies between, both ends are partial


# by default some of the changes that a run makes; all of them where time allows
some_and_every = pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.heavy)])


def _has_recorded(store: Path, count: int) -> bool:
    return len(recorded(store)) >= count


def visible_rows(store: Path) -> int:
    """Return how many rows plain readers see, after comparing every one of them with the source."""
    try:
        dataset = xr.open_zarr(store)
        group = zarr.open_group(str(store), mode="r")
    except FileNotFoundError:
        return 0
    rows = dataset.sizes["sample"]
    if rows:
        assert_rows(dataset["x"].values, dataset["id"].values, rows)
        assert dataset["label"].values.tolist() == [name.split("/")[0] for name in dataset["id"].values]
        np.testing.assert_array_equal(group["x"][:], dataset["x"].values)
    dataset.close()
    return rows


def assert_rows(x: Any, ids: Any, rows: int) -> None:
    assert len(x) == len(ids) == rows
    numbers = [int(name[-8:-4]) for name in ids]
    np.testing.assert_array_equal(x, [item(number) for number in numbers])
    assert sorted(numbers) == list(range(rows))


@pytest.fixture(scope="module")
def undisturbed(drivers: Drivers, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The source, and what an undisturbed ingest, append and overwrite of it leave, with their changes."""
    root = tmp_path_factory.mktemp("undisturbed")
    first, grown = root / "first", root / "grown"
    tree = root / "tree"
    write_items(tree, 0, FIRST)
    found: dict[str, Any] = {"tree": tree}
    for store in (first, grown):
        ended = drivers.run("ingest", tree, store, label="folder", _below=str(store)).require_done()
    found["first"], found["first_changes"] = snapshot(first), ended.changes
    write_items(tree, FIRST, ALL)
    ended = drivers.run("ingest", tree, grown, label="folder", _below=str(grown)).require_done()
    found["grown"], found["grown_changes"] = snapshot(grown), ended.changes
    ended = drivers.run("ingest", tree, first, label="folder", overwrite=True, _below=str(first)).require_done()
    found["over"], found["over_changes"] = snapshot(first), ended.changes
    assert visible_rows(grown) == visible_rows(first) == ALL
    return found


def hide_new(tree: Path, root: Path) -> Path:
    """Return a copy of the tree, times included, without the files that are appended later."""
    part = root / "tree"
    for path in tree.rglob("*.npy"):
        if int(path.stem[-4:]) < FIRST:
            (part / path.relative_to(tree)).parent.mkdir(parents=True, exist_ok=True)
            (part / path.relative_to(tree)).hardlink_to(path)
    return part


def show_all(tree: Path, part: Path) -> None:
    for path in tree.rglob("*.npy"):
        link = part / path.relative_to(tree)
        if not link.exists():
            link.hardlink_to(path)


@some_and_every
def test_killed_before_changes_of_a_first_ingest(
    drivers: Drivers, undisturbed: dict[str, Any], tmp_path: Path, step: int
) -> None:
    changes = undisturbed["first_changes"]
    assert changes > 40
    part = hide_new(undisturbed["tree"], tmp_path)
    seen = set()
    for change in sorted({*range(0, changes, step), changes - 1}):
        store = tmp_path / f"store{change}"
        killed = drivers.run("ingest", part, store, label="folder", _below=str(store), _die_at=change)
        assert killed.signal == 9, change
        seen.add(visible_rows(store))
        done = recorded(store)
        before = stamps(store, done)
        again = drivers.run("ingest", part, store, label="folder").require_done()
        assert again.result["rows"] == FIRST
        require_same(store, undisturbed["first"])
        assert stamps(store, done) == before, change
        assert not list(tmp_path.glob("*.lease"))
    assert seen == {0, FIRST}


@some_and_every
def test_killed_before_changes_of_an_append(
    drivers: Drivers, undisturbed: dict[str, Any], tmp_path: Path, step: int
) -> None:
    changes = undisturbed["grown_changes"]
    assert changes > 30
    part = hide_new(undisturbed["tree"], tmp_path)
    stores = {change: tmp_path / f"store{change}" for change in sorted({*range(0, changes, step), changes - 1})}
    for store in stores.values():
        drivers.run("ingest", part, store, label="folder").require_done()
    show_all(undisturbed["tree"], part)
    seen = set()
    for change, store in stores.items():
        full = stamps(store, [0, 1])
        killed = drivers.run("ingest", part, store, label="folder", _below=str(store), _die_at=change)
        assert killed.signal == 9, change
        seen.add(visible_rows(store))
        again = drivers.run("ingest", part, store, label="folder").require_done()
        assert again.result["rows"] == ALL
        require_same(store, undisturbed["grown"])
        assert stamps(store, [0, 1]) == full, change
    assert seen == {FIRST, ALL}


@pytest.mark.parametrize("step", [30, pytest.param(1, marks=pytest.mark.heavy)])
def test_killed_before_changes_of_an_overwrite(
    drivers: Drivers, undisturbed: dict[str, Any], tmp_path: Path, step: int
) -> None:
    part = hide_new(undisturbed["tree"], tmp_path)
    changes = undisturbed["over_changes"]
    stores = {change: tmp_path / f"store{change}" for change in range(0, changes, step)}
    for store in stores.values():
        drivers.run("ingest", part, store, label="folder", nonfinite="drop").require_done()  # other settings
    show_all(undisturbed["tree"], part)
    for change, store in stores.items():
        options = {"label": "folder", "overwrite": True}
        killed = drivers.run("ingest", part, store, **options, _below=str(store), _die_at=change)
        assert killed.signal == 9, change
        assert visible_rows(store) in (0, FIRST, ALL)
        drivers.run("ingest", part, store, **options).require_done()
        require_same(store, undisturbed["over"])


@pytest.mark.parametrize("kind", ["one", "many"])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.heavy) for seed in (1, 2))])
def test_killed_at_random_times(drivers: Drivers, tmp_path: Path, kind: str, seed: int) -> None:
    tree, store, whole = tmp_path / "tree", tmp_path / "store", tmp_path / "whole"
    write_tree(tree, kind)
    drivers.run("ingest", tree, whole).require_done()
    expected = snapshot(whole)
    choose = random.Random(seed)
    for _ in range(4):
        already = len(recorded(store))
        goal = min(32, already + choose.randrange(1, 12))
        driver = drivers.start("ingest", tree, store, _delay=0.002, _hold=(38 - already, tmp_path / "never"))
        with running(driver):
            driver.until(partial(_has_recorded, store, goal))
        assert driver.kill().signal == 9
        done = recorded(store)
        before = stamps(store, done)
    assert 0 < len(done) < 40
    drivers.run("ingest", tree, store).require_done()
    require_same(store, expected)
    assert stamps(store, done) == before


@pytest.mark.heavy
@pytest.mark.parametrize("step", [23, 1])
def test_killed_before_changes_of_a_shuffled_ingest(drivers: Drivers, tmp_path: Path, step: int) -> None:
    """Rows that were dealt are used again, and nothing of them is left."""
    tree, whole = tmp_path / "tree", tmp_path / "whole"
    tree.mkdir()
    for part in range(2):
        np.save(tree / f"{part}.npy", np.stack([item(number) for number in range(8 * part, 8 * part + 8)]))
    options: dict[str, Any] = {"shuffle": 1, "label": "folder", "_run_bytes": 4 * (12 + 8 + 64)}  # runs of four rows
    changes = drivers.run("ingest", tree, whole, **options, _below=str(whole)).require_done().changes
    expected, dealt = snapshot(whole), set()
    for change in sorted({*range(0, changes, step), changes - 1}):
        store = tmp_path / f"store{change}"
        assert drivers.run("ingest", tree, store, **options, _below=str(store), _die_at=change).signal == 9
        dealt.add(len([path for path in store.glob("journal/shuffled/*/*") if path.name.isdecimal()]))
        drivers.run("ingest", tree, store, **options).require_done()
        require_same(store, expected)
        assert not list(tmp_path.glob("*.lease"))
    assert dealt >= {0, 4}


def write_tree(tree: Path, kind: str) -> None:
    """Write 160 rows: 40 shards of four."""
    if kind == "one":
        write_items(tree, 0, 160)
        return
    tree.mkdir()
    rows = np.stack([item(number) for number in range(160)])
    for number, part in enumerate(np.split(rows, [37, 38, 90])):
        np.save(tree / f"part{number}.npy", part)


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["one", "many"])
def test_driver_of_two_workers_killed(drivers: Drivers, tmp_path: Path, kind: str) -> None:
    tree, store, whole = tmp_path / "tree", tmp_path / "store", tmp_path / "whole"
    write_tree(tree, kind)
    drivers.run("ingest", tree, whole).require_done()
    driver = drivers.start("ingest", tree, store, _workers=2, _hold=(4, tmp_path / "go"))
    with running(driver):
        driver.until(lambda: len(recorded(store)) >= 3)
        workers = psutil.Process(driver.pid).children(recursive=True)
    assert len(workers) >= 2
    assert driver.kill().signal == 9
    (tmp_path / "go").touch()
    wait_until(lambda: not any(worker.is_running() for worker in workers))
    done = recorded(store)
    assert 3 <= len(done) < 40
    before = stamps(store, done)
    drivers.run("ingest", tree, store, _workers=2).require_done()
    require_same(store, snapshot(whole))
    assert stamps(store, done) == before


def test_one_of_two_workers_killed(drivers: Drivers, tmp_path: Path) -> None:
    tree, store, whole = tmp_path / "tree", tmp_path / "store", tmp_path / "whole"
    write_tree(tree, "many")
    drivers.run("ingest", tree, whole).require_done()
    driver = drivers.start("ingest", tree, store, _workers=2, _hold=(4, tmp_path / "go"))
    with running(driver):
        driver.until(lambda: len(recorded(store)) >= 3)
        everyone = psutil.Process(driver.pid).children(recursive=True)
        workers = [child for child in everyone if is_worker(child)]
        assert len(workers) == 2
        workers[0].kill()
        done = recorded(store)
        before = stamps(store, done)
        assert len(done) < 40
        (tmp_path / "go").touch()
        driver.wait().require_done()
    require_same(store, snapshot(whole))
    assert stamps(store, done) == before
    wait_until(lambda: not any(process.is_running() for process in everyone))


def is_worker(process: psutil.Process) -> bool:
    return "spawn_main" in " ".join(process.cmdline())
