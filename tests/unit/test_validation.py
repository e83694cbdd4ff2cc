import numpy as np
import pytest

from cvae_dist.config import TrainConfig
from cvae_dist.model.vae import VAE
from cvae_dist.store import Moments
from cvae_dist.store.reader import ArrayRows
from cvae_dist.training import validation
from cvae_dist.training.validation import Validation, choose_rows

ROWS = np.random.default_rng(0).normal(size=(3000, 5)).astype(np.float32)


@pytest.fixture(scope="module")
def vae() -> VAE:
    config = TrainConfig(likelihood="gaussian", feature_normalization=True).resolve(*ROWS.shape)
    return VAE.of(config, Moments.of(ROWS), ROWS.dtype)


def test_every_chosen_row_counts_and_always_with_the_same_noise(vae: VAE) -> None:
    chosen = np.arange(1, 3000, 2)
    held_out = Validation.read(ArrayRows(ROWS), chosen, 2, seed=3)
    weights = dict(vae.named_parameters())
    reconstruction, kl = held_out.terms(vae, weights)
    expected = vae.score_rows(ROWS[chosen], held_out.noise)
    assert reconstruction == pytest.approx(expected[0].mean(), rel=1e-5)
    assert kl == pytest.approx(expected[1].mean(), rel=1e-5)
    assert held_out.terms(vae, weights) == (reconstruction, kl)
    again = Validation.read(ArrayRows(ROWS), chosen, 2, seed=3)
    np.testing.assert_array_equal(again.noise, held_out.noise)
    assert not np.array_equal(Validation.read(ArrayRows(ROWS), chosen, 2, seed=4).noise, held_out.noise)
    assert np.unique(held_out.noise).size == held_out.noise.size, "no row has the noise of another"


def test_rows_that_validate_have_a_ceiling_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "_MAX_BYTES", 400)
    assert len(choose_rows(ArrayRows(ROWS), 100, 0)) == 20
    assert len(choose_rows(ArrayRows(ROWS), 7, 0)) == 7
    monkeypatch.setattr(validation, "_MAX_BYTES", 1)
    assert len(choose_rows(ArrayRows(ROWS), 100, 0)) == 1
