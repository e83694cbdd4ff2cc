"""A full disk, for real: a tiny file system where it may be mounted, and a limit on file sizes everywhere."""

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cvae_dist.errors import StorageFailed
from cvae_dist.store.urls import Location
from cvae_dist.verbs.ingest import ingest
from cvae_dist.verbs.verify import verify
from tests.faults.drivers import Drivers, recorded, require_same, snapshot

ROWS, FEATURES = 400, 2_000  # 8 kB a row; 100 shards of 32 kB


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "tree").mkdir()
    rows = np.random.default_rng(0).normal(size=(ROWS, FEATURES)).astype(np.float32)
    np.save(tmp_path / "tree" / "rows.npy", rows)
    return tmp_path / "tree"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 1 MB, for tests that may."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    try:
        mounted = subprocess.run(mount, capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command; the limit on file sizes covers the case")
    if mounted.returncode:
        pytest.skip("mounting is not permitted; the limit on file sizes covers the case")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def is_published(store: Path) -> bool:
    return bool(json.loads((store / "zarr.json").read_text())["attributes"]["cvae_dist"]["published"])


@pytest.mark.usefixtures("tiny_shards")
def test_full_disk(tree: Path, disk: Path, tmp_path: Path) -> None:
    store = disk / "store"
    ingest(tree, tmp_path / "whole")
    with pytest.raises(
        StorageFailed, match=r"(?s)no room left to write .*/store/.*run the same command again"
    ) as caught:
        ingest(tree, store)
    assert isinstance(caught.value, OSError)
    assert not is_published(store)
    assert not list(disk.rglob("*.partial"))
    assert not list(disk.glob("*.lease"))
    done = recorded(store)
    assert 5 < len(done) < 100
    subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
    result = ingest(tree, store)
    assert result.rows_written == ROWS - 4 * len(done)
    require_same(store, snapshot(tmp_path / "whole"))


@pytest.mark.usefixtures("tiny_shards")
def test_disk_too_full_for_the_lease(tree: Path, disk: Path) -> None:
    with open(disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            continue
    with pytest.raises(StorageFailed, match="no room left"):
        ingest(tree, disk / "store")
    assert [path.name for path in disk.iterdir()] == ["filler"]


@pytest.mark.parametrize("workers", [None, 1])
def test_limit_on_file_sizes(drivers: Drivers, tree: Path, tmp_path: Path, workers: int | None) -> None:
    store = tmp_path / "store"
    ended = drivers.run("ingest", tree, store, _file_bytes=20_000, _workers=workers)
    name, text, *bases = ended.error
    assert name == "StorageFailed", ended.trace
    assert "OSError" in bases
    assert "no room left to write" in text
    assert "x/c." in text
    assert not is_published(store)
    assert recorded(store) == []
    assert not list(tmp_path.rglob("*.partial"))
    assert not list(tmp_path.glob("*.lease"))
    assert drivers.run("ingest", tree, store).require_done().result["rows"] == ROWS
    assert verify(str(store)).ok


def test_append_on_a_full_disk_leaves_the_old_rows(drivers: Drivers, tree: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    drivers.run("ingest", tree, store).require_done()
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    np.save(tree / "z.npy", np.ones((10, FEATURES), np.float32))
    ended = drivers.run("ingest", tree, store, _file_bytes=20_000)
    assert ended.error[0] == "StorageFailed"
    assert verify(str(store)).ok
    (tree / "z.npy").rename(tree / "later")
    assert drivers.run("ingest", tree, store).require_done().result["rows_written"] == 0
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before
    (tree / "later").rename(tree / "z.npy")
    assert drivers.run("ingest", tree, store).require_done().result["rows"] == ROWS + 10


def test_read_only_place(drivers: Drivers, tree: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageFailed, match="cannot write .*Not a directory"):
        ingest(tree, tmp_path / "file" / "store")
    with pytest.raises(StorageFailed, match="cannot write"):
        Location.of("/proc/nothing/here").write(b"x")
