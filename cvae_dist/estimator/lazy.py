"""Dask arrays and xarray objects: lazy in, lazy out, with the coordinates of the rows kept."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from sklearn.utils import check_array

from cvae_dist.errors import InvalidInput
from cvae_dist.estimator.inputs import as_invalid_input, native

Function = Callable[[NDArray[Any]], NDArray[Any]]

_SAMPLE = "sample"


@dataclass(frozen=True)
class Kind:
    """What goes in, under the name that stores use, and what comes out; all of it along ``sample``."""

    name: str
    result_name: str
    result_dims: tuple[str, ...]


ROWS = Kind("x", "latent", ("latent",))
LATENTS = Kind("latent", "x", ("feature",))
DRAWS = Kind("x", "latent", ("draw", "latent"))
SCORES = Kind("x", "score", ())


def is_labelled_or_lazy(X: object) -> bool:
    """Whether X is a Dask array, DataArray or Dataset; asking imports neither library."""
    package, _, module = type(X).__module__.partition(".")
    return package == "xarray" or (package == "dask" and module.startswith("array"))


def apply(X: Any, function: Function, kind: Kind, width: int, sizes: tuple[int, ...], dtype: DTypeLike) -> Any:
    """Return ``function`` of rows, block by block, as the kind of object that ``X`` is; nothing is computed now.

    Parameters
    ----------
    X : dask.array.Array, xarray.DataArray or xarray.Dataset
        Rows along the dimension ``sample``, or the first one; all others together are ``width`` values. Of a Dataset
        the variable that stores call so, or its only one.
    function : callable
        (n, width) array -> (n, *sizes) array, row by row.
    kind : Kind
        Names of what goes in and what comes out.
    sizes : tuple of int
        Of what comes out for one row.
    dtype : dtype
        Of the result.

    Raises
    ------
    InvalidInput
        The rows have another width, or are no real numbers. What is not finite is found when it is computed.
    """
    block = _Block(function, width)
    if hasattr(X, "data_vars"):
        variable = X[_variable(X, kind)]
        return apply(variable, function, kind, width, sizes, dtype).to_dataset(name=kind.result_name)
    if hasattr(X, "dims"):
        return _of_labelled(X, block, kind, sizes, np.dtype(dtype))
    _check(X.shape, X.dtype, width)
    import dask.array

    whole = X.rechunk({axis: -1 for axis in range(1, X.ndim)})
    return dask.array.map_blocks(
        block,
        whole,
        dtype=dtype,
        chunks=(whole.chunks[0], *((size,) for size in sizes)),
        drop_axis=list(range(1, X.ndim)),
        new_axis=list(range(1, 1 + len(sizes))),
        meta=np.empty((0,) * (1 + len(sizes)), dtype),
    )


@contextmanager
def computed(X: Any, kind: Kind = ROWS) -> Iterator[Any]:
    """Give the values of X: what is in memory as it is, a lazy one in a temporary file, each block computed once."""
    if not is_labelled_or_lazy(X):
        yield X
        return
    if hasattr(X, "data_vars"):
        X = X[_variable(X, kind)]
    if hasattr(X, "dims"):
        X = X.transpose(_sample(X), ...).data
    if not hasattr(X, "dask"):
        yield np.asarray(X)
        return
    if any(math.isnan(length) for length in X.shape):
        raise InvalidInput(
            f"a Dask array of shape {X.shape} has blocks of unknown size; call compute_chunk_sizes() first"
        )
    if X.dtype.kind not in "biuf":
        raise InvalidInput(f"rows of dtype {X.dtype} are no real numbers; convert them to a float or integer type")
    import dask.array

    with tempfile.TemporaryDirectory(prefix="cvae-dist-") as folder:
        rows = np.lib.format.open_memmap(Path(folder) / "rows.npy", "w+", X.dtype, X.shape)
        dask.array.store(X, rows, lock=False)
        yield rows


@dataclass(frozen=True)
class _Block:
    """What is done to one block of rows; it travels to the worker with the model inside ``function``."""

    function: Function
    width: int

    def __call__(self, block: NDArray[Any]) -> NDArray[Any]:
        flat = np.reshape(block, (len(block), self.width))
        with as_invalid_input():
            rows = check_array(flat, dtype="numeric", ensure_min_samples=0)
        return self.function(native(rows))


def _of_labelled(X: Any, block: _Block, kind: Kind, sizes: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    import xarray

    sample = _sample(X)
    others = [dim for dim in X.dims if dim != sample]
    _check((X.sizes[sample], *(X.sizes[dim] for dim in others)), X.dtype, block.width)
    result = xarray.apply_ufunc(
        block,
        X if X.chunks is None else X.chunk(dict.fromkeys(others, -1)),
        input_core_dims=[others],
        output_core_dims=[kind.result_dims],
        exclude_dims=set(kind.result_dims) & set(others),
        dask="parallelized",
        output_dtypes=[dtype],
        dask_gufunc_kwargs={"output_sizes": dict(zip(kind.result_dims, sizes, strict=True))},
    )
    return result.rename(kind.result_name)


def _sample(X: Any) -> Any:
    if not X.dims:
        raise InvalidInput("a DataArray without dimensions holds no rows; give one with the dimension 'sample'")
    return _SAMPLE if _SAMPLE in X.dims else X.dims[0]


def _variable(X: Any, kind: Kind) -> Any:
    if kind.name in X.variables:  # xarray takes a variable with the name of its dimension for a coordinate
        return kind.name
    names = list(X.data_vars)
    if len(names) == 1:
        return names[0]
    raise InvalidInput(
        f"a Dataset with the variables {names} does not say which are the rows: name one of them {kind.name!r}, "
        "or give the DataArray"
    )


def _check(shape: tuple[int, ...], dtype: np.dtype[Any], width: int) -> None:
    if len(shape) < 2 or math.prod(shape[1:]) != width:
        features = math.prod(shape[1:]) if len(shape) > 1 else 0
        raise InvalidInput(
            f"X of shape {shape} has {features} features, but the model is expecting {width} features as input: "
            "give rows of the kind it was trained on"
        )
    if dtype.kind not in "biuf":
        raise InvalidInput(f"rows of dtype {dtype} are no real numbers; convert them to a float or integer type")
