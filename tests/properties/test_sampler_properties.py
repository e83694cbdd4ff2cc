from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvae_dist.errors import InvalidInput
from cvae_dist.store.permutation import Permutation, pick_rows
from cvae_dist.store.ranges import RowNumbers, expand_ranges
from cvae_dist.training.sampler import NO_ROWS, EpochOrder, Sampler, Share
from tests.order import indices

KEYS = st.integers(0, 2**64 - 1)
pytestmark = pytest.mark.filterwarnings("error")


@st.composite
def samplers(draw: st.DrawFn) -> Sampler:
    rows = draw(st.integers(1, 300))
    return Sampler(
        rows=rows,
        batch_size=draw(st.integers(5, 90)),
        seed=draw(KEYS),
        block_rows=draw(st.integers(1, 40)),
        window_rows=draw(st.integers(1, 300)),
        lanes=2 ** draw(st.integers(0, 9)),
    )


@st.composite
def stores(draw: st.DrawFn) -> tuple[Sampler, RowNumbers]:
    """A sampler, and the rows excluded from the store."""
    sampler = draw(samplers())
    count = draw(st.integers(0, 30))
    return sampler, pick_rows(sampler.rows + count, count, draw(KEYS))


def worlds(draw: st.DataObject, sampler: Sampler) -> list[int]:
    return [1, draw.draw(st.integers(1, min(sampler.lanes, 12))), min(sampler.lanes, 16)]


@given(size=st.integers(1, 5000), key=KEYS)
@settings(max_examples=60, deadline=None)
def test_permutation_is_a_bijection_and_has_an_inverse(size: int, key: int) -> None:
    permutation = Permutation(size, key)
    image = permutation(np.arange(size))
    assert np.array_equal(np.sort(image), np.arange(size))
    assert np.array_equal(permutation.inverse(image), np.arange(size))


@given(store=stores(), epoch=st.integers(0, 5), data=st.data())
@settings(max_examples=25, deadline=None)
def test_every_row_comes_once_and_steps_do_not_depend_on_the_world(
    store: tuple[Sampler, RowNumbers], epoch: int, data: st.DataObject
) -> None:
    sampler, excluded = store
    kept = np.setdiff1d(np.arange(sampler.rows + len(excluded)), excluded)
    alone = [indices(sampler, epoch, step, excluded=excluded) for step in range(sampler.steps_per_epoch)]
    assert np.array_equal(np.sort(np.concatenate(alone)), kept)
    assert [len(rows) for rows in alone[:-1]] == [sampler.batch_size] * (len(alone) - 1)
    for world in worlds(data, sampler):
        for step, rows in enumerate(alone):
            whole = np.full(len(rows), -1)
            for rank in range(world):
                part = sampler.positions(step, rank, world)
                assert (whole[part] == -1).all()
                whole[part] = indices(sampler, epoch, step, rank, world, excluded)
            assert np.array_equal(whole, rows)


@given(store=stores(), epoch=st.integers(0, 5), data=st.data())
@settings(max_examples=25, deadline=None)
def test_windows_hold_the_rows_of_the_steps_in_order(
    store: tuple[Sampler, RowNumbers], epoch: int, data: st.DataObject
) -> None:
    sampler, excluded = store
    order = EpochOrder(sampler, epoch, excluded)
    for world in worlds(data, sampler):
        reads = 0
        for rank in range(world):
            windows = [NO_ROWS]
            for window in range(sampler.windows):
                starts, counts = order.ranges(window, rank, world)
                assert (counts > 0).all()
                taken = order.take(window, rank, world)
                assert len(taken) == counts.sum() == len(sampler.served(*sampler.window(window), rank, world))
                windows.append(expand_ranges(starts, counts)[taken])
                reads += len(starts)
            steps = range(sampler.steps_per_epoch)
            expected = [indices(sampler, epoch, step, rank, world, excluded) for step in steps]
            assert np.array_equal(np.concatenate(windows), np.concatenate(expected))
        blocks = -(-(sampler.rows + len(excluded)) // sampler.block_rows)
        assert reads <= blocks + sampler.windows * world + len(excluded)


@given(store=stores(), most=st.integers(1, 400), data=st.data())
@settings(max_examples=25, deadline=None)
def test_requests_hold_the_rows_of_the_parts_from_any_position_on(
    store: tuple[Sampler, RowNumbers], most: int, data: st.DataObject
) -> None:
    sampler, excluded = store
    world = data.draw(st.integers(1, min(sampler.lanes, 12)))
    share = Share(sampler, excluded, data.draw(st.integers(0, world - 1)), world)
    epoch, first = data.draw(st.integers(0, 3)), data.draw(st.integers(0, sampler.steps_per_epoch - 1))
    wanted: list[int] = []
    steps = sampler.steps_per_epoch + 2
    for number, part in enumerate(islice(share.parts(epoch, first), steps), start=first):
        assert (part.epoch, part.step) == (epoch + number // sampler.steps_per_epoch, number % sampler.steps_per_epoch)
        start, end = sampler.step(part.step)
        assert part.n_global == end - start
        assert np.array_equal(part.positions, sampler.positions(part.step, share.rank, world))
        wanted += indices(sampler, part.epoch, part.step, share.rank, world, excluded).tolist()
    given: list[int] = []
    requests = share.requests(epoch, first, most)
    while len(given) < len(wanted):
        request = next(requests)
        assert len(request.take) <= request.counts.sum() <= share.window_rows
        assert len(request.take) <= most
        given += expand_ranges(request.starts, request.counts)[request.take].tolist()
    assert given[: len(wanted)] == wanted
    assert share.stored_rows == sampler.rows + len(excluded)


@given(sampler=samplers(), data=st.data())
@settings(max_examples=30, deadline=None)
def test_any_stops_and_resumes_with_other_worlds_yield_each_row_once(sampler: Sampler, data: st.DataObject) -> None:
    seen: list[RowNumbers] = []
    step = 0
    while step < sampler.steps_per_epoch:
        world = data.draw(st.integers(1, min(sampler.lanes, 12)))
        stop = data.draw(st.integers(step + 1, sampler.steps_per_epoch))
        for done in range(step, stop):
            seen += [indices(sampler, 1, done, rank, world) for rank in range(world)]
        step = stop
    assert np.array_equal(np.sort(np.concatenate(seen)), np.arange(sampler.rows))


@given(sampler=samplers(), epoch=st.integers(0, 10))
@settings(max_examples=30, deadline=None)
def test_other_seeds_and_epochs_give_other_orders(sampler: Sampler, epoch: int) -> None:
    # a window or a block order of few elements may repeat by chance
    sampler = replace(sampler, rows=sampler.rows + 100, block_rows=min(sampler.block_rows, 5))

    def whole(sampler: Sampler, epoch: int) -> list[int]:
        order = EpochOrder(sampler, epoch, NO_ROWS)
        windows = [expand_ranges(*order.ranges(number))[order.take(number)] for number in range(sampler.windows)]
        return [int(row) for rows in windows for row in rows]

    order = whole(sampler, epoch)
    assert order == whole(sampler, epoch)
    assert order != whole(sampler, epoch + 1)
    assert order != whole(replace(sampler, seed=sampler.seed + 1), epoch)


@given(sampler=samplers(), extra=st.integers(1, 50))
@settings(max_examples=20, deadline=None)
def test_more_ranks_than_lanes_are_refused(sampler: Sampler, extra: int) -> None:
    with pytest.raises(InvalidInput):
        sampler.positions(0, 0, sampler.lanes + extra)
