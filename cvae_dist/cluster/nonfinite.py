"""Rows that hold NaN or infinity, found before the others get their places: ``ingest --nonfinite drop``."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from cvae_dist.cluster.regions import map_regions
from cvae_dist.sources import Batch, Interval, Reader, StagedBatch
from cvae_dist.store import Location
from cvae_dist.store.columns import Integers
from cvae_dist.store.manifest import Entries, as_spans

if TYPE_CHECKING:
    from distributed import Client

_SCAN_BYTES = 16_000_000  # of rows that one task looks through


def without_nonfinite(reader: Reader, batch: Batch, place: Location, client: "Client | None") -> Batch:
    """Return a batch of whole files without the rows that hold NaN or infinity.

    As long as tasks look for them, they find the list of files at ``place``, and are sent intervals of it.

    Raises
    ------
    BadFiles
        Files turned out bad when they were read.
    """
    place.delete()  # a run may have been killed
    try:
        scans = map_regions(_nonfinite_rows, _scans(reader, batch, batch.stage(place)), client=client)
        with contextlib.closing(scans):  # nobody reads the list any more once it is deleted
            found = list(scans)
    finally:
        place.delete()
    rows = np.sort(np.concatenate(found))
    return Batch(_without(batch, rows)) if len(rows) else batch


@dataclass(frozen=True)
class _Scan:
    """Rows to look through, the first of which has number ``start`` in the batch."""

    reader: Reader
    batch: StagedBatch
    interval: Interval
    start: int


def _scans(reader: Reader, batch: Batch, staged: StagedBatch) -> Iterator[_Scan]:
    edges = np.append(np.arange(0, batch.rows, max(1, _SCAN_BYTES // reader.schema.row_bytes)), batch.rows)
    for interval, start in zip(batch.cut(edges), edges[:-1].tolist(), strict=True):
        yield _Scan(reader, staged, interval, start)


def _nonfinite_rows(scan: _Scan) -> Integers:
    """Return the numbers of the rows that hold NaN or infinity."""
    block = np.empty((scan.interval.rows, scan.reader.schema.n_features), scan.reader.schema.dtype)
    scan.reader.read(scan.batch.pieces(scan.interval), block)
    rows: Integers = scan.start + np.flatnonzero(~np.isfinite(block).all(axis=1))
    return rows


def _without(batch: Batch, rows: Integers) -> Iterator[Entries]:
    """Yield the files of a batch without some of its rows, whose numbers ascend."""
    stop = 0
    for entries in batch:
        edges = stop + np.append(0, np.cumsum(entries.rows))
        cuts, stop = np.searchsorted(rows, edges), int(edges[-1])
        counts, dropped = np.diff(cuts), entries.dropped.copy()
        for number in np.flatnonzero(counts):
            dropped[number] = as_spans(rows[cuts[number] : cuts[number + 1]] - edges[number])
        yield replace(entries, rows=entries.rows - counts, dropped=dropped)
