"""What the estimator takes for rows: arrays, and places of files or of a store."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.validation import validate_data

from cvae_dist.errors import InvalidInput
from cvae_dist.events import OnEvent, ignore
from cvae_dist.store import Location, RowStore
from cvae_dist.store.urls import StorageOptions

_STORE = "rows.zarr"


def is_place(X: object) -> bool:
    """Whether X says where rows are rather than being rows."""
    return isinstance(X, str | os.PathLike | RowStore)


def checked_array(estimator: object, X: Any, *, reset: bool) -> tuple[NDArray[Any], tuple[int, ...]]:
    """Return rows (n, n_features) of real finite numbers in their own dtype, and the shape of an item.

    ``reset`` makes the width and the names of the features those of the ``estimator``; otherwise they must agree.
    """
    with as_invalid_input(), np.errstate(invalid="ignore"):  # its sum of the largest floats is inf - inf
        items = X if hasattr(X, "shape") else np.asarray(X)
        item_shape = tuple(items.shape[1:]) if len(items.shape) > 2 else None
        flat = items if item_shape is None else np.reshape(items, (len(items), math.prod(item_shape)))
        rows = validate_data(estimator, flat, reset=reset, dtype="numeric")
    return native(rows), item_shape or (rows.shape[1],)


def native(rows: NDArray[Any]) -> NDArray[Any]:
    """Return numbers that torch can take: in this machine's byte order, booleans as 0 and 1."""
    numbers = rows.view(np.uint8) if rows.dtype == np.bool_ else rows
    return numbers.astype(numbers.dtype.newbyteorder("="), copy=False)


@contextmanager
def store_of(
    X: Any, directory: str | None, storage_options: StorageOptions | None, on_event: OnEvent = ignore
) -> Iterator[RowStore]:
    """Give the store that X is, or one of the .npy tree X, kept only beside a ``directory`` that is given."""
    if isinstance(X, RowStore):
        yield X
    elif (Location.of(X, storage_options) / "zarr.json").exists():
        yield RowStore.open(os.fspath(X), storage_options)
    else:
        from cvae_dist.verbs.ingest import ingest  # here, as arrays need no Dask

        with tempfile.TemporaryDirectory(prefix="cvae-dist-") as temporary:
            target = f"{directory.rstrip('/')}.{_STORE}" if directory else f"{temporary}/{_STORE}"
            ingest(X, target, storage_options=storage_options, on_event=on_event)
            yield RowStore.open(target, storage_options)


@contextmanager
def as_invalid_input() -> Iterator[None]:
    """Give scikit-learn's messages, which name the values, as an error of this package."""
    try:
        yield
    except ValueError as error:
        raise InvalidInput(str(error)) from error
