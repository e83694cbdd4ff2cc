"""Merging moments: like one pass over all rows, in any grouping."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cvae_dist.store import Moments

BLOCKS = hnp.arrays(
    np.float64,
    st.tuples(st.integers(2, 60), st.integers(1, 5)),
    elements=st.floats(-1e6, 1e6, allow_subnormal=False),
)


def assert_same(one: Moments, other: Moments, scale: float) -> None:
    assert one.count == other.count
    np.testing.assert_allclose(one.mean, other.mean, rtol=1e-12, atol=1e-12 * scale)
    np.testing.assert_allclose(one.m2, other.m2, rtol=1e-10, atol=1e-12 * scale**2 * one.count)
    np.testing.assert_array_equal(one.minimum, other.minimum)
    np.testing.assert_array_equal(one.maximum, other.maximum)


@settings(max_examples=60, deadline=None)
@given(BLOCKS, st.data())
def test_merge_is_associative_and_equals_one_pass(block: np.ndarray, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(block)), min_size=2, max_size=2)))
    a, b, c = (Moments.of(part) for part in np.split(block, cuts))
    left, right, whole = a.merge(b).merge(c), a.merge(b.merge(c)), Moments.of(block)
    scale = float(np.abs(block).max()) + 1e-300
    assert_same(left, right, scale)
    assert_same(left, whole, scale)


@settings(max_examples=60, deadline=None)
@given(BLOCKS, st.floats(-1e8, 1e8))
def test_a_shift_moves_the_mean_alone(block: np.ndarray, shift: float) -> None:
    plain, moved = Moments.of(block), Moments.of(block + shift)
    size = float(np.abs(block).max()) + abs(shift)
    np.testing.assert_allclose(moved.mean, plain.mean + shift, atol=1e-14 * size + 1e-300, rtol=1e-12)
    np.testing.assert_allclose(moved.std, plain.std, atol=1e-8 * (size + 1e-300), rtol=1e-9)
