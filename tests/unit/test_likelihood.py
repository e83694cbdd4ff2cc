"""Log-likelihoods against scipy, in float64."""

import numpy as np
import pytest
import torch
from scipy import stats

from cvae_dist.config import LikelihoodName
from cvae_dist.errors import InvalidInput
from cvae_dist.model.likelihood import (
    Bernoulli,
    ContinuousBernoulli,
    Likelihood,
    StudentT,
    choose_likelihood,
    log_normaliser,
    make_likelihood,
    mean_share,
)
from cvae_dist.model.scaling import Scaling
from cvae_dist.store import Moments

RNG = np.random.default_rng(0)
NAMES: list[LikelihoodName] = [
    "gaussian",
    "gaussian_per_feature",
    "gaussian_unit",
    "student_t",
    "bernoulli",
    "continuous_bernoulli",
]


def scaling_of(rows: np.ndarray) -> Scaling:
    return Scaling.of(Moments.of(rows), rows.dtype, per_feature=True)


def test_gaussian_matches_scipy() -> None:
    scaling = scaling_of(RNG.normal(size=(50, 7)))
    likelihood = make_likelihood("gaussian", scaling)
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
    likelihood = make_likelihood("gaussian", scaling_of(RNG.normal(size=(50, 4))))
    with torch.no_grad():
        likelihood.log_sigma.fill_(-1.5)
        draws = likelihood.draw(torch.ones(20_000, 4), torch.Generator().manual_seed(0))
    assert draws.mean() == pytest.approx(1, abs=0.01)
    assert draws.std() == pytest.approx(np.exp(-1.5), rel=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_constant_features_take_no_part(name: LikelihoodName) -> None:
    rows = RNG.random((50, 4)).astype(np.float32)
    wider = np.concatenate([rows, np.full((50, 3), 0.5, np.float32)], axis=1)
    output = torch.from_numpy(RNG.normal(size=wider.shape).astype(np.float32))
    narrow, wide = scaling_of(rows), scaling_of(wider)
    expected = make_likelihood(name, narrow).negative_log_likelihood(output[:, :4], narrow(torch.from_numpy(rows)))
    result = make_likelihood(name, wide).negative_log_likelihood(output, wide(torch.from_numpy(wider)))
    torch.testing.assert_close(result, expected)


def test_sigma_is_bounded() -> None:
    likelihood = make_likelihood("gaussian", scaling_of(RNG.normal(size=(50, 4))))
    for value, expected in ((-100.0, np.exp(-6)), (100.0, np.exp(4))):
        with torch.no_grad():
            likelihood.log_sigma.fill_(value)
        assert likelihood.sigma.item() == pytest.approx(expected)


def test_likelihood_is_chosen_from_the_values() -> None:
    def chosen(rows: np.ndarray) -> str:
        return str(choose_likelihood("auto", Moments.of(rows)).value)

    binary = (RNG.random((1000, 8)) < 0.3).astype(np.uint8)
    assert chosen(binary) == "bernoulli"
    grey = np.clip(RNG.normal(0.3, 1.5, (1000, 8)), 0, 1)  # mostly 0 or 1: the choice does not depend on the unit
    assert chosen(grey) == chosen(grey * 255) == "gaussian"
    assert chosen(RNG.random((1000, 8))) == "gaussian"
    assert chosen(binary * 255) == "gaussian"
    assert chosen(np.zeros((10, 3))) == "gaussian"
    assert chosen(stats.t(1.5).rvs((1000, 8), random_state=1)) == "student_t"
    assert chosen(RNG.normal(5, 2, (1000, 8))) == "gaussian"
    assert chosen(RNG.laplace(5, 2, (1000, 8))) == "gaussian"
    rare = np.where(RNG.random((5000, 8)) < 0.001, RNG.normal(100, 10, (5000, 8)), 0)
    assert chosen(rare) == "gaussian"
    asked = choose_likelihood("bernoulli", Moments.of(RNG.random((9, 2))))
    assert asked.value == "bernoulli"
    assert "asked" in asked.reason


def double(likelihood: Likelihood, **parameters: object) -> Likelihood:
    """Return the likelihood in float64 with these parameters."""
    likelihood = likelihood.double().requires_grad_(False)
    for name, value in parameters.items():
        getattr(likelihood, name).copy_(torch.as_tensor(value, dtype=torch.float64))
    return likelihood


def test_gaussian_per_feature_matches_scipy() -> None:
    log_sigma = RNG.normal(size=7)
    likelihood = double(
        make_likelihood("gaussian_per_feature", scaling_of(RNG.normal(size=(50, 7)))), log_sigma=log_sigma
    )
    output, rows = RNG.normal(size=(2, 20, 7))
    result = likelihood.negative_log_likelihood(torch.from_numpy(output), torch.from_numpy(rows))
    np.testing.assert_allclose(result, -stats.norm.logpdf(rows, output, np.exp(log_sigma)).sum(axis=1), rtol=1e-10)


def test_gaussian_unit_matches_scipy_and_learns_nothing() -> None:
    likelihood = double(make_likelihood("gaussian_unit", scaling_of(RNG.normal(size=(50, 7)))))
    output, rows = RNG.normal(size=(2, 20, 7))
    result = likelihood.negative_log_likelihood(torch.from_numpy(output), torch.from_numpy(rows))
    np.testing.assert_allclose(result, -stats.norm.logpdf(rows, output).sum(axis=1), rtol=1e-10)
    assert not list(likelihood.parameters())
    assert not likelihood.state_dict()


@pytest.mark.parametrize("dof", [1.0, 2.5, 40.0])
def test_student_t_matches_scipy(dof: float) -> None:
    scaling = scaling_of(RNG.normal(size=(50, 7)))
    likelihood = double(StudentT(scaling), log_sigma=-0.7, log_dof=np.log(dof))
    output, rows = RNG.normal(size=(2, 20, 7)) * 5
    expected = -stats.t.logpdf(rows, dof, output, np.exp(-0.7)).sum(axis=1)
    result = likelihood.negative_log_likelihood(torch.from_numpy(output), torch.from_numpy(rows))
    np.testing.assert_allclose(result, expected, rtol=1e-10)


@pytest.mark.parametrize("dof", [1.0, 2.5, 40.0])
def test_student_t_draws_follow_the_distribution(dof: float) -> None:
    likelihood = double(StudentT(scaling_of(RNG.normal(size=(50, 2)))), log_sigma=0.4, log_dof=np.log(dof))
    draws = likelihood.draw(torch.full((20_000, 2), 3.0).double(), torch.Generator().manual_seed(0)).numpy()
    for column in draws.T:
        assert stats.kstest(column, stats.t(dof, 3.0, np.exp(0.4)).cdf).pvalue > 1e-3


LOGITS = np.array([-400.0, -30.0, -2.0, -0.51, -0.49, -1e-3, -1e-9, 1e-9, 1e-3, 0.49, 0.51, 2.0, 30.0, 400.0])


def test_continuous_bernoulli_matches_scipy() -> None:
    rows = RNG.random((50, len(LOGITS)))
    scaling = scaling_of(rows)
    share = RNG.random((20, len(LOGITS)))
    standardised = (share - scaling.center.numpy()) / scaling.scale.numpy()
    rate = np.abs(LOGITS)  # from the upper end for a positive logit: exponential, cut at the other end
    distance = np.where(LOGITS > 0, 1 - share, share)
    expected = -stats.truncexpon.logpdf(distance, b=rate, scale=1 / rate)
    logits = torch.from_numpy(np.tile(LOGITS, (20, 1)))
    likelihood = double(ContinuousBernoulli(scaling), slope=scaling.scale, offset=scaling.center)
    result = likelihood.negative_log_likelihood(logits, torch.from_numpy(standardised))
    np.testing.assert_allclose(result, expected.sum(axis=1), rtol=1e-8)


def test_the_log_normaliser_and_its_slope_are_exact_everywhere() -> None:
    logits = torch.from_numpy(np.append(LOGITS, 0.0)).requires_grad_()
    value = log_normaliser(logits)
    (slope,) = torch.autograd.grad(value.sum(), logits)
    share, weights = np.polynomial.legendre.leggauss(200)
    share, weights = (share + 1) / 2, weights / 2
    density = np.exp(logits.detach().numpy()[:, None] * share - np.maximum(logits.detach().numpy(), 0)[:, None])
    integral = density @ weights
    expected = np.log(integral) + np.maximum(logits.detach().numpy(), 0)
    np.testing.assert_allclose(value.detach(), expected, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(slope, density @ (weights * share) / integral, rtol=1e-10)
    np.testing.assert_allclose(mean_share(logits.detach()), slope, rtol=1e-10)


def test_continuous_bernoulli_starts_at_the_mean_row_and_draws_around_it() -> None:
    rows = np.clip(RNG.normal(RNG.random(7), 0.2, (500, 7)), 0, 1)
    scaling = scaling_of(rows)
    likelihood = ContinuousBernoulli(scaling)
    logits = likelihood.initial_output()
    np.testing.assert_allclose(scaling.restore(likelihood.mean(logits)), rows.mean(axis=0), atol=1e-5)
    draws = scaling.restore(likelihood.draw(logits.expand(20_000, 7), torch.Generator().manual_seed(0))).numpy()
    assert draws.min() > -1e-5
    assert draws.max() < 1 + 1e-5
    np.testing.assert_allclose(draws.mean(axis=0), rows.mean(axis=0), atol=0.015)
    for logit, column in zip(logits.double().numpy(), draws.T, strict=True):
        distance = 1 - column if logit > 0 else column
        assert stats.kstest(distance, stats.truncexpon(b=abs(logit), scale=1 / abs(logit)).cdf).pvalue > 1e-3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 1e4])
def test_terms_and_gradients_are_finite_at_extremes(name: LikelihoodName, size: float) -> None:
    scaling = scaling_of(RNG.random((50, 3)))
    likelihood = make_likelihood(name, scaling)
    output = torch.tensor([[-size, 0.0, size]], requires_grad=True)
    for far in (-1e6, 0.0, 1e6):
        likelihood.negative_log_likelihood(output, torch.full((1, 3), far)).sum().backward()
    assert output.grad is not None
    assert output.grad.isfinite().all()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in likelihood.parameters())
    draws = likelihood.draw(output.detach().expand(100, 3), torch.Generator().manual_seed(0))
    assert draws.isfinite().all()


GREY = RNG.integers(0, 256, (40, 5)).astype(np.uint8)
GREY[:, 2], GREY[:2, 0] = 17, (0, 255)


@pytest.mark.parametrize("name", NAMES)
def test_the_volume_is_that_of_the_units_the_density_is_in(name: LikelihoodName) -> None:
    expected = {"bernoulli": 0.0, "continuous_bernoulli": 4 * np.log(255)}
    scales = np.log(GREY.std(axis=0, dtype=np.float64)[[0, 1, 3, 4]]).sum()
    assert make_likelihood(name, scaling_of(GREY)).log_volume == pytest.approx(expected.get(name, scales), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_entropy_is_the_least_that_a_row_can_have(name: LikelihoodName) -> None:
    likelihood = make_likelihood(name, scaling_of(GREY))
    least = likelihood.entropy(torch.from_numpy(GREY))
    assert least.dtype == torch.float64
    expected = stats.bernoulli(GREY[:, [0, 1, 3, 4]] / 255).entropy().sum(axis=1)
    np.testing.assert_allclose(least, expected if name == "bernoulli" else np.zeros(40), rtol=1e-12)


def test_an_undecided_likelihood_is_refused() -> None:
    with pytest.raises(InvalidInput, match="must be decided"):
        make_likelihood("auto", scaling_of(RNG.normal(size=(9, 2))))
