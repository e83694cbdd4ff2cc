import contextlib
import json
import pickle
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

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


@pytest.mark.parametrize(
    "pointer", [None, b"", b"{", b"[]", b'{"checkpoints": [{"file": "../rows", "digest": "", "size": 0}]}']
)
def test_without_a_pointer_the_newest_whole_file_is_gone_on_with(place: Path, pointer: bytes | None) -> None:
    checkpoints = Checkpoints(Location.of(str(place)), keep=3)
    for step in (1, 2, 1_000_000):
        checkpoints.save(step, state(step))
    next(place.glob("step1000000-*.pt")).write_bytes(b"torn")
    if pointer is None:
        (place / "LATEST.json").unlink()
    else:
        (place / "LATEST.json").write_bytes(pointer)
    told: list[str] = []
    for _ in range(2):
        loaded = Checkpoints(Location.of(str(place))).load(told.append)
        assert loaded is not None
        assert loaded["step"] == 2
        checkpoints.sweep()
    assert [message.split(" is ")[-1] for message in told[:1]] == ["passed over"]
    assert ["names no whole checkpoint; the training goes on from step000002-" in message for message in told[1:]] == [
        True
    ]
    assert steps_on_disk(place) == ["step000001", "step000002"], "the pointer names them again"
    checkpoints.save(3, state(3))
    assert steps_on_disk(place) == ["step000001", "step000002", "step000003"]


def test_a_whole_file_is_gone_on_with_where_those_that_are_named_are_not(place: Path) -> None:
    checkpoints = Checkpoints(Location.of(str(place)))
    checkpoints.save(1, state(1))
    pointer = (place / "LATEST.json").read_bytes()
    checkpoints.save(2, state(2))
    (place / "LATEST.json").write_bytes(pointer)
    next(place.glob("step000001-*.pt")).write_bytes(b"")
    loaded = checkpoints.load()
    assert loaded is not None
    assert loaded["step"] == 2


def test_files_of_which_none_is_whole_are_no_new_beginning(place: Path) -> None:
    checkpoints = Checkpoints(Location.of(str(place)))
    checkpoints.save(1, state(1))
    next(place.glob("*.pt")).write_bytes(b"")
    (place / "LATEST.json").unlink()
    with pytest.raises(Corrupt, match=r"step000001-\w+.pt: missing or damaged.* --overwrite"):
        checkpoints.load()


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_are_kept_as_asked_for(place: Path, keep: int) -> None:
    for step in range(1, 6):
        Checkpoints(Location.of(str(place)), keep=keep).save(step, state(step))
        assert steps_on_disk(place) == [f"step00000{kept}" for kept in range(max(1, step - keep + 1), step + 1)]
    Checkpoints(Location.of(str(place)), keep=2).save(6, state(6))
    assert steps_on_disk(place)[-1] == "step000006"
    assert len(steps_on_disk(place)) == 2


class Killed(BaseException):
    """What ends a process that is killed in a test."""


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that lets the so-manieth write or deletion of this process be its end."""
    real = {name: getattr(Location, name) for name in ("write", "delete", "sweep_partial")}

    def arm(number: int) -> None:
        changes = count(1)

        def patched(name: str) -> Any:
            def change(self: Location, *arguments: Any) -> Any:
                if next(changes) >= number:
                    raise Killed
                return real[name](self, *arguments)

            return change

        for name in real:
            monkeypatch.setattr(Location, name, patched(name))

    return arm


@pytest.mark.parametrize("pointer", ["whole", "lost"])
def test_a_save_that_is_killed_leaves_the_new_state_or_the_one_before(
    place: Path, kill_at: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, pointer: str
) -> None:
    """Killed at the file, at the pointer, at the deletion of the oldest, or not at all."""
    checkpoints, found = Checkpoints(Location.of(str(place))), []
    for number in range(1, 5):
        for step in (1, 2):
            checkpoints.save(step, state(step))
        kill_at(number)
        with contextlib.suppress(Killed):
            checkpoints.save(3, state(3))
        monkeypatch.undo()
        if pointer == "lost":
            (place / "LATEST.json").unlink()
        loaded = checkpoints.load()
        assert loaded is not None
        found.append(loaded["step"])
        checkpoints.sweep()
        if pointer == "whole":
            assert len(steps_on_disk(place)) == 2
        checkpoints.clear()
    assert found == ([2, 2, 3, 3] if pointer == "whole" else [2, 3, 3, 3])


@pytest.mark.parametrize("pointer", ["whole", "lost"])
def test_clearing_that_is_killed_leaves_all_or_nothing_to_go_on_with(
    place: Path, kill_at: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, pointer: str
) -> None:
    checkpoints, whole = Checkpoints(Location.of(str(place))), True
    for number in count(1):
        for step in (1, 2):
            checkpoints.save(step, state(step))
        if pointer == "lost":
            (place / "LATEST.json").unlink()
        kill_at(number)
        try:
            checkpoints.clear()
            break
        except Killed:
            pass
        finally:
            monkeypatch.undo()
        loaded = checkpoints.load()
        assert (loaded is not None) == whole, number
        whole = False
        checkpoints.sweep()
        assert len(steps_on_disk(place)) == (2 if loaded else 0)
        checkpoints.clear()
        assert not place.exists()
    assert number == 7, "pointer, two files, partial files, pointer, directory"


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
