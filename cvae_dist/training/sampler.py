"""Which rows come next: a shuffled order of any number of rows, a pure function of (seed, epoch, position).

The order is found by a fixed recipe, no part of which depends on how many ranks read it:

1. small *blocks* of neighbouring rows are put in the order of a keyed pseudo-random permutation;
2. that *virtual axis* is cut into ``lanes``, of equal length to one row, each served by one rank;
3. *windows* of consecutive virtual rows of a lane are shuffled; the windows of one number, over all
   lanes, are the shuffle buffer;
4. position ``p`` of the epoch is row ``p // lanes`` of lane ``p % lanes``; a step is ``batch_size``
   positions.

Nothing of the size of the data is ever allocated, and the whole state of a run is ``{epoch, step}``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import isqrt

import numpy as np
import numpy.typing as npt

from cvae_dist.errors import InvalidInput
from cvae_dist.store.ranges import RowNumbers, enumerate_runs, split_ranges

Words = npt.NDArray[np.uint64]

NO_ROWS: RowNumbers = np.empty(0, dtype=np.int64)
NO_ROWS.flags.writeable = False
INDEX_BYTES = 8  # a buffered row costs its bytes and one index

_LANES = (48, 24, 12, 6, 4, 2, 1)  # composite, so that many world sizes share them evenly
_LANES_OF_CHUNKS = 12  # enough for a small gang, where a window of a lane has to hold several large blocks
_BLOCKS_PER_LANE = 4
_LARGEST_BLOCK = 1024
_BLOCKS_PER_BATCH_ROW = 10  # variance inflation 1 + B / K <= 1.1
_LARGEST_WINDOW = 2**19  # rows over all lanes: bounds each temporary of a shuffle to 4 MB
_INDEX_WINDOW = 2**16  # rows over all lanes where the data is in memory and only indices are prefetched

_ROUNDS = 6
_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # SplitMix64 (Steele et al. 2014)
_BLOCK_ORDER, _ROW_ORDER, _HELD_OUT = 1, 2, 3  # what a derived key is for
_HASHED_ROWS = 2**16  # rows hashed at once: the temporaries stay in the second level cache


@dataclass(frozen=True)
class Permutation:
    """Keyed invertible permutation of ``range(size)`` in O(1) memory.

    A Feistel network (Luby and Rackoff 1988) on a grid just larger than ``size``, repeated for the few
    values that fall outside (cycle walking, Black and Rogaway 2002).
    """

    size: int
    key: int

    def __call__(self, values: RowNumbers) -> RowNumbers:
        """Return where each of ``values`` (int64, inside ``range(size)``) goes."""
        return self._walk(values, self._encrypt)

    def inverse(self, values: RowNumbers) -> RowNumbers:
        """Return what goes to each of ``values``."""
        return self._walk(values, self._decrypt)

    @cached_property
    def _grid(self) -> tuple[np.uint64, np.uint64]:
        height = isqrt(max(1, self.size) - 1) + 1
        return np.uint64(height), np.uint64(-(-self.size // height))

    @cached_property
    def _keys(self) -> tuple[np.uint64, ...]:
        return tuple(np.uint64(derive_key(self.key, number)) for number in range(_ROUNDS))

    def _walk(self, values: RowNumbers, step: Callable[[Words], Words]) -> RowNumbers:
        result = step(values.astype(np.uint64))
        outside = np.flatnonzero(result >= np.uint64(self.size))
        while outside.size:
            walked = step(result[outside])
            result[outside] = walked
            outside = outside[walked >= np.uint64(self.size)]
        return result.view(np.int64)

    def _encrypt(self, values: Words) -> Words:
        height, width = self._grid
        left = values // width
        right = values - left * width
        for number, key in enumerate(self._keys):
            if number % 2:
                right = _wrap(right + _below(left + key, width), width)
            else:
                left = _wrap(left + _below(right + key, height), height)
        return left * width + right

    def _decrypt(self, values: Words) -> Words:
        height, width = self._grid
        left = values // width
        right = values - left * width
        for number, key in reversed(tuple(enumerate(self._keys))):
            if number % 2:
                right = _wrap(right + (width - _below(left + key, width)), width)
            else:
                left = _wrap(left + (height - _below(right + key, height)), height)
        return left * width + right


@dataclass(frozen=True)
class Sampler:
    """The order of the training rows, for every epoch and any number of ranks.

    Attributes
    ----------
    rows : int
        Training rows; each comes exactly once per epoch.
    batch_size : int
        RowNumbers of a step over all ranks; only the last step of an epoch is shorter.
    seed : int
        Seed of the order.
    lanes : int
        Upper bound of the world size; the order depends on it, not on the world size.
    block_rows : int
        Neighbouring rows that are read together.
    window_rows : int
        RowNumbers of one lane that are shuffled together.
    """

    rows: int
    batch_size: int
    seed: int
    lanes: int
    block_rows: int
    window_rows: int

    def __post_init__(self) -> None:
        for name in ("rows", "batch_size", "lanes", "block_rows", "window_rows"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} is {getattr(self, name)}: the order of rows needs at least 1")
        if self.lanes > self.rows:
            raise InvalidInput(
                f"{self.lanes} lanes for {self.rows} training rows: a lane would be empty. "
                f"Use at most {self.rows} lanes"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch, the same for every rank."""
        return -(-self.rows // self.batch_size)

    @property
    def windows(self) -> int:
        """Shuffle buffers of an epoch."""
        return -(-self.rows // (self.lanes * self.window_rows))

    @property
    def buffer_rows(self) -> int:
        """RowNumbers of the shuffle buffer over all lanes and ranks."""
        return min(self.rows, self.lanes * self.window_rows)

    @property
    def variance_inflation(self) -> float:
        """Variance of a batch mean over that of independent draws, where neighbouring rows are alike.

        ``1 + B / K`` for ``K`` distinct blocks in the shuffle buffer; 1 where blocks are single rows.
        """
        if self.block_rows == 1:
            return 1.0
        return 1.0 + self.batch_size * self.block_rows / self.buffer_rows

    def lanes_of(self, rank: int, world: int) -> RowNumbers:
        """Return the lanes that a rank serves: ``rank``, ``rank + world``, ...

        Raises
        ------
        InvalidInput
            More ranks than lanes, or a rank outside the world.
        """
        if not 0 <= rank < world:
            raise InvalidInput(f"rank {rank} of a world of {world}: ranks are counted from 0 to {world - 1}")
        if world > self.lanes:
            raise InvalidInput(
                f"{world} ranks share {self.lanes} lanes: {world - self.lanes} of them would never get "
                f"a row. Start at most {self.lanes} ranks"
            )
        return np.arange(rank, self.lanes, world, dtype=np.int64)

    def step(self, step: int) -> tuple[int, int]:
        """Return the first and the end position of a step of the epoch."""
        if not 0 <= step < self.steps_per_epoch:
            raise InvalidInput(f"step {step} of an epoch of {self.steps_per_epoch} steps")
        return step * self.batch_size, min((step + 1) * self.batch_size, self.rows)

    def positions(self, step: int, rank: int = 0, world: int = 1) -> RowNumbers:
        """Return where the rows of a rank stand inside the global batch of a step (ascending int64)."""
        first, end = self.step(step)
        self.lanes_of(rank, world)
        positions = np.arange(first, end, dtype=np.int64)
        return positions[positions % self.lanes % world == rank] - first if world > 1 else positions - first

    def served_before(self, position: int, rank: int, world: int) -> int:
        """Return how many positions before ``position`` of the epoch a rank serves."""
        turns, lane = divmod(position, self.lanes)
        return turns * -(-(self.lanes - rank) // world) + max(0, -(-(lane - rank) // world))

    def window_of(self, position: int) -> int:
        """Return the number of the window that holds a position of the epoch."""
        return position // (self.lanes * self.window_rows)

    def window_start(self, window: int) -> int:
        """Return the first position of a window."""
        return min(self.rows, window * self.lanes * self.window_rows)

    def order(self, epoch: int, excluded: RowNumbers = NO_ROWS) -> "EpochOrder":
        """Return the order of one epoch over the rows of a store without ``excluded`` (sorted int64)."""
        return EpochOrder(self, epoch, excluded)

    def indices(
        self, epoch: int, step: int, rank: int = 0, world: int = 1, excluded: RowNumbers = NO_ROWS
    ) -> RowNumbers:
        """Return the store rows of a rank's part of a step, in the order of :meth:`positions`.

        The definition of the order, row by row; a loader finds the same rows window by window.
        """
        positions = self.positions(step, rank, world) + self.step(step)[0]
        order = self.order(epoch, excluded)
        lane, turn = positions % self.lanes, positions // self.lanes
        window, offset = np.divmod(turn, self.window_rows)
        for number in np.unique(window):
            inside = window == number
            offset[inside] = order.window_order(int(number))[lane[inside], offset[inside]]
        return order.rows(self.lane_start(lane) + window * self.window_rows + offset)

    def lane_start(self, lane: RowNumbers) -> RowNumbers:
        """Return the first virtual row of each of ``lane``; ``lanes`` itself is the end."""
        length, longer = divmod(self.rows, self.lanes)
        return lane * length + np.minimum(lane, longer)


@dataclass(frozen=True, eq=False)
class EpochOrder:
    """The order of one epoch: which store rows fill a window, and how a window is shuffled.

    The blocks partition the rows of the *store*, so that a block can be one compressed chunk of it;
    excluded rows are skipped where they fall on the virtual axis.
    """

    sampler: Sampler
    epoch: int
    excluded: RowNumbers

    def rows(self, virtual: RowNumbers) -> RowNumbers:
        """Return the store row at each training position of the virtual axis."""
        every = skip(virtual, self._excluded_virtual)
        block = self._block_at(every)
        return self._permutation(block) * self.sampler.block_rows + (every - self._block_start(block))

    def ranges(self, window: int, rank: int = 0, world: int = 1) -> tuple[RowNumbers, RowNumbers]:
        """Return starts and counts (int64) of the store rows of a rank's window, lane after lane.

        Over all windows and ranks these are at most ``blocks + lanes * windows + len(excluded)`` ranges.
        """
        low, high = self._lane_window(window, self.sampler.lanes_of(rank, world))
        low, high = low[low < high], high[low < high]
        first, last = skip(low, self._excluded_virtual), skip(high - 1, self._excluded_virtual)
        first_block = self._block_at(first)
        lane, number = enumerate_runs(self._block_at(last) - first_block + 1)
        block = first_block[lane] + number
        start = self._block_start(block)
        begin = np.maximum(start, first[lane])
        end = np.minimum(self._block_start(block + 1), last[lane] + 1)
        offset: RowNumbers = begin - start
        stored = self._permutation(block) * self.sampler.block_rows + offset
        return split_ranges(stored, end - begin, self.excluded)

    def take(self, window: int, rank: int = 0, world: int = 1) -> RowNumbers:
        """Return where in :meth:`ranges` the row of each position of a rank's window lies (ascending)."""
        lanes = self.sampler.lanes_of(rank, world)
        low, high = self._lane_window(window, lanes)
        lengths = high - low
        order = self.window_order(window)[rank::world]
        order += (np.cumsum(lengths) - lengths)[:, np.newaxis]
        # longer lanes come first, so the rows missing from the others are the end of the last turn
        return order.T.ravel()[: int(lengths.sum())]

    def window_order(self, window: int) -> RowNumbers:
        """Return the shuffled offsets (lanes, width) in a window of each lane; a missing row sorts last.

        Offsets are ordered by raw words of Philox, a stream that NumPy keeps between versions (unlike that
        of ``Generator`` methods). The low bits of a word are its offset, which makes the words distinct: any
        sort gives the same order on any machine.
        """
        sampler = self.sampler
        low, high = self._lane_window(window, np.arange(sampler.lanes))
        width = int(high[0] - low[0])
        key = np.array([self._key(_ROW_ORDER), window], dtype=np.uint64)
        words = np.random.Philox(key=key).random_raw(sampler.lanes * width).reshape(sampler.lanes, width)
        bits = np.uint64(max(1, (width - 1).bit_length()))
        words >>= bits
        words <<= bits
        words |= np.arange(width, dtype=np.uint64)
        words[high - low < width, -1] = _MASK
        words.sort(axis=1)
        words &= np.uint64((1 << int(bits)) - 1)
        return words.view(np.int64)

    def _lane_window(self, window: int, lanes: RowNumbers) -> tuple[RowNumbers, RowNumbers]:
        """Return the virtual rows, first and end, of a window in each of ``lanes``."""
        start, end = self.sampler.lane_start(lanes), self.sampler.lane_start(lanes + 1)
        low = start + window * self.sampler.window_rows
        return np.minimum(low, end), np.minimum(low + self.sampler.window_rows, end)

    def _key(self, purpose: int) -> int:
        return derive_key(self.sampler.seed, self.epoch, purpose)

    @cached_property
    def _permutation(self) -> Permutation:
        stored = self.sampler.rows + len(self.excluded)
        return Permutation(-(-stored // self.sampler.block_rows), self._key(_BLOCK_ORDER))

    @cached_property
    def _short_block(self) -> tuple[int, int]:
        """Place of the store's last block on the virtual axis, and how many rows it lacks."""
        blocks = self._permutation.size
        missing = blocks * self.sampler.block_rows - self.sampler.rows - len(self.excluded)
        return int(self._permutation.inverse(np.array([blocks - 1]))[0]), missing

    @cached_property
    def _excluded_virtual(self) -> RowNumbers:
        """Sorted places of the excluded rows on the virtual axis."""
        stored = self.excluded // self.sampler.block_rows
        block = self._permutation.inverse(stored)
        return np.sort(self._block_start(block) + self.excluded - stored * self.sampler.block_rows)

    def _block_start(self, block: RowNumbers) -> RowNumbers:
        short, missing = self._short_block
        return block * self.sampler.block_rows - missing * (block > short)

    def _block_at(self, virtual: RowNumbers) -> RowNumbers:
        short, missing = self._short_block
        start_after = (short + 1) * self.sampler.block_rows - missing
        return (virtual + missing * (virtual >= start_after)) // self.sampler.block_rows


def plan_sampler(
    rows: int,
    batch_size: int,
    row_bytes: int,
    seed: int,
    buffer_bytes: int,
    block_rows_hint: int = 1,
    excluded_rows: int = 0,
) -> Sampler:
    """Choose lanes, blocks and windows so that a loader of ``buffer_bytes`` shuffles as well as it can.

    Parameters
    ----------
    rows : int
        Training rows.
    batch_size : int
        RowNumbers of a step over all ranks.
    row_bytes : int
        Bytes of a stored row.
    seed : int
        Seed of the order.
    buffer_bytes : int
        Memory of the loader of one rank.
    block_rows_hint : int
        RowNumbers that are cheap to read together: 1, or the rows of a chunk that can only be read whole.
    excluded_rows : int
        RowNumbers of the store that are not trained on.

    Raises
    ------
    InvalidInput
        No rows, or a batch of no rows.
    """
    if rows < 1 or batch_size < 1:
        raise InvalidInput(f"{rows} training rows in batches of {batch_size}: both must be at least 1")
    if fits(rows + excluded_rows, row_bytes, buffer_bytes):
        lanes = _composite(min(rows, _LANES[0]))
        return Sampler(rows, batch_size, seed, lanes, 1, _balanced_window(rows, lanes, _INDEX_WINDOW))
    slots = (buffer_bytes - batch_size * row_bytes) // (2 * (row_bytes + INDEX_BYTES))
    buffered = min(max(slots, 1), _LARGEST_WINDOW)
    lanes = _LANES[0]
    if block_rows_hint > 1:
        lanes = max(_LANES_OF_CHUNKS, buffered // (_BLOCKS_PER_LANE * block_rows_hint))
    lanes = _composite(min(lanes, rows, buffered))
    window = _balanced_window(rows, lanes, buffered)
    block = lanes * window // (_BLOCKS_PER_BATCH_ROW * batch_size)
    block = block_rows_hint if block_rows_hint > 1 else min(max(block, 1), _LARGEST_BLOCK)
    return Sampler(rows, batch_size, seed, lanes, block, window)


def fits(rows: int, row_bytes: int, buffer_bytes: int) -> bool:
    """Whether a loader of ``buffer_bytes`` holds the whole store in memory."""
    return rows * row_bytes <= buffer_bytes


def validation_rows(rows: int, count: int, seed: int) -> RowNumbers:
    """Choose rows to hold out: those with the ``count`` smallest keyed hashes.

    Whether a row is chosen depends on its number and the seed, so a store that grows keeps its choice but
    for the rows that new ones displace.

    Returns
    -------
    numpy.ndarray, shape (min(count, rows),), int64
        Ascending.
    """
    key = np.uint64(derive_key(seed, _HELD_OUT))
    hashes, chosen = np.empty(0, dtype=np.uint64), NO_ROWS
    limit = np.uint64(_MASK)
    for first in range(0, rows if count > 0 else 0, _HASHED_ROWS):
        block = np.arange(first, min(first + _HASHED_ROWS, rows), dtype=np.uint64)
        hashed = _mix(block * np.uint64(_GOLDEN) + key)
        below = np.flatnonzero(hashed <= limit)
        hashes, chosen = np.append(hashes, hashed[below]), np.append(chosen, below + first)
        if len(hashes) > count:
            # the hash is a bijection, so there are no ties
            smallest = np.argpartition(hashes, count - 1)[:count]
            hashes, chosen = hashes[smallest], chosen[smallest]
            limit = hashes.max()
    return np.sort(chosen)


def skip(values: RowNumbers, excluded: RowNumbers) -> RowNumbers:
    """Return the ``values``-th numbers (counted from 0) that are not in ``excluded`` (sorted int64)."""
    if not excluded.size:
        return values
    return values + np.searchsorted(excluded - np.arange(excluded.size), values, side="right")


def derive_key(*parts: int) -> int:
    """Return a 64-bit key from integers (negative and larger ones are taken modulo 2**64)."""
    key = 0
    for part in parts:
        key = (key ^ (part & _MASK)) + _GOLDEN & _MASK
        key = (key ^ key >> 30) * _MIX_1 & _MASK
        key = (key ^ key >> 27) * _MIX_2 & _MASK
        key ^= key >> 31
    return key


def _mix(words: Words) -> Words:
    """Finalize SplitMix64, in place."""
    words ^= words >> np.uint64(30)
    words *= np.uint64(_MIX_1)
    words ^= words >> np.uint64(27)
    words *= np.uint64(_MIX_2)
    words ^= words >> np.uint64(31)
    return words


def _below(words: Words, limit: np.uint64) -> Words:
    """Hash words to ``range(limit)``, ``limit < 2**32``: multiply and shift is faster than a remainder."""
    hashed = _mix(words)
    hashed >>= np.uint64(32)
    hashed *= limit
    hashed >>= np.uint64(32)
    return hashed


def _wrap(words: Words, limit: np.uint64) -> Words:
    """Reduce words below ``2 * limit`` modulo ``limit``."""
    np.subtract(words, limit, out=words, where=words >= limit)
    return words


def _composite(limit: int) -> int:
    return next(lanes for lanes in _LANES if lanes <= limit)


def _balanced_window(rows: int, lanes: int, buffered: int) -> int:
    """Return rows per lane of windows that are nearly equal and together hold at most ``buffered`` rows."""
    longest = -(-rows // lanes)
    windows = -(-longest // max(1, buffered // lanes))
    return -(-longest // windows)
