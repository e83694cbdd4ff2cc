from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from cvae_dist.config import TrainConfig
from cvae_dist.events import Event, ignore
from cvae_dist.model.vae import VAE
from cvae_dist.store import Moments
from cvae_dist.store.reader import ArrayRows
from cvae_dist.training import multistart
from cvae_dist.training.fit import fit
from cvae_dist.training.multistart import choose_start, is_worthwhile
from cvae_dist.training.prepare import TrainingData
from cvae_dist.training.trainer import Trainer

SMALL: dict[str, Any] = {"dim_latent": 1, "cells_encoder": (32, 32), "likelihood": "gaussian"}


def s_curve(n_rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    position = 3 * np.pi * (np.random.default_rng(seed).random(n_rows) - 0.5)
    rows = np.stack([np.sin(position), np.sign(position) * (np.cos(position) - 1) / 2], axis=1)
    return rows.astype(np.float32), position


def build(rows: np.ndarray, **settings: Any) -> tuple[VAE, TrainConfig]:
    config = TrainConfig(**(SMALL | settings), feature_normalization=True).resolve(*rows.shape)
    return VAE.of(config, Moments.of(rows), rows.dtype, config.seed), config


@pytest.mark.heavy
def test_the_chosen_start_of_an_s_curve_is_unfolded() -> None:
    rows, position = s_curve(300, 0)
    vae, config = build(rows[:270])
    untrained = vae.embed_rows(rows)[:, 0]
    assert abs(spearmanr(untrained, position).statistic) < 0.99, "random weights do it: this tests nothing"
    reason = choose_start(vae, config, rows[:270], rows[270:])
    assert "the best of 6 starts" in reason
    assert abs(spearmanr(vae.embed_rows(rows)[:, 0], position).statistic) > 0.99
    assert np.square(vae.decode_rows(vae.embed_rows(rows)) - rows).mean() < 0.02


def test_the_start_with_the_least_loss_on_held_out_rows_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = s_curve(120, 0)
    vae, config = build(rows)
    monkeypatch.setattr(multistart, "_ELBO_STEPS", 2)
    monkeypatch.setattr(multistart, "_REGRESSION_STEPS", 2)
    kept: list[Any] = []
    losses = multistart._Together._losses

    def losses_of(self: Any, x: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        kept.append((self, len(x)))
        assert losses(self, x, draws).shape == (6,)
        return torch.tensor([5.0, 4.0, torch.inf, 1.0, 2.0, 3.0])

    monkeypatch.setattr(multistart._Together, "_losses", losses_of)
    assert choose_start(vae, config, rows[:100], rows[100:]).startswith("begun from a spectral embedding")
    together, judged = kept[0]
    assert judged == 20
    for name, value in vae.named_parameters():
        assert torch.equal(value, together.weights(3)[name])


def test_a_thousand_rows_from_everywhere_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    """All starts are tested a dozen times with 32 draws each: ten thousand rows took two minutes."""
    monkeypatch.setattr(multistart, "_ELBO_STEPS", 2)
    monkeypatch.setattr(multistart, "_methods", lambda rows, dim: {})
    rows, _ = s_curve(3000, 0)
    vae, config = build(rows)
    judged: list[torch.Tensor] = []
    losses = multistart._Together._losses

    def losses_of(self: Any, x: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        judged.append(x)
        return losses(self, x, draws)

    monkeypatch.setattr(multistart._Together, "_losses", losses_of)
    choose_start(vae, config, rows[:100], rows)
    assert len(judged[0]) == 1000
    np.testing.assert_array_equal(judged[0][[0, -1]], rows[[0, -1]])


@pytest.mark.heavy
def test_starts_that_overfit_a_few_rows_are_taken_from_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a thousand steps make of 40 rows of noise is worse on others than what knows nothing of them."""
    rows = np.random.default_rng(0).normal(size=(80, 6)).astype(np.float32)
    vae, config = build(rows[:40], dim_latent=2)
    at_the_mean = np.zeros((40, 2), np.float32)
    ignorant = vae.score_rows(rows[40:], at_the_mean)[0].mean()
    choose_start(vae, config, rows[:30], rows[30:40])
    assert sum(terms.mean() for terms in vae.score_rows(rows[40:], at_the_mean)) < ignorant + 1


@pytest.mark.parametrize(("n_rows", "dim_latent"), [(1, 1), (6, 1), (20, 24)])
def test_too_few_rows_for_a_graph_or_its_eigenvectors_still_have_random_starts(
    n_rows: int, dim_latent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multistart, "_ELBO_STEPS", 2)
    rows = s_curve(n_rows, 0)[0]
    vae, config = build(rows, dim_latent=dim_latent)
    assert "random" in choose_start(vae, config, rows, rows[:0])


@pytest.mark.parametrize(
    ("settings", "shape", "expected"),
    [
        ({"dim_latent": 1}, (300, 2), True),
        ({}, (20_000, 16), True),
        ({"dim_latent": 3}, (300, 5), False),
        ({}, (1797, 64), False),
        ({}, (20_001, 5), False),
        ({}, (300, 2), False),
        ({"dim_latent": 1}, (29, 2), False),
        ({"num_steps": 100}, (300, 5), False),
        ({"multi_start": True, "num_steps": 100}, (1797, 64), True),
        ({"multi_start": False}, (300, 5), False),
    ],
)
def test_several_starts_are_tried_where_they_pay(
    settings: dict[str, Any], shape: tuple[int, int], expected: bool
) -> None:
    assert is_worthwhile(TrainConfig(**settings).resolve(*shape), *shape) is expected


def fit_rows(directory: Path | None, on_event: Any = ignore) -> VAE:
    rows = s_curve(200, 1)[0]
    config = TrainConfig(**SMALL, num_steps=20, checkpoint_every=8, multi_start=True, tb_logging=False)
    data = TrainingData.in_memory(ArrayRows(rows), Moments.of(rows), (2,))
    return fit(data, config, str(directory) if directory else None, on_event).vae


class Killed(Exception):
    pass


@pytest.mark.parametrize("step", [5, *(pytest.param(step, marks=pytest.mark.heavy) for step in (0, 12))])
def test_a_resumed_training_keeps_its_start(step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multistart, "_ELBO_STEPS", 20)
    monkeypatch.setattr(multistart, "_REGRESSION_STEPS", 20)
    undisturbed = fit_rows(None)
    advance = Trainer.advance

    def advance_or_die(self: Trainer, *arguments: Any) -> None:
        if self.step == step:
            raise Killed
        advance(self, *arguments)

    events: list[Event] = []
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", advance_or_die)
        with pytest.raises(Killed):
            fit_rows(tmp_path, events.append)
    told = [event.message for event in events if event.message.startswith("begun from")]
    assert len(told) == 1
    monkeypatch.setattr("cvae_dist.training.prepare.choose_start", lambda *arguments: pytest.fail("chosen again"))
    resumed = fit_rows(tmp_path, events.append).state_dict()
    assert [event.message for event in events if event.message.startswith("begun from")] == told * 2
    for name, value in undisturbed.state_dict().items():
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)
