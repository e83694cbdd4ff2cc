"""Drift: against plain NumPy and SciPy, and what few, constant and missing rows come to."""

import numpy as np
import pytest
from scipy import stats

from cvae_dist.store import ArrayLayout, Drift, Layout, Moments, Sample
from cvae_dist.store.drift import stability_index
from cvae_dist.store.sample import feature_stride, sample_width

BEFORE = np.random.default_rng(0).normal(3, 2, (400, 3))
NEW = np.random.default_rng(1).normal(3, 2, (300, 3)) * [1, 1.5, 1] + [0, 0, 4]


def layout(features: int) -> Layout:
    return Layout(8, 4, (ArrayLayout("x", "<f8", ("sample", "feature"), (features,)),))


def sample(rows: np.ndarray) -> Sample:
    return Sample(np.arange(len(rows)), rows)


def between(before: np.ndarray, new: np.ndarray) -> Drift:
    grid = layout(before.shape[1])
    stride = feature_stride(grid)
    samples = sample(before[:, ::stride]), sample(new[:, ::stride])
    return Drift.between(Moments.of(before), Moments.of(new), samples, grid)


def column(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)[:, None]


def test_shift_and_ratio_are_numpys() -> None:
    found = between(BEFORE, NEW)
    shift = (NEW.mean(axis=0) - BEFORE.mean(axis=0)) / BEFORE.std(axis=0)
    ratio = NEW.std(axis=0) / BEFORE.std(axis=0)
    np.testing.assert_allclose(found.mean_shift, shift, rtol=1e-12)
    np.testing.assert_allclose(found.sd_ratio, ratio, rtol=1e-12)
    np.testing.assert_allclose(found.of_features, np.maximum(np.abs(shift), np.abs(np.log(ratio))), rtol=1e-12)
    assert (found.before, found.new, found.order().tolist()) == (400, 300, [2, 1, 0])
    assert found.largest == found.of_features[2]


def test_stability_index_is_its_formula_over_scipys_counts() -> None:
    found = stability_index(BEFORE, NEW)
    half = 0.5 / len(NEW)  # the smaller sample
    for feature in range(3):
        edges = [-1e9, *np.quantile(BEFORE[:, feature], np.arange(1, 10) / 10), 1e9]
        p, q = (
            (stats.cumfreq(np.searchsorted(edges, rows[:, feature]), 10, (0.5, 10.5)).cumcount) / len(rows)
            for rows in (BEFORE, NEW)
        )
        p, q = ((np.diff(part, prepend=0) + half) / (1 + 10 * half) for part in (p, q))
        np.testing.assert_allclose(found[feature], ((p - q) * np.log(p / q)).sum(), rtol=1e-9)
    assert found[0] < 0.1 < 0.25 < found[1] < found[2]
    np.testing.assert_array_equal(between(BEFORE, NEW).psi, found)


def test_equal_rows_do_not_drift() -> None:
    found = between(BEFORE, BEFORE[::-1])
    np.testing.assert_allclose(found.mean_shift, 0, atol=1e-12)
    np.testing.assert_allclose(found.sd_ratio, 1, rtol=1e-12)
    np.testing.assert_allclose(found.psi, 0, atol=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e9 + 0.1])
def test_a_constant_that_stays_does_not_drift(value: float) -> None:
    found = between(np.full((1000, 1), value), np.full((7, 1), value))
    assert (found.mean_shift.item(), found.sd_ratio.item(), found.psi.item()) == (0, 1, 0)


def test_a_constant_that_becomes_another_drifts_as_far_as_its_rows_tell() -> None:
    found = between(np.full((400, 1), 5.0), np.full((100, 1), 5.001))
    assert found.mean_shift.item() == pytest.approx(20)
    assert (found.sd_ratio.item(), found.psi.item() > 1) == (1, True)


def test_a_constant_that_comes_alive() -> None:
    found = between(np.zeros((10_000, 1)), np.random.default_rng(0).normal(size=(1000, 1)))
    spread = np.ptp(np.random.default_rng(0).normal(size=1000))
    assert found.sd_ratio.item() == pytest.approx(1 / (spread / 100), rel=0.1)
    assert found.largest > 2


def test_a_rare_value_that_appears_or_is_missing_is_small_drift() -> None:
    rare, never = np.zeros((10_000, 1)), np.zeros((5_000, 1))
    rare[17] = 3
    assert between(rare, never).largest < 0.05
    assert between(never, rare).largest < 0.5
    assert between(rare, never[:1]).largest < 0.05


def test_features_with_one_row_are_finite() -> None:
    for before, new in ((column(1), column(2)), (column(1), column(1, 2)), (column(1, 2), column(3))):
        found = between(before, new)
        assert np.isfinite([*found.mean_shift, *found.sd_ratio, *found.psi]).all()
    assert between(column(1, 3), column(5)).mean_shift.item() == 3
    assert between(column(1, 3), column(5)).sd_ratio.item() == 1


def test_skewed_bins_of_a_feature_that_is_mostly_zero() -> None:
    """Nine deciles are one value: the bins between them are empty on both sides, and count nothing."""
    before, new = np.zeros((4000, 1)), np.zeros((40, 1))
    before[::20], new[::20] = 1, 1
    assert stability_index(before, new).item() == pytest.approx(0, abs=1e-12)
    new[::2] = 1
    assert stability_index(before, new).item() > 1


def test_without_a_sample_there_is_no_index() -> None:
    assert np.isnan(stability_index(BEFORE, BEFORE[:0])).all()
    assert np.isnan(stability_index(BEFORE[:0], BEFORE)).all()
    found = Drift.between(Moments.of(BEFORE), Moments.of(NEW), (sample(BEFORE[:0]), sample(NEW)), layout(3))
    assert "PSI" not in found.told()


def test_wide_rows_are_sampled_at_some_features() -> None:
    before = np.random.default_rng(0).normal(size=(50, 2049))
    found = between(before, before + 1)
    assert (feature_stride(layout(2049)), sample_width(layout(2049))) == (3, 683)
    assert np.isfinite(found.psi).nonzero()[0].tolist() == list(range(0, 2049, 3))
    np.testing.assert_array_equal(found.psi[::3], stability_index(before[:, ::3], before[:, ::3] + 1))


def test_told() -> None:
    found = between(BEFORE, NEW)
    assert found.told(("a", "b", "c"), 1) == (
        f"c: mean {found.mean_shift[2]:+.2g} sd, sd x {found.sd_ratio[2]:.3g}, PSI {found.psi[2]:.2g}"
    )
    assert [part.partition(":")[0] for part in found.told().split("; ")] == ["feature 2", "feature 1", "feature 0"]
