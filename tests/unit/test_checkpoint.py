import json
import pickle
from pathlib import Path

import pytest
import torch

from cvae_dist.errors import Corrupt, StorageFailed
from cvae_dist.store import Location
from cvae_dist.training.checkpoint import Checkpoints


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def state(step: int) -> dict[str, object]:
    return {
        "step": step,
        "weights": {"a": torch.full((3,), float(step))},
        "history": [{"loss": 1.5}],
        "name": "x",
    }


def steps_on_disk(place: Path) -> list[str]:
    return sorted(path.name[:10] for path in place.glob("*.pt"))


def test_the_newest_state_comes_back(place: Path) -> None:
    checkpoints = Checkpoints(Location.of(str(place)))
    assert checkpoints.load() is None
    for step in (1, 2, 3):
        checkpoints.save(step, state(step))
    loaded = Checkpoints(Location.of(str(place))).load()
    assert loaded is not None
    assert (loaded["step"], loaded["history"], loaded["name"]) == (3, [{"loss": 1.5}], "x")
    assert loaded["weights"]["a"].tolist() == [3, 3, 3]
    assert steps_on_disk(place) == ["step000002", "step000003"]


@pytest.mark.parametrize("damage", ["torn", "empty", "flipped", "missing"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(place: Path, damage: str) -> None:
    checkpoints = Checkpoints(Location.of(str(place)))
    checkpoints.save(1, state(1))
    checkpoints.save(2, state(2))
    newest = next(place.glob("step000002-*.pt"))
    data = newest.read_bytes()
    if damage == "missing":
        newest.unlink()
    else:
        flipped = bytes([*data[:-50], data[-50] ^ 1, *data[-49:]])
        newest.write_bytes({"torn": data[:-100], "empty": b"", "flipped": flipped}[damage])
    loaded = checkpoints.load()
    assert loaded is not None
    assert loaded["step"] == 1


def test_without_a_whole_checkpoint_the_remedy_is_named(place: Path) -> None:
    checkpoints = Checkpoints(Location.of(str(place)))
    checkpoints.save(1, state(1))
    next(place.glob("*.pt")).write_bytes(b"")
    with pytest.raises(Corrupt, match="--overwrite"):
        checkpoints.load()
    (place / "LATEST.json").write_text("{")
    with pytest.raises(Corrupt, match="--overwrite"):
        checkpoints.load()


def test_killed_before_the_pointer_moved_the_old_state_holds(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(Location.of(str(place)))
    checkpoints.save(1, state(1))
    write = Location.write

    def dying(self: Location, *buffers: bytes) -> None:
        if self.name == "LATEST.json":
            raise StorageFailed("killed")
        write(self, *buffers)

    monkeypatch.setattr(Location, "write", dying)
    with pytest.raises(StorageFailed):
        checkpoints.save(2, state(2))
    monkeypatch.undo()
    loaded = checkpoints.load()
    assert loaded is not None
    assert loaded["step"] == 1
    assert steps_on_disk(place) == ["step000001", "step000002"]
    checkpoints.sweep()
    assert steps_on_disk(place) == ["step000001"]
    assert (place / "LATEST.json").exists()


def test_saving_the_same_step_again_keeps_the_one_before(place: Path) -> None:
    checkpoints = Checkpoints(Location.of(str(place)))
    for step in (1, 2, 2):
        checkpoints.save(step, state(step))
    assert steps_on_disk(place) == ["step000001", "step000002"]


def test_a_file_that_would_run_code_is_not_unpickled(place: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (exec, ("raise SystemExit('code was run')",))

    checkpoints = Checkpoints(Location.of(str(place)))
    checkpoints.save(1, {"evil": Evil()})
    with pytest.raises(pickle.UnpicklingError):
        checkpoints.load()


def test_clearing_leaves_nothing(place: Path) -> None:
    checkpoints = Checkpoints(Location.of(str(place)))
    checkpoints.save(1, state(1))
    assert set(json.loads((place / "LATEST.json").read_text())["checkpoints"][0]) == {
        "file",
        "digest",
        "size",
    }
    checkpoints.clear()
    assert not place.exists()
    assert checkpoints.load() is None
    checkpoints.sweep()


def test_object_stores_will_do() -> None:
    checkpoints = Checkpoints(Location.of("memory://trained/checkpoints"))
    for step in (1, 2, 3):
        checkpoints.save(step, state(step))
    checkpoints.sweep()
    loaded = checkpoints.load()
    assert loaded is not None
    assert loaded["step"] == 3
    assert len(list(Location.of("memory://trained/checkpoints").list())) == 3
