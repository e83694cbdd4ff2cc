"""Rows to latents and back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, cast, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_array

from cvae_dist.config import ComputePrecision
from cvae_dist.errors import InvalidInput
from cvae_dist.estimator import lazy
from cvae_dist.estimator.fitted import Fitted
from cvae_dist.estimator.inputs import as_invalid_input, checked_array, is_place, store_of
from cvae_dist.model.kernels import drawback
from cvae_dist.model.sampling import posterior_spread
from cvae_dist.store import RowStore
from cvae_dist.store.reader import RowReader
from cvae_dist.training.loader import read_rows
from cvae_dist.training.sampler import validation_rows

if TYPE_CHECKING:
    Floats = NDArray[np.float32]

_LOGGER = logging.getLogger(__name__)
_BLOCK_BYTES = 32_000_000


class Inference(ClassNamePrefixFeaturesOutMixin, TransformerMixin, Fitted):  # type: ignore[misc]
    """``embed`` and ``decode``, under scikit-learn's names too."""

    @overload
    def embed(
        self,
        X: Any,
        batch_size: int = 16_384,
        *,
        return_std: Literal[False] = False,
        precision: ComputePrecision = "float32",
    ) -> Floats: ...
    @overload
    def embed(
        self, X: Any, batch_size: int = 16_384, *, return_std: Literal[True], precision: ComputePrecision = "float32"
    ) -> tuple[Floats, Floats]: ...
    def embed(
        self, X: Any, batch_size: int = 16_384, *, return_std: bool = False, precision: ComputePrecision = "float32"
    ) -> Floats | tuple[Floats, Floats]:
        """Return the latents of rows: the posterior means.

        Parameters
        ----------
        X : array, DataFrame, path, URL or RowStore
            Rows as in the constructor. Of a Dask array the latents are a Dask array, of a DataArray or Dataset a
            DataArray or Dataset with the coordinates of the rows, and nothing is computed before they are.
        batch_size : int
            Rows computed at once; it bounds memory and changes no result.
        return_std : bool
            Also return the standard deviations of the posteriors: how uncertain the encoding is. It is no measure of
            how unusual a row is, see :meth:`score_samples`. Behind a flow they are estimated from 64 draws.
        precision : {"float32", "bf16"}
            Type that matrix products are computed in. bf16 is about 1.6 times as fast on processors that have it,
            and errs by about 1 % of the latents' spread.

        Returns
        -------
        (n, dim_latent) float32 array, or two of them

        Raises
        ------
        NotFitted
            The model is not trained.
        InvalidInput
            The rows have another number of features, or values that are not finite numbers, or there is no such
            precision.
        """
        model = self._model()
        if told := drawback(precision):
            _LOGGER.warning(told)
        mean_of, spread_of = (
            partial(function, batch_size=batch_size, precision=precision)
            for function in (model.embed_rows, partial(posterior_spread, model))
        )

        means = self._mapped(X, mean_of, lazy.ROWS, (model.dim_latent,), np.float32, refuses_nan=True)
        if not return_std:
            return cast("Floats", means)
        return means, self._mapped(X, spread_of, lazy.ROWS, (model.dim_latent,), np.float32)

    def decode(self, z: ArrayLike) -> NDArray[np.floating[Any]]:
        """Return the rows that latents stand for, in the data's units.

        Parameters
        ----------
        z : (n, dim_latent) array
            Finite numbers. Dask arrays, DataArrays and Datasets give the same, lazily, as for :meth:`embed`.

        Returns
        -------
        (n, n_features) float32 array
            float64 where float32 cannot hold both offset and digits of a feature.
        """
        model = self._model()
        if lazy.is_labelled_or_lazy(z):
            dtype = model.scaling.restored_dtype
            rows = lazy.apply(z, model.decode_rows, lazy.LATENTS, model.dim_latent, (model.n_features,), dtype)
            return cast("NDArray[np.floating[Any]]", rows)
        if _is_plain(z) and z.dtype == np.float32 and _is_finite(z):
            latents = z
        else:
            with as_invalid_input():
                latents = check_array(z, dtype=np.float32, input_name="z")
        return cast("NDArray[np.floating[Any]]", model.decode_rows(latents))

    def transform(self, X: Any) -> Floats:
        """Return the latents of rows; see :meth:`embed`."""
        return self.embed(X)

    def inverse_transform(self, X: ArrayLike) -> NDArray[np.floating[Any]]:
        """Return the rows that latents stand for; see :meth:`decode`."""
        return self.decode(X)

    def _mapped(
        self,
        X: Any,
        function: lazy.Function,
        kind: lazy.Kind,
        sizes: tuple[int, ...],
        dtype: Any,
        *,
        refuses_nan: bool = False,
    ) -> Any:
        """Return ``function`` of rows: lazily of lazy ones, of a store's a bounded number at a time.

        What refuses NaN itself, as it reads the rows, spares them a reading before.
        """
        if lazy.is_labelled_or_lazy(X):
            return lazy.apply(X, function, kind, self._model().n_features, sizes, dtype)
        if not is_place(X):
            return function(X if refuses_nan and self._is_own(X) else self._rows(X))
        with store_of(X, None, self.storage_options) as store:
            self._check_width(store)
            return np.concatenate([function(block) for block in _blocks(store)])

    def _rows(self, X: Any) -> NDArray[Any]:
        """Return rows in memory, (n, n_features), of the kind the model was trained on."""
        return X if self._is_own(X) and _is_finite(X) else checked_array(self, X, reset=False)[0]

    def _is_own(self, X: Any) -> TypeGuard[NDArray[Any]]:
        """Whether these are rows of the kind the model was trained on for certain, but for NaN and infinity."""
        return _is_plain(X) and X.shape[1] == self.n_features_in_ and not hasattr(self, "feature_names_in_")

    def _some_rows(self, X: Any, most: int) -> NDArray[Any]:
        """Return :meth:`_rows` of rows wherever they are, but no more than ``most``, chosen by their numbers."""
        return self._picked(X, lambda total: validation_rows(total, most, 0))[0]

    def _picked(
        self, X: Any, choose: Callable[[int], NDArray[np.int64]]
    ) -> tuple[NDArray[Any], NDArray[np.int64], int]:
        """Return the rows, wherever they are, whose numbers ``choose(total)`` gives, these numbers, and the total."""
        if is_place(X):
            with store_of(X, None, self.storage_options) as store:
                self._check_width(store)
                numbers = choose(store.rows)
                return read_rows(RowReader(store), numbers), numbers, store.rows
        with self._in_memory(X) as rows:
            numbers = choose(len(rows))
            return rows[numbers], numbers, len(rows)

    @contextmanager
    def _in_memory(self, X: Any) -> Iterator[NDArray[Any]]:
        """Give :meth:`_rows` of rows that are no place, lazy ones computed."""
        with lazy.computed(X) if lazy.is_labelled_or_lazy(X) else nullcontext(X) as items:
            yield self._rows(items)

    def _check_width(self, store: RowStore) -> None:
        if store.n_features != self.n_features_in_:
            raise InvalidInput(
                f"{store.url} has {store.n_features} features, but {type(self).__name__} is expecting "
                f"{self.n_features_in_} features as input: give rows of the kind it is trained on"
            )

    @property
    def _n_features_out(self) -> int:
        return self._model().dim_latent

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags


def _is_plain(values: object) -> TypeGuard[NDArray[Any]]:
    """Whether these are numbers in two dimensions that torch takes as they are."""
    return (
        type(values) is np.ndarray and values.ndim == 2 and len(values) > 0 and values.dtype in (np.uint8, np.float32)
    )


def _is_finite(values: NDArray[Any]) -> bool:
    """Whether there is neither NaN nor infinity for certain: then the slower general check finds nothing."""
    with np.errstate(all="ignore"):
        return values.dtype == np.uint8 or bool(np.isfinite(values.sum(dtype=np.float32)))


def _blocks(store: RowStore) -> Iterator[NDArray[Any]]:
    """Give the rows of a store, a bounded number of bytes at a time."""
    step = max(1, _BLOCK_BYTES // (store.n_features * 8))
    for start in range(0, store.rows, step):
        yield store.read(store.main, start, min(start + step, store.rows))
