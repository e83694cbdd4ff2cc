"""How the order of a training is cut, so that a loader shuffles well in the memory that it has."""

from cvae_dist.errors import InvalidInput
from cvae_dist.training.loader import INDEX_BYTES, fits
from cvae_dist.training.sampler import Sampler

_LANES = (48, 24, 12, 6, 4, 2, 1)  # composite, so that many world sizes share them evenly
_LANES_OF_CHUNKS = 12  # enough for a small gang, where a window of a lane has to hold several large blocks
_BLOCKS_PER_LANE = 4
_LARGEST_BLOCK = 1024
_BLOCKS_PER_BATCH_ROW = 10  # variance inflation 1 + B / K <= 1.1
_LARGEST_WINDOW = 2**19  # rows over all lanes: bounds each temporary of a shuffle to 4 MB
_INDEX_WINDOW = 2**16  # rows over all lanes where the data is in memory and only indices are prefetched


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

    ``rows`` are trained on, in steps of ``batch_size`` rows over all ranks; ``excluded_rows`` of the store are not.
    ``block_rows_hint`` rows are cheap to read together: 1, or the rows of a chunk that can only be read whole.

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


def _composite(limit: int) -> int:
    return next(lanes for lanes in _LANES if lanes <= limit)


def _balanced_window(rows: int, lanes: int, buffered: int) -> int:
    """Return rows per lane of windows that are nearly equal and together hold at most ``buffered`` rows."""
    longest = -(-rows // lanes)
    windows = -(-longest // max(1, buffered // lanes))
    return -(-longest // windows)
