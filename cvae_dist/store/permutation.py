"""Chance that is a pure function of keys: a permutation of any size, and rows picked by their hashes."""

import math
from dataclasses import dataclass
from functools import cached_property
from math import isqrt

import numpy as np
import numpy.typing as npt

from cvae_dist.store.hashing import GOLDEN, MIX_1, MIX_2, Words, mix
from cvae_dist.store.ranges import RowNumbers

_ROUNDS = 6
_MASK = 2**64 - 1
BLOCK_ORDER, ROW_ORDER, PICKED, STORED_ORDER, HELD_OUT, VALIDATES = 1, 2, 3, 4, 5, 6  # what a derived key is for
_HASHED_ROWS = 2**16  # rows hashed at once: the temporaries stay in the second level cache


@dataclass(frozen=True)
class Permutation:
    """Keyed invertible permutation of ``range(size)`` in O(1) memory.

    A Feistel network (Luby and Rackoff 1988) on a grid just larger than ``size``. It is repeated for the few values
    that fall outside (cycle walking, Black and Rogaway 2002).
    """

    size: int
    key: int

    def __call__(self, values: RowNumbers) -> RowNumbers:
        """Return where each of ``values`` (int64, inside ``range(size)``) goes."""
        return self._walk(values, inverse=False)

    def inverse(self, values: RowNumbers) -> RowNumbers:
        """Return what goes to each of ``values``."""
        return self._walk(values, inverse=True)

    @cached_property
    def _grid(self) -> tuple[np.uint64, np.uint64]:
        height = isqrt(max(1, self.size) - 1) + 1
        return np.uint64(height), np.uint64(-(-self.size // height))

    @cached_property
    def _keys(self) -> tuple[np.uint64, ...]:
        return tuple(np.uint64(derive_key(self.key, number)) for number in range(_ROUNDS))

    def _walk(self, values: RowNumbers, inverse: bool) -> RowNumbers:
        result = self._permute(values.astype(np.uint64), inverse)
        outside = np.flatnonzero(result >= np.uint64(self.size))
        while outside.size:
            walked = self._permute(result[outside], inverse)
            result[outside] = walked
            outside = outside[walked >= np.uint64(self.size)]
        return result.view(np.int64)

    def _permute(self, values: Words, inverse: bool) -> Words:
        height, width = self._grid
        left = values // width
        right = values - left * width
        rounds = tuple(enumerate(self._keys))
        for number, key in reversed(rounds) if inverse else rounds:
            if number % 2:
                moved = _below(left + key, width)
                right = _wrap(right + (width - moved if inverse else moved), width)
            else:
                moved = _below(right + key, height)
                left = _wrap(left + (height - moved if inverse else moved), height)
        return left * width + right


def shuffled(size: int, key: int) -> RowNumbers:
    """Return ``range(size)``, below 2**32, in the order of keyed hashes: a whole permutation, sooner than by the class.

    The numbers are sorted with their hashes, cut to the bits that are left, in front of them.
    """
    low = np.uint64(2 ** size.bit_length() - 1)
    words = np.arange(size, dtype=np.uint64)
    for first in range(0, size, _HASHED_ROWS):
        part = words[first : first + _HASHED_ROWS]
        part |= mix(part * np.uint64(GOLDEN) + np.uint64(key)) & ~low
    words.sort()
    words &= low
    return words.view(np.int64)


def pick_rows(rows: int, count: int, seed: int) -> RowNumbers:
    """Pick ``count`` of ``rows`` rows, or all: those with the smallest keyed hashes; return them in ascending order.

    Priors are fitted and models diagnosed on rows picked so. Whether a row is picked depends on its number and the
    seed. So a store that grows keeps its choice, but for the rows that new ones displace.
    """
    key = np.uint64(derive_key(seed, PICKED))
    hashes, picked = np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64)
    limit = np.uint64(_MASK)
    for first in range(0, rows if count > 0 else 0, _HASHED_ROWS):
        block = np.arange(first, min(first + _HASHED_ROWS, rows), dtype=np.uint64)
        hashed = mix(block * np.uint64(GOLDEN) + key)
        below = np.flatnonzero(hashed <= limit)
        hashes, picked = np.append(hashes, hashed[below]), np.append(picked, below + first)
        if len(hashes) > count:
            # the hash is a bijection, so there are no ties
            smallest = np.argpartition(hashes, count - 1)[:count]
            hashes, picked = hashes[smallest], picked[smallest]
            limit = hashes.max()
    return np.sort(picked)


def hold_out(rows: int, share: float, most: int, seed: int) -> tuple[RowNumbers, RowNumbers]:
    """Return which of ``rows`` rows validate, and which are not trained on, both ascending.

    A row that validates is never trained on, however many rows come after it. One row of every ``1 / share`` neighbours
    is chosen, by a hash, until there are ``most``; then ``most`` more for every doubling of the rows. None of these is
    trained on. ``most`` of them validate, spread evenly. At least one row is left to train on.
    """
    if share <= 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    doublings = max(0, math.ceil(math.log2(max(1.0, rows * share / most)))) + 1
    number = np.arange(min(most * (1 + doublings), rows + 1))
    doubling, place = np.divmod(number, most)
    length = np.ldexp(1 / share, np.maximum(doubling - 1, 0))  # neighbours of which one is chosen
    start = np.where(doubling > 0, most * length, 0.0)
    chosen = np.floor(start + (place + _uniform(number, seed, HELD_OUT)) * length).astype(np.int64)
    there = chosen < _not_all(chosen, rows)
    chosen, rank = chosen[there], (_uniform(number, seed, VALIDATES) / length)[there]
    validating = chosen[np.argsort(rank, kind="stable")[:most]]
    return np.unique(validating), np.unique(chosen)


def _not_all(chosen: RowNumbers, rows: int) -> int:
    """Return ``rows``, or one less where all rows are chosen."""
    return rows - (len(np.unique(chosen[chosen < rows])) == rows)


def _uniform(numbers: RowNumbers, seed: int, purpose: int) -> npt.NDArray[np.float64]:
    """Return a keyed hash of every number as a float in [0, 1)."""
    words = mix(numbers.astype(np.uint64) * np.uint64(GOLDEN) + np.uint64(derive_key(seed, purpose)))
    return np.asarray(words >> np.uint64(11)) * 2.0**-53


def derive_key(*parts: int) -> int:
    """Return a 64-bit key from integers, which are taken modulo 2**64."""
    key = 0
    for part in parts:
        key = (key ^ (part & _MASK)) + GOLDEN & _MASK
        key = (key ^ key >> 30) * MIX_1 & _MASK
        key = (key ^ key >> 27) * MIX_2 & _MASK
        key ^= key >> 31
    return key


def _below(words: Words, limit: np.uint64) -> Words:
    """Hash words to ``range(limit)``, ``limit < 2**32``: multiply and shift is faster than a remainder."""
    hashed = mix(words)
    hashed >>= np.uint64(32)
    hashed *= limit
    hashed >>= np.uint64(32)
    return hashed


def _wrap(words: Words, limit: np.uint64) -> Words:
    """Reduce words below ``2 * limit`` modulo ``limit``."""
    np.subtract(words, limit, out=words, where=words >= limit)
    return words
