"""The sample of a store: which rows are in it depends on their numbers alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cvae_dist.store import ArrayLayout, Layout, Sample
from cvae_dist.store.sample import RunningSample, level_of, sample_width, sampled_rows

LAYOUT = Layout(8, 4, (ArrayLayout("x", "<i8", ("sample", "feature"), (2,)),))
MOST = 4096
levels = st.integers(0, 12)


def values(rows: np.ndarray) -> np.ndarray:
    return np.stack([rows, -rows], axis=1)


def sampled(start: int, stop: int, level: int, cuts: list[int]) -> Sample:
    """Sample rows that come in blocks."""
    running = RunningSample(start, stop, level, LAYOUT)
    edges = [start, *sorted(min(max(cut, start), stop) for cut in cuts), stop]
    for first, last in zip(edges, edges[1:], strict=False):
        running.add(values(np.arange(first, last)))
    return running.sample()


@given(st.integers(0, 2**40), st.integers(0, 5000), levels)
def test_one_of_every_cell(start: int, count: int, level: int) -> None:
    rows = sampled_rows(start, start + count, level)
    assert rows.dtype == np.int64
    assert (np.diff(rows >> level) > 0).all()
    assert len(rows) == 0 or (start <= rows[0] and rows[-1] < start + count)
    assert count // 2**level - 1 <= len(rows) <= count // 2**level + 2


@given(st.integers(0, 3000), st.integers(0, 3000), levels, st.integers(0, 12))
def test_a_higher_level_keeps_some_of_a_lower_one(start: int, count: int, level: int, above: int) -> None:
    low, high = sampled_rows(start, start + count, level), sampled_rows(start, start + count, level + above)
    assert set(high.tolist()) <= set(low.tolist())
    np.testing.assert_array_equal(Sample(low, values(low)).thinned(level + above).rows, high)


@given(st.lists(st.integers(0, 3000), max_size=5), levels, st.lists(st.integers(0, 3000), max_size=5))
def test_any_parts_at_any_lower_levels_come_to_the_same(cuts: list[int], level: int, blocks: list[int]) -> None:
    edges = [0, *sorted(cuts), 3000]
    parts = [
        sampled(start, stop, number % (level + 1), blocks)
        for number, (start, stop) in enumerate(zip(edges, edges[1:], strict=False))
    ]
    found = Sample.joined(part for part in parts).thinned(level)
    np.testing.assert_array_equal(found.rows, sampled_rows(0, 3000, level))
    np.testing.assert_array_equal(found.values, values(found.rows))


@given(st.integers(0, 2**45))
def test_the_level_rises_with_the_rows_and_keeps_half_of_what_is_allowed_at_least(rows: int) -> None:
    level = level_of(rows, LAYOUT)
    assert level_of(rows + 1, LAYOUT) >= level
    assert rows <= MOST << level
    assert level == 0 or rows > MOST << level - 1


@pytest.mark.parametrize("features", [1, 100, 1024, 1025, 4_000_000])
@pytest.mark.parametrize("dtype", ["|u1", "<f4", "<f8"])
def test_a_sample_has_four_megabytes_at_most(features: int, dtype: str) -> None:
    layout = Layout(8, 4, (ArrayLayout("x", dtype, ("sample", "feature"), (features,)),))
    width = sample_width(layout)
    row_bytes = 8 + width * np.dtype(dtype).itemsize
    assert width == min(features, width) <= 1024
    most = 1_000_000 >> level_of(1_000_000, layout)
    assert 240 <= most <= MOST
    assert most * row_bytes <= 4_000_000


def test_rows_are_sampled_evenly() -> None:
    """No residue is preferred, as in data with a period."""
    rows = sampled_rows(0, 2**20, 8)
    for period in (2, 3, 10, 64):
        counts = np.bincount(rows % period, minlength=period)
        expected = len(rows) / period
        assert ((counts - expected) ** 2 / expected).sum() < period + 5 * np.sqrt(2 * period)


def test_no_rows() -> None:
    running = RunningSample(5, 9, None, LAYOUT)
    running.add(values(np.arange(5, 9)))
    for empty in (running.sample(), Sample.none(LAYOUT), Sample.none(LAYOUT).thinned(3)):
        assert (empty.rows.shape, empty.values.shape, empty.values.dtype) == ((0,), (0, 2), np.int64)
