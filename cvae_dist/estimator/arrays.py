"""Numbers in memory, checked as scikit-learn does, with its messages as errors of this package."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn import get_config
from sklearn.base import BaseEstimator
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import validate_data

from cvae_dist.errors import InvalidInput
from cvae_dist.estimator.refusals import refuse_kind, require_finite


def checked_rows(estimator: BaseEstimator, X: Any, *, reset: bool) -> tuple[NDArray[Any], tuple[int, ...]]:
    """Return rows (n, n_features) of real finite numbers in their own dtype, and the shape of an item.

    With ``reset`` the ``estimator`` takes over number and names of the features; otherwise they must agree with it.
    """
    refuse_kind(X)
    with _as_invalid_input():
        items = X if hasattr(X, "shape") else np.asarray(X)
        refuse_kind(items)
        item_shape = tuple(items.shape[1:]) if len(items.shape) > 2 else None
        flat = items if item_shape is None else np.reshape(items, (len(items), math.prod(item_shape)))
        rows = validate_data(estimator, flat, reset=reset, dtype="numeric", ensure_all_finite=False)
    item_shape = item_shape or (rows.shape[1],)
    require_finite(rows, getattr(estimator, "feature_names_in_", None), item_shape)
    return _native(rows), item_shape


def checked_block(items: NDArray[Any], width: int, name: str = "") -> NDArray[Any]:
    """Return items (n, ...) as rows (n, width) of real finite numbers; there may be none of them."""
    flat = np.reshape(items, (len(items), width))
    with _as_invalid_input():
        return _native(check_array(flat, dtype="numeric", ensure_min_samples=0, input_name=name))


def checked_latents(z: Any) -> NDArray[np.float32]:
    """Return latents (n, dim_latent) as finite float32."""
    if is_plain(z) and z.dtype == np.float32 and is_finite(z):
        return z
    with _as_invalid_input():
        latents: NDArray[np.float32] = check_array(z, dtype=np.float32, input_name="z")
    return latents


def random_state_of(given: int | np.random.RandomState | np.random.Generator | None) -> np.random.RandomState:
    """Return the generator that a ``random_state`` means; one of NumPy's new kind seeds one of the old.

    Raises
    ------
    InvalidInput
        It is neither of them, nor a seed.
    """
    if isinstance(given, np.random.Generator):
        return np.random.RandomState(int(given.integers(2**31)))
    with _as_invalid_input():
        state: np.random.RandomState = check_random_state(given)
    return state


def output_library(estimator: BaseEstimator) -> str:
    """Return the library whose tables ``set_output``, or scikit-learn's configuration, asks for; or ``default``."""
    own: dict[str, str] = getattr(estimator, "_sklearn_output_config", {})
    return own.get("transform", str(get_config()["transform_output"]))


def as_frame(rows: NDArray[Any], names: Sequence[str], library: str, index: Any = None) -> Any:
    """Return rows as a table of ``library``, pandas or polars, with named columns."""
    if library == "polars":
        import polars  # type: ignore[import-not-found] # there, as scikit-learn was asked for it

        return polars.DataFrame(rows, schema=list(names))
    return pd.DataFrame(rows, columns=list(names), index=index)


def is_plain(values: object) -> TypeGuard[NDArray[Any]]:
    """Whether these are numbers in two dimensions that torch takes as they are."""
    return (
        type(values) is np.ndarray and values.ndim == 2 and len(values) > 0 and values.dtype in (np.uint8, np.float32)
    )


def is_finite(values: NDArray[Any]) -> bool:
    """Whether there is certainly neither NaN nor infinity, so that the slower general check can be left out."""
    with np.errstate(all="ignore"):
        return values.dtype == np.uint8 or bool(np.isfinite(values.sum(dtype=np.float32)))


def _native(rows: NDArray[Any]) -> NDArray[Any]:
    """Return numbers that torch can take: in this machine's byte order, booleans as 0 and 1."""
    numbers = rows.view(np.uint8) if rows.dtype == np.bool_ else rows
    return numbers.astype(numbers.dtype.newbyteorder("="), copy=False)


@contextmanager
def _as_invalid_input() -> Iterator[None]:
    """Raise scikit-learn's messages, which name the values, as an error of this package."""
    try:
        yield
    except ValueError as error:
        raise InvalidInput(str(error)) from error
