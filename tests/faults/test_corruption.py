"""Stored bytes that changed, one at a time: `verify` names the shard, and nothing reads them as rows."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cvae_dist.errors import Corrupt
from cvae_dist.store import Layout, RowStore
from cvae_dist.store.layout import encode_chunk
from cvae_dist.verbs.ingest import ingest
from cvae_dist.verbs.verify import verify
from tests.faults.drivers import item, small_grid, write_items

pytestmark = pytest.mark.usefixtures("tiny_shards")
ROWS = 10  # shards of 4, 4 and 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    write_items(root / "tree", 0, ROWS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Layout, "of", small_grid())
        ingest(root / "tree", root / "store", label="folder")
    assert verify(str(root / "store")).ok
    return root / "store"


@pytest.fixture
def tree(whole: Path, tmp_path: Path) -> Path:
    """The files that it was made from, as old as they were."""
    shutil.copytree(whole.with_name("tree"), tmp_path / "tree")
    return tmp_path / "tree"


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "store")
    return tmp_path / "store"


def problems(store: Path) -> list[tuple[str, int | None]]:
    result = verify(str(store))
    assert result.ok == (not result.problems)
    return [(problem.array, problem.shard) for problem in result.problems]


def described(store: Path) -> Path:
    """Return the subgroup of the publication."""
    return store / RowStore.open(str(store)).publication.path


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


X = 2 * (2 * 12 + 4)  # bytes of the chunks of a full shard of x, with their checksums
POSITIONS = {"first bit": 0, "value": 8 * 13 + 5, "checksum": 8 * 25, "second chunk": 8 * 30,
             "index": 8 * X + 3, "checksum of the index": 8 * (X + 32)}  # fmt: skip


@pytest.mark.parametrize("shard", [0, 2])
@pytest.mark.parametrize("bit", POSITIONS.values(), ids=POSITIONS)
def test_one_flipped_bit_of_x(store: Path, shard: int, bit: int) -> None:
    path = store / f"x/c.{shard}.0"
    bit = min(bit, 8 * path.stat().st_size - 1)
    flip(path, bit)
    assert problems(store) == [("x", shard)]
    flip(path, bit)
    assert problems(store) == []


@pytest.mark.parametrize("name", ["id", "label"])
@pytest.mark.parametrize("place", [0.0, 0.3, 0.6, 0.99])
def test_one_flipped_bit_of_a_column(store: Path, name: str, place: float) -> None:
    path = store / f"{name}/c.1"
    flip(path, int(8 * path.stat().st_size * place))
    assert problems(store) == [(name, 1)]
    with pytest.raises(Corrupt, match=name):
        RowStore.open(str(store)).read(name)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "truncated"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "too long"),
    "zero-length": (lambda path: path.write_bytes(b""), "empty"),
    "deleted": (lambda path: path.unlink(), "missing"),
    "zeros": (lambda path: path.write_bytes(bytes(path.stat().st_size)), "changed"),
}


@pytest.mark.parametrize("key", ["x/c.1.0", "id/c.2", "label/c.0"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_shard(store: Path, key: str, damage: str) -> None:
    apply, word = DAMAGES[damage]
    apply(store / key)
    name, _, shard = key.replace(".", "/").split("/")[:3]
    (problem,) = verify(str(store)).problems
    assert (problem.array, problem.shard) == (name, int(shard))
    assert word in problem.reason
    if damage != "longer":
        with pytest.raises(Corrupt, match=name):
            RowStore.open(str(store)).read(name)


@pytest.mark.parametrize("name", ["x", "id", "label"])
def test_two_shards_swapped(store: Path, name: str) -> None:
    one, other = (store / f"{name}/c.{shard}{'.0' * (name == 'x')}" for shard in (0, 1))
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    result = verify(str(store))
    assert [(p.array, p.shard) for p in result.problems] == [(name, 0), (name, 1)]
    assert ["shard 1" in result.problems[0].reason, "shard 0" in result.problems[1].reason] == [True, True]


def test_two_shards_swapped_with_their_records(store: Path) -> None:
    for folder in ("x", "id", "label"):
        one, other = (store / folder / f"c.{shard}{'.0' * (folder == 'x')}" for shard in (0, 1))
        one.rename(store / "aside")
        other.rename(one)
        (store / "aside").rename(other)
    table = RowStore.open(str(store)).records().table[[1, 0, 2]]
    (described(store) / "record/c.0.0").write_bytes(b"".join(map(bytes, encode_chunk(table, 3))))
    assert problems(store) == [("record", None)]


FILES = {
    "record": "c.0.0", "moments": "c.0.0.0", "mean": "c.0", "std": "c.0", "min": "c.0", "max": "c.0",
    "manifest_path": "c.0", "manifest_rows": "c.0", "manifest_size": "c.0",
    "sample": "c.0.0", "sample_row": "c.0",
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_damaged_publication(store: Path, name: str, damage: str) -> None:
    DAMAGES[damage][0](described(store) / name / FILES[name])
    assert problems(store) == [(name, None)]


@pytest.mark.parametrize("name", ["mean", "std", "min", "max", "moments"])
def test_statistics_rewritten(store: Path, name: str) -> None:
    """Whole bytes with right checksums, that say something else."""
    publication = RowStore.open(str(store)).publication
    values = publication.read(name) + 1e-9
    data = b"".join(map(bytes, encode_chunk(values, publication.arrays[name].chunk)))
    (described(store) / name / FILES[name]).write_bytes(data)
    assert {problem[0] for problem in problems(store)} <= {"mean", "std", "minimum", "maximum"}
    assert problems(store)


@pytest.mark.parametrize("name", ["x", "id", "mean", "record", "manifest_path", ""])
@pytest.mark.parametrize("how", ["shape", "deleted", "garbage", "nested"])
def test_metadata_changed(store: Path, name: str, how: str) -> None:
    place = name if name in ("x", "id") else str(described(store).relative_to(store) / name).rstrip("/")
    path = store / place / "zarr.json"
    if how == "deleted":
        path.unlink()
    elif how == "shape":
        document = json.loads(path.read_bytes())
        document["shape"] = [ROWS + 1]
        path.write_text(json.dumps(document))
    else:
        path.write_text("{" if how == "garbage" else "[" * 10**5)
    assert problems(store) == [(place, None)]


def test_damaged_group(store: Path) -> None:
    (store / "zarr.json").write_text('{"zarr_format": 3')
    with pytest.raises(ValueError, match="not a store made by cvae-dist"):
        verify(str(store))


def test_a_lost_carried_shard_is_not_appended_to_as_zeros(store: Path, tree: Path) -> None:
    before = RowStore.open(str(store)).document
    (store / "x/c.2.0").unlink()
    write_items(tree, ROWS, ROWS + 5)
    with pytest.raises(Corrupt, match="c.2.0: the file is missing|shard 2 of id is missing"):
        ingest(tree, store, label="folder")
    after = {name: value for name, value in RowStore.open(str(store)).document.items() if name != "driver"}
    assert after == before


def test_a_lost_ledger_is_not_left_out_of_the_statistics(store: Path, tree: Path) -> None:
    before = (store / "zarr.json").read_bytes()
    (described(store) / "record/c.0.0").unlink()
    write_items(tree, ROWS, ROWS + 5)
    with pytest.raises(Corrupt, match="record/c.0.0 is missing"):
        ingest(tree, store, label="folder")
    assert (store / "zarr.json").read_bytes() == before
    ingest(tree, store, label="folder", overwrite=True)
    assert verify(str(store)).ok


def test_lost_moments_are_not_left_out_of_the_statistics(store: Path, tree: Path) -> None:
    (described(store) / "moments/c.0.0.0").unlink()
    write_items(tree, ROWS, ROWS + 5)
    with pytest.raises(Corrupt, match="moments/c.0.0.0 is missing"):
        ingest(tree, store, label="folder")
    assert RowStore.open(str(store)).rows == ROWS


def test_command_exits_1_and_names_the_shard(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Layout, "shards_per_pack", 1000)  # the command knows nothing of small packs
    store = tmp_path / "store"
    ingest(tree, store)

    def run() -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "cvae_dist", "verify", str(store), "--quiet"]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert run().returncode == 0
    (store / "x/c.1.0").write_bytes(b"")
    (described(store) / "mean/c.0").unlink()
    ended = run()
    assert ended.returncode == 1
    assert "x shard 1: empty" in ended.stdout
    assert "mean: " in ended.stdout
    assert "Traceback" not in ended.stderr


def test_verify_of_what_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        verify(str(tmp_path / "nothing"))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "file").write_text("x")
    with pytest.raises(ValueError, match="not a store"):
        verify(str(tmp_path / "foreign"))


def test_rows_are_what_was_written(store: Path) -> None:
    opened = RowStore.open(str(store))
    numbers = [int(name[-8:-4]) for name in opened.read("id")]
    np.testing.assert_array_equal(opened.read("x"), [item(number) for number in numbers])
    shutil.rmtree(store)
