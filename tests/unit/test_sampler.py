import time
import tracemalloc

import numpy as np
import pytest

from cvae_dist.errors import InvalidInput
from cvae_dist.store.permutation import Permutation, derive_key, hold_out, pick_rows
from cvae_dist.store.ranges import RowNumbers, expand_ranges, split_ranges
from cvae_dist.training.plan import plan_sampler
from cvae_dist.training.sampler import NO_ROWS, EpochOrder, Sampler, Share, bit_reversed, skip
from tests.order import GOLDEN, MASK, derive, epoch_rows, mix, permuted


@pytest.mark.parametrize(("size", "key"), [(1, 3), (2, 5), (17, 123456789), (1000, 7), (4999, 2**63)])
def test_permutation_equals_an_independent_scalar_implementation(size: int, key: int) -> None:
    expected = [permuted(size, key, value) for value in range(size)]
    assert Permutation(size, key)(np.arange(size)).tolist() == expected


def whole_epoch(sampler: Sampler, epoch: int, excluded: RowNumbers = NO_ROWS) -> list[int]:
    """Return the rows of an epoch, window after window."""
    order = EpochOrder(sampler, epoch, excluded)
    windows = [expand_ranges(*order.ranges(number))[order.take(number)] for number in range(sampler.windows)]
    return np.concatenate(windows).tolist()


def test_the_keys_are_frozen() -> None:
    # resumed trainings, other NumPy versions and other machines must go on in the same order
    assert Permutation(1000, 7)(np.arange(6)).tolist() == [584, 776, 735, 693, 403, 779]
    assert derive_key(1, 2, 3) == derive(1, 2, 3) == 15020427595393229491
    assert pick_rows(1000, 5, seed=1).tolist() == [395, 410, 580, 607, 790]


@pytest.mark.parametrize(
    "sampler",
    [
        Sampler(1000, 64, 7, 8, 200, lanes=16),
        Sampler(1000, 64, 2**63 - 1, 1, 333, lanes=64),  # windows and lanes of unequal length
        Sampler(97, 10, 0, 5, 50, lanes=128),  # lanes that have no row
        Sampler(9000, 256, 3, 4, 8192),
    ],
)
def test_the_order_equals_an_independent_scalar_implementation(sampler: Sampler) -> None:
    excluded = pick_rows(sampler.rows + 30, 30, 1)
    assert tuple(whole_epoch(sampler, 2, excluded)) == epoch_rows(sampler, 2, excluded)


def test_keys_accept_any_integer() -> None:
    assert derive_key(-1) == derive_key(2**64 - 1)
    assert len(whole_epoch(Sampler(10, 2, -5, 1, 6, lanes=2), 0)) == 10


def test_a_billion_rows_cost_no_more_than_a_thousand() -> None:
    sampler = plan_sampler(10**9, 1024, 16, seed=0, buffer_bytes=256_000_000, excluded_rows=10_000)
    excluded = np.arange(10_000) * 99_991
    tracemalloc.start()
    request = next(Share(sampler, excluded).requests(3, 500_000, 2**20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 2**20
    seconds = []
    for _ in range(3):
        began = time.process_time()
        request = next(Share(sampler, excluded).requests(3, 500_000, 2**20))
        seconds.append(time.process_time() - began)
    assert min(seconds) < 0.1
    rows = expand_ranges(request.starts, request.counts)[request.take][:1024]
    assert len(np.unique(rows)) == 1024
    assert 0 <= rows.min() < 10**8 < 9 * 10**8 < rows.max() < 10**9 + 10_000


@pytest.mark.parametrize("batch_size", [16, 256, 1024, 4096, 65_536])
@pytest.mark.parametrize("row_bytes", [4, 256, 3072, 40_000, 3_000_000])
def test_plan_keeps_the_variance_inflation_small(batch_size: int, row_bytes: int) -> None:
    sampler = plan_sampler(10**8, batch_size, row_bytes, seed=0, buffer_bytes=256_000_000)
    assert 1.0 <= sampler.variance_inflation <= 1.1
    assert sampler.lanes == 4096
    if sampler.block_rows > 1:
        assert 2 * sampler.buffer_rows * row_bytes + batch_size * row_bytes <= 256_000_000
    assert sampler.block_rows * row_bytes <= max(row_bytes, 65_536)


def test_plan_shuffles_single_rows_when_everything_fits() -> None:
    sampler = plan_sampler(10_000, 256, 256, seed=0, buffer_bytes=96_000_000)
    assert sampler.block_rows == 1
    assert sampler.variance_inflation == 1.0


def test_plan_reads_whole_chunks_where_it_must() -> None:
    for batch_size, limit in ((256, 1.02), (1024, 1.15)):
        sampler = plan_sampler(10**7, batch_size, 784, seed=0, buffer_bytes=256_000_000, block_rows_hint=83)
        assert sampler.block_rows == 83
        assert 1.0 < sampler.variance_inflation < limit


def test_plan_of_rows_larger_than_the_buffer_still_works() -> None:
    sampler = plan_sampler(5, 3, 10**9, seed=0, buffer_bytes=10**6)
    assert sorted(whole_epoch(sampler, 0)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("batch_size", [256, 1000, 1024, 65_536])
@pytest.mark.parametrize("world", [2, 3, 7, 16, 64, 100, 256])
def test_a_step_is_shared_equally(batch_size: int, world: int) -> None:
    sampler = Sampler(10**6, batch_size, 0, 1, 2**16)
    steps = range(min(sampler.steps_per_epoch - 1, 1 + 4096 // batch_size))
    ranks = range(0, world, max(1, world // 16))
    shares = np.array([[len(sampler.positions(step, rank, world)) for rank in ranks] for step in steps])
    assert shares.max() <= np.ceil(batch_size / world) + 0.06 * batch_size / world + 1


def test_more_ranks_than_lanes_are_refused() -> None:
    sampler = Sampler(100, 10, 0, 1, 10, lanes=4)
    with pytest.raises(InvalidInput, match="5 ranks share 4 lanes"):
        sampler.positions(0, rank=0, world=5)
    with pytest.raises(InvalidInput, match="rank 2 of a world of 2"):
        EpochOrder(sampler, 0, NO_ROWS).take(0, rank=2, world=2)


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"batch_size": 0}, {"lanes": 48}, {"block_rows": 0}, {"lanes": 0}])
def test_impossible_orders_are_refused(wrong: dict[str, int]) -> None:
    settings = {"rows": 100, "batch_size": 10, "seed": 0, "lanes": 4, "block_rows": 1, "window_rows": 10, **wrong}
    with pytest.raises(InvalidInput):
        Sampler(**settings)


def test_bits_are_reversed() -> None:
    assert bit_reversed(8).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]
    assert bit_reversed(1).tolist() == [0]
    assert (bit_reversed(4096)[bit_reversed(4096)] == np.arange(4096)).all()


def test_steps_outside_the_epoch_are_refused() -> None:
    with pytest.raises(InvalidInput, match="step 10 of an epoch of 10 steps"):
        Sampler(100, 10, 0, 1, 10, lanes=4).step(10)


def test_picked_rows_are_nested_as_a_store_grows() -> None:
    small, large = pick_rows(70_000, 500, 3), pick_rows(200_000, 500, 3)
    assert set(large[large < 70_000]) < set(small)
    assert len(small) == len(large) == 500
    assert (np.diff(small) > 0).all()
    assert abs(small.mean() / 35_000 - 1) < 0.1


def test_picked_rows_are_those_with_the_smallest_hashes() -> None:
    hashes = [mix(row * GOLDEN + derive(3, 3) & MASK) for row in range(2000)]
    assert pick_rows(2000, 20, 3).tolist() == sorted(np.argsort(np.array(hashes, np.uint64))[:20].tolist())


@pytest.mark.parametrize(("share", "most"), [(0.1, 10_000), (0.1, 50), (0.37, 20), (0.99, 7), (1.0, 3), (0.001, 5)])
def test_a_row_that_validated_never_trains_as_a_store_grows(share: float, most: int) -> None:
    before = np.empty(0, np.int64)
    for rows in [*range(1, 60), 99, 100, 101, 333, 1000, 5000, 40_000, 41_000, 10**6]:
        validating, excluded = hold_out(rows, share, most, 3)
        assert np.isin(before, excluded).all()
        assert np.isin(validating, excluded).all()
        assert (np.diff(validating) > 0).all()
        assert (np.diff(excluded) > 0).all()
        assert len(excluded) < rows
        assert len(validating) <= min(most, np.ceil(rows * share))
        assert len(validating) >= min(most, np.floor(rows * share) - 1, rows - 1) * (0.5 if share > 0.3 else 1)
        before = validating


def test_held_out_rows_are_spread_evenly_and_few_where_there_are_many_rows() -> None:
    assert len(hold_out(300, 1 - 0.9, 10_000, 0)[0]) == 30
    assert hold_out(1000, 0.0, 10_000, 0)[0].size == 0
    validating, excluded = hold_out(10**9, 0.1, 10_000, 0)
    assert len(validating) == 10_000
    assert len(excluded) < 160_000
    counts = np.histogram(validating, 10, (0, 10**9))[0]
    assert np.abs(counts - 1000).max() < 150
    assert not np.array_equal(validating, hold_out(10**9, 0.1, 10_000, 1)[0])


def test_picked_rows_at_the_limits() -> None:
    assert pick_rows(5, 0, 0).tolist() == []
    assert pick_rows(5, 9, 0).tolist() == [0, 1, 2, 3, 4]
    assert pick_rows(0, 9, 0).tolist() == []


def test_skip_and_split_leave_out_the_excluded_rows() -> None:
    excluded = np.array([0, 3, 4, 9])
    kept = [1, 2, 5, 6, 7, 8, 10, 11]
    assert skip(np.arange(8), excluded).tolist() == kept
    starts, counts = split_ranges(np.array([6, 0, 3]), np.array([6, 6, 1]), excluded)
    assert expand_ranges(starts, counts).tolist() == [6, 7, 8, 10, 11, 1, 2, 5]


@pytest.mark.parametrize(
    ("block_rows", "window_rows", "batch_size", "lanes"),
    [(1, 4096, 256, 4096), (16, 16_384, 256, 4096), (64, 16_384, 256, 4096), (32, 8192, 300, 512), (16, 8192, 256, 32),
     (64, 8192, 256, 4096), (8, 2000, 256, 4096)],
)  # fmt: skip
def test_batches_of_sorted_classes_vary_as_the_law_says(
    block_rows: int, window_rows: int, batch_size: int, lanes: int
) -> None:
    rows, classes = 100_000, 10
    sampler = Sampler(rows, batch_size, 1, block_rows, window_rows, lanes)
    label = np.arange(rows) * classes // rows
    proportions = []
    for epoch in range(4):
        order = np.array(whole_epoch(sampler, epoch))
        batches = label[order][: rows // batch_size * batch_size].reshape(-1, batch_size)
        proportions += [np.bincount(batch, minlength=classes) for batch in batches]
        assert np.abs(np.diff(order)).mean() == pytest.approx(rows / 3, rel=0.03)
    counts = np.array(proportions)
    independent = batch_size * (1 / classes) * (1 - 1 / classes)
    measured = counts.var(axis=0).mean() / independent
    assert 0.6 < measured / sampler.variance_inflation < 1.1
