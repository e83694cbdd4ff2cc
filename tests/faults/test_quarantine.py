"""Files that cannot be used, among others: all named, or set aside, tried again, and taken when they were mended."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client, LocalCluster

from cvae_dist.errors import InvalidInput
from cvae_dist.events import Event
from cvae_dist.store import RowStore
from cvae_dist.verbs.ingest import IngestResult, _Run, ingest
from cvae_dist.verbs.verify import verify
from tests.faults.drivers import snapshot

pytestmark = pytest.mark.usefixtures("tiny_shards")
GOOD = np.arange(5, dtype=np.float32)
COUNT = 23  # files: several shards of four, and a partial one

# What is wrong is seen by the size of a file, or only when it is read.
BY_SIZE = {
    3: ("truncated", lambda path: path.write_bytes(path.read_bytes()[:-1])),
    4: ("header", lambda path: path.write_bytes(b"")),
}
BY_READING = {
    9: ("dtype", lambda path: np.save(path, GOOD.astype(np.int32))),
    10: ("header", lambda path: path.write_bytes(bytes(path.stat().st_size))),
    11: ("shape", lambda path: np.save(path, GOOD[:, None])),
    17: ("dtype", lambda path: np.save(path, GOOD.astype(np.uint32))),
}
ALL = {**BY_SIZE, **BY_READING}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Client]:
    with LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address="127.0.0.1:0") as cluster:
        yield Client(cluster, set_as_default=False)


@pytest.fixture(params=["here", "through Dask"])
def client(request: pytest.FixtureRequest) -> Client | None:
    return request.getfixturevalue("cluster") if request.param == "through Dask" else None


class Tree:
    """A tree of files, the store that is made of it, and what was said at the last run."""

    def __init__(self, folder: Path, client: Client | None) -> None:
        self.root, self.store, self.client = folder / "tree", folder / "store", client
        self.root.mkdir()
        self.notes: list[str] = []
        for number in range(COUNT):
            self.mend(number)

    def path(self, number: int) -> Path:
        return self.root / f"{number:02d}.npy"

    def mend(self, *numbers: int) -> None:
        for number in numbers:
            np.save(self.path(number), GOOD + number)

    def spoil(self, numbers: dict[int, tuple[str, Callable[[Path], object]]]) -> None:
        for number, (_, spoil) in numbers.items():
            spoil(self.path(number))

    def ingest(self, **options: Any) -> IngestResult:
        def note(event: Event) -> None:
            if event.kind == "note":
                self.notes.append(event.message)

        self.notes = []
        return ingest(self.root, self.store, client=self.client, on_event=note, **options)

    def require(self, order: list[int]) -> None:
        """See that the store has these files, in this order."""
        found = RowStore.open(str(self.store))
        np.testing.assert_array_equal(found.read("x"), [GOOD + number for number in order])
        assert found.read("id").tolist() == [self.path(number).name for number in order]
        assert verify(str(self.store)).ok

    def aside(self) -> dict[int, tuple[str, str]]:
        """Return what the manifest says of files without rows."""
        manifest = RowStore.open(str(self.store)).manifest()
        assert manifest is not None
        return {
            int(entries.path[n][:2]): (entries.status[n], entries.detail[n])
            for entries in manifest.batches()
            for n in np.flatnonzero(entries.rows == 0)
        }


@pytest.fixture
def tree(tmp_path: Path, client: Client | None) -> Tree:
    return Tree(tmp_path, client)


def without(bad: dict[int, Any]) -> list[int]:
    return [number for number in range(COUNT) if number not in bad]


@pytest.mark.parametrize("bad", [BY_SIZE, BY_READING, ALL], ids=["by size", "by reading", "both"])
def test_they_are_set_aside_tried_again_and_taken(tree: Tree, bad: dict[int, Any]) -> None:
    tree.spoil(bad)
    result = tree.ingest(bad="skip")
    assert (result.files, result.bad_files, result.rows) == (COUNT, len(bad), COUNT - len(bad))
    tree.require(without(bad))
    aside = tree.aside()
    assert {number: code for number, (code, _) in aside.items()} == {number: code for number, (code, _) in bad.items()}
    for number, (_, detail) in aside.items():
        assert f"unusable file: {tree.path(number)} {detail}" in tree.notes

    before = snapshot(tree.store), stamps(tree.store)
    again = tree.ingest(bad="skip")
    assert (again.bad_files, again.rows_written) == (len(bad), 0)
    assert (snapshot(tree.store), stamps(tree.store)) == before

    first, *others = bad
    tree.mend(first)
    assert tree.ingest(bad="skip").bad_files == len(others)
    tree.require([*without(bad), first])
    assert tree.aside().keys() == {*others}
    tree.mend(*others)
    assert tree.ingest().bad_files == 0
    tree.require([*without(bad), first, *others])
    assert tree.aside() == {}


def stamps(store: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in store.rglob("*") if path.is_file()}


@pytest.mark.parametrize("bad", [BY_SIZE, BY_READING, ALL], ids=["by size", "by reading", "both"])
def test_all_are_named_and_nothing_is_published(tree: Tree, bad: dict[int, Any]) -> None:
    tree.spoil(bad)
    with pytest.raises(InvalidInput, match=r"unusable files: .*--bad skip"):
        tree.ingest()
    found = {number for number in bad if any(str(tree.path(number)) in note for note in tree.notes)}
    assert found == ({*BY_SIZE} if bad is ALL else {*bad}), "no file is read where some cannot be used anyway"
    store = RowStore.find(str(tree.store))
    assert store is None or not store.published
    tree.mend(*bad)
    assert tree.ingest().rows == COUNT
    tree.require([*range(COUNT)])


@pytest.mark.parametrize("bad", [BY_SIZE, BY_READING, ALL], ids=["by size", "by reading", "both"])
def test_only_so_many_are_accepted(tree: Tree, bad: dict[int, Any]) -> None:
    tree.spoil(bad)
    with pytest.raises(InvalidInput, match=r"unusable files: ") as caught:
        tree.ingest(bad="skip", max_bad=len(bad) - 1)
    assert "--max-bad" in str(caught.value)
    assert tree.ingest(bad="skip", max_bad=len(bad)).rows == COUNT - len(bad)


def test_a_file_becomes_bad_beside_a_store(tree: Tree) -> None:
    """What is in a store stays there, whatever new files are like."""
    tree.ingest()
    np.save(tree.root / "x.npy", GOOD.astype(np.int32))
    np.save(tree.root / "y.npy", GOOD[:2])
    tree.mend(50)
    with pytest.raises(InvalidInput, match=r"y\.npy has items of shape \(2,\)"):
        tree.ingest()
    result = tree.ingest(bad="skip")
    assert (result.files, result.bad_files, result.rows) == (3, 2, COUNT + 1)
    tree.require([*range(COUNT), 50])


@pytest.mark.parametrize("how", ["raise", "skip"])
def test_nothing_is_usable(tree: Tree, how: str) -> None:
    for number in range(COUNT):
        tree.path(number).write_bytes(b"")
    with pytest.raises(InvalidInput, match=rf"{COUNT} unusable files: .*00\.npy is empty") as caught:
        tree.ingest(bad=how)
    assert ("--bad skip" in str(caught.value)) == (how == "raise")
    assert not tree.store.exists()


def test_a_bad_file_among_rows_that_are_looked_through(tree: Tree) -> None:
    """All rows are read before any is written, where those that are not finite are to be left out."""
    tree.spoil(ALL)
    np.save(tree.path(20), GOOD * np.nan)
    result = tree.ingest(bad="skip", nonfinite="drop")
    assert (result.rows, result.dropped, result.bad_files) == (COUNT - len(ALL) - 1, 1, len(ALL))
    tree.require(without({**ALL, 20: None}))


def test_a_shard_of_bad_files_is_read_once(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[int] = []
    real = _Run._plan
    monkeypatch.setattr(_Run, "_plan", lambda run, *arguments: plans.append(1) or real(run, *arguments))
    bad = {number: BY_READING[9] for number in range(4, 15)}
    tree.spoil(bad)
    assert tree.ingest(bad="skip").bad_files == len(bad)
    assert len(plans) == 2
    tree.require(without(bad))


@pytest.mark.parametrize("target", ["nowhere", "long/er.npy" * 13 + "12345", "loop.npy"])
def test_a_link_that_leads_nowhere(tree: Tree, target: str) -> None:
    """Also where it is as long as the files are: the text of the second one has 148 bytes."""
    link = tree.root / "loop.npy"
    link.symlink_to(target)
    assert len(target) in (7, 148, 8)
    with pytest.raises(InvalidInput, match=r"loop\.npy (is a symbolic link to|cannot be read: Too many levels)"):
        tree.ingest()
    assert tree.ingest(bad="skip").bad_files == 1
    (entries,) = RowStore.open(str(tree.store)).manifest().batches()  # type: ignore[union-attr]
    (status,) = entries.status[entries.path == "loop.npy"]
    assert status == ("unreadable" if target == link.name else "link")
    assert tree.ingest(bad="skip").nothing_to_do
    link.unlink()
    np.save(link, GOOD)
    assert tree.ingest().rows == COUNT + 1
