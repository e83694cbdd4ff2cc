"""Rows to latents and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_array

from cvae_dist.errors import InvalidInput
from cvae_dist.estimator.fitted import Fitted
from cvae_dist.estimator.rows import as_invalid_input, checked_array, is_place, store_of
from cvae_dist.store import RowStore

if TYPE_CHECKING:
    Floats = NDArray[np.float32]

_BLOCK_BYTES = 32_000_000


class Inference(ClassNamePrefixFeaturesOutMixin, TransformerMixin, Fitted):  # type: ignore[misc]
    """``embed`` and ``decode``, under scikit-learn's names too."""

    def embed(self, X: Any, batch_size: int = 2048) -> Floats:
        """Return the latents of rows: the posterior means.

        Parameters
        ----------
        X : array, DataFrame, path, URL or RowStore
            Rows as in the constructor.
        batch_size : int
            Rows computed at once; it bounds memory and changes no result.

        Returns
        -------
        (n, dim_latent) float32 array

        Raises
        ------
        NotFitted
            The model is not trained.
        InvalidInput
            The rows have another number of features, or values that are not finite numbers.
        """
        model = self._model()
        if not is_place(X):
            return model.embed_rows(self._rows(X), batch_size)
        with store_of(X, None, self.storage_options) as store:
            self._check_width(store)
            step = max(1, _BLOCK_BYTES // (store.n_features * 8))
            starts = range(0, store.rows, step)
            blocks = (store.read(store.main, start, min(start + step, store.rows)) for start in starts)
            return np.concatenate([model.embed_rows(block, batch_size) for block in blocks])

    def decode(self, z: ArrayLike) -> NDArray[np.floating[Any]]:
        """Return the rows that latents stand for, in the data's units.

        Parameters
        ----------
        z : (n, dim_latent) array
            Finite numbers.

        Returns
        -------
        (n, n_features) float32 array
            float64 where float32 cannot hold both offset and digits of a feature.
        """
        model = self._model()
        with as_invalid_input():
            latents = check_array(z, dtype=np.float32, input_name="z")
        return cast("NDArray[np.floating[Any]]", model.decode_rows(latents))

    def transform(self, X: Any) -> Floats:
        """Return the latents of rows; see :meth:`embed`."""
        return self.embed(X)

    def inverse_transform(self, X: ArrayLike) -> NDArray[np.floating[Any]]:
        """Return the rows that latents stand for; see :meth:`decode`."""
        return self.decode(X)

    def _rows(self, X: Any) -> NDArray[Any]:
        """Return rows in memory, (n, n_features), of the kind the model was trained on."""
        return checked_array(self, X, reset=False)[0]

    def _check_width(self, store: RowStore) -> None:
        if store.n_features != self._model().n_features:
            raise InvalidInput(
                f"{store.url} has {store.n_features} features, but {type(self).__name__} is expecting "
                f"{self._model().n_features} features as input: embed rows of the kind it was trained on"
            )

    @property
    def _n_features_out(self) -> int:
        return self._model().dim_latent

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags
