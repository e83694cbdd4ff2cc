"""Rows from anywhere, read only: a source lists its pieces without reading their rows."""

import os

from cvae_dist.sources.npy import NpyTree
from cvae_dist.sources.pieces import Pieces
from cvae_dist.sources.source import Listing, RowsPerFile, Schema, Source
from cvae_dist.store import Location

__all__ = ["Listing", "NpyTree", "Pieces", "RowsPerFile", "Schema", "Source", "open_source"]


def open_source(source: str | os.PathLike[str] | Source, rows_per_file: RowsPerFile) -> Source:
    """Return the source that a path means; one that is open already as it is."""
    return source if isinstance(source, Source) else NpyTree(Location.of(source), rows_per_file)
