"""The order of the training rows, row by row, as the recipe in ``training.sampler`` says it."""

import numpy as np

from cvae_dist.store.permutation import BLOCK_ORDER, Permutation, derive_key
from cvae_dist.store.ranges import RowNumbers
from cvae_dist.training.sampler import NO_ROWS, EpochOrder, Sampler


def virtual_axis(sampler: Sampler, epoch: int, excluded: RowNumbers) -> RowNumbers:
    """Return the store rows in the order of their permuted blocks, without the excluded ones."""
    stored = sampler.rows + len(excluded)
    permutation = Permutation(-(-stored // sampler.block_rows), derive_key(sampler.seed, epoch, BLOCK_ORDER))
    blocks = permutation(np.arange(permutation.size))
    axis = (blocks[:, np.newaxis] * sampler.block_rows + np.arange(sampler.block_rows)).ravel()
    return axis[(axis < stored) & ~np.isin(axis, excluded)]


def indices(
    sampler: Sampler, epoch: int, step: int, rank: int = 0, world: int = 1, excluded: RowNumbers = NO_ROWS
) -> RowNumbers:
    """Return the store rows of a rank's part of a step, in the order of ``Sampler.positions``."""
    positions = sampler.positions(step, rank, world) + step * sampler.batch_size
    order = EpochOrder(sampler, epoch, excluded)
    turn, lane = np.divmod(positions, sampler.lanes)
    window, place = np.divmod(turn, sampler.window_rows)
    shuffled = {number: order.window_order(number) for number in set(window.tolist())}
    offset = [shuffled[key][one, each] for key, one, each in zip(window.tolist(), lane, place, strict=True)]
    first = sampler.lane_start(lane) + window * sampler.window_rows
    return virtual_axis(sampler, epoch, excluded)[first + np.array(offset, dtype=np.int64)]
