"""What tests ask of sources: all their files, and all their rows."""

from pathlib import Path
from typing import Any

import numpy as np

from cvae_dist.sources import FileOptions, Files, Pieces, Reader, open_source


def scan(root: str | Path, storage_options: dict[str, Any] | None = None, **options: Any) -> tuple[Reader, Pieces]:
    """Return what reads a source, as its first file says, and the runs of rows of all its files."""
    source = open_source(root, FileOptions(**options), storage_options)
    files = Files.join(list(source.list().batches()))
    reader = source.reader(files[:1])
    rows, problems = reader.count(files)
    if problems:
        raise problems[0]
    return reader, Pieces(files.path, files.size, files.version, np.zeros_like(rows), rows)


def read_all(reader: Reader, pieces: Pieces) -> np.ndarray:
    """Return the rows of some pieces."""
    out = np.full((pieces.total, reader.schema.n_features), 99, reader.schema.dtype)
    reader.read(pieces, out)
    return out
