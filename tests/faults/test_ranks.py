"""Several ranks train one model: it is the model of one process, whatever happens to them on the way."""

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from sklearn.datasets import load_digits

from cvae_dist.config import TrainConfig
from cvae_dist.errors import Corrupt, InvalidInput, OutputLocked, RankFailed, RankLost, SettingsChanged
from cvae_dist.events import Event, OnEvent, ignore
from cvae_dist.launch.gang import train_together
from cvae_dist.launch.launcher import launch
from cvae_dist.launch.local import LocalRanks
from cvae_dist.launch.rank import Task
from cvae_dist.progress import LiveBars
from cvae_dist.store import Location, RowStore
from cvae_dist.training.history import Figures
from cvae_dist.training.optimizer import Optimizer
from cvae_dist.training.trainer import Trainer
from cvae_dist.training.world import Membership
from cvae_dist.verbs.ingest import ingest
from cvae_dist.verbs.train import train
from tests.faults.drivers import Clock
from tests.servers import free_port
from tests.unit.test_loop import take_over

STEPS = 120
RECORDED = "gradient", "weights"  # the first, and the last
SETTINGS: dict[str, Any] = {
    "num_steps": STEPS, "dim_latent": 4, "cells_encoder": (32, 16), "batch_size": 50, "test_every": 40,
    "checkpoint_every": 30, "tb_logging": False, "precision": "float32", "buffer_bytes": 40_000,
}  # fmt: skip

OF_THE_CLOCK = ("time", "rows_per_second", "waiting_share")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("ranks")
    (root / "tree").mkdir()
    np.save(root / "tree" / "digits.npy", load_digits().data.astype(np.float32).reshape(-1, 8, 8)[:1203])
    ingest(root / "tree", root / "rows.zarr")
    return str(root / "rows.zarr")


@dataclass(frozen=True)
class Recording(Task):
    """A training whose ranks keep their first gradient and their last weights beside the model, and fail as asked."""

    fault: str = ""

    def run(
        self, membership: Membership | None, on_event: OnEvent, store: RowStore | None = None
    ) -> tuple[Figures, bool]:
        rank = membership.rank if membership else 0
        real_clip, real_use, real_advance = Optimizer._clip, Trainer.use_best_weights, Trainer.advance

        def clip(optimizer: Optimizer, *arguments: Any) -> bool:
            if optimizer.updates == optimizer.skipped == 0:
                if self.fault == "wrong factor":
                    for value in optimizer._parameters:
                        value.grad = value.grad / optimizer._world.size
                _save(f"{self.model}-gradient-{rank}", [value.grad for value in optimizer._parameters])
            return real_clip(optimizer, *arguments)

        def use_best_weights(trainer: Trainer) -> None:
            _save(f"{self.model}-weights-{rank}", list(trainer.vae.parameters()))
            real_use(trainer)

        def advance(trainer: Trainer, *arguments: Any) -> None:
            if trainer.step == 45 and rank == 1 and self.fault:
                _fail(self.fault)
            real_advance(trainer, *arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Optimizer, "_clip", clip)
            patch.setattr(Trainer, "use_best_weights", use_best_weights)
            patch.setattr(Trainer, "advance", advance)
            return super().run(membership, on_event, store)


def _save(path: str, values: Sequence[torch.Tensor]) -> None:
    np.save(path, np.concatenate([value.detach().numpy().ravel() for value in values]))


def _fail(fault: str) -> None:
    if fault == "raises":
        raise ZeroDivisionError("of the rank itself")
    if fault == "hangs":
        time.sleep(1000)
    if fault == "refuses":
        raise Corrupt("a shard is torn")


def task(store: str, model: Path, fault: str = "", timeout: float = 60, **settings: Any) -> Recording:
    config = TrainConfig(**{**SETTINGS, **settings})
    return Recording(store, str(model), config, False, None, timeout, fault)


class Started:
    """Starts ranks, and remembers them."""

    def __init__(self, task: Task, sizes: Sequence[int]) -> None:
        self.task, self.sizes = task, list(sizes)
        self.generations: list[LocalRanks] = []

    def __call__(self, anew: bool) -> LocalRanks:
        size = self.sizes.pop(0) if len(self.sizes) > 1 else self.sizes[0]
        self.generations.append(LocalRanks(replace(self.task, overwrite=self.task.overwrite and anew), size))
        return self.generations[-1]

    @property
    def pids(self) -> list[int]:
        return self.generations[-1].pids

    def require_nobody_left(self) -> None:
        for pid in (pid for generation in self.generations for pid in generation.pids):
            assert not Path(f"/proc/{pid}").exists()


def run(
    store: str, model: Path, sizes: Sequence[int] = (2,), on_event: OnEvent = ignore, fault: str = "",
    max_restarts: int = 5, **settings: Any,
) -> tuple[dict[str, Any], Started]:  # fmt: skip
    started = Started(task(store, model, fault, **settings), sizes)
    try:
        return train_together(started, on_event, max_restarts), started
    finally:
        started.require_nobody_left()


def weights(model: Path) -> np.ndarray:
    found = load_file(model / "model.safetensors")
    return np.concatenate([found[name].ravel().astype(float) for name in sorted(found) if "stretch" not in name])


def history(model: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (model / "history.jsonl").read_text().splitlines()]


def require_one_bar(events: Sequence[Event], restarts: int = 0, saved: int = 30) -> None:
    """Look at what is shown of a training that was told in these events, and goes on from step ``saved`` or later."""
    starts = [event.done for event in events if event.kind == "start"]
    assert starts[0] == 0
    assert len(starts) == 1 + restarts
    assert all(step >= saved for step in starts[1:]), "the bar goes on at a checkpoint"
    assert {event.total for event in events if event.kind != "note"} == {STEPS}
    assert [event.kind for event in events].count("done") == 1
    with LiveBars() as bars:
        for event in events:
            bars(event)
    (bar,) = bars._progress.tasks
    assert (bar.completed, bar.total) == (STEPS, STEPS)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one.astype(float) - other) / np.linalg.norm(other))


@pytest.fixture(scope="module")
def alone(store: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of one process, this one, and its first gradient beside it."""
    model = tmp_path_factory.mktemp("alone") / "model"
    task(store, model).run(None, ignore)
    return model


def killing(started: Callable[[], Started], kills: dict[int, int]) -> Callable[[Event], None]:
    """Return a listener that kills a rank when so many steps are done: {steps: rank}."""

    def listen(event: Event) -> None:
        if event.kind == "test" and kills and event.done >= min(kills):
            os.kill(started().pids[kills.pop(min(kills))], signal.SIGKILL)

    return listen


@pytest.mark.heavy
@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_make_the_model_of_one_process(store: str, alone: Path, tmp_path: Path, size: int) -> None:
    events: list[Event] = []
    result, _ = run(store, tmp_path / "model", [size], events.append)
    assert (result["steps"], result["stopped_because"]) == (STEPS, "finished")
    require_one_bar(events)
    require_that_of_one_process(tmp_path / "model", alone, size)
    for before, record in pairwise(history(tmp_path / "model")):
        assert record["rows_per_second"] * (record["time"] - before["time"]) > 0.75 * 40 * 50, "of all ranks"


def require_that_of_one_process(model: Path, alone: Path, size: int) -> None:
    gradients, ends = ([np.load(f"{model}-{what}-{rank}.npy") for rank in range(size)] for what in RECORDED)
    for rank in range(1, size):
        np.testing.assert_array_equal(gradients[rank], gradients[0])
        np.testing.assert_array_equal(ends[rank], ends[0])
    assert distance(gradients[0], np.load(f"{alone}-gradient-0.npy")) <= 1e-6
    assert distance(weights(model), weights(alone)) <= 1e-4
    records = history(model)
    for record, expected in zip(records, history(alone), strict=True):
        timeless = {name: value for name, value in expected.items() if name not in OF_THE_CLOCK}
        assert {name: record[name] for name in timeless} == pytest.approx(timeless, rel=1e-3)
        assert record.keys() == expected.keys()
    assert records[0]["rows_per_second"] * records[0]["time"] > 0.75 * 40 * 50, "of all ranks"


@pytest.mark.heavy
def test_a_wrong_factor_shows_in_the_gradient(store: str, alone: Path, tmp_path: Path) -> None:
    run(store, tmp_path / "model", fault="wrong factor")
    gradient = np.load(f"{tmp_path}/model-gradient-0.npy")
    assert distance(gradient, np.load(f"{alone}-gradient-0.npy")) > 0.1


@pytest.mark.parametrize(
    ("sizes", "kills"),
    [([2], {40: 1}), pytest.param([2, 1, 2], {40: 0, 80: 0}, marks=pytest.mark.heavy)],
)
def test_killed_ranks_start_again(
    store: str, alone: Path, tmp_path: Path, sizes: list[int], kills: dict[int, int]
) -> None:
    """Each time with another number of them, as a cluster is scaled."""
    events: list[Event] = []
    box: list[Started] = []
    kill = killing(lambda: box[0], dict(kills))

    def listen(event: Event) -> None:
        events.append(event)
        kill(event)

    box.append(Started(task(store, tmp_path / "model"), sizes))
    result = train_together(box[0], listen, 5)
    box[0].require_nobody_left()
    assert (result["steps"], result["stopped_because"]) == (STEPS, "finished")
    assert sum("was killed (SIGKILL); all ranks start again" in event.message for event in events) == len(kills)
    saved = 0 if 0 in kills.values() else 30  # rank 0 may be killed while it writes the first checkpoint
    require_one_bar(events, len(kills), saved)
    require_that_of_one_process(tmp_path / "model", alone, sizes[-1])


@pytest.mark.heavy
def test_ranks_that_are_lost_too_often_end_it(store: str, tmp_path: Path) -> None:
    box: list[Started] = []
    box.append(Started(task(store, tmp_path / "model"), [2]))
    with pytest.raises(RankLost, match=r"lost 1 times, the last time as rank 1 of 2 was killed \(SIGKILL\)"):
        train_together(box[0], killing(lambda: box[0], {40: 1}), 0)
    box[0].require_nobody_left()
    result, _ = run(store, tmp_path / "model", [1])
    assert result["steps"] == STEPS, "the next command goes on"


@pytest.mark.heavy
def test_an_overwritten_model_is_made_anew_only_once(store: str, alone: Path, tmp_path: Path) -> None:
    box: list[Started] = []
    box.append(Started(replace(task(store, alone), model=str(tmp_path / "model")), [2]))
    train(store, tmp_path / "model", **{**SETTINGS, "num_steps": 5, "seed": 1})
    with pytest.raises(SettingsChanged):
        train_together(box[0], ignore, 0)
    box[0].task = replace(box[0].task, overwrite=True)
    starts: list[int] = []
    kill = killing(lambda: box[0], {40: 1})

    def listen(event: Event) -> None:
        starts.extend([event.done] if event.kind == "start" else [])
        kill(event)

    train_together(box[0], listen, 1)
    assert starts[0] == 0
    assert starts[1] >= 30, "the second generation went on"
    assert distance(weights(tmp_path / "model"), weights(alone)) <= 1e-4


@pytest.mark.heavy
def test_an_interrupt_leaves_a_checkpoint(store: str, alone: Path, tmp_path: Path) -> None:
    def listen(event: Event) -> None:
        if event.kind == "test" and event.done == 40:
            os.kill(os.getpid(), signal.SIGINT)

    result, _ = run(store, tmp_path / "model", on_event=listen)
    assert result["stopped_because"] == "interrupted"
    assert 40 <= result["steps"] < STEPS
    result, _ = run(store, tmp_path / "model", [1])
    assert distance(weights(tmp_path / "model"), weights(alone)) <= 1e-4


@pytest.mark.heavy
def test_out_of_time_all_ranks_stop_at_the_same_step(store: str, alone: Path, tmp_path: Path) -> None:
    result, _ = run(store, tmp_path / "model", max_time=1e-9)
    assert (result["steps"], result["stopped_because"]) == (1, "out of time")
    ends = [np.load(f"{tmp_path}/model-weights-{rank}.npy") for rank in range(2)]
    np.testing.assert_array_equal(ends[0], ends[1])
    result, _ = run(store, tmp_path / "model", [1])
    assert (result["steps"], result["stopped_because"]) == (STEPS, "finished")
    assert distance(weights(tmp_path / "model"), weights(alone)) <= 1e-4


def test_ranks_that_start_again_have_the_time_that_is_left(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, given = Clock(), list[float | None]()
    monkeypatch.setattr("cvae_dist.launch.launcher.time", clock)

    def start_thrice(start: Callable[[bool], None], *_: Any) -> dict[str, Any]:
        for _ in range(3):
            start(False)
            clock.sleep(120)
        return {}

    monkeypatch.setattr("cvae_dist.launch.launcher.train_together", start_thrice)
    monkeypatch.setattr("cvae_dist.launch.launcher.LocalRanks", lambda task, _: given.append(task.config.max_time))
    launch("local:2", task(store, tmp_path / "model", max_time=3), ignore, 0, None)
    assert given == [pytest.approx(3, abs=0.1), pytest.approx(1, abs=0.1), 0]
    launch("local:2", task(store, tmp_path / "model"), ignore, 0, None)
    assert given[3:] == [None] * 3


@pytest.mark.heavy
def test_a_rank_that_raises_is_shown(store: str, tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match=r"(?s)rank 1 of 2 failed.*ZeroDivisionError: of the rank itself"):
        run(store, tmp_path / "model", fault="raises")


@pytest.mark.heavy
def test_a_rank_that_refuses_is_heard_in_its_own_words(store: str, tmp_path: Path) -> None:
    with pytest.raises(Corrupt, match="a shard is torn"):
        run(store, tmp_path / "model", fault="refuses")


@pytest.mark.heavy
def test_a_rank_that_hangs_is_given_up_after_the_timeout(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cvae_dist.launch.gang._GRACE", 3.0)
    with pytest.raises(RankLost, match=r"rank 1 of 2 did not answer|did not answer for .* s \(timeout=5\)"):
        run(store, tmp_path / "model", fault="hangs", timeout=5, max_restarts=0)


@pytest.mark.heavy
def test_only_one_driver_trains_a_model(store: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    errors: list[BaseException] = []

    def listen(event: Event) -> None:
        if event.kind == "start":
            try:
                train(store, model, launcher="local:1", **SETTINGS)
            except OutputLocked as error:
                errors.append(error)
            os.kill(os.getpid(), signal.SIGINT)

    result, _ = run(store, model, [1], on_event=listen, num_steps=10**6)  # it does not end before the other began
    assert result["stopped_because"] == "interrupted"
    assert len(errors) == 1


@pytest.mark.heavy
def test_ranks_end_when_the_lease_is_taken_away(store: str, tmp_path: Path) -> None:
    model, lease = tmp_path / "model", tmp_path / "model.lease"

    def listen(event: Event) -> None:
        if event.kind == "test" and event.done == 40:
            take_over(Location.of(lease))

    with pytest.raises(OutputLocked, match="taken over by process .* of eve"):
        run(store, model, on_event=listen, num_steps=10**6)
    assert json.loads(lease.read_text())["user"] == "eve"
    before = {path: path.read_bytes() for path in model.rglob("*") if path.is_file()}
    assert not (model / "model.safetensors").exists()
    lease.unlink()
    starts: list[int] = []

    def interrupt(event: Event) -> None:
        starts.extend([event.done] if event.kind == "start" else [])
        if event.kind == "test":
            os.kill(os.getpid(), signal.SIGINT)

    assert before == {path: path.read_bytes() for path in model.rglob("*") if path.is_file()}
    run(store, model, on_event=interrupt, num_steps=10**6)
    assert starts[0] >= 30, "it goes on from the checkpoint"


@pytest.mark.parametrize(
    ("launcher", "words"),
    [("local:0", "known: auto"), ("local", "known"), ("slurm", "known"), ("env", "no ranks in the environment")],
)
def test_launchers_that_are_none(store: str, tmp_path: Path, launcher: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        train(store, tmp_path / "model", launcher=launcher, **SETTINGS)


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.heavy)])
def test_the_second_run_has_nothing_to_do(store: str, alone: Path, size: int) -> None:
    result = train(store, alone, launcher=f"local:{size}", **SETTINGS)
    assert result.nothing_to_do
    assert result.steps == STEPS


def test_all_ranks_hear_that_there_is_nothing_to_do(store: str, alone: Path) -> None:
    """They form no group for it, so that two threads can be two ranks."""
    ranks = [Membership(rank, 2, rank, 2, "127.0.0.1", port) for port in [free_port()] for rank in range(2)]
    with ThreadPoolExecutor(2) as threads:
        for figures, nothing_to_do in threads.map(lambda rank: task(store, alone).run(rank, ignore), ranks):
            assert nothing_to_do
            assert figures.steps == STEPS


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
