import contextlib
import json
import math
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from cvae_dist.config import TrainConfig
from cvae_dist.errors import (
    Corrupt,
    InvalidInput,
    OutputLocked,
    SettingsChanged,
    SourceNotFound,
    StorageFailed,
    TrainingDiverged,
)
from cvae_dist.events import Event, ignore
from cvae_dist.model.directory import load_model
from cvae_dist.model.vae import VAE
from cvae_dist.store import Lease, Location, Moments, RowStore
from cvae_dist.store import lease as lease_module
from cvae_dist.store.permutation import hold_out
from cvae_dist.store.reader import ArrayRows
from cvae_dist.store.urls import Changed
from cvae_dist.training import schedule
from cvae_dist.training.fit import fit
from cvae_dist.training.history import Figures, Scalars
from cvae_dist.training.loader import Batch, Loader
from cvae_dist.training.loop import Trained
from cvae_dist.training.optimizer import Optimizer
from cvae_dist.training.prepare import Training, TrainingData
from cvae_dist.training.resume import _discard
from cvae_dist.training.trainer import Trainer
from cvae_dist.training.validation import Validation
from cvae_dist.verbs.ingest import ingest
from cvae_dist.verbs.train import train
from tests.faults.drivers import Clock, wait_until

DIGITS, CLASSES = load_digits(return_X_y=True)
DIGITS = DIGITS.astype(np.float32)
QUICK: dict[str, Any] = {"num_steps": 60, "test_every": 20, "checkpoint_every": 25, "tb_logging": False}


def fit_digits(
    directory: Path | None = None, on_event: Any = ignore, rows: int = 300, **settings: Any
) -> tuple[VAE, Any]:
    data = DIGITS[:rows]
    config = TrainConfig(**(QUICK | settings))
    trained = fit(in_memory(data), config, directory and str(directory), on_event)
    if trained.figures.stopped_because == "interrupted":
        raise KeyboardInterrupt
    return trained.vae, trained.history


def in_memory(rows: np.ndarray) -> TrainingData:
    return TrainingData.in_memory(ArrayRows(rows), Moments.of(rows), (8, 8))


def weights_of(vae: VAE) -> dict[str, np.ndarray]:
    return {name: value.numpy().copy() for name, value in vae.state_dict().items()}


def assert_same_weights(one: VAE, other: VAE) -> None:
    first, second = weights_of(one), weights_of(other)
    assert "stretch.matrices" in first, "the matrix of metric='data' is compared too"
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


@pytest.fixture(scope="module")
def undisturbed() -> tuple[VAE, Any]:
    return fit_digits()


@pytest.fixture
def store(tmp_path: Path) -> str:
    (tmp_path / "tree").mkdir()
    np.save(tmp_path / "tree" / "digits.npy", DIGITS[:300].reshape(-1, 8, 8).astype(np.uint8))
    ingest(str(tmp_path / "tree"), str(tmp_path / "rows.zarr"))
    return str(tmp_path / "rows.zarr")


def interrupt_after(steps: int, monkeypatch: pytest.MonkeyPatch, number: int = signal.SIGTERM) -> None:
    advance = Trainer.advance

    def advance_and_signal(self: Trainer, *arguments: Any) -> None:
        advance(self, *arguments)
        if self.step == steps:
            signal.raise_signal(number)

    monkeypatch.setattr(Trainer, "advance", advance_and_signal)


def test_latents_of_digits_tell_the_classes_apart() -> None:
    vae, history = fit_digits(rows=1797, num_steps=1200, test_every=None)
    held_out = np.zeros(1797, bool)
    held_out[hold_out(1797, 0.1, 10_000, 0)[0]] = True
    latents = vae.embed_rows(DIGITS)
    neighbours = KNeighborsClassifier(5).fit(latents[~held_out], CLASSES[~held_out])
    assert neighbours.score(latents[held_out], CLASSES[held_out]) > 0.8
    assert history[-1]["validation_loss"] < history[0]["validation_loss"] - 5


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(undisturbed: tuple[VAE, Any]) -> None:
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    assert_same_weights(fit_digits()[0], undisturbed[0])
    other = fit_digits(seed=1)[0]
    assert not np.array_equal(other.encoder.head.weight, undisturbed[0].encoder.head.weight)


def test_history_has_every_validation_once(undisturbed: tuple[VAE, Any]) -> None:
    _, history = undisturbed
    assert [record["step"] for record in history] == [20, 40, 60]
    for record in history:
        assert record["loss"] == pytest.approx(record["reconstruction"] + record["kl"])
        assert record["validation_loss"] == pytest.approx(record["validation_reconstruction"] + record["validation_kl"])
        assert record["rows_per_second"] > 0
        assert 0 < record["waiting_share"] < 1
        assert 0 < record["gradient_norm"] < record["largest_gradient_norm"]
    assert history[0]["epoch"] == 20 / 9  # 270 rows in batches of 30
    assert [record["kl_weight"] for record in history] == [1, 1, 1]


def test_gradient_norms_are_those_before_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    clip = Optimizer._clip

    def noting(self: Optimizer, *arguments: Any) -> bool:
        norms.append(math.hypot(*(float(value.grad.norm()) for value in self._parameters)))  # type: ignore[union-attr]
        return clip(self, *arguments)

    monkeypatch.setattr(Optimizer, "_clip", noting)
    _, history = fit_digits(grad_clip=0.5)
    for record, part in zip(history, np.reshape(norms, (3, 20)), strict=True):
        assert record["gradient_norm"] == pytest.approx(part.mean(), rel=1e-5)
        assert record["largest_gradient_norm"] == pytest.approx(part.max(), rel=1e-5)


def test_the_waiting_share_counts_the_wait_for_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = Loader.batches

    def slow(self: Loader, *position: int) -> Iterator[Batch]:
        for batch in batches(self, *position):
            time.sleep(0.002)
            yield batch

    monkeypatch.setattr(Loader, "batches", slow)
    _, history = fit_digits()
    for record in history:
        assert record["waiting_share"] * 20 * 30 / record["rows_per_second"] >= 20 * 0.002


@pytest.mark.parametrize("steps", [1, 20, 25, 33, 59])
def test_interrupted_anywhere_it_ends_with_the_same_weights(
    steps: int, undisturbed: tuple[VAE, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    interrupt_after(steps, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        fit_digits(tmp_path)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    with pytest.raises(SourceNotFound, match="is not finished"):
        load_model(str(tmp_path))
    monkeypatch.undo()
    started: list[Event] = []
    vae, history = fit_digits(tmp_path, started.append)
    assert started[0].done == steps
    assert started[0].values == {"variance_inflation": 1.0, "validation_rows": 30}
    assert_same_weights(vae, undisturbed[0])
    assert_same_weights(load_model(str(tmp_path)), undisturbed[0])
    of_the_clock = ("time", "rows_per_second", "waiting_share")
    timeless = [{name: record[name] for name in record if name not in of_the_clock} for record in history]
    expected = [{name: value for name, value in record.items() if name in timeless[0]} for record in undisturbed[1]]
    assert timeless == expected
    assert [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()] == history


@pytest.fixture
def ctrl_c_interrupts() -> Iterator[None]:
    """Undo that a shell which runs the tests in the background makes them deaf to SIGINT."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_without_a_directory_ctrl_c_leaves_the_best_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(33, monkeypatch, signal.SIGINT)
    trained = fit(in_memory(DIGITS[:300]), TrainConfig(**QUICK))
    assert (trained.figures.steps, trained.figures.stopped_because) == (33, "interrupted")
    held_out = Validation.read(ArrayRows(DIGITS[:300]), hold_out(300, 0.1, 10_000, 0)[0], 2, 0)
    (record,) = trained.history
    terms = held_out.terms(trained.vae, dict(trained.vae.named_parameters()))
    assert terms == (record["validation_reconstruction"], record["validation_kl"])


def test_without_a_directory_sigterm_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    interrupt_after(33, monkeypatch, signal.SIGTERM)
    trained = fit(in_memory(DIGITS[:300]), TrainConfig(**QUICK))
    signal.signal(signal.SIGTERM, before)
    assert (received, trained.figures.stopped_because) == ([signal.SIGTERM], "finished")


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advance = Trainer.advance

    def twice(self: Trainer, *arguments: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        advance(self, *arguments)

    monkeypatch.setattr(Trainer, "advance", twice)
    with pytest.raises(KeyboardInterrupt):
        fit_digits(tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_it_trains_outside_the_main_thread(undisturbed: tuple[VAE, Any], tmp_path: Path) -> None:
    results: list[VAE] = []
    thread = threading.Thread(target=lambda: results.append(fit_digits(tmp_path)[0]))
    thread.start()
    thread.join()
    assert_same_weights(results[0], undisturbed[0])


def test_train_from_a_store_resumes_finishes_and_then_has_nothing_to_do(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(tmp_path / "model")
    interrupt_after(33, monkeypatch)
    result = train(store, model, **QUICK)
    assert (result.steps, result.stopped_because) == (33, "interrupted")
    monkeypatch.undo()
    events: list[Event] = []
    result = train(store, model, TrainConfig(**QUICK), on_event=events.append)
    assert (result.steps, result.stopped_because, result.model) == (60, "finished", model)
    assert result.epochs == pytest.approx(60 / 9)
    assert math.isfinite(result.loss)
    kinds = [event.kind for event in events if event.kind != "progress"]
    assert [kind for kind in kinds if kind != "test"] == ["start", "note", "note", "done"]
    assert (events[0].done, events[0].total, events[0].unit) == (33, 60, "steps")
    description = json.loads((tmp_path / "model" / "config.json").read_text())
    assert description["lineage"]["store"] == store
    assert description["lineage"]["item_shape"] == [8, 8]
    assert description["lineage"]["held_out"] == {"rows": 300, "share": 1 - 0.9, "most": 10_000, "seed": 0}
    figures = description["lineage"]["figures"]
    assert list(figures) == ["steps", "epochs", "loss", "validation_loss", "stopped_because", "seconds"]
    assert (figures["steps"], figures["stopped_because"]) == (60, "finished")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "model").rglob("*")}
    again = train(store, model, **QUICK)
    assert (again.steps, again.stopped_because, again.nothing_to_do) == (60, "finished", True)
    assert not result.nothing_to_do
    assert (again.model, again.seconds) == (model, result.seconds)
    assert again.validation_loss == result.validation_loss
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "model").rglob("*")} == written


def test_a_store_and_memory_give_the_same_model(store: str, tmp_path: Path) -> None:
    train(store, str(tmp_path / "model"), **QUICK)
    rows = DIGITS[:300].astype(np.uint8)
    vae = fit(in_memory(rows), TrainConfig(**QUICK)).vae
    loaded = load_model(str(tmp_path / "model"))
    np.testing.assert_allclose(loaded.embed_rows(rows), vae.embed_rows(rows), atol=1e-5)


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused_by_name_with_both_values(
    finished: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if finished:
        fit_digits(tmp_path)
    else:
        interrupt_after(5, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            fit_digits(tmp_path)
        monkeypatch.undo()
    with pytest.raises(SettingsChanged, match=r"\(dim_latent: 2 there, 1 asked for\).*--overwrite"):
        fit_digits(tmp_path, dim_latent=1)
    with pytest.raises(SettingsChanged, match="num_steps: 60 there, 50 asked for"):
        fit_digits(tmp_path, num_steps=50)
    with pytest.raises(SettingsChanged, match="rows: '"):
        fit_digits(tmp_path, rows=299)
    fit_digits(tmp_path, checkpoint_every=7)


class TestFinishedTrainingsGoOn:
    def test_from_the_best_weights_at_the_last_step(
        self, undisturbed: tuple[VAE, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fit_digits(tmp_path)
        first: list[tuple[int, dict[str, np.ndarray], float]] = []
        advance = Trainer.advance

        def looked_at(self: Trainer, *arguments: Any) -> None:
            first.append((self.step, weights_of(self.vae), self.learning_rate))
            advance(self, *arguments)

        monkeypatch.setattr(Trainer, "advance", looked_at)
        vae, history = fit_digits(tmp_path, num_steps=100)
        step, weights, rate = first[0]
        assert (step, len(first)) == (60, 40)
        earlier = weights_of(undisturbed[0])
        assert earlier.keys() - weights.keys() == {"stretch.matrices", "stretch.power"}, (
            "it is measured anew at the end"
        )
        for name, value in weights.items():
            np.testing.assert_array_equal(value, earlier[name])
        assert rate == pytest.approx(schedule.learning_rate(60, 100, 3e-3 * math.sqrt(30 / 256)) / 2)
        assert [record["step"] for record in history] == [20, 40, 60, 80, 100]
        best = min(record["validation_loss"] for record in history)
        assert best < history[2]["validation_loss"]
        assert_same_weights(load_model(str(tmp_path)), vae)
        lineage = json.loads((tmp_path / "config.json").read_text())["lineage"]
        assert (lineage["continued_from_step"], lineage["figures"]["validation_loss"]) == (60, best)
        assert not (tmp_path / "checkpoints").exists()

    @pytest.mark.parametrize("steps", [61, 80, 99])
    def test_interrupted_it_ends_with_the_same_weights(
        self, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fit_digits(tmp_path / "whole")
        shutil.copytree(tmp_path / "whole", tmp_path / "broken")
        expected, _ = fit_digits(tmp_path / "whole", num_steps=100)
        interrupt_after(steps, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            fit_digits(tmp_path / "broken", num_steps=100)
        monkeypatch.undo()
        events: list[Event] = []
        shorter, history = fit_digits(tmp_path / "broken", events.append)
        assert events[-1].message.startswith("already trained")
        assert history[-1]["step"] == 60
        assert shorter.embed_rows(DIGITS[:3]).shape == (3, 2)
        assert_same_weights(fit_digits(tmp_path / "broken", num_steps=100)[0], expected)

    def test_killed_while_it_is_saved(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fit_digits(tmp_path)

        def killed(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("cvae_dist.training.loop.save_model", killed)
        with pytest.raises(KeyboardInterrupt):
            fit_digits(tmp_path, num_steps=100)
        monkeypatch.undo()
        assert [record["step"] for record in fit_digits(tmp_path, num_steps=100)[1]] == [20, 40, 60, 80, 100]

    def test_killed_just_after_its_end(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def killed(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("cvae_dist.training.loop.Checkpoints.clear", killed)
        with pytest.raises(KeyboardInterrupt):
            fit_digits(tmp_path)
        monkeypatch.undo()
        assert (tmp_path / "checkpoints").exists()
        assert fit_digits(tmp_path, num_steps=80)[1][-1]["step"] == 80
        assert not (tmp_path / "checkpoints").exists()

    def test_a_start_that_is_not_surpassed_stays(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before, _ = fit_digits(tmp_path)
        (tmp_path / "history.jsonl").unlink()  # as where the model was copied without it
        vae, history = fit_digits(tmp_path)
        assert_same_weights(vae, before)
        assert history == []
        monkeypatch.setattr(Validation, "terms", lambda *_: (1e9, 0.0))
        assert_same_weights(fit_digits(tmp_path, num_steps=100)[0], before)

    def test_automatic_settings_follow_the_steps_and_others_do_not(self, tmp_path: Path) -> None:
        fit_digits(tmp_path, num_steps=4)
        config = json.loads((tmp_path / "config.json").read_text())
        config["lineage"]["made_with"]["ema_decay"] = 0.75  # as another number of steps might have given
        (tmp_path / "config.json").write_text(json.dumps(config))
        fit_digits(tmp_path, num_steps=6)
        assert json.loads((tmp_path / "config.json").read_text())["lineage"]["made_with"]["ema_decay"] == 0.99
        with pytest.raises(SettingsChanged, match="ema_decay"):
            fit_digits(tmp_path, num_steps=8, ema_decay=0.5)
        with pytest.raises(SettingsChanged, match="dim_latent"):
            fit_digits(tmp_path, num_steps=8, dim_latent=3)
        with pytest.raises(SettingsChanged, match="rows: '"):
            fit_digits(tmp_path, num_steps=8, rows=299)

    def test_from_a_store(self, store: str, tmp_path: Path) -> None:
        model = str(tmp_path / "model")
        train(store, model, **QUICK)
        result = train(store, model, **QUICK | {"num_steps": 80})
        assert (result.steps, result.stopped_because) == (80, "finished")
        assert not result.nothing_to_do
        assert train(store, model, **QUICK | {"num_steps": 80}).nothing_to_do


def test_overwrite_begins_anew(undisturbed: tuple[VAE, Any], tmp_path: Path) -> None:
    fit_digits(tmp_path, seed=5)
    data = DIGITS[:300]
    config = TrainConfig(**QUICK)
    trained = fit(in_memory(data), config, str(tmp_path), overwrite=True)
    assert_same_weights(trained.vae, undisturbed[0])
    assert len(trained.history) == 3


def test_weights_left_alone_by_a_kill_are_replaced(undisturbed: tuple[VAE, Any], tmp_path: Path) -> None:
    fit_digits(tmp_path)
    (tmp_path / "config.json").unlink()  # it is written last and deleted first
    assert_same_weights(fit_digits(tmp_path)[0], undisturbed[0])


def test_a_finished_fit_is_loaded(undisturbed: tuple[VAE, Any], tmp_path: Path) -> None:
    fit_digits(tmp_path)
    vae, history = fit_digits(tmp_path)
    assert_same_weights(vae, undisturbed[0])
    assert [record["step"] for record in history] == [20, 40, 60]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "history.jsonl",
        "model.safetensors",
    ]


def spoil_after(step: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Let all weights be bad after the test at a step; return a box for the average at that test."""
    at_best: dict[str, np.ndarray] = {}
    test = Trainer.test

    def test_and_spoil(self: Trainer) -> Any:
        record = test(self)
        if self.step == step:
            at_best.update({name: value.numpy().copy() for name, value in self._optimizer.average.items()})
            with torch.no_grad():
                for weight in self.vae.parameters():
                    weight.mul_(3)
        return record

    monkeypatch.setattr(Trainer, "test", test_and_spoil)
    return at_best


def test_the_best_weights_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    at_best = spoil_after(40, monkeypatch)
    vae, history = fit_digits()
    assert history[2]["validation_loss"] > history[1]["validation_loss"]
    for name, value in vae.named_parameters():
        np.testing.assert_array_equal(value.numpy(), at_best[name])


def test_the_last_checkpoint_alone_has_the_best_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_best = spoil_after(40, monkeypatch)
    interrupt_after(55, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        fit_digits(tmp_path, keep_checkpoints=1)
    assert len(list((tmp_path / "checkpoints").glob("step000055-*.pt"))) == len(names_of(tmp_path / "checkpoints")) - 1
    monkeypatch.undo()
    vae, history = fit_digits(tmp_path)
    assert history[2]["validation_loss"] > history[1]["validation_loss"]
    for name, value in vae.named_parameters():
        np.testing.assert_array_equal(value.numpy(), at_best[name])


class TestSaving:
    def test_also_by_the_clock(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        clock, advance = Clock(), Trainer.advance
        saved: list[int] = []
        monkeypatch.setattr("cvae_dist.training.saving.time", clock)
        monkeypatch.setattr("cvae_dist.training.loop.Checkpoints.save", lambda _, step, state: saved.append(step))

        def a_minute_long(self: Trainer, *arguments: Any) -> None:
            advance(self, *arguments)
            clock.sleep(60)

        monkeypatch.setattr(Trainer, "advance", a_minute_long)
        fit_digits(tmp_path, num_steps=30, checkpoint_every=20)
        assert saved == [10, 20]
        saved.clear()
        fit_digits(tmp_path / "often", num_steps=30, checkpoint_every=20, checkpoint_minutes=8)
        assert saved == [8, 16, 20, 28]

    def test_a_full_disk_ends_the_training(
        self, undisturbed: tuple[VAE, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write, steps = Location.write, list[int]()

        def full(self: Location, *buffers: Any) -> str:
            if self.name.startswith("step000040"):
                raise StorageFailed("no room left")
            return write(self, *buffers)

        monkeypatch.setattr(Location, "write", full)
        with pytest.raises(StorageFailed, match="no room left"):
            fit_digits(tmp_path, lambda event: steps.append(event.done), checkpoint_every=20)
        assert max(steps) <= 60
        assert not (tmp_path / "config.json").exists()
        monkeypatch.undo()
        started: list[Event] = []
        assert_same_weights(fit_digits(tmp_path, started.append)[0], undisturbed[0])
        assert started[0].done == 20

    @pytest.mark.parametrize("loss", ["lost", "empty"])
    def test_a_lost_pointer_is_said_and_costs_nothing(
        self, loss: str, undisturbed: tuple[VAE, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        interrupt_after(33, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            fit_digits(tmp_path)
        monkeypatch.undo()
        pointer = tmp_path / "checkpoints" / "LATEST.json"
        pointer.unlink() if loss == "lost" else pointer.write_bytes(b"")
        (tmp_path / "checkpoints" / "notes").write_text("of somebody else")
        events: list[Event] = []
        assert_same_weights(fit_digits(tmp_path, events.append)[0], undisturbed[0])
        assert "LATEST.json names no whole checkpoint; the training goes on from step000033-" in events[0].message
        assert events[1].done == 33
        assert names_of(tmp_path / "checkpoints") == ["notes"]

    def test_a_discarded_training_does_not_go_on_wherever_that_was_killed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It was a finished one, of which a longer one was begun."""
        fit_digits(tmp_path / "whole")
        interrupt_after(70, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            fit_digits(tmp_path / "whole", num_steps=80)
        monkeypatch.undo()
        starts: list[int] = []

        def until_begun(event: Event) -> None:
            if event.kind == "start":
                starts.append(event.done)
                raise Killed

        for number in count(1):
            model = tmp_path / str(number)
            shutil.copytree(tmp_path / "whole", model)
            with Lease.held(Location.of(model)) as lease, monkeypatch.context() as patch:
                let_it_end_at(number, patch)
                try:
                    _discard(lease)
                    break
                except Killed:
                    pass
            with pytest.raises(Killed):
                fit_digits(model, until_begun, num_steps=80)
        assert starts == [70, *[60] * 5, *[0] * 5], "as it was, as before it, and as if nothing had been there"

    @pytest.mark.parametrize("given", [4_000, 30_000])
    def test_another_buffer_keeps_the_order(
        self, given: int, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        settings = QUICK | {"buffer_bytes": 9_000}  # of a store of 19 kB
        train(store, str(tmp_path / "whole"), **settings)
        interrupt_after(33, monkeypatch)
        train(store, str(tmp_path / "model"), **settings)
        monkeypatch.undo()
        opened: list[Loader] = []
        batches = Loader.batches
        monkeypatch.setattr(Loader, "batches", lambda self, *position: opened.append(self) or batches(self, *position))
        result = train(store, str(tmp_path / "model"), **settings | {"buffer_bytes": given})
        assert (result.steps, result.nothing_to_do) == (60, False)
        (loader,) = opened
        assert loader._share.sampler.windows > 2
        assert loader.resident == (given == 30_000)
        assert_same_weights(load_model(str(tmp_path / "model")), load_model(str(tmp_path / "whole")))
        assert train(store, str(tmp_path / "model"), **QUICK).nothing_to_do


class TestMaxTime:
    def test_it_stops_with_a_checkpoint_and_goes_on(
        self, undisturbed: tuple[VAE, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock, advance = Clock(), Trainer.advance
        monkeypatch.setattr("cvae_dist.training.loop.time", clock)

        def a_minute_long(self: Trainer, *arguments: Any) -> None:
            advance(self, *arguments)
            clock.sleep(60)

        monkeypatch.setattr(Trainer, "advance", a_minute_long)
        for begin in (0, 26, 52):
            events: list[Event] = []
            config = TrainConfig(**QUICK, max_time=25)
            trained = fit(in_memory(DIGITS[:300]), config, str(tmp_path), events.append)
            assert next(event.done for event in events if event.kind == "start") == begin
            if begin < 52:
                assert (trained.figures.steps, trained.figures.stopped_because) == (begin + 26, "out of time")
                assert events[-1].message == (
                    f"stopped after step {begin + 26}, as its time is over, which is saved; the same command goes on "
                    "from there"
                )
        assert trained.figures.stopped_because == "finished"
        assert_same_weights(trained.vae, undisturbed[0])
        assert_same_weights(load_model(str(tmp_path)), undisturbed[0])

    def test_however_short_a_run_gets_on(self, tmp_path: Path) -> None:
        steps = [fit_once(tmp_path, max_time=1e-9).steps for _ in range(3)]
        assert steps == [1, 2, 3]

    def test_without_a_directory_the_best_weights_are_the_model(self) -> None:
        figures = fit_once(None, max_time=1e-9)
        assert (figures.steps, figures.stopped_because) == (1, "out of time")


def fit_once(directory: Path | None, **settings: Any) -> Figures:
    config = TrainConfig(**QUICK, **settings)
    return fit(in_memory(DIGITS[:300]), config, str(directory) if directory else None).figures


class Killed(BaseException):
    """What ends a process that is killed in a test."""


def let_it_end_at(number: int, patch: pytest.MonkeyPatch) -> None:
    """Let the so-manieth write or deletion be the end."""
    changes = count(1)

    def or_end(change: Any) -> Any:
        def change_or_end(*arguments: Any) -> Any:
            if next(changes) >= number:
                raise Killed
            return change(*arguments)

        return change_or_end

    for name in ("write", "delete"):
        patch.setattr(Location, name, or_end(getattr(Location, name)))


def test_training_stops_when_validation_no_longer_improves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cvae_dist.training.schedule._PATIENCE_STEPS", 60)
    events: list[Event] = []
    _, history = fit_digits(None, events.append, rows=60, num_steps=4000, test_every=10, learning_rate=0.02)
    assert events[-1].done < 4000
    best = min(history, key=lambda record: record["validation_loss"])
    assert f"stopped improving; the weights of step {best['step']} are kept" in events[-1].message
    assert history[-1]["step"] - max(best["step"], 800) == 60


def test_a_few_broken_steps_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Optimizer.step

    def broken_step(self: Optimizer, loss: torch.Tensor, *arguments: Any) -> tuple[bool, list[float]]:
        return step(self, loss * (math.nan if self.skipped < 7 else 1), *arguments)

    monkeypatch.setattr(Optimizer, "step", broken_step)
    vae, history, *_ = fit_digits()
    assert history[-1]["skipped_steps"] == 7
    assert all(weight.isfinite().all() for weight in vae.parameters())


DIVERGING: dict[str, Any] = {"learning_rate": 1.0, "kl_warmup": 0.0, "num_steps": 300, "cells_encoder": (64,) * 6}


def notes_of(events: list[Event]) -> list[str]:
    return [event.message for event in events if event.kind == "note" and "diverged" in event.message]


@pytest.mark.parametrize("split", [None, 1.0])
def test_diverging_training_backs_off_and_ends_well(split: float | None) -> None:
    events: list[Event] = []
    vae, history, *_ = fit_digits(None, events.append, **DIVERGING, train_valid_split=split)
    assert notes_of(events), "nothing diverged: this tests nothing"
    assert history[-1]["step"] == 300
    assert history[-1]["loss"] < 200, "as good as knowing the mean row"
    assert all(weight.isfinite().all() for weight in vae.parameters())
    assert max(record["learning_rate"] for record in history[-5:]) <= 0.1


def test_a_training_that_backs_off_is_resumed_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed, expected, *_ = fit_digits(None, **DIVERGING)
    for steps in (10, 30, 70, 200):
        interrupt_after(steps, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            fit_digits(tmp_path, **DIVERGING)
        monkeypatch.undo()
    vae, history, *_ = fit_digits(tmp_path, **DIVERGING)
    assert_same_weights(vae, undisturbed)
    for name in ("loss", "skipped_steps", "learning_rate"):
        assert [record.get(name) for record in history] == [record.get(name) for record in expected]


def test_a_first_loss_that_is_infinite_is_no_yardstick(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = VAE.forward
    calls = 0

    def overflowing(self: VAE, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        terms = forward(self, *arguments)
        factor = math.inf if calls == 1 else 1e9 if calls > 40 else 1
        return terms._replace(reconstruction=terms.reconstruction * factor)

    monkeypatch.setattr(VAE, "forward", overflowing)
    with pytest.raises(TrainingDiverged, match="of step 40"):
        fit_digits(num_steps=300, train_valid_split=1.0)


def test_a_diverged_training_has_not_finished_where_its_store_has_grown(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = VAE.forward
    calls = 0

    def breaking(self: VAE, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        terms = forward(self, *arguments)
        return terms._replace(reconstruction=terms.reconstruction * (math.nan if calls > 40 else 1))

    settings = QUICK | {"num_steps": 300, "train_valid_split": 1.0}
    monkeypatch.setattr(VAE, "forward", breaking)
    with pytest.raises(TrainingDiverged, match="holds the last good weights"):
        train(store, str(tmp_path / "model"), **settings)
    monkeypatch.undo()
    np.save(tmp_path / "tree" / "more.npy", DIGITS[300:400].reshape(-1, 8, 8).astype(np.uint8))
    ingest(str(tmp_path / "tree"), store)
    with pytest.raises(TrainingDiverged, match="holds the last good weights"):
        train(store, str(tmp_path / "model"), **settings)


def fit_spoilt_digits(directory: Path | None, on_event: Any = ignore) -> Any:
    """Train on rows of which some, that do not validate, are no numbers; their statistics do not show it."""
    rows = DIGITS[:300].copy()
    rows[np.setdiff1d(np.arange(300), hold_out(300, 0.1, 10_000, 0)[0])[::30]] = np.nan
    config = TrainConfig(**QUICK | {"num_steps": 2000})
    data = TrainingData.in_memory(ArrayRows(rows), Moments.of(DIGITS[:300]), (8, 8))
    return fit(data, config, str(directory) if directory else None, on_event)


def test_a_training_that_diverges_for_good_keeps_the_last_good_weights(tmp_path: Path) -> None:
    events: list[Event] = []
    with pytest.raises(TrainingDiverged, match=r"holds the last good weights, of step \d+\. Look for rows") as caught:
        fit_spoilt_digits(tmp_path, events.append)
    assert len(notes_of(events)) == 3
    good = load_model(str(tmp_path))
    assert np.isfinite(good.decode_rows(good.embed_rows(DIGITS))).all()
    trained = caught.value.trained
    assert isinstance(trained, Trained)
    assert_same_weights(good, trained.vae)
    assert trained.history[-1]["loss"] < trained.history[0]["loss"]
    assert not (tmp_path / "checkpoints").exists()
    with pytest.raises(TrainingDiverged, match="holds the last good weights") as told_again:
        fit_spoilt_digits(tmp_path)
    assert isinstance(told_again.value.trained, Trained)
    assert_same_weights(told_again.value.trained.vae, good)
    with pytest.raises(TrainingDiverged) as again:
        fit_spoilt_digits(None)
    assert isinstance(again.value.trained, Trained)
    assert_same_weights(again.value.trained.vae, good)


def test_nothing_is_kept_of_a_training_that_was_never_good(tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged, match=r"diverged by step 200: .* No weights were worth keeping") as caught:
        fit_digits(tmp_path, kl_weight=1e38, num_steps=300, test_every=None)
    assert caught.value.trained is None
    with pytest.raises(SourceNotFound):
        load_model(str(tmp_path))
    fit_digits(tmp_path)


def test_only_the_encoder_decays_by_its_own_rate() -> None:
    parts = torch.nn.ModuleDict({"encoder": torch.nn.Linear(2, 1), "decoder": torch.nn.Linear(1, 2)})
    before = {name: value.detach().clone() for name, value in parts.named_parameters()}
    optimizer = Optimizer(parts, ema_decay=0.9, grad_clip=3.0, encoder_decay=5.0)
    loss = sum(value.sum() for value in parts.parameters()) * 0.0
    assert optimizer.step(loss, 0.1, torch.ones(1))[0]  # type: ignore[arg-type]
    for name, value in parts.named_parameters():
        decay = 5.0 if name.startswith("encoder") else 1e-4
        torch.testing.assert_close(value.detach(), before[name] * (1 - 0.1 * decay))


def test_an_outlying_gradient_is_clipped_to_the_running_norm() -> None:
    layer = torch.nn.Linear(3, 1, bias=False)
    optimizer = Optimizer(layer, ema_decay=0.9, grad_clip=3.0)
    for scale in (1.0, 1.0, 1e6):
        assert optimizer.step(scale * layer(torch.ones(1, 3)).sum(), 0.0, torch.ones(2)) == (True, [1, 1])
    (mean,) = optimizer.state()["adam"]["means"]  # of gradients of ones, twice, and threes
    assert mean.tolist() == [pytest.approx([0.9 * 0.9 * 0.1 + 0.9 * 0.1 + 0.1 * 3] * 3, rel=1e-4)]


def test_a_ten_times_too_high_learning_rate_does_no_harm() -> None:
    vae, history = fit_digits(learning_rate=0.03, num_steps=200)
    assert all(math.isfinite(record["validation_loss"]) for record in history)
    assert np.isfinite(vae.embed_rows(DIGITS)).all()


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_a_handful_of_rows_can_be_trained_on(rows: int) -> None:
    vae, history = fit_digits(rows=rows, num_steps=20)
    assert np.isfinite(vae.decode_rows(vae.embed_rows(DIGITS[:rows]))).all()
    assert history


def test_without_validation_rows_the_last_weights_count() -> None:
    vae, history = fit_digits(train_valid_split=1.0)
    assert "validation_loss" not in history[-1]
    assert np.isfinite(vae.embed_rows(DIGITS)).all()


def test_no_rows_are_refused() -> None:
    with pytest.raises(InvalidInput, match="no rows"):
        fit_digits(rows=0)


def test_unknown_settings_and_missing_stores_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="did you mean 'num_steps'"):
        train("nowhere.zarr", str(tmp_path / "model"), num_stepz=3)
    with pytest.raises(SourceNotFound, match="there is no store at"):
        train(str(tmp_path / "nowhere.zarr"), str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


def test_progress_tells_rate_and_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cvae_dist.training.loop._SECONDS_BETWEEN_EVENTS", 0)
    events: list[Event] = []
    fit_digits(None, events.append)
    progress = [event for event in events if event.kind == "progress"]
    assert [event.done for event in progress] == list(range(1, 61))
    assert all(event.values["rows_per_second"] > 0 and math.isfinite(event.values["loss"]) for event in progress)  # type: ignore[operator, arg-type]


def test_tensorboard_shows_the_history(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, history = fit_digits(tmp_path, tb_logging=True)
    accumulator = EventAccumulator(str(tmp_path / "logs")).Reload()
    points = [(point.step, point.value) for point in accumulator.Scalars("validation_loss")]
    assert points == [(record["step"], pytest.approx(record["validation_loss"])) for record in history]


def test_missing_tensorboard_is_said_once_where_logs_were_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(place: Path | None, **settings: Any) -> list[str]:
        events: list[Event] = []
        fit_digits(place, events.append, **settings)
        return [event.message for event in events if "TensorBoard" in event.message]

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    missing = "no TensorBoard logs are written, as it is not installed: pip install 'cvae-dist[tensorboard]'"
    assert said(tmp_path / "logged", tb_logging=True) == [missing]
    assert said(tmp_path / "not_logged", tb_logging=False) == said(None, tb_logging=True) == []


def test_a_bucket_gets_no_tensorboard_logs_and_says_so() -> None:
    place = Location.of("memory://models/digits/logs")
    with Scalars(place, 0) as scalars:
        scalars.add({"step": 1, "loss": 2.0})
    (note,) = scalars.notes
    assert note == f"no TensorBoard logs are written, as {place} is not on a disk; history.jsonl has all of it"
    assert not place.exists()


def test_the_threads_of_torch_are_put_back() -> None:
    before = torch.get_num_threads()
    fit_digits()
    assert torch.get_num_threads() == before


def test_own_validation_rows_leave_every_row_to_train_on(tmp_path: Path) -> None:
    def run(validation: np.ndarray) -> list[Any]:
        data, config = DIGITS[:300], TrainConfig(**QUICK)
        rows, moments, valid = ArrayRows(data), Moments.of(data), ArrayRows(validation)
        data = TrainingData.in_memory(rows, moments, (8, 8), valid)
        return fit(data, config, str(tmp_path)).history

    history = run(DIGITS[300:400])
    assert history[0]["epoch"] == 2  # 300 rows in batches of 30
    assert history[-1]["validation_loss"] > 0
    with pytest.raises(SettingsChanged, match="rows: '"):
        run(DIGITS[300:399])


def test_second_training_of_one_model_is_refused(tmp_path: Path) -> None:
    place = Location.of(str(tmp_path / "model"))
    with Lease.held(place), pytest.raises(OutputLocked, match="is being written by process"):
        fit_digits(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def files_of(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def names_of(place: Path) -> list[str]:
    return [path.name for path in place.glob("*")]


def take_over(lease: Location) -> None:
    """Take a lease as another driver does: only as it is, which its holder may just have renewed."""
    while True:
        found, version = lease.read_versioned()
        with contextlib.suppress(Changed):
            lease.replace(json.dumps(json.loads(found) | {"token": "x", "user": "eve"}).encode(), version)
            return


@pytest.mark.parametrize(
    ("owner", "method", "call"), [(Trainer, "advance", 33), (Trainer, "test", 2), (Training, "measure", 1)]
)
def test_a_training_that_lost_its_lease_changes_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type, method: str, call: int
) -> None:
    monkeypatch.setattr(lease_module, "_RENEWALS", 6000)
    real, calls, before = getattr(owner, method), count(1), {}

    def lose(*arguments: Any) -> Any:
        result = real(*arguments)
        if next(calls) == call:
            wait_until(lambda: "LATEST.json" in names_of(tmp_path / "model" / "checkpoints"))
            take_over(Location.of(tmp_path / "model.lease"))
            wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name == "lease"])
            before.update(files_of(tmp_path))
        return result

    monkeypatch.setattr(owner, method, lose)
    with pytest.raises(OutputLocked, match="taken over by process .* of eve"):
        fit_digits(tmp_path / "model")
    assert "model/checkpoints/LATEST.json" in before
    assert files_of(tmp_path) == before


def test_checkpoints_are_neither_replaced_nor_deleted_once_the_lease_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls, before = Trainer.state, count(1), {}

    def lose(trainer: Trainer) -> Any:
        if next(calls) == 3:
            pointer = tmp_path / "model" / "checkpoints" / "LATEST.json"
            wait_until(lambda: pointer.exists() and len(json.loads(pointer.read_text())["checkpoints"]) == 2)
            (tmp_path / "model.lease").unlink()
            before.update(files_of(tmp_path))
        return real(trainer)

    monkeypatch.setattr(Trainer, "state", lose)
    with pytest.raises(OutputLocked, match="was deleted"):
        fit_digits(tmp_path / "model", checkpoint_every=15)
    after = files_of(tmp_path)
    assert len([name for name in before if "checkpoints/step" in name]) == 2
    assert {name: after[name] for name in before} == before


def test_a_training_that_waits_for_an_earlier_one_says_so(tmp_path: Path) -> None:
    with Lease.held(Location.of(tmp_path / "model")):
        document = json.loads((tmp_path / "model.lease").read_text())
    (tmp_path / "model.lease").write_text(json.dumps(document | {"machine": "far", "term": 0.1}))
    events: list[Event] = []
    fit_digits(tmp_path / "model", events.append)
    assert "waiting up to" in events[0].message


def test_a_store_that_was_replaced_meanwhile_makes_no_model(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(store: RowStore) -> None:
        raise Corrupt(f"{store.location} was replaced")

    monkeypatch.setattr(RowStore, "require_unchanged", refuse, raising=False)
    with pytest.raises(Corrupt, match="was replaced"):
        train(store, str(tmp_path / "model"), **QUICK)
    monkeypatch.undo()
    assert not (tmp_path / "model" / "config.json").exists()
    assert train(store, str(tmp_path / "model"), **QUICK).steps == 60


@pytest.mark.parametrize("name", ["checkpoints/mine", "model.safetensors"])
def test_files_of_somebody_else_are_left_alone(name: str, tmp_path: Path, store: str) -> None:
    mine = tmp_path / "project" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("x")
    for overwrite in (False, True):
        with pytest.raises(InvalidInput, match="files that cvae-dist did not write"):
            train(store, str(tmp_path / "project"), overwrite=overwrite, **QUICK)
    assert mine.read_text() == "x"


@pytest.mark.parametrize("inside", ["", "/model"])
def test_a_store_is_no_place_for_a_model(store: str, inside: str) -> None:
    with pytest.raises(InvalidInput, match="lies in the store"):
        train(store, store + inside, **QUICK)
