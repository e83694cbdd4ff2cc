"""What MLflow gets of a training: in a real store of files, and from a server that is dead, or silent."""

import json
import socket
import sys
from pathlib import Path
from typing import Any

import mlflow
import pytest

from cvae_dist.errors import TrainingDiverged
from cvae_dist.events import Event
from cvae_dist.training import tracking
from cvae_dist.training.history import plotted
from tests.unit.test_loop import fit_digits, interrupt_after


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep runs below ``tmp_path``, as the environment of MLflow says."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "digits")


def runs() -> list[Any]:
    """Return all runs of the experiment, the first one first."""
    (experiment,) = [each for each in mlflow.search_experiments() if each.name == "digits"]
    return mlflow.MlflowClient().search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])


def points(run: Any, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in mlflow.MlflowClient().get_metric_history(run.info.run_id, name)]


def notes(events: list[Event]) -> list[str]:
    return [event.message for event in events if "MLflow" in event.message]


def test_a_training_is_a_run_with_settings_figures_and_places(tmp_path: Path) -> None:
    events: list[Event] = []
    _, history = fit_digits(tmp_path / "model", events.append, mlflow_logging=True)
    assert notes(events) == []
    (run,) = runs()
    assert run.info.status == "FINISHED"
    assert (run.data.params["num_steps"], run.data.params["batch_size"]) == ("60", "30")
    assert run.data.params["likelihood"] not in ("auto", "None"), "the settings are resolved"
    assert run.data.tags["cvae_dist.model"] == str(tmp_path / "model")
    assert run.data.tags["cvae_dist.store"] == "memory"
    assert run.data.metrics.keys() == plotted(history[-1]).keys()
    for name in run.data.metrics:
        assert points(run, name) == [(record["step"], record[name]) for record in history]
    assert json.loads((tmp_path / "model" / "mlflow_run.json").read_text())["run"] == run.info.run_id


def test_without_a_directory_there_is_a_run_too() -> None:
    fit_digits(mlflow_logging=True)
    (run,) = runs()
    assert (run.info.status, "cvae_dist.model" in run.data.tags) == ("FINISHED", False)


def interrupted(model: Path, steps: int, **settings: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(steps, patch)
        with pytest.raises(KeyboardInterrupt):
            fit_digits(model, mlflow_logging=True, **settings)


def test_a_training_that_goes_on_goes_on_with_its_run(tmp_path: Path) -> None:
    interrupted(tmp_path / "model", 33)
    assert [run.info.status for run in runs()] == ["KILLED"]
    _, history = fit_digits(tmp_path / "model", mlflow_logging=True)
    (run,) = runs()
    assert run.info.status == "FINISHED"
    assert points(run, "loss") == [(record["step"], record["loss"]) for record in history]


def test_records_after_the_last_checkpoint_are_sent_once(tmp_path: Path) -> None:
    def fail(event: Event) -> None:
        if event.kind == "test" and event.done == 40:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit_digits(tmp_path / "model", fail, mlflow_logging=True)
    (run,) = runs()
    assert run.info.status == "FAILED"
    assert [step for step, _ in points(run, "loss")] == [20, 40], "the checkpoint is of step 25"
    _, history = fit_digits(tmp_path / "model", mlflow_logging=True)
    (run,) = runs()
    assert points(run, "loss") == [(record["step"], record["loss"]) for record in history]


def test_records_that_are_missing_are_sent_when_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "mlflow", None)
        interrupted(tmp_path / "model", 33)
    _, history = fit_digits(tmp_path / "model", mlflow_logging=True)
    (run,) = runs()
    assert points(run, "loss") == [(record["step"], record["loss"]) for record in history]


def test_more_steps_and_other_trainings_are_other_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit_digits(tmp_path / "model", mlflow_logging=True)
    interrupted(tmp_path / "model", 70, num_steps=80)
    _, history = fit_digits(tmp_path / "model", mlflow_logging=True, num_steps=80)
    first, longer = runs()
    assert (first.data.params["num_steps"], longer.data.params["num_steps"]) == ("60", "80")
    assert points(longer, "loss") == [(record["step"], record["loss"]) for record in history]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "others").as_uri())
    interrupted(tmp_path / "other", 33)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "moved").as_uri())
    fit_digits(tmp_path / "other", mlflow_logging=True)
    (run,) = runs()
    assert (len(points(run, "loss")), run.data.params["num_steps"]) == (3, "60"), "another server knows no such run"


def test_a_training_that_diverges_has_failed() -> None:
    with pytest.raises(TrainingDiverged):
        fit_digits(mlflow_logging=True, kl_weight=1e38, num_steps=300, test_every=None)
    (run,) = runs()
    assert run.info.status == "FAILED"


def test_missing_mlflow_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    events: list[Event] = []
    fit_digits(None, events.append, mlflow_logging=True)
    assert notes(events) == ["MLflow gets nothing, as it is not installed: pip install 'cvae-dist[mlflow]'"]


def test_a_dead_server_is_said_once_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    events: list[Event] = []
    _, history = fit_digits(None, events.append, mlflow_logging=True)
    assert len(history) == 3
    (note,) = notes(events)
    assert f"127.0.0.1:{port}" in note
    assert "secret" not in note


def test_a_silent_server_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_PATIENCE", 0.2)
    events: list[Event] = []
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        _, history = fit_digits(None, events.append, mlflow_logging=True)
    assert len(history) == 3
    assert notes(events) == ["MLflow has not answered for 0.2 s, and may miss the end of this training"]
