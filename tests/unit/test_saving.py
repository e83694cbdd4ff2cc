"""Checkpoints are written by a thread, one at a time, from a copy; when they are due, and what becomes of errors."""

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from cvae_dist.errors import OutputLocked, StorageFailed
from cvae_dist.store import Lease, Location
from cvae_dist.training import saving as saving_module
from cvae_dist.training.checkpoint import Checkpoints
from cvae_dist.training.saving import Saving
from tests.faults.drivers import Clock


class Slow(Checkpoints):
    """Checkpoints whose saves wait until they may end."""

    def __init__(self, place: Path) -> None:
        super().__init__(Location.of(place))
        self.may_end, self.steps = threading.Event(), list[int]()
        self.error: Exception | None = None

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        assert self.may_end.wait(30)
        if self.error:
            raise self.error
        super().save(step, state)
        self.steps.append(step)


@pytest.fixture
def slow(tmp_path: Path) -> Slow:
    return Slow(tmp_path / "checkpoints")


@pytest.fixture
def saving(slow: Slow) -> Iterator[Saving]:
    with Saving(slow, 10, 5) as saving:
        yield saving
        slow.may_end.set()


def test_what_is_saved_is_the_state_of_that_moment(slow: Slow, saving: Saving) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    state = {"weights": {"a": weight}, "means": [torch.zeros(2)], "history": [{"loss": 1.0}], "step": 1}
    saving.save(1, state)
    with torch.no_grad():
        weight.add_(1)
    state["means"][0].add_(1)
    state["history"].append({"loss": 2.0})
    state["history"][0]["loss"] = 3.0
    assert not slow.steps, "training goes on before anything is written"
    slow.may_end.set()
    saving.wait()
    loaded = slow.load()
    assert loaded is not None
    assert loaded["weights"]["a"].tolist() == [1, 1, 1]
    assert loaded["means"][0].tolist() == [0, 0]
    assert loaded["history"] == [{"loss": 1.0}]


def test_a_save_waits_for_the_one_before(slow: Slow, saving: Saving) -> None:
    saving.save(1, {"step": 1})
    next_one = threading.Thread(target=saving.save, args=(2, {"step": 2}))
    next_one.start()
    next_one.join(0.02)
    assert next_one.is_alive()
    assert not slow.steps
    slow.may_end.set()
    next_one.join()
    saving.wait()
    assert slow.steps == [1, 2]


def test_leaving_waits_for_what_is_written(slow: Slow) -> None:
    with Saving(slow, 10, 5) as saving:
        saving.save(1, {"step": 1})
        threading.Timer(0.02, slow.may_end.set).start()
    assert slow.steps == [1]


@pytest.mark.parametrize("then", ["save", "wait"])
def test_an_error_of_the_thread_is_raised_by_the_next_call(slow: Slow, saving: Saving, then: str) -> None:
    slow.error = StorageFailed("no room left")
    slow.may_end.set()
    saving.save(1, {"step": 1})
    with pytest.raises(StorageFailed, match="no room left"):
        saving.save(2, {"step": 2}) if then == "save" else saving.wait()
    saving.wait()
    assert not slow.steps


def test_a_thread_that_is_left_behind_cannot_write_once_the_lease_is_given_back(tmp_path: Path) -> None:
    with Lease.held(Location.of(tmp_path / "model")) as lease:
        checkpoints = Checkpoints(Location.of(tmp_path / "model" / "checkpoints"), lease.check)
    with Saving(checkpoints, 10, 5) as saving:
        saving.save(1, {"step": 1})
        with pytest.raises(OutputLocked, match="was given back"):
            saving.wait()
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_due_after_steps_or_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(saving_module, "time", clock)
    with Saving(None, 10, 5) as saving:
        assert [step for step in range(1, 31) if saving.is_due(step)] == [10, 20, 30]
        clock.sleep(290)
        assert not saving.is_due(31)
        clock.sleep(11)
        assert saving.is_due(31)
        saving.save(31, {})
        assert not saving.is_due(32)
        clock.sleep(301)
        assert saving.is_due(33)
