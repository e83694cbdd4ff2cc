"""Which rows come next: a shuffled order of any number of rows, a pure function of (seed, epoch, position).

The order is found by a fixed recipe, which does not depend on how many ranks read it:

1. small *blocks* of neighbouring rows are put in the order of a keyed pseudo-random permutation;
2. that *virtual axis* is cut into *windows*, which are the shuffle buffer, and each window into *lanes* of equal
   length to one row;
3. the rows of a lane are shuffled, by a key of its own;
4. the positions of a window take one row of every lane in turn. The turn goes through the lanes in bit-reversed order
   (van der Corput 1935): lanes that follow one another in it lie far apart, so every run of positions is spread evenly
   over the window, and seldom has two rows of one block;
5. a step is ``batch_size`` positions. A rank serves neighbouring lanes, so of a window it reads one run of the virtual
   axis, and of a step it has its share, to a few rows.

Nothing of the size of the data is ever allocated, and the whole state of a run is ``{epoch, step}``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from cvae_dist.errors import InvalidInput
from cvae_dist.store.hashing import GOLDEN, mix
from cvae_dist.store.permutation import BLOCK_ORDER, ROW_ORDER, Permutation, derive_key
from cvae_dist.store.ranges import RowNumbers, expand_ranges, split_ranges

Words32 = npt.NDArray[np.uint32]

NO_ROWS: RowNumbers = np.empty(0, dtype=np.int64)
NO_ROWS.flags.writeable = False

ORDER = 2  # version of the recipe: a training goes on in the order that it began with, or not at all
LANES = 4096  # the same for every storage, memory and world: 256 ranks have equal shares of a large step to 2 %
_SHUFFLED_AT_ONCE = 2**16  # rows: the temporaries stay in the second level cache
_MISSING = np.iinfo(np.uint32).max  # in place of a row that a lane lacks; it sorts last


@dataclass(frozen=True, eq=False)
class Request:
    """Rows to read at once, and the order in which they come.

    ``starts`` and ``counts`` are row ranges of the store. ``take`` are the rows that come, one after the other, counted
    from 0 through all ranges; each comes once at most.
    """

    starts: RowNumbers
    counts: RowNumbers
    take: RowNumbers


@dataclass(frozen=True, eq=False)
class Part:
    """A rank's part of a step, which has ``n_global`` rows over all ranks.

    ``positions``, (n,), are where the rank's rows stand inside the global batch.
    """

    epoch: int
    step: int
    positions: RowNumbers
    n_global: int


@dataclass(frozen=True)
class Sampler:
    """The order of the training rows, for every epoch and any number of ranks.

    Attributes
    ----------
    rows : int
        Training rows; each comes exactly once per epoch.
    batch_size : int
        Rows of a step over all ranks; only the last step of an epoch is shorter.
    seed : int
        Seed of the order.
    block_rows : int
        Neighbouring rows that are read together.
    window_rows : int
        Rows that are shuffled together, over all ranks.
    lanes : int
        Upper bound of the world size, a power of two; the order depends on it, not on the world size.
    """

    rows: int
    batch_size: int
    seed: int
    block_rows: int
    window_rows: int
    lanes: int = LANES

    def __post_init__(self) -> None:
        for name in ("rows", "batch_size", "block_rows", "window_rows", "lanes"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} is {getattr(self, name)}: the order of rows needs at least 1")
        if self.lanes & (self.lanes - 1):
            raise InvalidInput(f"{self.lanes} lanes: their number has to be a power of two")

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch, the same for every rank."""
        return -(-self.rows // self.batch_size)

    @property
    def windows(self) -> int:
        """Windows of an epoch."""
        return -(-self.rows // self.window_rows)

    @property
    def buffer_rows(self) -> int:
        """Rows of the largest window."""
        return min(self.rows, self.window_rows)

    @property
    def variance_inflation(self) -> float:
        """Variance of a batch mean over that of independent draws, at most, where neighbouring rows are alike.

        For ``B`` rows from ``K`` blocks that were drawn at random it is ``1 + B / K``. Here the first of each lane's
        rows in a batch costs less, as it meets no row of its block but those of a lane nearby (the square is measured).
        1 where blocks are single rows.
        """
        if self.block_rows == 1:
            return 1.0
        crowded = self.batch_size * self.block_rows / self.buffer_rows
        repeated = max(0.0, 1 - self.lanes / self.batch_size)
        return 1.0 + min(crowded, repeated * crowded + 0.4 * crowded**2)

    def lanes_of(self, rank: int, world: int) -> tuple[int, int]:
        """Return the first and the end of the lanes that a rank serves.

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
        return rank * self.lanes // world, (rank + 1) * self.lanes // world

    def step(self, step: int) -> tuple[int, int]:
        """Return the first and the end position of a step of the epoch."""
        if not 0 <= step < self.steps_per_epoch:
            raise InvalidInput(f"step {step} of an epoch of {self.steps_per_epoch} steps")
        return step * self.batch_size, min((step + 1) * self.batch_size, self.rows)

    def positions(self, step: int, rank: int = 0, world: int = 1) -> RowNumbers:
        """Return where the rows of a rank stand inside the global batch of a step (ascending int64)."""
        first, end = self.step(step)
        if world == 1:
            return np.arange(end - first, dtype=np.int64)
        return self.served(first, end, rank, world) - first

    def served(self, first: int, end: int, rank: int, world: int) -> RowNumbers:
        """Return the positions of the epoch in [first, end) that a rank serves."""
        begin, stop = self.lanes_of(rank, world)
        positions = np.arange(first, end, dtype=np.int64)
        lane = bit_reversed(self.lanes)[positions % self.window_rows % self.lanes]
        return positions[(begin <= lane) & (lane < stop)]

    def window(self, number: int) -> tuple[int, int]:
        """Return the first and the end position of a window; they are also its first and end virtual row."""
        return number * self.window_rows, min((number + 1) * self.window_rows, self.rows)

    def lane_starts(self, number: int) -> RowNumbers:
        """Return the first virtual row of every lane of a window, and the end of the last."""
        first, end = self.window(number)
        length, longer = divmod(end - first, self.lanes)
        lengths = length + (bit_reversed(self.lanes) < longer)
        return np.append(first, first + np.cumsum(lengths))


@dataclass(frozen=True, eq=False)
class EpochOrder:
    """The order of one epoch: which store rows fill a window, and how a window is shuffled.

    The blocks partition the rows of the *store*, so that a block can be one compressed chunk of it. Excluded rows are
    skipped where they fall on the virtual axis.
    """

    sampler: Sampler
    epoch: int
    excluded: RowNumbers

    def ranges(self, window: int, rank: int = 0, world: int = 1) -> tuple[RowNumbers, RowNumbers]:
        """Return starts and counts (int64) of the store rows of a rank's window, in the order of the virtual axis.

        Over all windows and ranks these are at most ``blocks + windows * world + len(excluded)`` ranges.
        """
        begin, stop = self.sampler.lanes_of(rank, world)
        low, high = self.sampler.lane_starts(window)[[begin, stop]]
        if low == high:
            return NO_ROWS, NO_ROWS
        first, last = skip(np.array([low, high - 1]), self._excluded_virtual)
        block = np.arange(self._block_at(first), self._block_at(last) + 1)
        start = self._block_start(block)
        begins = np.maximum(start, first)
        ends = np.minimum(self._block_start(block + 1), last + 1)
        stored = self._permutation(block) * self.sampler.block_rows + (begins - start)
        return split_ranges(stored, ends - begins, self.excluded)

    def take(self, window: int, rank: int = 0, world: int = 1) -> RowNumbers:
        """Return, for each position in order, the index of its row among the rows that :meth:`ranges` lists.

        Only the rank's own lanes are shuffled. The rows of a lane are ordered by 32-bit words, two of each word of
        SplitMix64, keyed by the lane. The low bits of a word are the row's place in the lane. That makes the words
        distinct, so that any sort gives the same order on any machine.
        """
        begin, stop = self.sampler.lanes_of(rank, world)
        starts = self.sampler.lane_starts(window)
        lanes = begin + np.argsort(bit_reversed(self.sampler.lanes)[begin:stop])
        lengths = starts[lanes + 1] - starts[lanes]
        width = int(lengths.max())
        order = np.empty((width, len(lanes)), dtype=np.int64)
        tile = max(1, _SHUFFLED_AT_ONCE // max(width, 1))
        for first in range(0, len(lanes), tile):
            part = slice(first, first + tile)
            words = self._shuffle(window, lanes[part], lengths[part], width)
            words += (starts[lanes[part]] - starts[begin]).astype(np.uint32)[:, np.newaxis]
            order[:, part] = words.T
        # the lanes that lack a row come last in their turn: the gaps are all at the end, and are cut off
        return order.ravel()[: int(lengths.sum())]

    def _shuffle(self, window: int, lanes: RowNumbers, lengths: RowNumbers, width: int) -> Words32:
        """Return the shuffled places (lanes, width) in some lanes; that of a row which a lane lacks comes last."""
        window_key = np.uint64(self._key(ROW_ORDER, window))
        keys = mix(lanes.astype(np.uint64) * np.uint64(GOLDEN) + window_key)
        counters = np.arange(-(-width // 2), dtype=np.uint64) * np.uint64(GOLDEN)
        words = mix(keys[:, np.newaxis] + counters).astype("<u8", copy=False).view("<u4")[:, :width]
        low = np.uint32((1 << max(1, (width - 1).bit_length())) - 1)
        words &= ~low
        words |= np.arange(width, dtype=np.uint32)
        words[lengths < width, -1:] = _MISSING
        words.sort(axis=1)
        words &= low
        return words

    def _key(self, *purpose: int) -> int:
        return derive_key(self.sampler.seed, self.epoch, *purpose)

    @cached_property
    def _permutation(self) -> Permutation:
        stored = self.sampler.rows + len(self.excluded)
        return Permutation(-(-stored // self.sampler.block_rows), self._key(BLOCK_ORDER))

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

    def _block_at(self, virtual: np.int64) -> np.int64:
        short, missing = self._short_block
        start_after = (short + 1) * self.sampler.block_rows - missing
        return np.int64((virtual + missing * (virtual >= start_after)) // self.sampler.block_rows)


@dataclass(frozen=True, eq=False)
class Share:
    """What rank ``rank`` of ``world`` reads of the order. ``excluded``, ascending, are store rows not trained on."""

    sampler: Sampler
    excluded: RowNumbers
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        self.sampler.lanes_of(self.rank, self.world)
        excluded, stored = self.excluded, self.stored_rows
        if excluded.size and (np.any(np.diff(excluded) < 1) or excluded[0] < 0 or excluded[-1] >= stored):
            raise InvalidInput(f"the {len(excluded)} excluded rows must be ascending, distinct and below {stored}")

    @property
    def stored_rows(self) -> int:
        """Rows of the store."""
        return self.sampler.rows + len(self.excluded)

    @cached_property
    def window_rows(self) -> int:
        """Rows of this rank's part of the largest window."""
        begin, stop = self.sampler.lanes_of(self.rank, self.world)
        starts = self.sampler.lane_starts(0)
        return int(starts[stop] - starts[begin])

    def requests(self, epoch: int, step: int, most_rows: int) -> Iterator[Request]:
        """Yield what to read from a position on, epoch after epoch without end.

        A request is this rank's part of a window; where that has more than ``most_rows`` rows, some of its positions.
        """
        window, passed = divmod(self.sampler.step(step)[0], self.sampler.window_rows)
        first = window * self.sampler.window_rows
        passed = len(self.sampler.served(first, first + passed, self.rank, self.world))
        while True:
            order = EpochOrder(self.sampler, epoch, self.excluded)
            for number in range(window, self.sampler.windows):
                starts, counts = order.ranges(number, self.rank, self.world)
                take = order.take(number, self.rank, self.world)
                yield from _split(starts, counts, take, passed, most_rows)
                passed = 0
            epoch, window = epoch + 1, 0

    def parts(self, epoch: int, step: int) -> Iterator[Part]:
        """Return this rank's part of every step from a position on, epoch after epoch without end."""
        self.sampler.step(step)
        return self._parts(epoch, step)

    def _parts(self, epoch: int, step: int) -> Iterator[Part]:
        while True:
            for number in range(step, self.sampler.steps_per_epoch):
                first, end = self.sampler.step(number)
                yield Part(epoch, number, self.sampler.positions(number, self.rank, self.world), end - first)
            epoch, step = epoch + 1, 0


def _split(starts: RowNumbers, counts: RowNumbers, take: RowNumbers, passed: int, most_rows: int) -> Iterator[Request]:
    """Yield a window, without the first ``passed`` of its positions, in requests of at most ``most_rows`` rows."""
    if len(take) <= most_rows:
        yield Request(starts, counts, take[passed:])
        return
    rows = expand_ranges(starts, counts)[take]
    for first in range(passed, len(rows), most_rows):
        part = rows[first : first + most_rows]
        order = np.argsort(part)
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        yield Request(part[order], np.ones_like(order), place)


@lru_cache(8)
def bit_reversed(size: int) -> RowNumbers:
    """Return the numbers below ``size``, a power of two, with their bits in reversed order: its own inverse."""
    numbers = np.arange(size, dtype=np.int64)
    result = np.zeros_like(numbers)
    for _ in range(size.bit_length() - 1):
        result = result << 1 | numbers & 1
        numbers >>= 1
    result.flags.writeable = False
    return result


def skip(values: RowNumbers, excluded: RowNumbers) -> RowNumbers:
    """Return the ``values``-th numbers (counted from 0) that are not in ``excluded`` (sorted int64)."""
    if not excluded.size:
        return values
    return values + np.searchsorted(excluded - np.arange(excluded.size), values, side="right")
