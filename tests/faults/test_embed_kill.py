"""Embed killed: the next run ends with the bytes of an undisturbed one and repeats nothing that was recorded."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import xarray as xr

from cvae_dist.config import ModelConfig
from cvae_dist.errors import CvaeDistError, InvalidInput, SettingsChanged
from cvae_dist.model.directory import save_model
from cvae_dist.model.vae import VAE
from cvae_dist.store import Layout, Moments, RowStore
from cvae_dist.verbs.decode import decode
from cvae_dist.verbs.embed import embed
from cvae_dist.verbs.ingest import ingest
from cvae_dist.verbs.score import score
from cvae_dist.verbs.verify import verify
from tests.faults.drivers import (
    Drivers,
    item,
    recorded,
    require_same,
    running,
    small_grid,
    snapshot,
    stamps,
    wait_until,
    write_items,
)

ROWS = 482  # 121 shards, the last one partial; an output shard covers several


@pytest.fixture(scope="module")
def torch_drivers() -> Iterator[Drivers]:
    server = Drivers(["cvae_dist.cluster.model_map", "cvae_dist.verbs.embed", "cvae_dist.verbs.decode"])
    yield server
    server.close()


@pytest.fixture(scope="module")
def made(torch_drivers: Drivers, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A store, a model that fits it, and the latents of an undisturbed run."""
    root = tmp_path_factory.mktemp("made")
    write_items(root / "tree", 0, ROWS)
    rows, model, latents = root / "rows", root / "model", root / "latents"
    torch_drivers.run("ingest", root / "tree", rows, label="folder").require_done()
    values = np.stack([item(number) for number in range(ROWS)])
    config = ModelConfig(cells_encoder=(16,), likelihood="gaussian", feature_normalization=True)
    save_model(str(model), VAE.of(config, Moments.of(values), "<f4"), {"store": "rows"})
    ended = torch_drivers.run("embed", rows, model, latents, _below=str(latents)).require_done()
    assert len(recorded(latents)) > 7
    assert ended.result == {"rows": ROWS, "rows_written": ROWS, "dropped": 0}
    return {
        "rows": rows,
        "model": model,
        "latents": snapshot(latents),
        "shards": len(recorded(latents)),
        "changes": ended.changes,
        "tree": root / "tree",
    }


def test_ids_and_labels_travel(made: dict[str, Any], torch_drivers: Drivers, tmp_path: Path) -> None:
    torch_drivers.run("embed", made["rows"], made["model"], tmp_path / "z").require_done()
    require_same(tmp_path / "z", made["latents"])
    with xr.open_zarr(tmp_path / "z") as latents, xr.open_zarr(made["rows"]) as rows:
        assert latents["z"].dims == ("sample", "latent")
        assert {"id", "label"} <= set(latents["z"].coords)
        assert latents["id"].values.tolist() == rows["id"].values.tolist()
    assert verify(str(tmp_path / "z")).ok


@pytest.mark.parametrize("kills", [4, pytest.param(24, marks=pytest.mark.heavy)])
def test_driver_killed_before_chosen_changes(
    made: dict[str, Any], torch_drivers: Drivers, tmp_path: Path, kills: int
) -> None:
    for change in range(0, made["changes"], made["changes"] // kills):
        out = tmp_path / f"z{change}"
        killed = torch_drivers.run("embed", made["rows"], made["model"], out, _below=str(out), _die_at=change)
        assert killed.signal == signal.SIGKILL, change
        done = recorded(out)
        before = stamps(out, done)
        torch_drivers.run("embed", made["rows"], made["model"], out).require_done()
        require_same(out, made["latents"])
        assert stamps(out, done) == before


def test_driver_killed_while_it_runs(made: dict[str, Any], torch_drivers: Drivers, tmp_path: Path) -> None:
    out = tmp_path / "z"
    total = made["shards"]
    for goal in (1, total // 3, total // 2):
        hold = (total - 2 - len(recorded(out)), tmp_path / "never")
        command = torch_drivers.start("embed", made["rows"], made["model"], out, _delay=0.002, _hold=hold)
        with running(command) as driver:
            driver.until(lambda goal=goal: len(recorded(out)) >= goal)
        assert driver.kill().signal == signal.SIGKILL
    done = recorded(out)
    assert total // 2 <= len(done) < total
    before = stamps(out, done)
    torch_drivers.run("embed", made["rows"], made["model"], out).require_done()
    require_same(out, made["latents"])
    assert stamps(out, done) == before


@pytest.mark.heavy
def test_one_of_two_workers_killed_and_then_the_driver(
    made: dict[str, Any], torch_drivers: Drivers, tmp_path: Path
) -> None:
    out = tmp_path / "z"
    options = {"_workers": 2, "_hold": (6, tmp_path / "go")}
    with running(torch_drivers.start("embed", made["rows"], made["model"], out, **options)) as driver:
        driver.until(lambda: len(recorded(out)) >= 1)
        everyone = psutil.Process(driver.pid).children(recursive=True)
        workers = [child for child in everyone if "spawn_main" in " ".join(child.cmdline())]
        assert len(workers) == 2
        workers[1].kill()
        driver.until(lambda: len(recorded(out)) >= 4)
        everyone += psutil.Process(driver.pid).children(recursive=True)
    assert driver.kill().signal == signal.SIGKILL
    (tmp_path / "go").touch()
    wait_until(lambda: not any(process.is_running() for process in everyone))
    done = recorded(out)
    assert 4 <= len(done) < made["shards"]
    before = stamps(out, done)
    torch_drivers.run("embed", made["rows"], made["model"], out, _workers=2).require_done()
    require_same(out, made["latents"])
    assert stamps(out, done) == before


@pytest.mark.parametrize("verb", [embed, score])
def test_output_is_never_one_of_the_inputs(made: dict[str, Any], verb: Any) -> None:
    before = snapshot(made["rows"])
    for out in (made["rows"], made["model"], made["rows"] / "x", made["rows"].parent):
        with pytest.raises(CvaeDistError, match="lie in one another|not a store"):
            verb(made["rows"], made["model"], out, overwrite=True)
    assert snapshot(made["rows"]) == before
    assert sorted(os.listdir(made["model"])) == ["config.json", "model.safetensors"]


def test_growth_under_way_changes_nothing_for_embed(
    made: dict[str, Any], torch_drivers: Drivers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The partial shard of the source is replaced by a growth that was killed."""
    monkeypatch.setattr(Layout, "of", small_grid())
    tree, rows, out = tmp_path / "tree", tmp_path / "rows", tmp_path / "z"
    write_items(tree, 0, 10)
    ingest(tree, rows, label="folder")
    embed(rows, made["model"], out)
    before = snapshot(out)
    write_items(tree, 10, 19)
    shard, published = rows / "x/c.2.0", (rows / "x/c.2.0").read_bytes()
    with running(torch_drivers.start("ingest", tree, rows, label="folder", _hold=(1, tmp_path / "never"))) as driver:
        driver.until(lambda: shard.read_bytes() != published)
    assert driver.kill().signal == signal.SIGKILL
    opened = RowStore.open(str(rows))
    assert (opened.rows, opened.interrupted) == (10, True), "the kill came at another moment"
    assert embed(rows, made["model"], out).nothing_to_do
    assert snapshot(out) == before
    embed(rows, made["model"], tmp_path / "fresh")
    require_same(tmp_path / "fresh", before)
    ingest(tree, rows, label="folder")
    assert embed(rows, made["model"], out).rows_written == 11
    embed(rows, made["model"], tmp_path / "whole")
    np.testing.assert_array_equal(RowStore.open(str(out)).read("z"), RowStore.open(str(tmp_path / "whole")).read("z"))


def test_source_made_anew_is_followed(made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Layout, "of", small_grid())
    for start, rows in ((0, 10), (20, 30), (20, 23)):
        write_items(tmp_path / f"tree{start}{rows}", start, rows)
    ingest(tmp_path / "tree010", tmp_path / "rows", label="folder")
    embed(tmp_path / "rows", made["model"], tmp_path / "z")
    for tree in ("tree2030", "tree2023"):
        ingest(tmp_path / tree, tmp_path / "rows", label="folder", overwrite=True)
        result = embed(tmp_path / "rows", made["model"], tmp_path / "z")
        assert result.rows_written == result.rows == RowStore.open(str(tmp_path / "rows")).rows
        embed(tmp_path / "rows", made["model"], tmp_path / f"z of {tree}")
        for name in ("z", "id", "label"):
            found, expected = (RowStore.open(str(tmp_path / place)).read(name) for place in ("z", f"z of {tree}"))
            np.testing.assert_array_equal(found, expected)
        assert verify(str(tmp_path / "z")).ok
    before = snapshot(tmp_path / "z")
    ingest(tmp_path / "tree010", tmp_path / "rows", overwrite=True)
    with pytest.raises(SettingsChanged, match=r"has z \(2,\) <f4, id \(\) string, label"):
        embed(tmp_path / "rows", made["model"], tmp_path / "z")
    assert snapshot(tmp_path / "z") == before


def test_rows_of_another_store_do_not_replace_latents(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Layout, "of", small_grid())
    for start, rows in ((0, 10), (20, 30), (20, 23)):
        write_items(tmp_path / f"tree{start}{rows}", start, rows)
        ingest(tmp_path / f"tree{start}{rows}", tmp_path / f"rows{start}{rows}", label="folder")
    embed(tmp_path / "rows010", made["model"], tmp_path / "z")
    before = snapshot(tmp_path / "z")
    with pytest.raises(SettingsChanged, match="what they are made from has changed"):
        embed(tmp_path / "rows2030", made["model"], tmp_path / "z")
    with pytest.raises(SettingsChanged, match="holds 10 rows, but is now to have 3"):
        embed(tmp_path / "rows2023", made["model"], tmp_path / "z")
    assert snapshot(tmp_path / "z") == before


def test_rows_that_do_not_fit_the_model(made: dict[str, Any], tmp_path: Path) -> None:
    write_items(tmp_path / "tree", 0, 5, features=4)
    ingest(tmp_path / "tree", tmp_path / "rows")
    with pytest.raises(InvalidInput, match="has rows of 4 values, but model .* takes 3"):
        embed(tmp_path / "rows", made["model"], tmp_path / "z")
    with pytest.raises(InvalidInput, match="holds rows, but latents are needed"):
        decode(made["rows"], made["model"], tmp_path / "z")
    assert not (tmp_path / "z").exists()
