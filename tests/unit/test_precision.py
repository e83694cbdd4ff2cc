from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cvae_dist.config import ModelConfig, TrainConfig
from cvae_dist.events import Event, ignore
from cvae_dist.model.kernels import computing_in
from cvae_dist.model.networks import Decoder, Encoder
from cvae_dist.model.vae import VAE
from cvae_dist.store import Moments
from cvae_dist.store.reader import ArrayRows
from cvae_dist.training import precision
from cvae_dist.training.fit import fit
from cvae_dist.training.precision import Decision, choose_precision
from cvae_dist.training.prepare import TrainingData
from cvae_dist.training.trainer import Trainer

ROWS = np.random.default_rng(0).normal(size=(600, 96)).astype(np.float32)
LARGE = ModelConfig(cells_encoder=(512, 256), residual_blocks=2, likelihood="gaussian", feature_normalization=True)


@pytest.fixture
def vae() -> VAE:
    return VAE.of(LARGE, Moments.of(ROWS), "<f4")


def time_steps(exact: float, short: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(precision, "_times", lambda vae, batch_size: (exact, short))


@pytest.mark.parametrize(("short", "chosen"), [(0.5, "bf16"), (0.95, "float32")])
def test_the_faster_type_is_chosen_where_it_is_clearly_faster(
    short: float, chosen: str, vae: VAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    time_steps(1.0, short, monkeypatch)
    decision = choose_precision("auto", vae, 256)
    assert decision.value == chosen
    assert chosen in decision.note


def test_nothing_is_timed_where_there_is_nothing_to_choose(vae: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_times", lambda *arguments: pytest.fail("timed"))
    assert choose_precision("bf16", vae, 256) == Decision("bf16")
    assert choose_precision("float32", vae, 256) == Decision("float32")
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    assert choose_precision("auto", vae, 16) == Decision("float32"), "steps are small"
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)
    assert choose_precision("auto", vae, 256) == Decision("float32")


def test_timing_leaves_the_model_as_it_was(vae: VAE) -> None:
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    state = torch.get_rng_state()
    exact, short = precision._times(vae, 64)
    assert exact > 0
    assert short > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert all(weight.grad is None for weight in vae.parameters())


def test_bf16_changes_digits_of_the_terms_but_not_their_type_or_meaning(vae: VAE) -> None:
    rows, noise = torch.from_numpy(ROWS), torch.zeros(600, 2)
    exact = vae(rows, noise)[:2]
    with computing_in(torch.bfloat16):
        short = vae(rows, noise)[:2]
    again = vae(rows, noise)[:2]
    for one, other, third in zip(exact, short, again, strict=True):
        assert other.dtype == torch.float32
        assert not torch.equal(one, other), "nothing was computed in bfloat16"
        torch.testing.assert_close(other.mean(), one.mean(), rtol=0.02, atol=0.02)
        assert torch.equal(one, third)


def test_residual_blocks_add_little_at_first_and_learn() -> None:
    encoder, decoder = Encoder(20, (32, 16), 2, residual_blocks=2), Decoder(2, (16, 32), 20, residual_blocks=2)
    encoder.initialise(torch.Generator().manual_seed(0))
    decoder.initialise(torch.Generator().manual_seed(0), torch.zeros(20))
    x = torch.randn(64, 20, generator=torch.Generator().manual_seed(1))
    hidden = encoder.body[:4](x)
    for block in encoder.body[4:]:
        changed = block(hidden)
        assert 0 < (changed - hidden).norm() < 0.5 * hidden.norm()
    (decoder(encoder.mean(encoder.hidden(x))) - x).square().mean().backward()
    for part in (encoder.body[4], decoder.body[2]):
        assert all(weight.grad is not None and weight.grad.any() for weight in part.parameters())


def fit_rows(directory: Path | None, on_event: Any = ignore, **settings: Any) -> VAE:
    config = TrainConfig(
        num_steps=12, checkpoint_every=4, batch_size=256, test_every=4, tb_logging=False, cells_encoder=(512, 256)
    ).model_copy(update=settings)
    return fit(
        TrainingData.in_memory(ArrayRows(ROWS), Moments.of(ROWS), (96,)),
        config,
        str(directory) if directory else None,
        on_event,
    ).vae


class Killed(Exception):
    pass


@pytest.mark.parametrize("step", [5, *(pytest.param(step, marks=pytest.mark.heavy) for step in (0, 10))])
def test_a_resumed_training_keeps_the_precision_it_began_with(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = fit_rows(None, precision="bf16")
    time_steps(1.0, 0.5, monkeypatch)
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
    assert any("steps in bf16" in event.message for event in events)
    time_steps(1.0, 2.0, monkeypatch)
    resumed = fit_rows(tmp_path).state_dict()
    for name, value in undisturbed.state_dict().items():
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)


def test_bf16_and_float32_train_to_different_digits() -> None:
    exact, short = fit_rows(None, precision="float32"), fit_rows(None, precision="bf16")
    assert not torch.equal(exact.encoder.head.weight, short.encoder.head.weight)
    torch.testing.assert_close(exact.encoder.head.weight, short.encoder.head.weight, rtol=0.1, atol=0.05)
