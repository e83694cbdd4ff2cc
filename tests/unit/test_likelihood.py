"""Log-likelihoods and the KL term against scipy, in float64."""

import numpy as np
import pytest
import torch
from scipy import stats

from cvae_dist.model import posterior
from cvae_dist.model.likelihood import Bernoulli, Gaussian, choose_likelihood
from cvae_dist.model.scaling import Scaling
from cvae_dist.store import Moments

RNG = np.random.default_rng(0)


def scaling_of(rows: np.ndarray) -> Scaling:
    return Scaling.of(Moments.of(rows), rows.dtype, per_feature=True)


def test_gaussian_matches_scipy() -> None:
    scaling = scaling_of(RNG.normal(size=(50, 7)))
    likelihood = Gaussian(scaling)
    with torch.no_grad():
        likelihood.log_sigma.fill_(-0.7)
    output, rows = RNG.normal(size=(2, 20, 7)).astype(np.float32)
    expected = -stats.norm.logpdf(rows.astype(np.float64), output, np.exp(-0.7)).sum(axis=1)
    result = likelihood.negative_log_likelihood(torch.from_numpy(output), torch.from_numpy(rows))
    np.testing.assert_allclose(result.detach(), expected, rtol=2e-6)


def test_bernoulli_matches_scipy_on_binary_rows() -> None:
    rows = (RNG.random((30, 7)) < RNG.random(7)).astype(np.uint8)
    scaling = scaling_of(rows)
    logits = RNG.normal(size=rows.shape).astype(np.float32)
    probability = 1 / (1 + np.exp(-logits.astype(np.float64)))
    active = scaling.active.numpy()
    expected = -stats.bernoulli.logpmf(rows, probability)[:, active].sum(axis=1)
    standardised = scaling(torch.from_numpy(rows))
    result = Bernoulli(scaling).negative_log_likelihood(torch.from_numpy(logits), standardised)
    np.testing.assert_allclose(result, expected, rtol=2e-6)


def test_bernoulli_of_grey_values_is_the_cross_entropy() -> None:
    rows = RNG.integers(0, 256, (30, 7)).astype(np.uint8)
    scaling = scaling_of(rows)
    logits = RNG.normal(size=rows.shape).astype(np.float32)
    probability, share = 1 / (1 + np.exp(-logits.astype(np.float64))), rows / 255.0
    expected = -(share * np.log(probability) + (1 - share) * np.log(1 - probability)).sum(axis=1)
    standardised = scaling(torch.from_numpy(rows))
    result = Bernoulli(scaling).negative_log_likelihood(torch.from_numpy(logits), standardised)
    np.testing.assert_allclose(result, expected, rtol=2e-6)


def test_bernoulli_mean_and_draws_come_back_in_data_units() -> None:
    rows = RNG.integers(0, 256, (30, 7)).astype(np.uint8)
    scaling = scaling_of(rows)
    likelihood = Bernoulli(scaling)
    logits = torch.from_numpy(RNG.normal(size=(5, 7)).astype(np.float32))
    mean = scaling.restore(likelihood.mean(logits))
    np.testing.assert_allclose(mean, 255 * torch.sigmoid(logits), atol=1e-3)
    draws = scaling.restore(likelihood.draw(logits, torch.Generator().manual_seed(0)))
    assert set(draws.round().unique().tolist()) == {0, 255}


def test_bernoulli_starts_at_the_mean_row() -> None:
    rows = RNG.random((500, 7))
    scaling = scaling_of(rows)
    likelihood = Bernoulli(scaling)
    start = scaling.restore(likelihood.mean(likelihood.initial_output()))
    np.testing.assert_allclose(start, rows.mean(axis=0), atol=1e-5)


def test_gaussian_draws_have_the_learned_sigma() -> None:
    likelihood = Gaussian(scaling_of(RNG.normal(size=(50, 4))))
    with torch.no_grad():
        likelihood.log_sigma.fill_(-1.5)
        draws = likelihood.draw(torch.ones(20_000, 4), torch.Generator().manual_seed(0))
    assert draws.mean() == pytest.approx(1, abs=0.01)
    assert draws.std() == pytest.approx(np.exp(-1.5), rel=0.02)


@pytest.mark.parametrize("kind", [Gaussian, Bernoulli])
def test_constant_features_take_no_part(kind: type[Gaussian | Bernoulli]) -> None:
    rows = RNG.random((50, 4)).astype(np.float32)
    wider = np.concatenate([rows, np.full((50, 3), 0.5, np.float32)], axis=1)
    output = torch.from_numpy(RNG.normal(size=wider.shape).astype(np.float32))
    narrow, wide = scaling_of(rows), scaling_of(wider)
    expected = kind(narrow).negative_log_likelihood(output[:, :4], narrow(torch.from_numpy(rows)))
    result = kind(wide).negative_log_likelihood(output, wide(torch.from_numpy(wider)))
    torch.testing.assert_close(result, expected)


def test_sigma_is_bounded() -> None:
    likelihood = Gaussian(scaling_of(RNG.normal(size=(50, 4))))
    for value, expected in ((-100.0, np.exp(-6)), (100.0, np.exp(4))):
        with torch.no_grad():
            likelihood.log_sigma.fill_(value)
        assert likelihood.sigma.item() == pytest.approx(expected)


def test_kl_matches_scipy_and_monte_carlo() -> None:
    mean, logvar = RNG.normal(size=(2, 6, 3))
    result = posterior.kl_divergence(torch.from_numpy(mean), torch.from_numpy(logvar)).numpy()
    draws = RNG.normal(mean, np.exp(logvar / 2), size=(200_000, 6, 3))
    ratio = stats.norm.logpdf(draws, mean, np.exp(logvar / 2)) - stats.norm.logpdf(draws)
    terms = ratio.sum(axis=2)
    error = terms.std(axis=0) / np.sqrt(len(terms))
    assert (np.abs(terms.mean(axis=0) - result) < 5 * error).all()
    entropy = stats.norm.entropy(mean, np.exp(logvar / 2))
    cross = 0.5 * (mean**2 + np.exp(logvar) + np.log(2 * np.pi))
    np.testing.assert_allclose(result, (cross - entropy).sum(axis=1), rtol=1e-12)


def test_likelihood_is_chosen_from_the_values() -> None:
    def chosen(rows: np.ndarray) -> str:
        return str(choose_likelihood("auto", Moments.of(rows)).value)

    binary = (RNG.random((1000, 8)) < 0.3).astype(np.uint8)
    assert chosen(binary) == "bernoulli"
    assert chosen(np.clip(RNG.normal(0.3, 3, (1000, 8)), 0, 1)) == "bernoulli"
    assert chosen(RNG.random((1000, 8))) == "gaussian"
    assert chosen(binary * 255) == "gaussian"
    assert chosen(np.zeros((10, 3))) == "gaussian"
    asked = choose_likelihood("bernoulli", Moments.of(RNG.random((9, 2))))
    assert asked.value == "bernoulli"
    assert "asked" in asked.reason
