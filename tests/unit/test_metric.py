"""Latents stretched so that distances are like those of the rows."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from cvae_dist.config import ModelConfig
from cvae_dist.errors import InvalidInput
from cvae_dist.estimator import CompressionVAE
from cvae_dist.model.directory import load_model, save_model
from cvae_dist.model.metric import Stretch, mean_pullback, stretch_of
from cvae_dist.model.vae import VAE
from cvae_dist.store import Moments

DIM, FEATURES = 3, 7
CONFIG = ModelConfig(
    dim_latent=DIM, cells_encoder=(16, 8), residual_blocks=1, likelihood="gaussian",
    feature_normalization=False, iaf_flow_length=0,
)  # fmt: skip
LATENTS = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
ROWS = np.random.default_rng(0).normal(size=(60, FEATURES)).astype(np.float32) * [5, 1, 1, 1, 1, 1, 0]


@pytest.fixture(scope="module")
def vae() -> VAE:
    """Return a model that has a stretch."""
    made = VAE.of(CONFIG, Moments.of(ROWS), "<f8").requires_grad_(False).eval()
    made.measure_stretch(ROWS)
    return made


@pytest.fixture(scope="module")
def estimator() -> CompressionVAE:
    return CompressionVAE(dim_latent=DIM, num_steps=20, random_state=0).fit(ROWS)


def test_the_pullback_is_that_of_finite_differences_in_float64(vae: VAE) -> None:
    decoder = VAE.of(CONFIG, Moments.of(ROWS), "<f8").double().requires_grad_(False).decoder
    at = torch.from_numpy(np.random.default_rng(1).normal(size=(40, DIM)))

    def decoded(latents: torch.Tensor) -> np.ndarray:
        return decoder.output(decoder.body(latents)).numpy()

    step = 1e-5
    slopes = [(decoded(at + step * axis) - decoded(at - step * axis)) / (2 * step) for axis in torch.eye(DIM).double()]
    expected = np.einsum("inf,jnf->ij", slopes, slopes) / len(at)
    np.testing.assert_allclose(mean_pullback(vae.decoder, at.float()), expected, rtol=0, atol=2e-3 * expected.max())


def test_it_is_the_same_whether_jacobians_are_held_together_or_one_by_one(
    vae: VAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = torch.from_numpy(vae.embed_rows(ROWS))
    together = mean_pullback(vae.decoder, at)
    monkeypatch.setattr("cvae_dist.model.metric._VALUES", 1)
    np.testing.assert_allclose(mean_pullback(vae.decoder, at), together, rtol=1e-5, atol=1e-8)


def stretch(gains: list[float], spread: float = 0.5) -> Stretch:
    """Return the stretch of a decoder that multiplies latents by ``gains``; lengths of rows are ``spread`` about 1."""
    pullback = mean_pullback(lambda z: z * torch.tensor(gains), LATENTS)
    return stretch_of(pullback, LATENTS, torch.linspace(1 - spread, 1 + spread, 20))


def test_directions_are_stretched_by_a_power_of_what_they_do_to_the_rows() -> None:
    found = stretch([9.0, 1.0])
    there, back = found.matrices
    assert there[0, 0] / there[1, 1] == pytest.approx(9**0.5)
    assert there[0, 1] == pytest.approx(0)
    np.testing.assert_allclose(there @ back, np.eye(2), rtol=0, atol=1e-6)
    assert (there @ there).trace() == pytest.approx(2), "on average, lengths stay as they are"
    np.testing.assert_array_equal(found(LATENTS), LATENTS @ there)


def test_lengths_of_latents_differ_less_where_those_of_rows_do_not() -> None:
    found = stretch([3.0, 3.0], spread=0.1)
    before, after = LATENTS.norm(dim=1), found(LATENTS).norm(dim=1)
    np.testing.assert_allclose(after / after[0], (before / before[0]) ** 0.25, rtol=1e-5)
    np.testing.assert_allclose(functional.cosine_similarity(found(LATENTS), LATENTS), 1, rtol=1e-6)
    assert 0.8 < after.mean() / before.mean() < 1.25
    np.testing.assert_allclose(found.undo(found(LATENTS)), LATENTS, rtol=0, atol=1e-5)


def test_a_latent_at_the_origin_stays_there() -> None:
    found = stretch([3.0, 1.0], spread=0)
    np.testing.assert_array_equal(found.undo(found(torch.zeros(1, 2))), torch.zeros(1, 2))


def test_a_direction_that_changes_nothing_can_be_turned_back() -> None:
    for gains in ([1.0, 0.0], [0.0, 0.0]):
        there, back = stretch(gains).matrices
        np.testing.assert_allclose(there @ back, np.eye(2), rtol=0, atol=1e-4)


def test_a_decoder_without_finite_slopes_breaks_nothing() -> None:
    assert stretch([torch.nan, 1.0]).matrices.isfinite().all()


def test_constant_features_do_not_count() -> None:
    vae = VAE.of(CONFIG, Moments.of(ROWS), "<f8").requires_grad_(False).eval()
    vae.measure_stretch(ROWS)
    before = vae.stretch.matrices
    vae.decoder.output.weight[-1] = 100.0
    vae.measure_stretch(ROWS)
    np.testing.assert_allclose(vae.stretch.matrices, before, rtol=1e-5, atol=1e-6)


def test_stretched_latents_are_the_latents_times_the_matrix_and_decode_to_the_same_rows(vae: VAE) -> None:
    latents, stretched = vae.embed_rows(ROWS), vae.embed_rows(ROWS, metric="data")
    np.testing.assert_allclose(stretched, latents @ vae.stretch.matrices[0].numpy(), rtol=0, atol=1e-5)
    assert np.abs(stretched - latents).max() > 0.01
    decoded = vae.decode_rows(stretched, metric="data")
    np.testing.assert_allclose(decoded, vae.decode_rows(latents), rtol=0, atol=1e-4)


def test_stretched_latents_do_not_depend_on_the_rows_beside_them(vae: VAE) -> None:
    whole = vae.embed_rows(ROWS, metric="data")
    np.testing.assert_array_equal(vae.embed_rows(ROWS[::-1], 16, metric="data")[::-1], whole)
    np.testing.assert_array_equal(vae.embed_rows(ROWS[5:6], metric="data")[0], whole[5])


def test_rows_of_one_length_are_stretched_alone_too_and_come_back() -> None:
    rows = ROWS / np.linalg.norm(ROWS, axis=1, keepdims=True)
    rows = np.concatenate([rows, -rows])  # about a mean of zero
    vae = VAE.of(CONFIG, Moments.of(rows), "<f8").requires_grad_(False).eval()
    vae.measure_stretch(rows)
    assert vae.stretch.power == 0.25
    whole = vae.embed_rows(rows, metric="data")
    np.testing.assert_array_equal(vae.embed_rows(rows[::-1], 16, metric="data")[::-1], whole)
    np.testing.assert_array_equal(vae.embed_rows(rows[5:6], metric="data")[0], whole[5])
    decoded = vae.decode_rows(whole, metric="data")
    np.testing.assert_allclose(decoded, vae.decode_rows(vae.embed_rows(rows)), rtol=0, atol=1e-4)


def test_a_model_that_learned_nothing_has_a_stretch() -> None:
    found = stretch_of(torch.zeros(2, 2), torch.zeros(20, 2), torch.ones(20))
    assert found.matrices.isfinite().all()


def test_distances_are_more_like_those_of_the_rows() -> None:
    """Three directions of unlike weight: one latent each, all of unit spread."""
    factors = np.random.default_rng(0).normal(size=(300, 3))
    rows = (factors * [10, 3, 1]) @ np.linalg.qr(np.random.default_rng(1).normal(size=(9, 3)))[0].T
    quick = {"num_steps": 600, "learning_rate": 0.03, "cells_encoder": (32,), "feature_normalization": False}
    model = CompressionVAE(dim_latent=3, random_state=0, **quick).fit(rows)

    def agreement(latents: np.ndarray) -> float:
        pairs = np.array(list(itertools.combinations(range(0, 300, 5), 2)))
        apart = [np.linalg.norm(x[pairs[:, 0]] - x[pairs[:, 1]], axis=1) for x in (rows, latents)]
        return float(np.corrcoef(*apart)[0, 1])

    assert agreement(model.embed(rows, metric="data")) > agreement(model.embed(rows)) + 0.1


def test_the_estimator_stretches_and_undoes_it(estimator: CompressionVAE) -> None:
    stretched = estimator.embed(ROWS, metric="data")
    assert np.abs(stretched - estimator.embed(ROWS)).max() > 1e-3
    restored = estimator.decode(stretched, metric="data")
    np.testing.assert_allclose(restored, estimator.decode(estimator.embed(ROWS)), rtol=0, atol=1e-4)
    np.testing.assert_array_equal(estimator.transform(ROWS), estimator.embed(ROWS, metric="latent"))


def test_lazy_rows_are_stretched_too(estimator: CompressionVAE) -> None:
    dask_array = pytest.importorskip("dask.array")
    lazy = estimator.embed(dask_array.from_array(ROWS, chunks=(20, -1)), metric="data")
    np.testing.assert_array_equal(lazy.compute(), estimator.embed(ROWS, metric="data"))
    decoded = estimator.decode(lazy, metric="data").compute()
    np.testing.assert_allclose(decoded, estimator.decode(estimator.embed(ROWS)), rtol=0, atol=1e-4)


def test_an_unknown_metric_is_refused(estimator: CompressionVAE) -> None:
    for use in (estimator.embed, lambda x, metric: estimator.decode(x[:, :DIM], metric)):
        with pytest.raises(InvalidInput, match="metric='cosine' is unknown: choose 'latent'.*'data'"):
            use(ROWS, metric="cosine")


def test_standard_deviations_are_those_of_the_latents_as_they_are(estimator: CompressionVAE) -> None:
    with pytest.raises(InvalidInput, match="ask for them with metric='latent'"):
        estimator.embed(ROWS, return_std=True, metric="data")


def test_a_model_keeps_its_matrix_and_one_of_before_says_what_to_do(vae: VAE, tmp_path: Path) -> None:
    save_model(str(tmp_path / "model"), vae, {})
    loaded = load_model(str(tmp_path / "model"))
    np.testing.assert_array_equal(loaded.embed_rows(ROWS, metric="data"), vae.embed_rows(ROWS, metric="data"))
    save_model(str(tmp_path / "before"), VAE.of(CONFIG, Moments.of(ROWS), "<f8"), {})
    before = load_model(str(tmp_path / "before"))
    assert before.embed_rows(ROWS).shape == (60, DIM)
    for use in (before.embed_rows, before.decode_rows):
        with pytest.raises(InvalidInput, match="lacks the matrix.*Use metric='latent', or train the model again"):
            use(ROWS, metric="data")


@pytest.mark.parametrize("share", [0.9, 1.0])
def test_a_training_measures_at_the_same_rows_every_time(share: float) -> None:
    first, second = (
        CompressionVAE(dim_latent=2, num_steps=5, train_valid_split=share, random_state=0).fit(ROWS) for _ in range(2)
    )
    np.testing.assert_array_equal(first.model_.stretch.matrices, second.model_.stretch.matrices)
