"""How rows are dealt: whatever the sizes, every row goes to one place, and every shard gets its share of every run."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cvae_dist.cluster.shuffle import Deal
from cvae_dist.store.permutation import derive_key, shuffled


@st.composite
def deals(draw: st.DrawFn) -> Deal:
    rows, size = draw(st.integers(1, 80)), draw(st.integers(1, 20))
    return Deal(
        rows, draw(st.integers(1, min(rows, 9))), size, draw(st.integers(0, size - 1)), draw(st.integers(0, 99))
    )


@given(deals())
def test_all_rows_are_dealt_once(deal: Deal) -> None:
    lengths = np.diff(deal.run_edges)
    assert deal.run_edges[0] == 0
    assert deal.run_edges[-1] == lengths.sum() == deal.rows
    assert set(lengths) <= {lengths.min(), lengths.min() + 1}
    shards = np.diff(deal.shard_edges)
    assert shards.sum() == deal.rows
    assert deal.lead + shards[0] <= deal.rows_per_shard
    assert (shards[1:-1] == deal.rows_per_shard).all()
    given = np.array([np.diff(deal.given(run, deal.shard_edges)) for run in range(deal.runs)])
    assert (given.sum(axis=1) == lengths).all()
    assert (given.sum(axis=0) == shards).all()
    assert (given.max(axis=0) - given.min(axis=0) <= 1).all()
    for run, length in enumerate(lengths.tolist()):
        assert sorted(deal.order_of_run(run)) == list(range(length))
    for shard, count in enumerate(shards.tolist()):
        assert sorted(deal.order_of_shard(shard)) == list(range(count))


@given(st.integers(0, 500), st.integers(0, 2**64 - 1))
def test_shuffled_numbers(size: int, key: int) -> None:
    assert sorted(shuffled(size, key)) == list(range(size))


def test_neither_places_nor_neighbours_are_correlated() -> None:
    places = np.arange(5_000)
    orders = [shuffled(len(places), derive_key(seed)) for seed in range(100)]
    pairs = ([(order, places) for order in orders], [(order[1:], order[:-1]) for order in orders])
    for some in pairs:
        correlations = [np.corrcoef(*pair)[0, 1] * np.sqrt(len(places)) for pair in some]
        assert 0.8 < np.std(correlations) < 1.2
        assert abs(np.mean(correlations)) < 0.3


def test_the_order_is_frozen() -> None:
    # a run that was killed must go on in the same order with other NumPy versions and on other machines
    assert shuffled(10, 7).tolist() == [2, 0, 9, 6, 8, 1, 5, 7, 4, 3]
    large = shuffled(100_000, 1)
    assert sorted(large.tolist()) == list(range(100_000))
    assert large[:3].tolist() == [29839, 47734, 52713]
