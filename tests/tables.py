"""What tests ask of readers of tables: one file as it is listed, and its rows."""

import os
from pathlib import Path

import numpy as np

from cvae_dist.sources.files import File, local_version
from cvae_dist.sources.source import FileReader
from cvae_dist.store.urls import Location


def listed(path: Path, root: Location | None = None) -> File:
    """Return a local file as it is listed, below its folder by default."""
    status = os.stat(path)
    root = root or Location.of(path.parent)
    return File(root, os.path.relpath(path, root.path), status.st_size, local_version(status))


def found(root: Location, path: str) -> File:
    """Return a file as it is listed, wherever it is."""
    if root.is_local:
        return listed(Path(root.path) / path, root)
    return next(File(root, *entry) for entry in root.list() if entry.name == path)


def read(
    reader: FileReader, file: File, first: int = 0, rows: int | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return rows of a file, those to its end by default, and their columns."""
    rows = reader.count_file(file) - first if rows is None else rows
    out = np.empty((rows, reader.schema.n_features), reader.schema.dtype)
    return out, dict(reader.read_file(file, first, out))
