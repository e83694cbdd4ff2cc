"""What X may be: numbers in memory, lazy or labelled arrays, .npy files, and stores."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator

from cvae_dist.errors import InvalidInput
from cvae_dist.estimator import lazy
from cvae_dist.estimator.arrays import checked_rows, is_finite, is_plain
from cvae_dist.events import OnEvent, ignore
from cvae_dist.store import Location, RowStore
from cvae_dist.store.permutation import pick_rows
from cvae_dist.store.ranges import RowNumbers
from cvae_dist.store.reader import ArrayRows, Reader, RowReader
from cvae_dist.store.urls import StorageOptions
from cvae_dist.training.loader import read_rows

RowsLike = ArrayLike | str | os.PathLike[str] | RowStore

_STORE = "rows.zarr"
_BLOCK_BYTES = 32_000_000


def is_place(X: object) -> bool:
    """Whether X says where rows are rather than being rows."""
    return isinstance(X, str | os.PathLike | RowStore)


@contextmanager
def store_of(
    X: Any,
    storage_options: StorageOptions | None,
    directory: str | os.PathLike[str] | None = None,
    on_event: OnEvent = ignore,
) -> Iterator[RowStore]:
    """Give the store that X is or names. A source of ``ingest`` becomes one: beside ``directory``, or temporary."""
    if isinstance(X, RowStore):
        yield X
    elif RowStore.claims(Location.of(X, storage_options)):
        store = RowStore.open(os.fspath(X), storage_options)
        yield store
        store.require_unchanged()
    else:
        from cvae_dist.verbs.ingest import ingest  # here, as arrays need no Dask

        with tempfile.TemporaryDirectory(prefix="cvae-dist-") as temporary:
            target = f"{os.fspath(directory).rstrip('/')}.{_STORE}" if directory else f"{temporary}/{_STORE}"
            ingest(X, target, storage_options=storage_options, on_event=on_event)
            yield RowStore.open(target, storage_options)


@dataclass(frozen=True)
class GivenRows:
    """Rows X of the kind an estimator is trained on, wherever they are.

    Every method raises InvalidInput where they have other features than the ``estimator`` knows, or are no finite
    numbers.
    """

    estimator: BaseEstimator
    X: Any

    def map(self, function: lazy.RowFunction, gives: lazy.Variable, *, refuses_nan: bool = False) -> NDArray[Any]:
        """Return ``function`` of all rows: lazily of lazy ones, of a store's a bounded number at a time.

        Plain numbers are not searched for NaN before a function that ``refuses_nan`` itself.
        """
        if lazy.is_labelled_or_lazy(self.X):
            return cast("NDArray[Any]", lazy.apply(self.X, function, lazy.rows_of(self.estimator.model_), gives))
        if not is_place(self.X):
            return self._map_array(function, refuses_nan)
        with self._store() as store:
            return np.concatenate([function(block) for block in _blocks(store)])

    def _map_array(self, function: lazy.RowFunction, refuses_nan: bool) -> NDArray[Any]:
        try:
            return function(self._checked(self.X, may_hold_nan=refuses_nan))
        except InvalidInput:
            checked_rows(self.estimator, self.X, reset=False)  # which names the columns that are not finite
            raise

    def some(self, most: int) -> NDArray[Any]:
        """Return the rows, but no more than ``most``, chosen by their numbers."""
        return self.chosen(lambda total: pick_rows(total, most, 0))[0]

    def chosen(self, choose: Callable[[int], RowNumbers]) -> tuple[NDArray[Any], RowNumbers, int]:
        """Return the rows whose numbers ``choose(total)`` gives, these numbers, and the total."""
        with self.reader() as reader:
            numbers = choose(reader.n_rows)
            return read_rows(reader, numbers), numbers, reader.n_rows

    @contextmanager
    def reader(self) -> Iterator[Reader]:
        """Give a reader of the rows; lazy ones are computed."""
        if is_place(self.X):
            with self._store() as store:
                yield RowReader(store)
        else:
            with lazy.computed(self.X) as items:
                yield ArrayRows(self._checked(items))

    def _checked(self, X: Any, *, may_hold_nan: bool = False) -> NDArray[Any]:
        """Return rows in memory as (n, n_features); plain numbers are spared scikit-learn's slower check."""
        known = self.estimator
        fits = is_plain(X) and X.shape[1] == known.n_features_in_ and not hasattr(known, "feature_names_in_")
        return X if fits and (may_hold_nan or is_finite(X)) else checked_rows(known, X, reset=False)[0]

    @contextmanager
    def _store(self) -> Iterator[RowStore]:
        known = self.estimator
        with store_of(self.X, known.storage_options) as store:
            if store.n_features != known.n_features_in_:
                raise InvalidInput(
                    f"{store.url} has {store.n_features} features, but {type(known).__name__} is expecting "
                    f"{known.n_features_in_} features as input: give rows of the kind it is trained on"
                )
            yield store


def _blocks(store: RowStore) -> Iterator[NDArray[Any]]:
    """Give the rows of a store, a bounded number of bytes at a time."""
    step = max(1, _BLOCK_BYTES // (store.n_features * 8))
    for start in range(0, store.rows, step):
        yield store.read(store.main, start, min(start + step, store.rows))
