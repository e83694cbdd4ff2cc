"""Priors fitted to latents: densities, draws, what they gain on held-out latents, and where they are kept."""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.mixture import GaussianMixture

from cvae_dist.errors import Corrupt, InvalidInput, MissingExtra, NotFitted, SettingsChanged
from cvae_dist.estimator import CompressionVAE
from cvae_dist.model import prior
from cvae_dist.model.directory import load_prior
from cvae_dist.model.draws import _key
from cvae_dist.model.prior import Flow, Mixture, fit_prior, restored
from cvae_dist.pipeline import run
from cvae_dist.store import Location, RowStore
from cvae_dist.verbs.fit_prior import fit_prior as fit_prior_of_rows
from cvae_dist.verbs.ingest import ingest
from cvae_dist.verbs.sample import sample
from cvae_dist.verbs.train import train

DIGITS = load_digits().data.astype(np.float32)
QUICK: dict[str, Any] = {"num_steps": 20, "cells_encoder": (32,)}
NAMES: list[Any] = ["mixture", "flow"]
HELD_OUT = 600


@pytest.fixture(scope="module")
def latents() -> np.ndarray:
    """Draws of the posteriors of digits, (1797, 4): islands, as little holds them together, not one normal."""
    model = CompressionVAE(DIGITS, dim_latent=4, num_steps=500, kl_weight=0.25).train()
    return model.posterior_sample(DIGITS, random_state=0)[:, 0]


@pytest.fixture(scope="module", params=["mixture", pytest.param("flow", marks=pytest.mark.heavy)])
def fitted(request: pytest.FixtureRequest, latents: np.ndarray) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prior, "_MAX_STEPS", 600)
        return fit_prior(request.param, latents[HELD_OUT:], np.random.RandomState(0))


def test_held_out_latents_are_more_probable_than_under_one_normal(fitted: Any, latents: np.ndarray) -> None:
    held_out, seen = latents[:HELD_OUT], latents[HELD_OUT:]
    best_normal = stats.multivariate_normal(seen.mean(axis=0), np.cov(seen.T))
    for normal in (stats.multivariate_normal(np.zeros(4)), best_normal):
        gain = fitted.log_density(held_out) - normal.logpdf(held_out)
        assert gain.mean() > 5 * gain.std() / math.sqrt(len(gain))


@pytest.mark.parametrize("name", NAMES)
def test_the_density_integrates_to_one(name: Any, latents: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prior, "_MAX_STEPS", 60)
    fitted = fit_prior(name, latents[:, :2], np.random.RandomState(0))
    axis = np.linspace(-12, 12, 301)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2).astype(np.float32)
    assert np.exp(fitted.log_density(grid)).sum() * (axis[1] - axis[0]) ** 2 == pytest.approx(1, abs=2e-3)


def test_draws_have_the_density_and_repeat(fitted: Any, latents: np.ndarray) -> None:
    drawn = fitted.draw(4000, 1.0, np.random.RandomState(1))
    assert drawn.dtype == np.float32
    np.testing.assert_array_equal(drawn, fitted.draw(4000, 1.0, np.random.RandomState(1)))
    entropy = -fitted.log_density(drawn)
    fresh = -fitted.log_density(latents[HELD_OUT:])
    assert entropy.mean() == pytest.approx(fresh.mean(), abs=0.3)
    np.testing.assert_allclose(drawn.mean(axis=0), latents.mean(axis=0), atol=0.15)
    np.testing.assert_allclose(np.cov(drawn.T), np.cov(latents.T), atol=0.35)
    cold = fitted.draw(4000, 0.3, np.random.RandomState(1))
    assert -fitted.log_density(cold).mean() < entropy.mean()


def test_arrays_restore_it(fitted: Any, latents: np.ndarray) -> None:
    architecture = json.loads(json.dumps(fitted.architecture))
    again = restored("flow" if isinstance(fitted, Flow) else "mixture", fitted.arrays(), architecture)
    np.testing.assert_array_equal(again.log_density(latents), fitted.log_density(latents))
    noise = np.random.RandomState(1), np.random.RandomState(1)
    np.testing.assert_array_equal(again.draw(9, 1.0, noise[0]), fitted.draw(9, 1.0, noise[1]))


def test_fits_repeat_and_leave_the_global_generator_alone(latents: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prior, "_MAX_STEPS", 60)
    for name in NAMES:
        torch.manual_seed(5)
        state = torch.get_rng_state()
        one, other = (fit_prior(name, latents[:100], np.random.RandomState(0)) for _ in range(2))
        np.testing.assert_array_equal(one.log_density(latents), other.log_density(latents))
        assert torch.equal(torch.get_rng_state(), state)


def test_mixture_is_scikit_learns(latents: np.ndarray) -> None:
    mixture = Mixture.fit(latents, 4, np.random.RandomState(0))
    theirs = GaussianMixture(4, random_state=np.random.RandomState(0)).fit(latents.astype(np.float64))
    np.testing.assert_allclose(mixture.factors @ mixture.factors.transpose(0, 2, 1), theirs.covariances_)
    np.testing.assert_allclose(mixture.log_density(latents), theirs.score_samples(latents.astype(np.float64)))
    still = mixture.draw(10, 0.0, np.random.RandomState(0))
    assert all(np.isclose(row, mixture.means, atol=1e-6).all(axis=1).any() for row in still)


@pytest.mark.heavy
@pytest.mark.parametrize("dim", [1, 3])
def test_flow_of_other_widths(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prior, "_MAX_STEPS", 400)
    random = np.random.RandomState(0)
    skewed = np.exp(random.normal(size=(2000, dim))).astype(np.float32) * 100
    flow = Flow.fit(skewed, random)
    exact = stats.lognorm.logpdf(skewed[:200] / 100, 1).sum(axis=1) - dim * math.log(100)
    assert flow.log_density(skewed[:200]).mean() == pytest.approx(exact.mean(), abs=0.15 * dim)
    np.testing.assert_allclose(np.median(flow.draw(4000, 1.0, random), axis=0), 100, rtol=0.2)


class TestOfAModel:
    @pytest.mark.parametrize("name", NAMES)
    def test_kept_beside_it_and_found_again(self, name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(prior, "_MAX_STEPS", 60)
        model = CompressionVAE(DIGITS[:200], logdir=tmp_path / "model", **QUICK).train().fit_prior(prior=name)
        monkeypatch.setattr(prior, "_ARCHITECTURE", {"transforms": 1})  # as in some other release
        restored = CompressionVAE(logdir=tmp_path / "model")
        rows = restored.sample(5, prior=name, random_state=0)
        np.testing.assert_array_equal(rows, model.sample(5, prior=name, random_state=0))
        assert not np.array_equal(rows, model.sample(5, random_state=0))
        assert {path.suffix for path in (tmp_path / "model" / "priors").iterdir()} == {".json", ".safetensors"}

    def test_of_an_earlier_model_it_is_gone(self, tmp_path: Path) -> None:
        model = CompressionVAE(DIGITS[:200], logdir=tmp_path, **QUICK).train().fit_prior()
        model.train(num_steps=30)
        assert not (tmp_path / "priors").exists()
        assert not hasattr(model, "priors_")
        with pytest.raises(NotFitted, match=r"fit_prior \(cvae-dist fit-prior STORE .* --prior mixture\)"):
            load_prior(Location.of(str(tmp_path)), "mixture")

    def test_of_another_model_it_is_refused(self, tmp_path: Path) -> None:
        for steps, name in ((20, "one"), (30, "other")):
            CompressionVAE(DIGITS[:200], logdir=tmp_path / name, **QUICK | {"num_steps": steps}).train().fit_prior()
        (tmp_path / "one" / "priors").rename(tmp_path / "kept")
        (tmp_path / "other" / "priors").rename(tmp_path / "one" / "priors")
        with pytest.raises(NotFitted, match="belongs to an earlier model"):
            load_prior(Location.of(str(tmp_path / "one")), "mixture")
        with pytest.raises(NotFitted, match="no rows to fit"):
            CompressionVAE(logdir=tmp_path / "one").sample(3, prior="mixture")

    def test_damaged_it_is_refused(self, tmp_path: Path) -> None:
        CompressionVAE(DIGITS[:200], logdir=tmp_path, **QUICK).train().fit_prior()
        file = tmp_path / "priors" / "mixture.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"x")
        with pytest.raises(Corrupt, match="does not match its digest"):
            CompressionVAE(logdir=tmp_path).sample(3, prior="mixture")
        (tmp_path / "priors" / "mixture.json").write_text("{")
        with pytest.raises(Corrupt, match="cannot be rebuilt"):
            CompressionVAE(logdir=tmp_path).sample(3, prior="mixture")

    def test_refusals(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = CompressionVAE(DIGITS[:200], **QUICK).train()
        for call in (model.sample, model.fit_prior):
            with pytest.raises(InvalidInput, match="prior='flaw' is unknown"):
                call(prior="flaw")  # type: ignore[operator]
        with pytest.raises(InvalidInput, match="1 latents: give at least 2 rows"):
            model.fit_prior(DIGITS[:1])
        with pytest.raises(InvalidInput, match="0 components"):
            model.fit_prior(n_components=0)
        model.X = None
        with pytest.raises(NotFitted, match="fit_prior"):
            model.sample(3, prior="mixture")
        monkeypatch.setitem(sys.modules, "zuko.flows", None)
        with pytest.raises(MissingExtra, match=r"pip install 'cvae-dist\[flow\]'"):
            model.fit_prior(DIGITS, prior="flow")

    def test_of_many_rows_a_share_is_looked_at(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[int] = []
        fit = Mixture.fit
        monkeypatch.setattr(prior.Mixture, "fit", lambda z, *rest: (seen.append(len(z)), fit(z, *rest))[1])
        monkeypatch.setattr("cvae_dist.model.prior.MAX_FITTED_ROWS", 50)
        CompressionVAE(DIGITS[:200], **QUICK).train().fit_prior()
        assert seen == [50]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("verbs")
    (root / "tree").mkdir()
    np.save(root / "tree" / "rows.npy", DIGITS[:200])
    ingest(root / "tree", root / "rows.zarr")
    train(str(root / "rows.zarr"), str(root / "model"), tb_logging=False, **QUICK)
    return root


class TestVerbs:
    def test_sample_draws_from_what_was_fitted(self, place: Path) -> None:
        rows, model = place / "rows.zarr", str(place / "model")
        with pytest.raises(NotFitted, match="fit it with fit_prior"):
            sample(model, place / "none.zarr", 10, prior="mixture")
        result = fit_prior_of_rows(rows, model, n_components=2)
        assert result.rows == 200
        assert result.log_density > result.log_density_of_normal
        asked: dict[str, Any] = {"prior": "mixture", "seed": 3, "temperature": 0.5, "noise": False}
        block = load_prior(Location.of(model), "mixture")[0].draw(
            1024, 0.5, np.random.RandomState(_key(3, 0, "latent") % 2**32)
        )
        expected = CompressionVAE(logdir=model).decode(block)
        for n, name in ((10, "ten.zarr"), (1500, "many.zarr")):
            sample(model, place / name, n, **asked)
            np.testing.assert_array_equal(RowStore.open(str(place / name)).read("x", 0, 10), expected[:10])
        assert sample(model, place / "ten.zarr", 10, **asked).nothing_to_do
        fit_prior_of_rows(rows, model, n_components=3)
        with pytest.raises(SettingsChanged, match="prior_digest"):
            sample(model, place / "ten.zarr", 10, **asked)

    def test_the_same_fit_is_not_made_twice(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        rows, model = place / "rows.zarr", place / "model"
        first = fit_prior_of_rows(rows, model, seed=5)
        assert not first.nothing_to_do
        with monkeypatch.context() as patch:
            patch.setattr(prior, "fit_prior", None)
            again = fit_prior_of_rows(rows, model, seed=5)
        assert again == dataclasses.replace(first, nothing_to_do=True)
        assert not fit_prior_of_rows(rows, model, seed=6).nothing_to_do
        (model / "priors" / "mixture.safetensors").write_bytes(b"damaged")
        assert not fit_prior_of_rows(rows, model, seed=6).nothing_to_do

    def test_a_pipeline_fits_and_samples(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(place)
        Path("prior.yaml").write_text(
            "stages:\n- fit-prior: {store: rows.zarr, model: model, n_components: 4}\n"
            "- sample: {model: model, out: piped.zarr, n: 5, prior: mixture}\n"
        )
        assert not run("prior.yaml").nothing_to_do
        assert run("prior.yaml").nothing_to_do

    def test_verb_and_estimator_fit_the_same(self, place: Path) -> None:
        fit_prior_of_rows(place / "rows.zarr", place / "model")
        by_verb = load_prior(Location.of(str(place / "model")), "mixture")[1]
        CompressionVAE(logdir=place / "model").fit_prior(place / "rows.zarr")
        assert load_prior(Location.of(str(place / "model")), "mixture")[1] == by_verb

    def test_temperature_of_the_normal(self, place: Path) -> None:
        sample(place / "model", place / "cold.zarr", 3, temperature=0, noise=False)
        cold = RowStore.open(str(place / "cold.zarr")).read("x", 0, 3)
        np.testing.assert_array_equal(cold, CompressionVAE(logdir=place / "model").decode(np.zeros((3, 2))))

    def test_refusals(self, place: Path) -> None:
        with pytest.raises(InvalidInput, match="temperature=-1"):
            sample(place / "model", place / "x.zarr", 3, temperature=-1)
        for n in (0, 2.5, "3"):
            with pytest.raises(InvalidInput, match=r"asks for no rows; use a whole number"):
                sample(place / "model", place / "x.zarr", n)  # type: ignore[arg-type]
        with pytest.raises(InvalidInput, match="prior='flaw' is unknown"):
            sample(place / "model", place / "x.zarr", 3, prior="flaw")  # type: ignore[arg-type]
        (place / "narrow").mkdir()
        np.save(place / "narrow" / "rows.npy", DIGITS[:9, :5])
        ingest(place / "narrow", place / "narrow.zarr")
        with pytest.raises(InvalidInput, match="rows of 5 values, but model .* takes 64"):
            fit_prior_of_rows(place / "narrow.zarr", place / "model")
        with pytest.raises(InvalidInput, match="seed=-1"):
            fit_prior_of_rows(place / "rows.zarr", place / "model", seed=-1)

    @pytest.mark.heavy
    def test_command_line(self, place: Path, cvae_dist: Any) -> None:
        done = cvae_dist("fit-prior", str(place / "rows.zarr"), str(place / "model"), "--n-components", "2")
        assert "fit-prior: fitted 'mixture' to the latents of 200 rows" in done.stdout
        done = cvae_dist("sample", str(place / "model"), "new.zarr", "-n", "5", "--prior", "mixture")
        assert done.stdout.startswith("sample: wrote 5 rows")
        done = cvae_dist("sample", str(place / "model"), "other.zarr", "-n", "5", "--prior", "flow")
        assert done.returncode == 1
        assert "--prior flow" in done.stderr
