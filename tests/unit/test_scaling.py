import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine

from cvae_dist.errors import InvalidInput
from cvae_dist.model.scaling import Scaling, are_vectors, bounds, choose_normalization
from cvae_dist.store import Moments


def scaling_of(rows: np.ndarray, *, per_feature: bool = True) -> Scaling:
    return Scaling.of(Moments.of(rows), rows.dtype, per_feature=per_feature)


def standardised(rows: np.ndarray, *, per_feature: bool = True) -> np.ndarray:
    return scaling_of(rows, per_feature=per_feature)(torch.from_numpy(rows)).numpy()


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "u1", "i2", "i4", "i8"])
def test_every_type_is_standardised_as_float64_would(dtype: str) -> None:
    rows = (np.random.default_rng(0).normal(100, 30, (500, 5))).astype(dtype)
    expected = (rows.astype(np.float64) - rows.mean(0, dtype=np.float64)) / rows.std(0, dtype=np.float64)
    np.testing.assert_allclose(standardised(rows), expected, rtol=0, atol=1.5e-6)


def test_a_large_offset_costs_no_digits() -> None:
    rows = np.random.default_rng(0).normal(1e6, 1, (500, 3))
    expected = (rows - rows.mean(0)) / rows.std(0)
    np.testing.assert_allclose(standardised(rows), expected, rtol=0, atol=1e-6)
    single = (rows.astype(np.float32) - rows.mean(0).astype(np.float32)) / rows.std(0).astype(np.float32)
    assert np.abs(single - expected).max() > 1e-2, "float32 would have been good enough: this tests nothing"


def test_restoring_a_large_offset_keeps_its_digits() -> None:
    rows = np.random.default_rng(0).normal(1e6, 1, (100, 3))
    scaling = scaling_of(rows)
    restored = scaling.restore(scaling(torch.from_numpy(rows)))
    assert restored.numpy().dtype == scaling.restored_dtype == np.float64
    np.testing.assert_allclose(restored, rows, rtol=0, atol=1e-6)


def test_constants_become_zero_and_come_back() -> None:
    rows = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    rows[:, 1], rows[:, 3] = 7.25, 0.1
    scaling = scaling_of(rows)
    assert scaling.active.tolist() == [True, False, True, False]
    assert not scaling(torch.from_numpy(rows + 100))[:, [1, 3]].any()
    np.testing.assert_array_equal(scaling.restore(torch.randn(9, 4))[:, [1, 3]], [[7.25, np.float32(0.1)]] * 9)


def test_noise_of_rounding_counts_as_constant() -> None:
    rows = np.full((100, 2), 0.1, np.float32)
    rows[::2, 0] = np.nextafter(np.float32(0.1), np.float32(1))
    assert not scaling_of(rows).active.any()


def test_a_rare_feature_stays_within_ten_units() -> None:
    rows = np.zeros((100_000, 2))
    rows[5, 0] = 255
    rows[:, 1] = np.random.default_rng(0).normal(size=100_000)
    assert 255 / rows[:, 0].std() > 300
    assert np.abs(standardised(rows)[:, 0]).max() == pytest.approx(10, rel=1e-6)


def test_one_scale_for_all_keeps_the_proportions_of_features() -> None:
    rows = np.random.default_rng(0).normal(size=(1000, 2)) * [1, 10]
    result = standardised(rows, per_feature=False)
    assert result[:, 1].std() / result[:, 0].std() == pytest.approx(rows[:, 1].std() / rows[:, 0].std(), rel=1e-5)
    assert np.mean(result.var(axis=0)) == pytest.approx(1, rel=1e-5)


def test_far_magnitudes_do_not_overflow() -> None:
    rows = np.random.default_rng(0).normal(size=(100, 2)) * [1e-40, 1e40]
    assert np.abs(standardised(rows).std(axis=0) - 1).max() < 1e-5


def test_homogeneous_units_are_recognised() -> None:
    rng = np.random.default_rng(0)
    embeddings = Moments.of(rng.normal(size=(1000, 64)))
    mixed = Moments.of(rng.normal(size=(1000, 64)) * np.geomspace(1e-3, 1e3, 64))
    assert choose_normalization("auto", embeddings, "<f4", (64,)).value is False
    assert choose_normalization("auto", mixed, "<f4", (64,)).value is True
    assert choose_normalization("auto", mixed, "<f4", (8, 8)).value is False
    assert choose_normalization("auto", mixed, "|u1", (64,)).value is False
    assert choose_normalization(True, embeddings, "|u1", (8, 8)).value is True
    assert choose_normalization(False, mixed, "<f4", (64,)).value is False


def _embedding(rng: np.random.Generator) -> np.ndarray:
    """Return 500 unit vectors of 96 features whose spreads decrease by a factor of 4."""
    rows = rng.normal(size=(500, 96)) * np.geomspace(1, 0.25, 96)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _large_dimensions(rng: np.random.Generator) -> np.ndarray:
    rows = _embedding(rng)
    rows[:, [7, 50]] *= 30
    return rows


def _spectra(rng: np.random.Generator) -> np.ndarray:
    """Return mixtures of 5 bands over faint noise: weak regions vary a tenth as much as strong ones."""
    channels = np.linspace(0, 1, 120)
    bands = np.exp(-(((channels - rng.uniform(0, 1, (5, 1))) / 0.07) ** 2))
    return rng.lognormal(size=(500, 5)) @ bands + rng.normal(0, 0.05, (500, 120))


def _dead_channel(rng: np.random.Generator) -> np.ndarray:
    """Return spectra with one channel among weak ones that hardly varies, as in the corner of an image."""
    rows = _spectra(rng)
    rows[:, rows.std(axis=0).argmin()] *= 1e-4
    return rows


SHARED_UNIT = {
    "unit vectors": _embedding,
    "vectors with norms of their own": lambda rng: _embedding(rng) * rng.lognormal(size=(500, 1)),
    "vectors with an offset": lambda rng: _embedding(rng) + rng.normal(0, 5, 96),
    "vectors with large dimensions": _large_dimensions,
    "vectors and constants": lambda rng: np.pad(_embedding(rng), ((0, 0), (30, 0)), constant_values=2.5),
    "spectra": _spectra,
    "spectra with a dead channel": _dead_channel,
    "decaying waves": lambda rng: np.sin(np.arange(64) + rng.uniform(0, 6, (500, 1))) * np.exp(-np.arange(64) / 20),
    "images": lambda rng: np.sort(rng.uniform(size=(500, 64)), axis=1) * (rng.uniform(size=(500, 64)) < 0.3),
    "columns of 0 and 1": lambda rng: (rng.uniform(size=(500, 40)) < np.geomspace(0.01, 0.9, 40)).astype(float),
    "a standardised table": lambda rng: rng.normal(size=(500, 12)),
}
MIXED_UNITS = {
    "wine": lambda rng: load_wine().data,
    "breast cancer": lambda rng: load_breast_cancer().data,
    "diabetes": lambda rng: load_diabetes(scaled=False).data,
    "two blocks of a unit each": lambda rng: rng.normal(size=(500, 40)) * np.repeat([1, 30], 20),
    "a table with offsets": lambda rng: rng.normal(size=(500, 12)) * np.tile([1, 40, 7], 4) + np.arange(12) * 100,
    "numbers beside columns of 0 and 1": lambda rng: np.hstack(
        [rng.normal(50, 20, (500, 5)), rng.uniform(size=(500, 15)) < 0.1]
    ),
    "7 features": lambda rng: rng.normal(size=(500, 7)),
    "constants alone": lambda rng: np.full((500, 12), 3.0),
}


@pytest.mark.parametrize("name", [*SHARED_UNIT, *MIXED_UNITS])
def test_one_scale_is_chosen_where_features_share_their_unit(name: str) -> None:
    rows = (SHARED_UNIT | MIXED_UNITS)[name](np.random.default_rng(0))
    choice = choose_normalization("auto", Moments.of(rows), rows.dtype, rows.shape[1:])
    assert choice.value is (name in MIXED_UNITS), choice.reason


VECTORS = {
    "unit vectors", "vectors with norms of their own", "vectors with an offset", "vectors with large dimensions",
    "vectors and constants", "a standardised table",
}  # fmt: skip


@pytest.mark.parametrize("name", [*SHARED_UNIT, *MIXED_UNITS])
def test_vectors_are_told_from_images_and_tables(name: str) -> None:
    rows = (SHARED_UNIT | MIXED_UNITS)[name](np.random.default_rng(0))
    assert are_vectors(Moments.of(rows), rows.dtype, rows.shape[1:]) == (name in VECTORS)


def test_images_are_no_vectors_however_they_are_scaled() -> None:
    rng = np.random.default_rng(0)
    images = rng.beta(0.3, 1, (2000, 64)) * rng.uniform(0.1, 1, 64)
    for rows in (images, 1 - images, (images - images.mean(axis=0)) / images.std(axis=0), images - 0.3):
        assert not are_vectors(Moments.of(rows), "<f4", (64,))


def test_vectors_are_floats_in_one_dimension() -> None:
    moments = Moments.of(np.random.default_rng(0).normal(size=(2000, 64)))
    assert are_vectors(moments, "<f2", (64,))
    assert not are_vectors(moments, "<f4", (8, 8))
    assert not are_vectors(moments, "<i2", (64,))


def test_the_number_that_decided_is_told() -> None:
    rows = load_wine().data
    low, high = np.percentile(rows.std(axis=0), [5, 95])
    reason = choose_normalization("auto", Moments.of(rows), rows.dtype, (13,)).reason
    assert reason.startswith("one scale per feature")
    assert f"standard deviations: {high / low:.3g}" in reason


def test_what_is_not_finite_decides_nothing_but_breaks_nothing() -> None:
    huge = Moments(2, np.zeros(9), np.array([1.0, *[np.inf] * 8]), -np.ones(9), np.ones(9) * np.arange(1, 10))
    assert choose_normalization("auto", huge, "<f8", (9,)).value is True
    assert not are_vectors(huge, "<f8", (9,))


def test_bounds() -> None:
    def of(low: float, high: float, dtype: str) -> tuple[float, float]:
        return bounds(Moments.of(np.array([[low], [high]])), dtype)

    assert of(0, 1, "|u1") == (0, 1)
    assert of(3, 200, "|u1") == (0, 255)
    assert of(0, 16, "|u1") == (0, 16)
    assert of(0.2, 0.9, "<f4") == (0, 1)
    assert of(-3, 200, "<f4") == (-3, 200)


def test_no_rows_and_infinite_variance_are_refused() -> None:
    with pytest.raises(InvalidInput, match="no rows"):
        Scaling.of(Moments.empty(3), "<f4", per_feature=True)
    huge = Moments(2, np.zeros(2), np.array([1.0, np.inf]), -np.ones(2), np.ones(2))
    with pytest.raises(InvalidInput, match="first is feature 1"):
        Scaling.of(huge, "<f8", per_feature=True)


def test_one_scale_for_all_centres_every_feature() -> None:
    rows = np.random.default_rng(0).integers(0, 256, (500, 6)).astype(np.uint8) // np.arange(1, 7, dtype=np.uint8)
    result = standardised(rows, per_feature=False)
    assert np.abs(result.mean(axis=0)).max() < 1e-5
    assert np.abs(result).max() < 10


def test_scales_far_apart_all_become_one() -> None:
    rows = np.random.default_rng(0).normal(3, 1, (1000, 13)) * np.geomspace(1e-6, 1e6, 13)
    np.testing.assert_allclose(standardised(rows).std(axis=0), 1, rtol=1e-5)


def test_a_lone_outlier_leaves_no_row_further_out_than_ten_units() -> None:
    rows = np.random.default_rng(0).normal(size=(10_000, 2))
    rows[3, 0] = 1e9
    result = standardised(rows)
    assert np.abs(result[:, 0]).max() == pytest.approx(10, rel=1e-6)
    assert np.isfinite(result).all()
