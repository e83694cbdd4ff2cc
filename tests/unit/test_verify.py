"""`info` and the shape of what `verify` returns; `faults/test_corruption.py` damages stores."""

import json
from pathlib import Path

import numpy as np
import pytest

from cvae_dist.errors import Corrupt, InvalidInput, SourceNotFound
from cvae_dist.events import Event
from cvae_dist.model.files import FORMAT, VERSION
from cvae_dist.store import ArrayLayout, Layout, Location, RowStore
from cvae_dist.store.lineage import digest_bytes
from cvae_dist.verbs.info import info
from cvae_dist.verbs.ingest import ingest
from cvae_dist.verbs.verify import Problem, verify


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(Layout, "of", classmethod(lambda cls, arrays, rows=None, **_: cls(4, 2, arrays)))
    (tmp_path / "tree").mkdir()
    np.save(tmp_path / "tree" / "a.npy", np.arange(20.0).reshape(10, 2))
    ingest(tmp_path / "tree", tmp_path / "store")
    return tmp_path / "store"


def objects_of(store: Path) -> list[Path]:
    return [path for path in store.rglob("*") if path.is_file() and path.name != "zarr.json"]


def test_whole_store(store: Path) -> None:
    events: list[Event] = []
    result = verify(str(store), on_event=events.append)
    assert (result.ok, result.rows, result.objects, result.problems) == (True, 10, 3 + 4 + 1 + 8 + 2, ())
    assert len(objects_of(store)) == 18, "every object but the metadata is looked at"
    assert [event.kind for event in events] == ["start", "progress", "progress", "progress", "done"]
    assert [event.done for event in events] == [0, 4, 8, 10, 10]


def test_problem_says_where() -> None:
    assert str(Problem("x", 3, "missing")) == "x shard 3: missing"
    assert str(Problem("mean", None, "differs")) == "mean: differs"


def test_info_of_a_store(store: Path) -> None:
    entries = info(str(store))
    assert (entries["rows"], entries["kind"], entries["dropped"], entries["bytes"]) == (10, "rows", 0, 160)
    assert (entries["shards"], entries["rows_per_shard"], entries["rows_per_chunk"]) == (3, 4, 2)
    assert entries["range"] == "0 to 19"


def test_info_of_a_begun_store(tmp_path: Path) -> None:
    layout = Layout(4, 2, (ArrayLayout("x", "<f4", ("sample", "feature"), (2,)),))
    RowStore.create(Location.of(tmp_path / "s"), "rows", layout, {})
    assert "begun" in info(str(tmp_path / "s"))["rows"]


def test_info_of_nothing_and_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound, match="neither a store nor a model"):
        info(str(tmp_path / "s"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(Corrupt, match="not JSON"):
        info(str(tmp_path))
    (tmp_path / "config.json").rename(tmp_path / "other.json")
    with pytest.raises(InvalidInput, match="not a store"):
        info(str(tmp_path))


def write_model(place: Path) -> None:
    """Write a model as far as `verify` and `info` look into one."""
    settings, digest = {"dim_latent": 2}, digest_bytes(b"weights")
    description = {"format": FORMAT, "version": VERSION, "digest": digest, "model": settings, "lineage": {}}
    (place / "config.json").write_text(json.dumps(description))
    (place / "model.safetensors").write_bytes(b"weights")


def test_a_model_with_other_weights(tmp_path: Path) -> None:
    write_model(tmp_path)
    assert verify(str(tmp_path)).ok
    entries = info(tmp_path)
    assert (entries["model"], entries["settings"]) == (str(tmp_path), {"dim_latent": 2})
    (tmp_path / "model.safetensors").write_bytes(b"Weights")
    assert "changed" in str(verify(str(tmp_path)).problems[0])
    (tmp_path / "model.safetensors").unlink()
    assert str(verify(str(tmp_path)).problems[0]) == "model.safetensors: missing"


def test_a_damaged_prior(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "priors").mkdir()
    (tmp_path / "priors" / "flow.json").write_text('{"digest": "' + digest_bytes(b"arrays") + '"}')
    file = tmp_path / "priors" / "flow.safetensors"
    file.write_bytes(b"arrays")
    assert verify(str(tmp_path)).ok
    file.write_bytes(b"Arrays")
    assert str(verify(str(tmp_path)).problems[0]).startswith("priors/flow.safetensors: changed")
    file.unlink()
    assert str(verify(str(tmp_path)).problems[0]) == "priors/flow.safetensors: missing"
    (tmp_path / "priors" / "flow.json").write_text("{")
    assert str(verify(str(tmp_path)).problems[0]) == "priors/flow.json: changed: it names no digest"
