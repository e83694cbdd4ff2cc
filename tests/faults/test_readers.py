"""Readers that poll a store while it is made and while it grows see whole rows only."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr

from cvae_dist.store import RowStore
from tests.faults.drivers import Driver, Drivers, item, running, write_items

FIRST, ALL = 42, 90


def poll(store: Path, driver: Driver) -> set[int]:
    """Open the store again and again until the driver has ended; return the numbers of rows that were seen."""
    seen = set()
    while not driver.has_ended:
        seen |= {look(store, with_xarray) for with_xarray in (True, False)}
    return seen


def look(store: Path, with_xarray: bool) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if with_xarray:
            with xr.open_zarr(store) as dataset:
                x, ids = dataset["x"].values, dataset["id"].values
        else:
            group = zarr.open_group(str(store), mode="r")
            x, ids = group["x"][:], group["id"][:]
    assert len(x) == len(ids)
    numbers = [int(name[-8:-4]) for name in ids]
    np.testing.assert_array_equal(x.reshape(-1, 3), np.array([item(n) for n in numbers]).reshape(-1, 3))
    assert sorted(numbers) == list(range(len(numbers)))
    return len(x)


@pytest.mark.parametrize("workers", [None, pytest.param(2, marks=pytest.mark.heavy)])
def test_polled_while_it_is_made_and_grows(drivers: Drivers, tmp_path: Path, workers: int | None) -> None:
    tree, store = tmp_path / "tree", tmp_path / "store"
    options = {"_delay": 0.02, "_workers": workers}
    write_items(tree, 0, FIRST)
    with running(drivers.start("ingest", tree, store, **options, _hold=(3, tmp_path / "go"))) as driver:
        driver.until((store / "zarr.json").exists)
        driver.until((store / "id" / "zarr.json").exists)
        assert look(store, True) == look(store, False) == 0
        (tmp_path / "go").touch()
        assert poll(store, driver) <= {0, FIRST}
        driver.wait().require_done()
    write_items(tree, FIRST, ALL)
    with running(drivers.start("ingest", tree, store, **options, _hold=(3, tmp_path / "go on"))) as driver:
        assert look(store, True) == look(store, False) == FIRST
        (tmp_path / "go on").touch()
        seen = poll(store, driver)
        driver.wait().require_done()
    assert seen <= {FIRST, ALL}
    assert look(store, True) == look(store, False) == ALL


def test_a_begun_store_is_an_empty_data_set_and_no_input(drivers: Drivers, tmp_path: Path) -> None:
    tree, store = tmp_path / "tree", tmp_path / "store"
    write_items(tree, 0, FIRST)
    drivers.run("ingest", tree, store, _below=str(store), _die_at=30)
    assert look(store, True) == 0
    with pytest.raises(FileNotFoundError, match="begun but never finished"):
        RowStore.open(str(store))
