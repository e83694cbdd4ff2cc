"""RowStore: what is found, opened, begun, published and read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from cvae_dist.errors import Corrupt, InvalidInput, OutputLocked, SettingsChanged, SourceNotFound
from cvae_dist.store import STRING, ArrayLayout, Layout, Location, RowStore
from cvae_dist.verbs.ingest import ingest
from cvae_dist.verbs.verify import verify
from tests.faults.drivers import snapshot

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
    assert manifest is not None
    (entries,) = manifest.batches()
    assert entries.path.tolist() == [f"{n}.npy" for n in range(10)]
    assert (entries.start.tolist(), entries.rows.tolist()) == (list(range(10)), [1] * 10)
    assert {*entries.dropped, *entries.status, *entries.detail} == {""}


def test_xarray_opens_it_with_coordinates(store: RowStore) -> None:
    with xr.open_zarr(store.url) as dataset:
        assert dict(dataset.sizes) == {"sample": 10, "feature": 4}
        assert set(dataset.coords) == {"id"}
        assert set(dataset.data_vars) == {"x"}
        assert dataset["x"].attrs["item_shape"] == [2, 2]


@pytest.mark.parametrize("version", [None, 1, 2, 3, 4, 5, 7])
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
        with pytest.raises(InvalidInput, match=rf"in format {version or 1}, but .* format 6"):
            use()
    assert json.loads(file.read_text()) == group


def test_fingerprint_follows_the_rows_alone(store: RowStore, tmp_path: Path) -> None:
    ingest(tmp_path / "tree", tmp_path / "again", rows_per_file="one")
    assert RowStore.open(str(tmp_path / "again")).fingerprint == store.fingerprint
    np.save(tmp_path / "tree" / "9.npy", np.full((2, 2), 9.5, np.float32))
    ingest(tmp_path / "tree", tmp_path / "other", rows_per_file="one")
    assert RowStore.open(str(tmp_path / "other")).fingerprint != store.fingerprint


def test_the_chunks_of_a_publication_are_read_and_checked(store: RowStore, tmp_path: Path) -> None:
    publication = tmp_path / "store" / store.publication.path
    assert store.publication.arrays.keys() == {
        "mean", "std", "min", "max", "record", "sample", "sample_row",
        "manifest_path", "manifest_size", "manifest_version", "manifest_start", "manifest_rows", "manifest_dropped",
        "manifest_status", "manifest_detail",
    }  # fmt: skip
    uses: dict[str, Callable[[RowStore], object]] = {
        "record/c.0.0": RowStore.records,
        "mean/c.0": RowStore.statistics,
        "sample/c.0.0": RowStore.sample,
        "sample_row/c.0": RowStore.sample,
        "manifest_path/c.0": lambda store: list((store.manifest() or pytest.fail("it has none")).batches()),
    }
    for key, use in uses.items():
        use(RowStore.open(store.url))
        data = (publication / key).read_bytes()
        (publication / key).write_bytes(data[:9] + bytes([data[9] ^ 1]) + data[10:])
        with pytest.raises(Corrupt, match=f"{key}.* so nothing is known of them"):
            use(RowStore.open(store.url))
        (publication / key).write_bytes(data)


def test_a_whole_ledger_of_another_publication_is_refused(store: RowStore, tmp_path: Path) -> None:
    np.save(tmp_path / "tree" / "9.npy", np.full((2, 2), 9.5, np.float32))
    ingest(tmp_path / "tree", tmp_path / "other", rows_per_file="one")
    other = RowStore.open(str(tmp_path / "other"))
    key = "record/c.0.0"
    (tmp_path / "store" / store.publication.path / key).write_bytes(
        (tmp_path / "other" / other.publication.path / key).read_bytes()
    )
    with pytest.raises(Corrupt, match="the ledger of .* is not that of its publication"):
        store.records()


def test_rows_that_grew_are_unchanged_and_others_are_not(store: RowStore, tmp_path: Path) -> None:
    store.require_unchanged()
    for name in ("x", "y", "z"):  # the publication that was read is not kept for so long
        np.save(tmp_path / "tree" / f"{name}.npy", np.full((2, 2), 10, np.float32))
        ingest(tmp_path / "tree", tmp_path / "store", rows_per_file="one")
        store.require_unchanged()
    np.save(tmp_path / "tree" / "3.npy", np.full((2, 2), 3.5, np.float32))
    ingest(tmp_path / "tree", tmp_path / "store", rows_per_file="one", overwrite=True)
    with pytest.raises(Corrupt, match="were replaced while they were read"):
        store.require_unchanged()


@pytest.mark.parametrize("change", ["the group is deleted", "it is begun anew"])
def test_rows_that_vanished_are_not_unchanged(store: RowStore, tmp_path: Path, change: str) -> None:
    store.records()
    if change == "it is begun anew":
        store.retract(LAYOUT, "rows", {}, "token")
    else:
        shutil.rmtree(tmp_path / "store")
    with pytest.raises(Corrupt, match="were replaced while they were read"):
        store.require_unchanged()


def test_the_group_is_only_replaced_where_nobody_else_did(store: RowStore, tmp_path: Path) -> None:
    mine = RowStore.open(store.url).claimed("mine")
    assert mine.interrupted
    for late in (store, RowStore(store.location, store.document, store.history, "other")):
        with pytest.raises(OutputLocked, match="was changed by another driver"):
            late.claimed("late")
        with pytest.raises(OutputLocked, match="was changed by another driver"):
            late.retract(LAYOUT, "rows", {}, "late")
    with pytest.raises(OutputLocked, match="was changed by another driver"):
        RowStore.create(store.location, "rows", LAYOUT, {}, "late")
    found = RowStore.open(store.url)
    assert (found.rows, found.document["driver"], found.version) == (10, "mine", mine.version)
    np.testing.assert_array_equal(found.read("x"), store.read("x"))
    assert mine.claimed("again").document["driver"] == "again"


FORGED: dict[str, Callable[[dict[str, Any]], object]] = {
    "rows negative": lambda ours: ours.update(rows=-1),
    "rows as text": lambda ours: ours.update(rows="10"),
    "rows missing": lambda ours: ours.pop("rows"),
    "more rows": lambda ours: ours.update(rows=1000),
    "dropped negative": lambda ours: ours.update(dropped=-1),
    "layout of another kind": lambda ours: ours.update(layout=[]),
    "array that leads out": lambda ours: ours["layout"]["arrays"][0].update(name="../x"),
    "dtype of objects": lambda ours: ours["layout"]["arrays"][0].update(dtype="|O"),
    "publication that leads out": lambda ours: ours.update(publication="../../x"),
    "publication without a name": lambda ours: ours.update(publication=""),
    "publication of another kind": lambda ours: ours.update(publication=7),
    "arrays of another kind": lambda ours: ours.update(arrays=[1]),
    "no ledger": lambda ours: ours["arrays"].pop("record"),
    "ledger of other shape": lambda ours: ours["arrays"]["record"].update(shape=[3, 4]),
    "ledger of other dimensions": lambda ours: ours["arrays"]["record"].update(shape=[]),
    "ledger of other dtype": lambda ours: ours["arrays"]["record"].update(dtype="|O"),
    "ledger without chunks": lambda ours: ours["arrays"]["record"].update(chunk=0),
    "statistics of other width": lambda ours: ours["arrays"]["std"].update(shape=[10**12]),
    "no statistics": lambda ours: ours["arrays"].pop("max"),
    "manifest without sizes": lambda ours: ours["arrays"].pop("manifest_size"),
    "manifest of other dtype": lambda ours: ours["arrays"]["manifest_path"].update(dtype="<i8"),
    "manifest of other columns": lambda ours: ours["arrays"].update(manifest_x=ours["arrays"]["manifest_path"]),
    "manifest of two lengths": lambda ours: ours["arrays"]["manifest_rows"].update(shape=[11]),
    "manifest of two chunks": lambda ours: ours["arrays"]["manifest_rows"].update(chunk=9),
    "sample of other width": lambda ours: ours["arrays"]["sample"].update(shape=[10, 3]),
    "sample of other dtype": lambda ours: ours["arrays"]["sample"].update(dtype="<f8"),
    "sample of other length": lambda ours: ours["arrays"]["sample_row"].update(shape=[9]),
    "sample without numbers": lambda ours: ours["arrays"].pop("sample_row"),
    "sample that is endless": lambda ours: [
        ours["arrays"][name].update(shape=[10**9, *shape]) for name, shape in (("sample_row", []), ("sample", [4]))
    ],
    "drift of other width": lambda ours: ours["arrays"].update(drift_psi=ours["arrays"]["sample_row"]),
    "settings of another kind": lambda ours: ours.update(settings=3),
    "no lineage": lambda ours: ours.pop("lineage"),
    "no fingerprint": lambda ours: ours.pop("fingerprint"),
    "no kind": lambda ours: ours.pop("kind"),
}  # fmt: skip


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_description_is_refused_by_name(store: RowStore, tmp_path: Path, case: str) -> None:
    file = tmp_path / "store" / "zarr.json"
    group = json.loads(file.read_text())
    FORGED[case](group["attributes"]["cvae_dist"])
    file.write_text(json.dumps(group))
    before = {path: path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()}
    for use in (
        lambda: RowStore.find(store.url),
        lambda: RowStore.open(store.url),
        lambda: ingest(tmp_path / "tree", store.url, rows_per_file="one", overwrite=True),
    ):
        with pytest.raises(InvalidInput, match="its description is damaged or forged"):
            use()
    assert {path: path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()} == before


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
    (Path(store.url) / "journal").mkdir()
    (Path(store.url) / "journal" / "0").write_text("x")
    anew = store.retract(LAYOUT, "latents", {"a": 2}, "token")
    found = RowStore.find(store.location)
    assert found is not None
    assert (found.document, found.version) == (anew.document, anew.version)
    assert (found.published, found.rows, found.kind, found.interrupted) == (False, 0, "latents", True)
    assert (found.document["settings"], found.history, found.publication.arrays) == ({"a": 2}, "", {})
    assert sorted(snapshot(Path(store.url))) == ["id/zarr.json", "x/zarr.json", "zarr.json"]
    with xr.open_zarr(store.url) as dataset:
        assert dataset.sizes["sample"] == 0


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "{}",
        "[]",
        '{"attributes": {}}',
        '{"attributes": {"cvae_dist": 3',
        "\0",
        '{"a":' * 100_000,
        "[" * 10**6,
    ],
    ids=range(9),
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


def test_array_that_is_not_there(store: RowStore) -> None:
    with pytest.raises(KeyError, match="nothing"):
        store.read("nothing")


@pytest.mark.parametrize("name", ["x", "id"])
def test_shard_that_is_not_there_or_changed(store: RowStore, name: str) -> None:
    path = min((Path(store.url) / name).glob("c.*"))
    data = path.read_bytes()
    for content in (data[:-1], b"", data[:7] + bytes([data[7] ^ 8]) + data[8:]):
        path.write_bytes(content)
        with pytest.raises(Corrupt, match=f"/{name}/c.0"):
            store.read(name)
    path.unlink()
    with pytest.raises(Corrupt, match="missing"):
        store.read(name)


def test_what_the_metadata_of_an_array_says_is_never_run(store: RowStore) -> None:
    """Rows are decoded as the group's description says. `verify` tells that the metadata is another."""
    before = store.read("x"), store.read("id")
    for name in ("x", "id"):
        path = Path(store.url) / name / "zarr.json"
        path.write_text(path.read_text().replace('"crc32c"', '"evil"'))
    assert [block.tolist() for block in (store.read("x"), store.read("id"))] == [block.tolist() for block in before]
    assert {problem.array for problem in verify(store.url).problems} == {"x", "id"}
