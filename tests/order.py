"""The order of the training rows in plain Python, one row at a time, as the recipe in ``training.sampler`` says it."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from cvae_dist.store.ranges import RowNumbers
from cvae_dist.training.sampler import NO_ROWS, Sampler

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
BLOCKS, ROWS = 1, 2  # what keys are for


def mix(word: int) -> int:
    """Finalize SplitMix64."""
    word ^= word >> 30
    word = word * 0xBF58476D1CE4E5B9 & MASK
    word ^= word >> 27
    word = word * 0x94D049BB133111EB & MASK
    return word ^ word >> 31


def derive(*parts: int) -> int:
    key = 0
    for part in parts:
        key = mix((key ^ (part & MASK)) + GOLDEN & MASK)
    return key


def permuted(size: int, key: int, value: int) -> int:
    """A Feistel network on a grid, walked until it is inside."""
    height = next(h for h in range(1, size + 1) if h * h >= size)
    width = -(-size // height)
    while True:
        left, right = divmod(value, width)
        for number in range(6):
            word = derive(key, number)
            if number % 2:
                right = (right + ((mix(left + word & MASK) >> 32) * width >> 32)) % width
            else:
                left = (left + ((mix(right + word & MASK) >> 32) * height >> 32)) % height
        value = left * width + right
        if value < size:
            return value


def reversed_bits(number: int, size: int) -> int:
    bits = size.bit_length() - 1
    return int(format(number, f"0{bits}b")[::-1], 2) if bits else 0


def lane_of(sampler: Sampler, position: int) -> int:
    """Return the lane that serves a position of an epoch."""
    return reversed_bits(position % sampler.window_rows % sampler.lanes, sampler.lanes)


def epoch_rows(sampler: Sampler, epoch: int, excluded: RowNumbers = NO_ROWS) -> tuple[int, ...]:
    """Return the store row of every position of an epoch."""
    return _epoch_rows(sampler, epoch, tuple(excluded.tolist()))


@lru_cache(16)
def _epoch_rows(sampler: Sampler, epoch: int, excluded: tuple[int, ...]) -> tuple[int, ...]:
    stored, size, left_out = sampler.rows + len(excluded), sampler.block_rows, set(excluded)
    blocks, key = -(-stored // size), derive(sampler.seed, epoch, BLOCKS)
    axis: list[int] = []
    for place in range(blocks):
        block = permuted(blocks, key, place)
        axis += [row for row in range(block * size, min((block + 1) * size, stored)) if row not in left_out]
    order: list[int] = []
    for window, first in enumerate(range(0, sampler.rows, sampler.window_rows)):
        order += _shuffled(axis[first : first + sampler.window_rows], sampler, epoch, window)
    return tuple(order)


def _shuffled(rows: list[int], sampler: Sampler, epoch: int, window: int) -> Iterator[int]:
    """Shuffle the lanes of one window, and deal their rows in turn."""
    lanes = sampler.lanes
    turn = [reversed_bits(slot, lanes) for slot in range(lanes)]
    lengths = [0] * lanes
    for position in range(len(rows)):
        lengths[turn[position % lanes]] += 1
    width, window_key = max(lengths), derive(sampler.seed, epoch, ROWS, window)
    dealt, start = [], 0
    for lane, length in enumerate(lengths):
        key = mix(lane * GOLDEN + window_key & MASK)
        low = (1 << max(1, (width - 1).bit_length())) - 1
        ranked = []
        for place in range(length):
            word = mix(place // 2 * GOLDEN + key & MASK)
            half = word >> 32 if place % 2 else word & 0xFFFFFFFF
            ranked.append((half & ~low | place, rows[start + place]))
        dealt.append([row for _, row in sorted(ranked)])
        start += length
    for position in range(len(rows)):
        yield dealt[turn[position % lanes]][position // lanes]


def indices(
    sampler: Sampler, epoch: int, step: int, rank: int = 0, world: int = 1, excluded: RowNumbers = NO_ROWS
) -> RowNumbers:
    """Return the store rows of a rank's part of a step, in the order of ``Sampler.positions``."""
    first = step * sampler.batch_size
    positions = range(first, min(first + sampler.batch_size, sampler.rows))
    lanes = range(rank * sampler.lanes // world, (rank + 1) * sampler.lanes // world)
    order = epoch_rows(sampler, epoch, excluded)
    served = [order[position] for position in positions if lane_of(sampler, position) in lanes]
    return np.array(served, dtype=np.int64)
