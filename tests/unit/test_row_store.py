"""RowStore: what is found, opened, begun, published and read."""

import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from cvae_dist.errors import Corrupt, InvalidInput, SettingsChanged, SourceNotFound
from cvae_dist.store import STRING, ArrayLayout, Layout, Location, RowStore
from cvae_dist.verbs.ingest import ingest

LAYOUT = Layout(
    4,
    2,
    (
        ArrayLayout("x", "<f4", ("sample", "feature"), (4,), {"item_shape": [2, 2]}),
        ArrayLayout("id", STRING, ("sample",)),
    ),
)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RowStore:
    monkeypatch.setattr(Layout, "of", classmethod(lambda cls, arrays, rows=None, **_: cls(4, 2, arrays)))
    for number in range(10):
        (tmp_path / "tree").mkdir(exist_ok=True)
        np.save(tmp_path / "tree" / f"{number}.npy", np.full((2, 2), number, np.float32))
    ingest(tmp_path / "tree", tmp_path / "store", rows_per_file="one")
    return RowStore.open(str(tmp_path / "store"))


def test_what_a_store_says_of_itself(store: RowStore, tmp_path: Path) -> None:
    assert (store.kind, store.main, store.rows, store.n_features) == ("rows", "x", 10, 4)
    assert (store.item_shape, store.columns, store.published) == ((2, 2), ("id",), True)
    assert store.url == str(tmp_path / "store")
    assert store.layout.to_json() == Layout(4, 2, store.layout.arrays).to_json()
    assert len(store.history.splitlines()) == 1


def test_any_range_is_read(store: RowStore) -> None:
    for start in range(10):
        for stop in range(start, 11):
            assert store.read("x", start, stop)[:, 0].tolist() == list(range(start, stop))
            assert store.read("id", start, stop).tolist() == [f"{n}.npy" for n in range(start, stop)]
    assert len(store.read("x")) == 10


def test_statistics_and_manifest(store: RowStore) -> None:
    moments = store.statistics()
    assert moments.count == 10
    np.testing.assert_allclose(moments.mean, 4.5)
    np.testing.assert_allclose(moments.std, np.arange(10).std())
    assert (moments.minimum.tolist(), moments.maximum.tolist()) == ([0] * 4, [9] * 4)
    manifest = store.manifest()
    assert manifest["path"].tolist() == [f"{n}.npy" for n in range(10)]
    assert manifest["rows"].tolist() == [1] * 10
    assert manifest["dropped"].tolist() == []


def test_xarray_opens_it_with_coordinates(store: RowStore) -> None:
    with xr.open_zarr(store.url) as dataset:
        assert dict(dataset.sizes) == {"sample": 10, "feature": 4}
        assert set(dataset.coords) == {"id"}
        assert set(dataset.data_vars) == {"x"}
        assert dataset["x"].attrs["item_shape"] == [2, 2]


@pytest.mark.parametrize("version", [None, 1, 3])
def test_a_store_in_the_format_of_another_release_is_refused_by_name(
    store: RowStore, tmp_path: Path, version: int | None
) -> None:
    file = tmp_path / "store" / "zarr.json"
    group = json.loads(file.read_text())
    group["attributes"]["cvae_dist"] |= {"version": version}
    if version is None:
        del group["attributes"]["cvae_dist"]["version"]
    file.write_text(json.dumps(group))
    for use in (lambda: RowStore.open(store.url), lambda: ingest(tmp_path / "tree", store.url, overwrite=True)):
        with pytest.raises(InvalidInput, match=rf"in format {version or 1}, but .* format 2"):
            use()
    assert json.loads(file.read_text()) == group


def test_fingerprint_follows_the_rows_alone(store: RowStore, tmp_path: Path) -> None:
    ingest(tmp_path / "tree", tmp_path / "again", rows_per_file="one")
    assert RowStore.open(str(tmp_path / "again")).fingerprint == store.fingerprint
    np.save(tmp_path / "tree" / "9.npy", np.full((2, 2), 9.5, np.float32))
    ingest(tmp_path / "tree", tmp_path / "other", rows_per_file="one")
    assert RowStore.open(str(tmp_path / "other")).fingerprint != store.fingerprint


def test_begun_store_is_empty_and_not_open_to_use(tmp_path: Path) -> None:
    location = Location.of(tmp_path / "store")
    RowStore.create(location, "rows", LAYOUT, {"a": 1})
    found = RowStore.find(location)
    assert found is not None
    assert (found.published, found.rows) == (False, 0)
    with pytest.raises(SourceNotFound, match="begun but never finished"):
        RowStore.open(str(location))
    with xr.open_zarr(tmp_path / "store") as dataset:
        assert dataset.sizes["sample"] == 0


def test_settings_are_compared_one_by_one(tmp_path: Path) -> None:
    store = RowStore.create(Location.of(tmp_path / "s"), "rows", LAYOUT, {"a": 1, "b": [1, 2], "c": None})
    store.require_settings("rows", {"a": 1, "b": [1, 2], "c": None})
    with pytest.raises(SettingsChanged, match=r"a: 1 there, 2 asked for, kind: 'rows' there, 'latents' asked for"):
        store.require_settings("latents", {"a": 2, "b": [1, 2], "c": None})


def test_retracted_store_is_begun_again(store: RowStore) -> None:
    store.retract()
    found = RowStore.find(store.location)
    assert found is not None
    assert not found.published
    assert [path.name for path in Path(store.url).iterdir()] == ["zarr.json"]


@pytest.mark.parametrize(
    "content", [None, "", "{}", "[]", '{"attributes": {}}', '{"attributes": {"cvae_dist": 3', "\0"]
)
def test_what_is_not_ours(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "data").write_text("x")
    if content is not None:
        (tmp_path / "s" / "zarr.json").write_text(content)
    with pytest.raises(InvalidInput, match="not a store made by cvae-dist"):
        RowStore.find(str(tmp_path / "s"))


def test_nothing_there(tmp_path: Path) -> None:
    assert RowStore.find(str(tmp_path / "s")) is None
    with pytest.raises(SourceNotFound, match="there is no store at"):
        RowStore.open(str(tmp_path / "s"))


def test_array_that_is_not_there_or_lost_its_metadata(store: RowStore) -> None:
    with pytest.raises(Corrupt, match="nothing"):
        store.read("nothing")
    (Path(store.url) / "x" / "zarr.json").unlink()
    with pytest.raises(Corrupt, match="/x"):
        store.read("x")
