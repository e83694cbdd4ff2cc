"""Rows that are shuffled on the way in: all of them, in an order that a seed decides, with ids that lead back."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from distributed import Client
from pyarrow import parquet

from cvae_dist.cluster import resolve_client, shuffle
from cvae_dist.errors import InvalidInput, SettingsChanged, StorageFailed
from cvae_dist.events import Event
from cvae_dist.store import Layout, Location, RowStore
from cvae_dist.verbs.ingest import ingest
from cvae_dist.verbs.verify import verify
from tests.faults.drivers import SHARDS_PER_PACK, item, require_same, small_grid, snapshot, stamps, write_items
from tests.servers import serve

ROW_BYTES = 3 * 4 + 8  # x, and an id that is made for it
ROWS = 61


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of four rows, runs of ten."""
    monkeypatch.setattr(Layout, "of", small_grid())
    monkeypatch.setattr(Layout, "shards_per_pack", SHARDS_PER_PACK)
    monkeypatch.setattr(shuffle, "_RUN_BYTES", 10 * ROW_BYTES)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    write_blocks(tmp_path / "tree", 0, ROWS)
    return tmp_path / "tree"


def write_blocks(tree: Path, start: int, stop: int, size: int = 17) -> None:
    """Write items as rows of a few files, one folder each."""
    for first in range(start, stop, size):
        (tree / f"class {first:03d}").mkdir(parents=True)
        rows = np.stack([item(number) for number in range(first, min(first + size, stop))])
        np.save(tree / f"class {first:03d}" / "rows.npy", rows)


def order(store: Path | Location) -> list[int]:
    """Return the ids in stored order, after checking that they lead to the rows."""
    opened = RowStore.open(store if isinstance(store, Location) else str(store))
    ids = opened.read("id")
    np.testing.assert_array_equal(opened.read("x"), [item(number) for number in ids])
    return [int(number) for number in ids]


def interrupt(figure: str, count: int) -> Callable[[Event], None]:
    """Return a listener that interrupts a run when it hears of a figure for the count-th time."""
    heard = 0

    def listen(event: Event) -> None:
        nonlocal heard
        heard += figure in event.values
        if heard == count:
            raise KeyboardInterrupt

    return listen


def test_ids_lead_back_and_the_seed_decides(tree: Path, tmp_path: Path) -> None:
    found = {}
    notes: list[str] = []
    for name, seed in (("a", 1), ("again", 1), ("b", 2)):
        result = ingest(tree, tmp_path / name, shuffle=seed, on_event=lambda event: notes.append(event.message))
        assert result.rows == result.rows_written == ROWS
        found[name] = order(tmp_path / name)
        assert sorted(found[name]) == list(range(ROWS))
        assert verify(str(tmp_path / name)).ok
        assert not (tmp_path / name / "journal").exists()
    assert sum("61 rows are shuffled on their way: until they are published, they need 0 MB" in n for n in notes) == 3
    assert found["a"] != found["b"]
    assert found["a"] != list(range(ROWS))
    require_same(tmp_path / "again", snapshot(tmp_path / "a"))
    assert ingest(tree, tmp_path / "a", shuffle=1).nothing_to_do
    manifest = RowStore.open(str(tmp_path / "a")).manifest()
    assert manifest is not None
    (entries,) = manifest.batches()
    assert entries.start.tolist() == [0, 17, 34, 51], "the first id of each file"


def test_files_of_one_row(tmp_path: Path) -> None:
    tree, store = tmp_path / "tree", tmp_path / "store"
    write_items(tree, 0, 30)
    np.save(tree / "class 1" / "wrong.npy", np.ones(5, np.float32))
    ingest(tree, store, shuffle=4, label="folder", bad="skip")
    write_items(tree, 30, 41)
    before = stamps(store, range(7))
    assert ingest(tree, store, shuffle=4, label="folder", bad="skip").rows == 41
    assert stamps(store, range(7)) == before
    opened = RowStore.open(str(store))
    names = opened.read("id").tolist()
    numbers = [int(name[-8:-4]) for name in names]
    np.testing.assert_array_equal(opened.read("x"), [item(number) for number in numbers])
    assert opened.read("label").tolist() == [f"class {number % 3}" for number in numbers]
    assert sorted(numbers[:30]) == list(range(30))
    assert sorted(numbers[30:]) == list(range(30, 41))
    listed = sorted(names[:30])
    assert names[:30] != listed
    manifest = opened.manifest()
    assert manifest is not None
    (entries,) = manifest.batches()
    assert entries.path.tolist() == sorted(entries.path)
    assert [names[start] for start in entries.start[entries.rows > 0]] == entries.path[entries.rows > 0].tolist()
    assert entries.status[entries.rows == 0].tolist() == ["shape"]


def test_appends_are_shuffled_among_themselves(tree: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    ingest(tree, store, shuffle=1, label="folder")
    seen, full = order(store), ROWS // 4
    for stop in (ROWS + 1, ROWS + 20):
        before = stamps(store, range(full))
        write_blocks(tree, len(seen), stop)
        assert ingest(tree, store, shuffle=1, label="folder").rows == stop
        found = order(store)
        assert found[: len(seen)] == seen
        assert sorted(found[len(seen) :]) == list(range(len(seen), stop))
        assert stamps(store, range(full)) == before
        seen, full = found, stop // 4
    firsts = np.array([0, 17, 34, 51, 61, 62, 79])
    folders = [f"class {firsts[firsts <= number].max():03d}" for number in seen]
    assert RowStore.open(str(store)).read("label").tolist() == folders
    assert verify(str(store)).ok


@pytest.mark.parametrize("seeds", [(None, 1), (1, None), (1, 2)])
def test_another_order_is_refused(tree: Path, tmp_path: Path, seeds: tuple[int | None, int | None]) -> None:
    store = tmp_path / "store"
    ingest(tree, store, shuffle=seeds[0])
    with pytest.raises(SettingsChanged, match=rf"shuffle: {seeds[0]} there, {seeds[1]} asked for.*--overwrite"):
        ingest(tree, store, shuffle=seeds[1])
    assert ingest(tree, store, shuffle=seeds[1], overwrite=True).rows == ROWS


def test_changed_files(tree: Path, tmp_path: Path) -> None:
    """Files of one row are replaced where they lie; those of many rows lie everywhere."""
    ingest(tree, tmp_path / "blocks", shuffle=1)
    (tree / "class 017" / "rows.npy").unlink()
    with pytest.raises(SettingsChanged, match="1 files .*as it was shuffled, their rows lie among all others"):
        ingest(tree, tmp_path / "blocks", shuffle=1, changed="rewrite")
    write_items(tmp_path / "items", 0, 14)
    ingest(tmp_path / "items", tmp_path / "rows", shuffle=1)
    before = RowStore.open(str(tmp_path / "rows")).read("id").tolist()
    changed = tmp_path / "items/class 2/item 0005.npy"
    np.save(changed, np.full(3, 7, np.float32))
    ingest(tmp_path / "items", tmp_path / "rows", shuffle=1, changed="rewrite")
    opened = RowStore.open(str(tmp_path / "rows"))
    assert opened.read("id").tolist() == before
    assert opened.read("x")[before.index("class 2/item 0005.npy")].tolist() == [7, 7, 7]
    assert verify(str(tmp_path / "rows")).ok


def test_dropped_rows_and_own_ids(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    values = np.arange(80.0).reshape(40, 2)
    values[[3, 17, 39], 1] = np.inf
    names = np.array([f"row {number}" for number in range(40)])
    for part in (slice(0, 20), slice(20, 40)):
        columns = {"name": names[part], "a": values[part, 0], "b": values[part, 1], "n": np.arange(40)[part]}
        parquet.write_table(pyarrow.table(columns), tmp_path / f"tree/{part.start}.parquet")
    store = tmp_path / "store"
    options: dict[str, Any] = {"columns": ("a", "b"), "id": "name", "carry": ("n",), "nonfinite": "drop"}
    result = ingest(tmp_path / "tree", store, shuffle=0, **options)
    assert (result.rows, result.dropped) == (37, 3)
    opened = RowStore.open(str(store))
    numbers = opened.read("n")
    assert sorted(numbers) == sorted({*range(40)} - {3, 17, 39})
    np.testing.assert_array_equal(opened.read("x"), values[numbers])
    assert opened.read("id").tolist() == names[numbers].tolist()


def test_a_row_that_is_not_finite_is_named(tree: Path, tmp_path: Path) -> None:
    rows = np.load(tree / "class 017/rows.npy")
    rows[5, 1] = np.inf
    np.save(tree / "class 017/rows.npy", rows)
    with pytest.raises(InvalidInput, match=r"class 017/rows.npy, row 5, holds NaN or infinity"):
        ingest(tree, tmp_path / "store", shuffle=1)


def test_files_that_turn_out_bad(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    for part in range(4):
        np.savez_compressed(tmp_path / f"tree/{part}.npz", np.stack([item(17 * part + row) for row in range(17)]))
    bad = tmp_path / "tree/2.npz"
    data = bytearray(bad.read_bytes())
    data[len(data) // 2] ^= 1
    bad.write_bytes(data)
    with pytest.raises(InvalidInput, match=r"tree/2.npz"):
        ingest(tmp_path / "tree", tmp_path / "store", shuffle=1)
    result = ingest(tmp_path / "tree", tmp_path / "store", shuffle=1, bad="skip")
    assert (result.rows, result.bad_files) == (51, 1)
    ids, x = (RowStore.open(str(tmp_path / "store")).read(name) for name in ("id", "x"))
    assert sorted(ids) == list(range(51))
    np.testing.assert_array_equal(x, [item(int(n) + 17 * (n >= 34)) for n in ids])
    assert not (tmp_path / "store/journal").exists()


@pytest.mark.parametrize(("figure", "count"), [("rows_dealt", 3), ("rows_per_second", 3)])
def test_an_interrupted_run_goes_on(tree: Path, tmp_path: Path, figure: str, count: int) -> None:
    ingest(tree, tmp_path / "whole", shuffle=1)
    with pytest.raises(KeyboardInterrupt):
        ingest(tree, tmp_path / "store", shuffle=1, on_event=interrupt(figure, count))
    runs = {path: path.stat() for path in (tmp_path / "store/journal/shuffled").rglob("*") if path.is_file()}
    assert 3 <= len(runs) <= 7
    with pytest.raises(SettingsChanged, match="shuffle: 1 there, 2 asked for"):
        ingest(tree, tmp_path / "store", shuffle=2)
    figures: list[Any] = []
    ingest(tree, tmp_path / "store", shuffle=1, on_event=lambda event: figures.append(event.values.get("rows_dealt")))
    assert len([one for one in figures if one]) == 7 - len(runs), "what was dealt is not dealt again"
    require_same(tmp_path / "store", snapshot(tmp_path / "whole"))


@pytest.mark.parametrize(("label", "place"), [(None, -9), ("folder", 3), ("folder", -20), ("folder", None)])
def test_damage_on_the_way_is_noticed_and_made_good(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, label: Any, place: int | None
) -> None:
    if label:
        monkeypatch.setattr(shuffle, "_RUN_BYTES", 10 * (ROW_BYTES + 64))
    options: dict[str, Any] = {"shuffle": 1, "label": label}
    ingest(tree, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        ingest(tree, tmp_path / "store", **options, on_event=interrupt("rows_per_second", 1))
    (victim,) = (tmp_path / "store/journal/shuffled").glob("*/3")
    data = bytearray(victim.read_bytes())
    if place is None:
        del data[20:]
    else:
        data[place] ^= 1
    victim.write_bytes(data)
    # the first thread that notices it deletes the object, and another one may miss it
    with pytest.raises(StorageFailed, match=r"3, which holds rows on their way .*(not match|is missing)"):
        ingest(tree, tmp_path / "store", **options)
    ingest(tree, tmp_path / "store", **options)
    require_same(tmp_path / "store", snapshot(tmp_path / "whole"))


def test_other_files_meanwhile(tree: Path, tmp_path: Path) -> None:
    """What was dealt of other files is deleted before more is written."""
    with pytest.raises(KeyboardInterrupt):
        ingest(tree, tmp_path / "store", shuffle=1, on_event=interrupt("rows_dealt", 7))
    write_blocks(tree, ROWS, ROWS + 9)
    with pytest.raises(KeyboardInterrupt):
        ingest(tree, tmp_path / "store", shuffle=1, on_event=interrupt("rows_dealt", 1))
    assert len(list((tmp_path / "store/journal/shuffled").iterdir())) == 1
    ingest(tree, tmp_path / "store", shuffle=1)
    ingest(tree, tmp_path / "whole", shuffle=1)
    require_same(tmp_path / "store", snapshot(tmp_path / "whole"))


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with resolve_client(workers=2) as started:
        assert started is not None
        yield started


def test_workers_make_the_same_bytes(tree: Path, tmp_path: Path, client: Client) -> None:
    ingest(tree, tmp_path / "threads", shuffle=1, label="folder")
    ingest(tree, tmp_path / "workers", shuffle=1, label="folder", client=client)
    require_same(tmp_path / "workers", snapshot(tmp_path / "threads"))


def test_in_an_object_store(tree: Path, tmp_path: Path) -> None:
    served = serve("weed")
    ingest(tree, tmp_path / "store", shuffle=1, label="folder")
    result = ingest(tree, served.url, shuffle=1, label="folder", storage_options=served.options)
    assert result.rows == ROWS
    place = Location.of(served.url, served.options)
    assert order(place) == order(tmp_path / "store")
    assert not [entry.name for entry in place.list() if entry.name.startswith("journal")]


def test_sorted_classes_are_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbouring rows are like rows drawn at random: the variance of their classes is not inflated."""
    monkeypatch.setattr(Layout, "of", small_grid(500))
    monkeypatch.setattr(shuffle, "_RUN_BYTES", 700 * (4 + 8))
    (tmp_path / "tree").mkdir()
    classes = np.repeat(np.arange(10, dtype=np.float32), 1000)
    for part in range(5):
        np.save(tmp_path / f"tree/{part}.npy", classes[part * 2000 : part * 2000 + 2000, np.newaxis])
    inflation = {}
    for seed in (None, 1, 2):
        ingest(tmp_path / "tree", tmp_path / f"{seed}", shuffle=seed)
        stored = RowStore.open(str(tmp_path / f"{seed}")).read("x")[:, 0]
        counts = (stored.reshape(-1, 50, 1) == np.arange(10)).sum(axis=1)
        inflation[seed] = counts.var(axis=0).mean() / (50 * 0.1 * 0.9)
    assert inflation[None] > 20
    assert 0.8 < inflation[1] < 1.1
    assert 0.8 < inflation[2] < 1.1
