"""Training on a card, beside the CPU. Nothing here runs where torch sees no card."""

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from cvae_dist.errors import InvalidInput
from cvae_dist.events import Event
from cvae_dist.model.directory import load_model
from cvae_dist.model.vae import VAE
from cvae_dist.training import loader as loader_module
from cvae_dist.training.trainer import Trainer
from cvae_dist.training.transfer import Home
from cvae_dist.verbs.ingest import ingest
from cvae_dist.verbs.train import train

CARDS = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = pytest.mark.skipif(not CARDS, reason="torch sees no card here")

SETTINGS: dict[str, Any] = {
    "num_steps": 50, "test_every": 20, "checkpoint_every": 10, "batch_size": 64, "tb_logging": False,
    "precision": "float32", "multi_start": False,
}  # fmt: skip
STREAMED = 40_000  # bytes: the store has 115,008


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("digits")
    (folder / "tree").mkdir()
    np.save(folder / "tree" / "digits.npy", load_digits().images.astype(np.uint8))
    ingest(str(folder / "tree"), str(folder / "rows.zarr"))
    return str(folder / "rows.zarr")


def trained(store: str, place: Path, on_event: Any = lambda event: None, **settings: Any) -> VAE:
    train(store, str(place), **(SETTINGS | settings), on_event=on_event)
    return load_model(str(place))


def distance(one: VAE, other: VAE) -> float:
    """Return the relative L2 distance of the weights."""
    first, second = (torch.cat([value.flatten() for value in vae.parameters()]) for vae in (one, other))
    return float((first - second).norm() / second.norm())


@pytest.fixture(scope="module")
def on_the_cpu(store: str, tmp_path_factory: pytest.TempPathFactory) -> VAE:
    return trained(store, tmp_path_factory.mktemp("cpu"), device="cpu")


@pytest.fixture
def homes(monkeypatch: pytest.MonkeyPatch) -> list[Home]:
    """Give the homes that rows found."""
    found: list[Home] = []

    class Noted(Home):
        def fill(self, rows: Any) -> None:
            super().fill(rows)
            found.append(self)

    monkeypatch.setattr(loader_module, "Home", Noted)
    return found


def test_a_model_of_a_card_is_that_of_the_cpu(store: str, tmp_path: Path, on_the_cpu: VAE, homes: list[Home]) -> None:
    events: list[Event] = []
    assert distance(trained(store, tmp_path / "resident", events.append), on_the_cpu) < 1e-4
    assert len(homes) == 1, "the rows stay on the card"
    assert any(event.message.startswith("computing on card 0: ") for event in events)


def test_rows_that_do_not_fit_travel(store: str, tmp_path: Path, homes: list[Home]) -> None:
    here = trained(store, tmp_path / "cpu", device="cpu", buffer_bytes=STREAMED)
    assert distance(trained(store, tmp_path / "card", buffer_bytes=STREAMED), here) < 1e-4
    assert not homes


@pytest.mark.parametrize("then", ["cuda", "cpu"])
def test_killed_and_resumed_also_on_another_device(
    then: str, store: str, tmp_path: Path, on_the_cpu: VAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = Trainer.advance

    def advance_and_signal(self: Trainer, *arguments: Any) -> None:
        advance(self, *arguments)
        if self.step == 27:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", advance_and_signal)
        assert train(store, str(tmp_path), **SETTINGS, device="cuda").stopped_because == "interrupted"
    assert distance(trained(store, tmp_path, device=then), on_the_cpu) < 1e-4


def test_a_step_waits_once(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advance, tolist, waits = Trainer.advance, torch.Tensor.tolist, []

    def watched(self: Trainer, *arguments: Any) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            advance(self, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def expected(self: torch.Tensor) -> Any:
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        waits.append(len(self))
        figures = tolist(self)
        torch.cuda.set_sync_debug_mode(mode)
        return figures

    monkeypatch.setattr(Trainer, "advance", watched)
    monkeypatch.setattr(torch.Tensor, "tolist", expected)
    trained(store, tmp_path, num_steps=10, test_every=100)
    assert waits[:10] == [4] * 10


@pytest.mark.parametrize("likelihood", ["student_t", "bernoulli", "continuous_bernoulli", "gaussian_per_feature"])
def test_every_likelihood_and_a_flow(likelihood: str, store: str, tmp_path: Path) -> None:
    settings = {"likelihood": likelihood, "dim_latent": 4, "iaf_flow_length": 2, "residual_blocks": 1}
    here, there = (trained(store, tmp_path / name, device=name, **settings) for name in ("cpu", "cuda"))
    assert distance(there, here) < 1e-3


def test_bf16_is_timed_and_trains(store: str, tmp_path: Path, on_the_cpu: VAE) -> None:
    events: list[Event] = []
    trained(store, tmp_path / "auto", events.append, precision="auto", cells_encoder=(1024, 1024), batch_size=256)
    assert any(event.message.startswith("steps in ") for event in events)
    assert distance(trained(store, tmp_path / "bf16", precision="bf16"), on_the_cpu) < 0.05


def test_compiled_steps_are_the_same(store: str, tmp_path: Path, on_the_cpu: VAE) -> None:
    assert distance(trained(store, tmp_path, compile=True), on_the_cpu) < 1e-4


@pytest.mark.skipif(CARDS > 1, reason="this machine has several cards")
def test_more_ranks_than_cards_are_refused(store: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="rank 1 has that of another rank"):
        train(store, str(tmp_path), **SETTINGS, device="cuda", launcher="local:2")


@pytest.mark.skipif(CARDS == 1, reason="this machine has one card")
def test_two_cards_train_the_same_model(store: str, tmp_path: Path, on_the_cpu: VAE) -> None:
    train(store, str(tmp_path), **SETTINGS, device="cuda", launcher="local:2")
    assert distance(load_model(str(tmp_path)), on_the_cpu) < 1e-4
