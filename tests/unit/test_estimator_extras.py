"""What the reference never had: samples, scores, posteriors, interpolation; against independent computations."""

import copy
import math
from pathlib import Path
from typing import Any

import dask.array
import numpy as np
import pandas as pd
import pytest
from scipy import special, stats
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cvae_dist.errors import InvalidInput, NotFitted
from cvae_dist.estimator import CompressionVAE
from cvae_dist.model.sampling import between, posterior_moments

DIGITS = load_digits()
X = (DIGITS.data[:300] / 16).astype(np.float32)
MIXED = np.random.default_rng(0).normal(size=(300, 5)).cumsum(axis=1) * np.array([1, 10, 100, 0.1, 1]) + 5
QUICK: dict[str, Any] = {"num_steps": 60, "cells_encoder": (32,), "iaf_flow_length": 0}


@pytest.fixture(scope="module")
def grey() -> CompressionVAE:
    return CompressionVAE(X, likelihood="bernoulli", **QUICK).train()


@pytest.fixture(scope="module")
def mixed() -> CompressionVAE:
    return CompressionVAE(MIXED, likelihood="gaussian", feature_normalization=True, **QUICK).train()


def linear_model() -> CompressionVAE:
    """A model without hidden layers whose p(x) is a normal with a known covariance: probabilistic PCA."""
    rows = np.random.default_rng(1).normal(size=(400, 3)) @ np.array([[2, 1, 0], [0, 1, 0.5], [0, 0, 0.3]]) + 7
    return CompressionVAE(
        rows, dim_latent=1, cells_encoder=(1,), likelihood="gaussian", feature_normalization=True, num_steps=600,
        multi_start=False,
    ).train()  # fmt: skip


class TestScores:
    def test_elbo_of_shares_is_relative_to_the_entropy_of_the_row(self, grey: CompressionVAE) -> None:
        noise = np.random.RandomState(0).standard_normal((8, 2)).astype(np.float32)
        mean, logvar = (moment.astype(np.float64) for moment in posterior_moments(grey.model_, X))
        expected = np.zeros(len(X))
        for draw in noise:
            p = grey.decode(mean + np.exp(logvar / 2) * draw).astype(np.float64)
            expected += (special.xlogy(X, p) + special.xlogy(1 - X, 1 - p)).sum(axis=1) / 8
        kl = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).sum(axis=1)
        entropy = -(special.xlogy(X, X) + special.xlogy(1 - X, 1 - X)).astype(np.float64).sum(axis=1)
        np.testing.assert_allclose(grey.score_samples(X), expected - kl + entropy, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(grey.score_samples(X, "reconstruction"), expected + entropy, rtol=1e-4, atol=1e-3)

    def test_grey_rows_are_not_punished_for_being_grey(self, grey: CompressionVAE) -> None:
        reconstruction = grey.score_samples(X, "reconstruction")
        assert (reconstruction <= 1e-4).all()  # minus a Kullback-Leibler divergence

    def test_densities_are_those_of_the_unit_of_the_data(self, mixed: CompressionVAE) -> None:
        scale = MIXED.std(axis=0)
        assert mixed.model_.likelihood.log_volume == pytest.approx(np.log(scale).sum(), abs=0.2)
        draw = np.random.RandomState(0).standard_normal((1, 2)).astype(np.float32)
        mean, logvar = posterior_moments(mixed.model_, MIXED)
        decoded = mixed.decode(mean + np.exp(logvar / 2) * draw)
        sigma = mixed.model_.likelihood.sigma.numpy() * mixed.model_.scaling.scale.numpy()  # type: ignore[operator]
        expected = stats.norm.logpdf(MIXED, decoded, sigma).sum(axis=1)
        np.testing.assert_allclose(mixed.score_samples(MIXED, "reconstruction", k=1), expected, rtol=1e-4, atol=1e-3)

    def test_densities_of_shares_are_those_of_the_unit_of_the_data(self) -> None:
        def score(rows: np.ndarray) -> np.ndarray:
            model = CompressionVAE(rows, likelihood="continuous_bernoulli", feature_normalization=False, **QUICK)
            return model.train().score_samples(rows)

        np.testing.assert_allclose(score(X * 200 + 7), score(X) - (X.std(axis=0) > 0).sum() * np.log(200), rtol=1e-3)

    def test_a_plain_autoencoder_scores_its_reconstruction(self) -> None:
        model = CompressionVAE(MIXED, kl_weight=0, **QUICK).train()
        np.testing.assert_array_equal(model.score_samples(MIXED), model.score_samples(MIXED, "reconstruction", k=8))

    @pytest.mark.heavy
    def test_importance_weights_against_quadrature(self) -> None:
        model = linear_model()
        rows = model.X[:8]
        z = np.linspace(-8, 8, 4001)
        decoded = model.decode(z[:, None]).astype(np.float64)
        sigma = model.model_.likelihood.sigma.numpy() * model.model_.scaling.scale.numpy()  # type: ignore[operator]
        joint = stats.norm.logpdf(rows[:, None], decoded[None], sigma).sum(axis=2) + stats.norm.logpdf(z)
        exact = special.logsumexp(joint, axis=1) + math.log(z[1] - z[0])
        estimates = [model.score_samples(rows, "iwae", k=1000, random_state=seed) for seed in range(8)]
        np.testing.assert_allclose(np.mean(estimates, axis=0), exact, atol=0.05)
        assert (model.score_samples(rows, "elbo", k=3000) <= exact + 0.01).all()

    def test_more_draws_tighten_the_bound(self, mixed: CompressionVAE) -> None:
        one, many = (mixed.score_samples(MIXED, "iwae", k=k).mean() for k in (1, 64))
        assert mixed.score_samples(MIXED, "elbo", k=64).mean() < many
        assert one < many

    def test_a_row_scores_the_same_in_any_company(self, grey: CompressionVAE) -> None:
        whole = grey.score_samples(X)
        np.testing.assert_array_equal(grey.score_samples(X[5:6]), whole[5:6])
        np.testing.assert_array_equal(grey.score_samples(X[::-1]), whole[::-1])

    def test_noise_is_less_normal_than_digits(self, grey: CompressionVAE) -> None:
        noise = np.random.default_rng(0).random(X.shape).astype(np.float32)
        assert np.median(grey.score_samples(noise)) < np.quantile(grey.score_samples(X), 0.01)

    def test_score_is_the_mean(self, grey: CompressionVAE) -> None:
        assert grey.score(X) == grey.score_samples(X).mean()

    @pytest.mark.parametrize(("arguments", "message"), [({"kind": "rec"}, "kind='rec'"), ({"k": 0}, "k=0")])
    def test_refusals(self, grey: CompressionVAE, arguments: Any, message: str) -> None:
        with pytest.raises(InvalidInput, match=message):
            grey.score_samples(X, **arguments)


class TestSamples:
    def test_shape_unit_and_repeatability(self, mixed: CompressionVAE) -> None:
        rows = mixed.sample(2000, random_state=3)
        assert rows.shape == (2000, 5)
        np.testing.assert_allclose(rows.mean(axis=0), MIXED.mean(axis=0), atol=0.5 * MIXED.std(axis=0).max())
        np.testing.assert_array_equal(rows, mixed.sample(2000, random_state=3))
        assert not np.array_equal(mixed.sample(5), mixed.sample(5))

    def test_noise_is_that_of_the_likelihood(self, mixed: CompressionVAE) -> None:
        means = mixed.sample(4000, noise=False, random_state=3)
        drawn = mixed.sample(4000, random_state=3)
        sigma = mixed.model_.likelihood.sigma.numpy() * mixed.model_.scaling.scale.numpy()  # type: ignore[operator]
        np.testing.assert_allclose((drawn - means).std(axis=0), sigma, rtol=0.05)

    def test_temperature(self, mixed: CompressionVAE) -> None:
        cold = mixed.sample(50, temperature=0, noise=False)
        np.testing.assert_allclose(cold, np.repeat(mixed.decode(np.zeros((1, 2))), 50, axis=0))
        wide, usual = (mixed.sample(2000, t, noise=False, random_state=0).std(axis=0).mean() for t in (2.0, 1.0))
        assert wide > usual

    def test_bernoulli_draws_are_bounds(self, grey: CompressionVAE) -> None:
        rows = grey.sample(50, random_state=0)
        np.testing.assert_allclose(rows, rows.round(), atol=1e-6)
        assert set(np.unique(np.abs(rows.round()))) == {0.0, 1.0}

    def test_a_prior_that_was_not_fitted_is_fitted_on_the_rows(self, grey: CompressionVAE) -> None:
        model = copy.copy(grey)
        assert model.sample(7, prior="mixture", random_state=0).shape == (7, 64)
        assert model.fit(X[:100]).sample(3, prior="mixture").shape == (3, 64)

    def test_refusals(self, grey: CompressionVAE) -> None:
        for arguments in ({"n": 0}, {"temperature": -1}, {"temperature": np.nan}, {"prior": "flaw"}):
            with pytest.raises(InvalidInput, match=next(iter(arguments)) if "n" not in arguments else "0 draws"):
                grey.sample(**{"n": 3, **arguments})

    @pytest.mark.parametrize("call", ["sample", "fit_prior", "posterior_sample", "score_samples", "score"])
    def test_before_training(self, call: str) -> None:
        with pytest.raises(NotFitted, match=r"call train\(\)"):
            getattr(CompressionVAE(X), call)(*([X] if call != "sample" else []))


class TestPosterior:
    def test_draws_have_the_posteriors_moments(self, mixed: CompressionVAE) -> None:
        mean, logvar = posterior_moments(mixed.model_, MIXED[:10])
        draws = mixed.posterior_sample(MIXED[:10], k=4000, random_state=0)
        assert (draws.shape, draws.dtype) == ((10, 4000, 2), np.float32)
        spread = np.exp(logvar / 2)
        np.testing.assert_allclose(draws.mean(axis=1), mean, atol=5 * spread.max() / 63)
        np.testing.assert_allclose(draws.std(axis=1), spread, rtol=0.07)

    def test_embed_returns_the_spread(self, mixed: CompressionVAE) -> None:
        z, spread = mixed.embed(MIXED, return_std=True)
        np.testing.assert_array_equal(z, mixed.embed(MIXED))
        np.testing.assert_allclose(spread, np.exp(posterior_moments(mixed.model_, MIXED)[1] / 2), rtol=1e-6)

    def test_precision_is_one_of_all_that_embed_gives(self, mixed: CompressionVAE, tmp_path: Path) -> None:
        z, spread = mixed.embed(MIXED, return_std=True, precision="bf16")
        for short, exact in zip((z, spread), mixed.embed(MIXED, return_std=True), strict=True):
            assert 0 < np.abs(short - exact).max() < 0.1
        np.save(tmp_path / "rows.npy", MIXED)
        np.testing.assert_array_equal(mixed.embed(tmp_path, precision="bf16"), z)
        lazy = dask.array.from_array(MIXED, chunks=(30, -1))
        for short, expected in zip(mixed.embed(lazy, return_std=True, precision="bf16"), (z, spread), strict=True):
            np.testing.assert_array_equal(short.compute(), expected)

    def test_an_unknown_precision_is_refused_at_once(self, mixed: CompressionVAE) -> None:
        with pytest.raises(InvalidInput, match="precision='double'"):
            mixed.embed(dask.array.from_array(MIXED), precision="double")  # type: ignore[call-overload]

    def test_spread_behind_a_flow_is_that_of_draws(self) -> None:
        model = CompressionVAE(MIXED, **QUICK | {"iaf_flow_length": 2}).train()
        spread = model.embed(MIXED[:5], return_std=True)[1]
        draws = model.posterior_sample(MIXED[:5], 3000, random_state=1)
        np.testing.assert_allclose(spread, draws.std(axis=1), rtol=0.35)
        np.testing.assert_array_equal(model.embed(MIXED, return_std=True)[1][:5], spread)


class TestInterpolation:
    @pytest.mark.parametrize("kind", ["linear", "slerp"])
    def test_ends_are_the_reconstructions(self, grey: CompressionVAE, kind: Any) -> None:
        way = grey.interpolate(X[0], X[1].reshape(8, 8), n=7, kind=kind)
        assert way.shape == (7, 64)
        np.testing.assert_allclose(way[[0, -1]], grey.decode(grey.embed(X[:2])), atol=1e-6)

    def test_slerp_turns_evenly(self) -> None:
        a, b = np.array([2.0, 0, 0], np.float32), np.array([0, 4.0, 0], np.float32)
        way = between(a, b, 5, "slerp")
        np.testing.assert_allclose(np.degrees(np.arctan2(way[:, 1], way[:, 0])), [0, 22.5, 45, 67.5, 90], atol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(way, axis=1), [2, 2.5, 3, 3.5, 4], rtol=1e-6)

    def test_slerp_without_an_arc_is_the_line(self) -> None:
        a = np.array([1.0, 2.0], np.float32)
        for b in (3 * a, -a, 0 * a):
            np.testing.assert_allclose(between(a, b, 4, "slerp"), between(a, b, 4, "linear"), atol=1e-6)

    def test_refusals(self, grey: CompressionVAE) -> None:
        with pytest.raises(InvalidInput, match="n=1"):
            grey.interpolate(X[0], X[1], n=1)
        with pytest.raises(InvalidInput, match="kind='cubic'"):
            grey.interpolate(X[0], X[1], kind="cubic")  # type: ignore[arg-type]

    @pytest.mark.parametrize("ends", [(X[0], X[1, :5]), (X[0, :5], X[1, :5]), (X[:2], X[2:4])])
    def test_rows_that_do_not_fit_are_refused(self, grey: CompressionVAE, ends: Any) -> None:
        with pytest.raises(InvalidInput, match=r"a of shape .* are not both a row of 64 features"):
            grey.interpolate(*ends)

    def test_rows_of_a_frame_need_no_names(self) -> None:
        frame = pd.DataFrame(X).add_prefix("pixel ")
        model = CompressionVAE(frame, **QUICK).train()
        np.testing.assert_array_equal(
            model.interpolate(frame.iloc[0], frame.iloc[1], n=2), model.decode(model.embed(frame[:2]))
        )


@pytest.mark.parametrize("draws", [0, -1, 2.5, "3", None])
def test_draws_are_counted_in_whole_numbers(mixed: CompressionVAE, draws: Any) -> None:
    for call in (mixed.sample, lambda k: mixed.posterior_sample(MIXED, k)):
        with pytest.raises(InvalidInput, match="whole number"):
            call(draws)
    if draws is not None:  # which means the default
        with pytest.raises(InvalidInput, match="whole number"):
            mixed.score_samples(MIXED, k=draws)


def test_widths_that_are_no_sequence_are_refused() -> None:
    with pytest.raises(InvalidInput, match="cells_encoder=5"):
        CompressionVAE(X, cells_encoder=5).train()  # type: ignore[arg-type]


def test_scores_take_every_random_state(mixed: CompressionVAE) -> None:
    by_int, by_state = (mixed.score_samples(MIXED, random_state=state) for state in (3, np.random.RandomState(3)))
    np.testing.assert_array_equal(by_int, by_state)
    assert not np.array_equal(by_int, mixed.score_samples(MIXED, random_state=None))


class TestScikitLearn:
    def test_search_by_score(self) -> None:
        search = GridSearchCV(CompressionVAE(**QUICK), {"num_steps": [1, 60]}, cv=2).fit(X)
        assert search.best_params_ == {"num_steps": 60}
        assert np.isfinite(search.cv_results_["mean_test_score"]).all()

    def test_pipeline_with_frames(self) -> None:
        frame = pd.DataFrame(MIXED, columns=list("abcde"))
        pipeline = make_pipeline(StandardScaler(), CompressionVAE(**QUICK)).set_output(transform="pandas")
        assert list(pipeline.fit_transform(frame).columns) == ["compressionvae0", "compressionvae1"]
        assert pipeline.score_samples(frame).shape == (300,)
        classifier = make_pipeline(CompressionVAE(**QUICK), KNeighborsClassifier(3))
        assert classifier.fit(X, DIGITS.target[:300]).score(X, DIGITS.target[:300]) > 0.2

    def test_html(self, grey: CompressionVAE) -> None:
        assert "CompressionVAE" in grey._repr_html_()
        assert len(grey._repr_html_()) < 100_000
