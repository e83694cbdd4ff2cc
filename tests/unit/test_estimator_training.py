"""How a training from Python shows itself, and what an interrupted one leaves."""

import logging
import pickle
import re
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_digits

from cvae_dist.errors import InvalidInput, NotFitted
from cvae_dist.estimator import CompressionVAE
from cvae_dist.events import Event
from cvae_dist.training.trainer import Trainer

DIGITS = load_digits().data[:300].astype(np.float32)
QUICK: dict[str, Any] = {"num_steps": 60, "test_every": 20, "cells_encoder": (16,), "multi_start": False}


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C during a step."""
    monkeypatch.setattr(signal, "SIGINT", signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    advance = Trainer.advance

    def advance_and_signal(self: Trainer, *arguments: Any) -> None:
        advance(self, *arguments)
        if self.step == step:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "advance", advance_and_signal)


class TestProgress:
    def test_one_line_for_each_validation_where_nobody_looks(
        self, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with caplog.at_level(logging.INFO, "cvae_dist"):
            CompressionVAE(DIGITS, **QUICK).train()
        told = [message for message in caplog.messages if "validation loss" in message]
        assert [re.search(r"(\d+)/60 steps", message)[1] for message in told[:3]] == ["20", "40", "60"]  # type: ignore[index]
        assert capsys.readouterr() == ("", "")

    @pytest.mark.parametrize("how", ["constructor", "train", "fit"])
    def test_verbose_false_silences(self, how: str, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, "cvae_dist"):
            if how == "train":
                CompressionVAE(DIGITS, **QUICK).train(verbose=False)
            elif how == "fit":
                CompressionVAE(verbose=False, **QUICK).fit(DIGITS)
            else:
                CompressionVAE(DIGITS, verbose=False, **QUICK).train()
        assert not caplog.messages

    def test_a_bar_on_a_terminal(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        CompressionVAE(DIGITS, **QUICK).train()
        shown = capsys.readouterr()
        assert "60/60 steps" in shown.err
        assert "validation loss" in shown.err
        assert not shown.out

    def test_a_listener_hears_everything_and_nothing_else_shows(self, caplog: pytest.LogCaptureFixture) -> None:
        events: list[Event] = []
        with caplog.at_level(logging.INFO, "cvae_dist"):
            CompressionVAE(DIGITS, **QUICK).train(on_event=events.append)
        assert [event.done for event in events if event.kind == "test"] == [20, 40, 60]
        assert not caplog.messages

    def test_a_tree_of_files_is_shown_too(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        np.save(tmp_path / "rows.npy", DIGITS)
        with caplog.at_level(logging.INFO, "cvae_dist"):
            CompressionVAE(tmp_path, **QUICK).train()
        assert any(message.startswith("ingest: ") for message in caplog.messages)


class TestInterrupted:
    def test_the_best_weights_so_far_are_the_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        embedder = CompressionVAE(DIGITS, **QUICK)
        interrupt_at(30, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            embedder.train()
        assert embedder.stopped_because_ == "interrupted"
        assert embedder.embed(DIGITS).shape == (300, 2)
        monkeypatch.undo()
        shorter = CompressionVAE(DIGITS, **QUICK).train(num_steps=60)
        assert shorter.stopped_because_ == "finished"

    def test_out_of_time_the_best_weights_so_far_are_the_model(self, tmp_path: Path) -> None:
        embedder = CompressionVAE(DIGITS, max_time=1e-9, **QUICK).train()
        assert embedder.stopped_because_ == "out of time"
        assert embedder.embed(DIGITS).shape == (300, 2)
        begun = CompressionVAE(DIGITS, max_time=1e-9, logdir=tmp_path, **QUICK).train()
        assert begun.embed(DIGITS).shape == (300, 2)
        events: list[Event] = []
        whole = CompressionVAE(DIGITS, logdir=tmp_path, **QUICK).train(on_event=events.append)
        assert next(event.done for event in events if event.kind == "start") == 1
        assert whole.stopped_because_ == "finished"

    @pytest.mark.parametrize("kind", ["array", "store"])
    def test_with_logdir_it_also_goes_on(self, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        np.save(tmp_path / "rows.npy", DIGITS)
        X = DIGITS if kind == "array" else tmp_path / "rows.npy"
        whole = CompressionVAE(X, logdir=tmp_path / "whole", **QUICK).train().embed(DIGITS)
        embedder = CompressionVAE(X, logdir=tmp_path / "model", **QUICK)
        interrupt_at(30, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            embedder.train()
        assert embedder.embed(DIGITS).shape == whole.shape
        with pytest.raises(NotFitted, match="not finished|no finished model"):
            CompressionVAE(logdir=tmp_path / "model").embed(DIGITS)
        monkeypatch.undo()
        events: list[Event] = []
        embedder.train(on_event=events.append)
        assert next(event.done for event in events if event.stage == "train") == 30
        np.testing.assert_array_equal(embedder.embed(DIGITS), whole)
        assert CompressionVAE(logdir=tmp_path / "model").stopped_because_ == "finished"


class TestRanks:
    @pytest.mark.parametrize(
        "environment",
        [
            {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "here", "SLURM_JOB_ID": "1"},
        ],
    )
    @pytest.mark.parametrize("kind", ["array", "files"])
    def test_one_of_several_is_refused(
        self, environment: dict[str, str], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        np.save(tmp_path / "rows.npy", DIGITS)
        embedder = CompressionVAE(DIGITS if kind == "array" else tmp_path, logdir=tmp_path / "model", **QUICK)
        for begin in (embedder.train, embedder.fit):
            with pytest.raises(InvalidInput, match=r"this process is rank 1 of 2 .*cvae_dist.train\(store, model\)"):
                begin()
        assert [path.name for path in tmp_path.iterdir()] == ["rows.npy"]

    def test_the_only_one_trains(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", "1")
        assert CompressionVAE(DIGITS, **QUICK).train().stopped_because_ == "finished"


class TestRepr:
    def test_it_is_short_and_holds_no_data(self) -> None:
        embedder = CompressionVAE(DIGITS, dim_latent=3, cells_encoder=[64] * 100)
        begin = "CompressionVAE(X=<ndarray (300, 64) float32>, dim_latent=3, cells_encoder=[64, 64,"
        assert repr(embedder).startswith(begin)
        assert len(repr(embedder)) < 200
        frame = pd.DataFrame(DIGITS)
        assert repr(CompressionVAE(frame)) == "CompressionVAE(X=<DataFrame (300, 64)>)"
        assert repr(CompressionVAE(logdir="model")) == "CompressionVAE(logdir='model')"
        assert len(embedder._repr_html_()) == pytest.approx(len(CompressionVAE()._repr_html_()), rel=0.3)

    def test_a_pickle_carries_no_rows(self) -> None:
        many = np.tile(DIGITS, (20, 1))
        embedder = CompressionVAE(many, X_valid=DIGITS, **QUICK).train()
        data = pickle.dumps(embedder)
        assert len(data) < many.nbytes / 2
        restored = pickle.loads(data)
        assert restored.X is restored.X_valid is None
        np.testing.assert_array_equal(restored.embed(DIGITS), embedder.embed(DIGITS))
        assert embedder.X is many
        assert pickle.loads(pickle.dumps(CompressionVAE("rows.zarr"))).X == "rows.zarr"
