import numpy as np
import pytest

from cvae_dist.errors import InvalidInput
from cvae_dist.store.permutation import Permutation, derive_key, pick_rows
from cvae_dist.store.ranges import expand_ranges, split_ranges
from cvae_dist.training.plan import plan_sampler
from cvae_dist.training.sampler import NO_ROWS, EpochOrder, Sampler, Share, skip
from tests.order import indices

MASK = 2**64 - 1


def mix(word: int) -> int:
    word ^= word >> 30
    word = word * 0xBF58476D1CE4E5B9 & MASK
    word ^= word >> 27
    word = word * 0x94D049BB133111EB & MASK
    return word ^ word >> 31


def scalar_permutation(size: int, key: int, value: int) -> int:
    """The same Feistel network in plain integers, one value at a time."""
    height = next(h for h in range(1, size + 1) if h * h >= size)
    width = -(-size // height)
    while True:
        left, right = divmod(value, width)
        for number in range(6):
            word = mix(0 + key + 0x9E3779B97F4A7C15 & MASK)
            word = mix((word ^ number) + 0x9E3779B97F4A7C15 & MASK)
            if number % 2:
                right = (right + ((mix(left + word & MASK) >> 32) * width >> 32)) % width
            else:
                left = (left + ((mix(right + word & MASK) >> 32) * height >> 32)) % height
        value = left * width + right
        if value < size:
            return value


@pytest.mark.parametrize(("size", "key"), [(1, 3), (2, 5), (17, 123456789), (1000, 7), (4999, 2**63)])
def test_permutation_equals_an_independent_scalar_implementation(size: int, key: int) -> None:
    expected = [scalar_permutation(size, key, value) for value in range(size)]
    assert Permutation(size, key)(np.arange(size)).tolist() == expected


def test_the_order_is_frozen() -> None:
    # resumed trainings, other NumPy versions and other machines must go on in the same order
    assert Permutation(1000, 7)(np.arange(6)).tolist() == [584, 776, 735, 693, 403, 779]
    assert derive_key(1, 2, 3) == 15020427595393229491
    assert indices(Sampler(1000, 64, 7, 6, 8, 40), 2, 3)[:8].tolist() == [
        10,
        119,
        225,
        215,
        587,
        293,
        297,
        951,
    ]
    assert pick_rows(1000, 5, seed=1).tolist() == [395, 410, 580, 607, 790]


def test_keys_accept_any_integer() -> None:
    assert derive_key(-1) == derive_key(2**64 - 1)
    assert indices(Sampler(10, 2, -5, 2, 1, 3), 0, 0).shape == (2,)


def test_a_billion_rows_cost_no_more_than_a_thousand() -> None:
    sampler = plan_sampler(10**9, 1024, 16, seed=0, buffer_bytes=96_000_000)
    request = next(Share(sampler, NO_ROWS).requests(epoch=3, step=500_000))
    rows = expand_ranges(request.starts, request.counts)[request.take][:1024]
    assert len(np.unique(rows)) == 1024
    assert 0 <= rows.min() < 10**8 < 9 * 10**8 < rows.max() < 10**9
    starts, counts = EpochOrder(sampler, 3, NO_ROWS).ranges(5)
    assert counts.sum() == sampler.buffer_rows < 2**20
    assert len(starts) < 20_000


@pytest.mark.parametrize("batch_size", [32, 256, 1024, 4096])
def test_plan_keeps_the_variance_inflation_small(batch_size: int) -> None:
    sampler = plan_sampler(10**7, batch_size, 256, seed=0, buffer_bytes=96_000_000)
    assert 1.0 <= sampler.variance_inflation <= 1.1
    slots = 2 * sampler.buffer_rows * (256 + 8) + batch_size * 256
    assert slots <= 96_000_000
    assert sampler.lanes == 48


def test_plan_shuffles_single_rows_when_everything_fits() -> None:
    sampler = plan_sampler(10_000, 256, 256, seed=0, buffer_bytes=96_000_000)
    assert sampler.block_rows == 1
    assert sampler.variance_inflation == 1.0


def test_plan_reads_whole_chunks_where_it_must() -> None:
    sampler = plan_sampler(10**7, 256, 784, seed=0, buffer_bytes=96_000_000, block_rows_hint=83)
    assert sampler.block_rows == 83
    assert sampler.window_rows >= 4 * 83


def test_plan_of_rows_larger_than_the_buffer_still_works() -> None:
    sampler = plan_sampler(5, 3, 10**9, seed=0, buffer_bytes=10**6)
    assert sorted(np.concatenate([indices(sampler, 0, step) for step in range(2)])) == [0, 1, 2, 3, 4]


def test_more_ranks_than_lanes_are_refused() -> None:
    sampler = Sampler(100, 10, 0, 4, 1, 10)
    with pytest.raises(InvalidInput, match="5 ranks share 4 lanes"):
        indices(sampler, 0, 0, rank=0, world=5)
    with pytest.raises(InvalidInput, match="rank 2 of a world of 2"):
        EpochOrder(sampler, 0, NO_ROWS).take(0, rank=2, world=2)


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"batch_size": 0}, {"lanes": 101}, {"block_rows": 0}])
def test_impossible_orders_are_refused(wrong: dict[str, int]) -> None:
    settings = {
        "rows": 100,
        "batch_size": 10,
        "seed": 0,
        "lanes": 4,
        "block_rows": 1,
        "window_rows": 10,
        **wrong,
    }
    with pytest.raises(InvalidInput):
        Sampler(**settings)


def test_steps_outside_the_epoch_are_refused() -> None:
    with pytest.raises(InvalidInput, match="step 10 of an epoch of 10 steps"):
        indices(Sampler(100, 10, 0, 4, 1, 10), 0, 10)


def test_picked_rows_are_nested_as_a_store_grows() -> None:
    small, large = pick_rows(70_000, 500, 3), pick_rows(200_000, 500, 3)
    assert set(large[large < 70_000]) < set(small)
    assert len(small) == len(large) == 500
    assert (np.diff(small) > 0).all()
    assert abs(small.mean() / 35_000 - 1) < 0.1


def test_picked_rows_are_those_with_the_smallest_hashes() -> None:
    hashes = [mix(row * 0x9E3779B97F4A7C15 + derive_key(3, 3) & MASK) for row in range(2000)]
    assert pick_rows(2000, 20, 3).tolist() == sorted(np.argsort(np.array(hashes, np.uint64))[:20].tolist())


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


@pytest.mark.parametrize(("block_rows", "window_rows"), [(1, 50), (4, 250), (16, 250), (16, 1000)])
def test_batches_of_sorted_classes_vary_as_the_law_says(block_rows: int, window_rows: int) -> None:
    rows, batch_size, classes = 100_000, 256, 10
    sampler = Sampler(rows, batch_size, 1, 8, block_rows, window_rows)
    label = np.arange(rows) * classes // rows
    proportions = []
    for epoch in range(2):
        order = EpochOrder(sampler, epoch, NO_ROWS)
        windows = [expand_ranges(*order.ranges(number))[order.take(number)] for number in range(sampler.windows)]
        batches = label[np.concatenate(windows)][: rows // batch_size * batch_size].reshape(-1, batch_size)
        proportions += [np.bincount(batch, minlength=classes) for batch in batches]
    counts = np.array(proportions)
    independent = batch_size * (1 / classes) * (1 - 1 / classes)
    measured = counts.var(axis=0).mean() / independent
    assert 0.8 < measured / sampler.variance_inflation < 1.1
