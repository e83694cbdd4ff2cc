"""Ranges of rows: arrays of first rows and of numbers of rows."""

import numpy as np
import numpy.typing as npt

RowNumbers = npt.NDArray[np.int64]


def enumerate_runs(lengths: RowNumbers) -> tuple[RowNumbers, RowNumbers]:
    """Return the run of every element of consecutive runs, and the element's place in its run."""
    run = np.repeat(np.arange(len(lengths)), lengths)
    return run, np.arange(len(run)) - (np.cumsum(lengths) - lengths)[run]


def expand_ranges(starts: RowNumbers, counts: RowNumbers) -> RowNumbers:
    """Return every row of the ranges, one range after the other."""
    source, number = enumerate_runs(counts)
    return starts[source] + number


def cut_ranges(starts: RowNumbers, counts: RowNumbers, size: int) -> tuple[RowNumbers, RowNumbers]:
    """Cut ranges at the multiples of ``size``, keeping their order; empty ones go."""
    ends = starts + counts
    pieces = np.where(counts > 0, (ends - 1) // size - starts // size + 1, 0)
    source, number = enumerate_runs(pieces)
    edge = (starts[source] // size + number) * size
    begin = np.maximum(edge, starts[source])
    return begin, np.minimum(edge + size, ends[source]) - begin


def split_ranges(starts: RowNumbers, counts: RowNumbers, excluded: RowNumbers) -> tuple[RowNumbers, RowNumbers]:
    """Cut ``excluded`` rows (sorted) out of the ranges, keeping their order."""
    first = np.searchsorted(excluded, starts)
    holes = np.searchsorted(excluded, starts + counts) - first
    if not holes.any():
        return starts, counts
    source, number = enumerate_runs(holes + 1)
    hole = first[source] + number
    padded = np.append(excluded, -1)  # neighbours that do not exist are not chosen
    before, after = padded[hole - 1], padded[np.minimum(hole, excluded.size)]
    begin = np.where(number == 0, starts[source], before + 1)
    end = np.where(number == holes[source], (starts + counts)[source], after)
    full = begin < end
    return begin[full], (end - begin)[full]
