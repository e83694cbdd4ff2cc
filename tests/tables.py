"""What tests ask of readers of files: one file as it is listed, and its rows."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cvae_dist.sources.files import BadFile, File, local_version
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


def read_steps(reader: FileReader, file: File, step: int) -> np.ndarray:
    """Return all rows of a file, read a few at a time."""
    rows = reader.count_file(file)
    out = np.full((rows, reader.schema.n_features), 99, reader.schema.dtype)
    for first in range(0, rows, step):
        reader.read_file(file, first, out[first : first + step])
    return out


def refused(open_reader: Callable[[Location, File, str | None], FileReader], path: Path, array: str | None) -> BadFile:
    """Return what is said of a file, an array of which cannot be read."""
    file = listed(path)
    with pytest.raises(BadFile) as caught:
        read_steps(open_reader(file.root, file, array), file, 3)
    assert caught.value.path == path.name
    return caught.value
