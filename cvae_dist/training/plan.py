"""How the order of a training is cut, so that a loader shuffles well in the memory that it has."""

from cvae_dist.errors import InvalidInput
from cvae_dist.training.loader import fits, slot_rows
from cvae_dist.training.sampler import LANES, Sampler

_BLOCKS_PER_BATCH_ROW = 4  # distinct blocks of a window: variance inflation 1.03
_BLOCKS_PER_REPEATED_ROW = 10  # the same for rows beyond one of each lane: 1.1 at most
_LARGEST_BLOCK = 65_536  # bytes: larger reads are hardly faster
_MOST_BLOCK_ROWS = 1024
_LARGEST_WINDOW = 2**20  # rows: bounds the indices of a window to 8 MB
_INDEX_WINDOW = 2**16  # rows of a window of single rows, which needs no more


def plan_sampler(
    rows: int,
    batch_size: int,
    row_bytes: int,
    seed: int,
    buffer_bytes: int,
    block_rows_hint: int = 1,
    excluded_rows: int = 0,
) -> Sampler:
    """Choose blocks and windows so that a loader of ``buffer_bytes`` shuffles as well as it can.

    ``rows`` are trained on, in steps of ``batch_size`` rows over all ranks; ``excluded_rows`` of the store are not.
    ``block_rows_hint`` rows are cheap to read together: 1, or the rows of a chunk that can only be read whole.
    Single rows are in windows of any size, as their order is a permutation already.

    Raises
    ------
    InvalidInput
        No rows, or a batch of no rows.
    """
    if rows < 1 or batch_size < 1:
        raise InvalidInput(f"{rows} training rows in batches of {batch_size}: both must be at least 1")
    window = _balanced(rows, min(slot_rows(batch_size, row_bytes, buffer_bytes), _LARGEST_WINDOW))
    block = 1
    if not fits(rows + excluded_rows, row_bytes, buffer_bytes):
        block = block_rows_hint if block_rows_hint > 1 else _block_rows(window, batch_size, row_bytes)
    if block == 1:
        window = _balanced(rows, _INDEX_WINDOW)
    return Sampler(rows, batch_size, seed, block, window)


def _block_rows(window: int, batch_size: int, row_bytes: int) -> int:
    """Return as many rows as read well together, and leave enough blocks in a window."""
    repeated = max(0, batch_size - LANES)
    blocks = max(_BLOCKS_PER_BATCH_ROW * batch_size, _BLOCKS_PER_REPEATED_ROW * repeated)
    return max(1, min(window // blocks, _LARGEST_BLOCK // row_bytes, _MOST_BLOCK_ROWS))


def _balanced(rows: int, most: int) -> int:
    """Return the rows of windows that are nearly equal, and have at most ``most`` rows and whole turns of the lanes."""
    longest = -(-rows // -(-rows // most))
    whole = -(-longest // LANES) * LANES
    return whole if whole <= most else longest
