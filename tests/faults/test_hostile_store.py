"""Stores that somebody prepared: nothing in them is run, and what is wrong with them is named."""

import contextlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from numcodecs.zstd import Zstd

import cvae_dist
from cvae_dist.errors import Corrupt, CvaeDistError, InvalidInput
from cvae_dist.store import Layout, RowStore
from cvae_dist.store.layout import checksummed
from tests.faults.drivers import small_grid, write_items


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (exec, (f"open({str(self.path)!r}, 'w').close()",))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(Layout, "of", small_grid())
    write_items(tmp_path / "tree", 0, 10)
    cvae_dist.ingest(tmp_path / "tree", tmp_path / "rows", label="folder")
    return tmp_path / "rows"


def group(store: Path) -> dict[str, object]:
    document: dict[str, object] = json.loads((store / "zarr.json").read_text())
    return document


@pytest.mark.parametrize("name", ["id", "label", "x", "publications/{}/mean", "publications/{}/manifest_path"])
def test_filters_of_the_older_zarr_format_never_run(store: Path, tmp_path: Path, name: str) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "ran"))
    path = store / name.format(RowStore.open(str(store)).publication.path.rpartition("/")[2])
    described = {
        "zarr_format": 2, "shape": [10], "chunks": [10], "dtype": "|O", "fill_value": None, "order": "C",
        "compressor": None, "filters": [{"id": "pickle"}],
    }  # fmt: skip
    for chunk in path.glob("c.*"):
        chunk.write_bytes(bomb)
    (path / ".zarray").write_text(json.dumps(described))
    (path / "zarr.json").unlink()
    for chunk in range(3):
        (path / str(chunk)).write_bytes(bomb)
    for read in (
        lambda: cvae_dist.info(str(store)),
        lambda: cvae_dist.verify(str(store)),
        lambda: RowStore.open(str(store)).read("id"),
        lambda: RowStore.open(str(store)).read("label"),
        lambda: RowStore.open(str(store)).read("x"),
        lambda: cvae_dist.ingest(tmp_path / "tree", store, label="folder"),
        lambda: cvae_dist.train(str(store), str(tmp_path / "model"), num_steps=1),
    ):
        with contextlib.suppress(CvaeDistError):
            read()
    assert not (tmp_path / "ran").exists()
    assert not cvae_dist.verify(str(store)).ok


def test_codecs_that_a_description_names_are_not_looked_up(store: Path, tmp_path: Path) -> None:
    document = json.loads((store / "x/zarr.json").read_text())
    document["codecs"] = [{"name": "numcodecs.pickle", "configuration": {}}]
    (store / "x/zarr.json").write_text(json.dumps(document))
    np.testing.assert_array_equal(RowStore.open(str(store)).read("x").shape, (10, 3))
    (problem,) = cvae_dist.verify(str(store)).problems
    assert (problem.array, problem.reason) == ("x", "its metadata differs from the copy in the group's")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"name": "../../outside"}, "'../../outside'"),
        ({"name": "/etc/passwd"}, "'/etc/passwd'"),
        ({"dtype": "|O"}, r"'\|O'"),
        ({"dtype": "|V1000000"}, "V1000000"),
        ({"shape": [-3]}, r"\(-3,\)"),
        ({"shape": [6, 6]}, r"\(6, 6\)"),
        ({"name": 7}, "TypeError"),
    ],
)
def test_a_forged_description_is_refused_before_anything_is_read(
    store: Path, tmp_path: Path, change: dict[str, object], named: str
) -> None:
    document = json.loads((store / "zarr.json").read_text())
    document["attributes"]["cvae_dist"]["layout"]["arrays"][0] |= change
    (store / "zarr.json").write_text(json.dumps(document))
    for read in (
        lambda: cvae_dist.info(str(store)),
        lambda: cvae_dist.verify(str(store)),
        lambda: cvae_dist.ingest(tmp_path / "tree", store, label="folder", overwrite=True),
    ):
        with pytest.raises(InvalidInput, match=f"damaged or forged .*{named}"):
            read()


@pytest.mark.parametrize(
    "change",
    [{"moving": "0-999999999999999999"}, {"moving": "../x"}, {"moving": 3}, {"grown_from": [{}]}, {"grown_from": 1}],
)
def test_forged_notes_of_replaced_rows_are_refused(store: Path, change: dict[str, object]) -> None:
    document = json.loads((store / "zarr.json").read_text())
    document["attributes"]["cvae_dist"] |= change
    (store / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(InvalidInput, match="damaged or forged"):
        RowStore.open(str(store))


def test_strings_that_claim_more_memory_than_there_is(store: Path) -> None:
    frame = bytearray(Zstd(level=1).encode(b"abc" * 100))
    claimed = frame[:4] + bytes([0xE0]) + (2**40).to_bytes(8, "little") + frame[4:]
    (store / "id/c.0").write_bytes(b"".join(bytes(part) for part in checksummed(bytes(claimed))))
    with pytest.raises(Corrupt, match=r"shard 0 of id cannot be trusted: the chunk claims to hold more than 2 GB"):
        RowStore.open(str(store)).read("id")


def test_a_group_that_is_nested_without_end(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/zarr.json").write_text('{"attributes":' * 100_000)
    with pytest.raises(InvalidInput, match="not a store made by cvae-dist"):
        cvae_dist.info(str(tmp_path / "rows"))
