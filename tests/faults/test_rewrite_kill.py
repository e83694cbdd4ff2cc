"""A rewrite that is killed: readers see the old rows or the new ones, and the next run ends with the same bytes."""

import random
import shutil
import signal
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cvae_dist.config import ModelConfig
from cvae_dist.errors import Corrupt, OutputLocked
from cvae_dist.model.directory import save_model
from cvae_dist.model.vae import VAE
from cvae_dist.store import Moments, RowStore
from cvae_dist.verbs.verify import verify
from tests.faults.drivers import Drivers, item, require_same, running, snapshot, write_items

ROWS, LEFT = 30, 28
EMBEDDED = 4  # rows of a shard of latents
CHANGED, DELETED, NEW = (5, 13), (2, 20, 21), (40,)
OPTIONS = {"label": "folder", "changed": "rewrite"}

STEP = 13
_LATER = [pytest.param(first, marks=pytest.mark.heavy) for first in range(1, STEP)]
some_and_every = pytest.mark.parametrize("first", [0, *_LATER])


@pytest.fixture(scope="module")
def undisturbed(drivers: Drivers, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A store, the tree it is made from and what becomes of both; how many changes that takes."""
    root = tmp_path_factory.mktemp("undisturbed")
    before, after, store, expected = (root / name for name in ("before", "after", "store", "expected"))
    write_items(before, 0, ROWS)
    for path in before.rglob("*.npy"):
        if int(path.stem[-4:]) not in DELETED:
            link = after / path.relative_to(before)
            link.parent.mkdir(parents=True, exist_ok=True)
            if int(path.stem[-4:]) in CHANGED:
                np.save(link, -np.load(path))
            else:
                link.hardlink_to(path)
    write_items(after, NEW[0], NEW[0] + 1)
    drivers.run("ingest", before, store, label="folder").require_done()
    shutil.copytree(store, expected)
    ended = drivers.run("ingest", after, expected, **OPTIONS, _below=str(expected)).require_done()
    assert rows_seen(expected) == "new"
    return {"after": after, "store": store, "expected": snapshot(expected), "changes": ended.changes}


def rows_seen(store: Path) -> str:
    """Return which rows our readers see: old, new or, while they are moved, none."""
    try:
        opened = RowStore.open(str(store))
        rows, names = opened.read("x"), opened.read("id")
        opened.require_unchanged()
    except (OutputLocked, Corrupt):
        return "none"
    found = {int(name[-8:-4]): row.tolist() for name, row in zip(names, rows, strict=True)}
    old = {number: item(number).tolist() for number in range(ROWS)}
    new = {number: values for number, values in old.items() if number not in DELETED}
    new |= {number: item(number).tolist() for number in NEW} | {number: (-item(number)).tolist() for number in CHANGED}
    assert len(found) == len(names)
    assert found in (old, new), "rows of two publications are mixed"
    return "new" if found == new else "old"


@some_and_every
def test_killed_before_changes(drivers: Drivers, undisturbed: dict[str, Any], tmp_path: Path, first: int) -> None:
    changes = undisturbed["changes"]
    assert changes > 40
    seen = []
    for change in sorted({*range(first, changes, STEP), *range(changes - 30, changes, 5)}):
        store = tmp_path / f"store{change}"
        shutil.copytree(undisturbed["store"], store)
        killed = drivers.run("ingest", undisturbed["after"], store, **OPTIONS, _below=str(store), _die_at=change)
        assert killed.signal == signal.SIGKILL, change
        seen.append(rows_seen(store))
        drivers.run("ingest", undisturbed["after"], store, **OPTIONS).require_done()
        assert rows_seen(store) == "new"
        require_same(store, undisturbed["expected"])
    assert [key for key, _ in groupby(seen)] == ["old", "none", "new"]


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(6))
def test_killed_at_random_times_under_the_eyes_of_readers(
    drivers: Drivers, undisturbed: dict[str, Any], tmp_path: Path, seed: int
) -> None:
    store, choose = tmp_path / "store", random.Random(seed)
    shutil.copytree(undisturbed["store"], store)
    arguments, options = ("ingest", undisturbed["after"], store), {**OPTIONS, "_delay": 0.02}
    for _ in range(4):
        with running(drivers.start(*arguments, **options)) as driver:
            time.sleep(choose.uniform(0.05, 0.3))
            rows_seen(store)
            driver.kill()
    with running(drivers.start(*arguments, **options)) as driver:
        driver.until(lambda: rows_seen(store) == "new")
        driver.wait().require_done()
    require_same(store, undisturbed["expected"])
    assert verify(str(store)).ok


@pytest.mark.heavy
def test_a_driver_of_two_workers_killed(drivers: Drivers, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(undisturbed["store"], store)
    arguments, options = ("ingest", undisturbed["after"], store), {**OPTIONS, "_workers": 2}
    with running(drivers.start(*arguments, **options, _hold=(1, tmp_path / "never"))) as driver:
        driver.until((store / "journal/shards").exists)
    assert driver.kill().signal == signal.SIGKILL
    assert rows_seen(store) == "old"
    drivers.run(*arguments, **options).require_done()
    require_same(store, undisturbed["expected"])


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory, undisturbed: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows that were rewritten, latents from before, what becomes of these, and how many changes that takes."""
    root = tmp_path_factory.mktemp("followed")
    rows, model, before, expected = (root / name for name in ("rows", "model", "before", "expected"))
    config = ModelConfig(cells_encoder=(16,), likelihood="gaussian", feature_normalization=True)
    values = np.stack([item(number) for number in range(ROWS)])
    save_model(str(model), VAE.of(config, Moments.of(values), "<f4"), {"store": "rows"})
    shutil.copytree(undisturbed["store"], rows)
    drivers = Drivers(["cvae_dist.cluster.model_map", "cvae_dist.verbs.embed"])
    drivers.run("embed", rows, model, before, _rows=EMBEDDED).require_done()
    drivers.run("ingest", undisturbed["after"], rows, **OPTIONS).require_done()
    shutil.copytree(before, expected)
    ended = drivers.run("embed", rows, model, expected, _below=str(expected), _rows=EMBEDDED).require_done()
    assert 0 < ended.result["rows_written"] < ended.result["rows"]
    yield {
        "drivers": drivers, "rows": rows, "model": model, "before": before, "expected": snapshot(expected),
        "changes": ended.changes,
    }  # fmt: skip
    drivers.close()


@pytest.mark.heavy
@pytest.mark.parametrize("first", range(STEP))
def test_latents_that_follow_killed_before_changes(followed: dict[str, Any], tmp_path: Path, first: int) -> None:
    drivers, seen = followed["drivers"], []
    for change in range(first, followed["changes"], STEP):
        latents = tmp_path / f"latents{change}"
        shutil.copytree(followed["before"], latents)
        command = ("embed", followed["rows"], followed["model"], latents)
        killed = drivers.run(*command, _below=str(latents), _die_at=change, _rows=EMBEDDED)
        assert killed.signal == signal.SIGKILL, change
        try:
            seen.append(RowStore.open(str(latents)).rows)
        except OutputLocked:
            seen.append(0)
        drivers.run(*command, _rows=EMBEDDED).require_done()
        require_same(latents, followed["expected"])
        assert verify(str(latents)).ok
    assert [rows for rows, _ in groupby(seen)] in ([ROWS, 0, LEFT], [ROWS, 0], [ROWS, LEFT])
