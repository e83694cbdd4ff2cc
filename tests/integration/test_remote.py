"""Stores in an object store: the same bytes as on a disk, without renames, links or directories."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import xarray as xr

from cvae_dist.config import ModelConfig
from cvae_dist.errors import Corrupt, InvalidInput, OutputLocked
from cvae_dist.model.directory import save_model
from cvae_dist.model.vae import VAE
from cvae_dist.store import Layout, Lease, Location, Moments, RowStore
from cvae_dist.store.reader import RowReader
from cvae_dist.verbs.decode import decode
from cvae_dist.verbs.embed import embed
from cvae_dist.verbs.info import info
from cvae_dist.verbs.ingest import ingest
from cvae_dist.verbs.verify import verify
from tests.faults.drivers import SHARDS_PER_PACK, item, small_grid, snapshot, write_items


@pytest.fixture(autouse=True)
def _tiny_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Layout, "of", small_grid())
    monkeypatch.setattr(Layout, "shards_per_pack", SHARDS_PER_PACK)


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[str]:
    url = f"memory://{tmp_path.name}"
    yield url
    filesystem = fsspec.filesystem("memory")
    if filesystem.exists(url):
        filesystem.rm(url, recursive=True)


def download(url: str, folder: Path) -> Path:
    filesystem = fsspec.filesystem("memory")
    root = Location.of(url).path
    for path in filesystem.find(root):
        target = folder / path.removeprefix(f"{root}/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(filesystem.cat_file(path))
    return folder


def test_ingest_grow_verify_and_overwrite(tmp_path: Path, bucket: str) -> None:
    tree, store = tmp_path / "tree", f"{bucket}/rows"
    write_items(tree, 0, 10)
    assert ingest(tree, store, label="folder").rows == 10
    assert ingest(tree, store, label="folder").nothing_to_do
    write_items(tree, 10, 19)
    assert ingest(tree, store, label="folder").rows_written == 11
    ingest(tree, tmp_path / "whole", label="folder", overwrite=True)
    opened = RowStore.open(store)
    numbers = [int(name[-8:-4]) for name in opened.read("id")]
    np.testing.assert_array_equal(opened.read("x"), [item(number) for number in numbers])
    assert verify(store).ok
    assert info(store)["rows"] == 19
    with xr.open_zarr(store) as dataset:
        assert dataset.sizes["sample"] == 19
    ingest(tree, store, label="folder", overwrite=True)
    assert snapshot(download(store, tmp_path / "copy")) == snapshot(tmp_path / "whole")
    assert not [path for path in fsspec.filesystem("memory").find(Location.of(bucket).path) if "lease" in path]


def test_embed_and_decode(tmp_path: Path, bucket: str) -> None:
    tree = tmp_path / "tree"
    write_items(tree, 0, 19)
    rows = np.stack([item(number) for number in range(19)])
    model = VAE.of(ModelConfig(cells_encoder=(8,), likelihood="gaussian"), Moments.of(rows), "<f4")
    for root in (bucket, str(tmp_path)):
        save_model(f"{root}/model", model, {})
        ingest(tree, f"{root}/rows", label="folder")
        embed(f"{root}/rows", f"{root}/model", f"{root}/latents")
        decode(f"{root}/latents", f"{root}/model", f"{root}/back")
    for name in ("latents", "back"):
        assert snapshot(download(f"{bucket}/{name}", tmp_path / "copy" / name)) == snapshot(tmp_path / name)
        assert verify(f"{bucket}/{name}").ok


def test_damage_is_named(tmp_path: Path, bucket: str) -> None:
    write_items(tmp_path / "tree", 0, 10)
    ingest(tmp_path / "tree", f"{bucket}/rows")
    place = Location.of(f"{bucket}/rows/x/c.1.0")
    data = place.read()
    for damaged in (data[:-1], b"", data[:5] + bytes([data[5] ^ 8]) + data[6:]):
        place.write(damaged)
        (problem,) = verify(f"{bucket}/rows").problems
        assert (problem.array, problem.shard) == ("x", 1)
    place.delete()
    (problem,) = verify(f"{bucket}/rows").problems
    assert "missing" in problem.reason
    with pytest.raises(Corrupt, match="x/c.1.0: the object is missing"):
        RowStore.open(f"{bucket}/rows").read("x")


def test_lease_and_foreign_objects(tmp_path: Path, bucket: str) -> None:
    write_items(tmp_path / "tree", 0, 5)
    with Lease.held(Location.of(f"{bucket}/rows")), pytest.raises(OutputLocked):
        ingest(tmp_path / "tree", f"{bucket}/rows")
    Location.of(f"{bucket}/other/data").write(b"precious")
    with pytest.raises(InvalidInput, match="memory://.*not a store made by cvae-dist"):
        ingest(tmp_path / "tree", f"{bucket}/other", overwrite=True)
    assert Location.of(f"{bucket}/other/data").read() == b"precious"


@pytest.mark.parametrize("dtype", ["u1", "f4"])
def test_a_reader_that_is_open_while_its_store_grows_keeps_reading(tmp_path: Path, bucket: str, dtype: str) -> None:
    """The partial last shard is rewritten: its chunks and their places in the object change."""
    (tmp_path / "tree").mkdir()
    rows = np.random.default_rng(0).integers(0, 255, (14, 64)).astype(dtype)
    np.save(tmp_path / "tree/a.npy", rows[:9])
    ingest(tmp_path / "tree", f"{bucket}/rows")
    store = RowStore.open(f"{bucket}/rows")
    readers = [RowReader(store) for _ in range(2)]
    readers[0].read(8, 9)  # knows the last shard, the other one does not
    for count in (11, 14):
        np.save(tmp_path / f"tree/b{count}.npy", rows[count - 3 if count == 14 else 9 : count])
        ingest(tmp_path / "tree", f"{bucket}/rows")
        for reader in readers:
            np.testing.assert_array_equal(reader.read(0, 9), rows[:9])
        store.require_unchanged()
        np.testing.assert_array_equal(store.read("x"), rows[:9])
    np.testing.assert_array_equal(RowStore.open(f"{bucket}/rows").read("x"), rows)
