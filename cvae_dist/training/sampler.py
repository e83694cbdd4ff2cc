"""Which rows come next: a shuffled order of any number of rows, a pure function of (seed, epoch, position).

The order is found by a fixed recipe, which does not depend on how many ranks read it:

1. small *blocks* of neighbouring rows are put in the order of a keyed pseudo-random permutation;
2. that *virtual axis* is cut into ``lanes``, of equal length to one row, each served by one rank;
3. *windows* of consecutive virtual rows of a lane are shuffled; the windows of one number, over all
   lanes, are the shuffle buffer;
4. position ``p`` of the epoch is row ``p // lanes`` of lane ``p % lanes``; a step is ``batch_size``
   positions.

Nothing of the size of the data is ever allocated, and the whole state of a run is ``{epoch, step}``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cvae_dist.errors import InvalidInput
from cvae_dist.store.permutation import BLOCK_ORDER, ROW_ORDER, Permutation, derive_key
from cvae_dist.store.ranges import RowNumbers, enumerate_runs, split_ranges

NO_ROWS: RowNumbers = np.empty(0, dtype=np.int64)
NO_ROWS.flags.writeable = False


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
    lanes : int
        Upper bound of the world size; the order depends on it, not on the world size.
    block_rows : int
        Neighbouring rows that are read together.
    window_rows : int
        Rows of one lane that are shuffled together.
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
        """Rows of the shuffle buffer over all lanes and ranks."""
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
        return self.served(first, end, rank, world) - first

    def served(self, first: int, end: int, rank: int, world: int) -> RowNumbers:
        """Return the positions of the epoch in [first, end) that a rank serves."""
        positions = np.arange(first, end, dtype=np.int64)
        return positions if world == 1 else positions[positions % self.lanes % world == rank]

    def lane_start(self, lane: RowNumbers) -> RowNumbers:
        """Return the first virtual row of each of ``lane``; ``lanes`` itself is the end."""
        length, longer = divmod(self.rows, self.lanes)
        return lane * length + np.minimum(lane, longer)


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
        """Return, for each position in order, the index of its row among the rows that :meth:`ranges` lists."""
        lanes = self.sampler.lanes_of(rank, world)
        low, high = self._lane_window(window, lanes)
        lengths = high - low
        order = self.window_order(window)[rank::world]
        order += (np.cumsum(lengths) - lengths)[:, np.newaxis]
        # only the last lanes can be a row short: transposed, the gaps are all at the end, and are cut off
        return order.T.ravel()[: int(lengths.sum())]

    def window_order(self, window: int) -> RowNumbers:
        """Return the shuffled offsets (lanes, width) in a window of each lane; a missing row sorts last.

        Offsets are ordered by raw words of Philox. NumPy keeps this stream between versions, unlike that of
        ``Generator`` methods. The low bits of a word are its offset. That makes the words distinct, so that any sort
        gives the same order on any machine.
        """
        sampler = self.sampler
        low, high = self._lane_window(window, np.arange(sampler.lanes))
        width = int(high[0] - low[0])
        key = np.array([self._key(ROW_ORDER), window], dtype=np.uint64)
        words = np.random.Philox(key=key).random_raw(sampler.lanes * width).reshape(sampler.lanes, width)
        bits = np.uint64(max(1, (width - 1).bit_length()))
        words >>= bits
        words <<= bits
        words |= np.arange(width, dtype=np.uint64)
        words[high - low < width, -1] = np.iinfo(np.uint64).max
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

    def _block_at(self, virtual: RowNumbers) -> RowNumbers:
        short, missing = self._short_block
        start_after = (short + 1) * self.sampler.block_rows - missing
        return (virtual + missing * (virtual >= start_after)) // self.sampler.block_rows


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

    @property
    def request_rows(self) -> int:
        """Rows of the largest request."""
        return min(self._lanes * self.sampler.window_rows, self.sampler.rows)

    @property
    def part_rows(self) -> int:
        """Rows of the largest part of a step."""
        return min(-(-self.sampler.batch_size // self.sampler.lanes) * self._lanes, self.sampler.batch_size)

    @property
    def _lanes(self) -> int:
        return len(self.sampler.lanes_of(self.rank, self.world))

    def requests(self, epoch: int, step: int) -> Iterator[Request]:
        """Yield a request for every window from a position on, epoch after epoch without end."""
        buffered = self.sampler.lanes * self.sampler.window_rows
        position = self.sampler.step(step)[0]
        window = position // buffered
        passed = len(self.sampler.served(window * buffered, position, self.rank, self.world))
        while True:
            order = EpochOrder(self.sampler, epoch, self.excluded)
            for number in range(window, self.sampler.windows):
                starts, counts = order.ranges(number, self.rank, self.world)
                yield Request(starts, counts, order.take(number, self.rank, self.world)[passed:])
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


def skip(values: RowNumbers, excluded: RowNumbers) -> RowNumbers:
    """Return the ``values``-th numbers (counted from 0) that are not in ``excluded`` (sorted int64)."""
    if not excluded.size:
        return values
    return values + np.searchsorted(excluded - np.arange(excluded.size), values, side="right")
