"""Dask arrays and xarray objects: lazy in, lazy out, with the coordinates of the rows kept."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cvae_dist.errors import InvalidInput
from cvae_dist.estimator.arrays import checked_block
from cvae_dist.model.vae import VAE

RowFunction = Callable[[NDArray[Any]], NDArray[Any]]

_SAMPLE = "sample"


@dataclass(frozen=True)
class Variable:
    """An array along ``sample``: its name in a Dataset and in stores, the dimensions of one row, its dtype."""

    name: str
    dims: Mapping[str, int]
    dtype: DTypeLike

    @property
    def width(self) -> int:
        """Values of one row."""
        return math.prod(self.dims.values())


def items_of(vae: VAE, item_shape: tuple[int, ...]) -> Variable:
    """Describe the items that a model's rows stand for."""
    names = ["feature"] if len(item_shape) == 1 else [f"feature_{axis}" for axis in range(len(item_shape))]
    return Variable("x", dict(zip(names, item_shape, strict=True)), vae.scaling.restored_dtype)


def rows_of(vae: VAE) -> Variable:
    """Describe the rows of a model."""
    return Variable("x", {"feature": vae.n_features}, vae.scaling.restored_dtype)


def latents_of(vae: VAE) -> Variable:
    """Describe the latents of a model."""
    return Variable("z", {"latent": vae.dim_latent}, np.float32)


def is_labelled_or_lazy(X: object) -> bool:
    """Whether X is a Dask array, DataArray or Dataset; asking imports neither library."""
    package, _, module = type(X).__module__.partition(".")
    return package == "xarray" or (package == "dask" and module.startswith("array"))


def apply(X: Any, function: RowFunction, takes: Variable, gives: Variable) -> Any:
    """Return ``function`` of rows as the kind of object that ``X`` is; nothing is computed now.

    ``X`` is a Dask array, DataArray or Dataset. Its rows lie along the dimension ``sample``, or the first one; all
    other dimensions together are one row. Of a Dataset the variable that is called as ``takes`` is meant, or its only
    one. ``function`` makes an (n, ...) array of an (n, width) one, row by row.

    Raises
    ------
    InvalidInput
        The rows have another width, or are no real numbers. Values that are not finite are found when it is computed.
    """
    if hasattr(X, "data_vars"):
        return apply(X[_variable(X, takes.name)], function, takes, gives).to_dataset(name=gives.name)
    block = partial(_of_block, function=function, width=takes.width, gives=tuple(gives.dims.values()))
    if hasattr(X, "dims"):
        return _of_labelled(X, block, takes.width, gives)
    _check(X.shape, X.dtype, takes.width)
    import dask.array

    whole = X.rechunk({axis: -1 for axis in range(1, X.ndim)})
    return dask.array.map_blocks(
        block,
        whole,
        dtype=gives.dtype,
        chunks=(whole.chunks[0], *((size,) for size in gives.dims.values())),
        drop_axis=list(range(1, X.ndim)),
        new_axis=list(range(1, 1 + len(gives.dims))),
        meta=np.empty((0,) * (1 + len(gives.dims)), gives.dtype),
    )


@contextmanager
def computed(X: Any, name: str = "x") -> Iterator[Any]:
    """Give the values of X, of a Dataset those of the variable ``name``.

    What is in memory is given as it is. A lazy array is computed into a temporary file, each block once.
    """
    if not is_labelled_or_lazy(X):
        yield X
        return
    if hasattr(X, "data_vars"):
        X = X[_variable(X, name)]
    if hasattr(X, "dims"):
        X = X.transpose(_sample(X), ...).data
    if not hasattr(X, "dask"):
        yield np.asarray(X)
        return
    if any(math.isnan(length) for length in X.shape):
        raise InvalidInput(
            f"a Dask array of shape {X.shape} has blocks of unknown size; call compute_chunk_sizes() first"
        )
    _check_dtype(X.dtype)
    import dask.array

    with tempfile.TemporaryDirectory(prefix="cvae-dist-") as folder:
        rows = np.lib.format.open_memmap(Path(folder) / "rows.npy", "w+", X.dtype, X.shape)
        dask.array.store(X, rows, lock=False)
        yield rows


def _of_block(items: NDArray[Any], function: RowFunction, width: int, gives: tuple[int, ...]) -> NDArray[Any]:
    """Return ``function`` of one block of items, as a Dask worker does; the model travels inside it."""
    return function(checked_block(items, width)).reshape(len(items), *gives)


def _of_labelled(X: Any, block: RowFunction, width: int, gives: Variable) -> Any:
    import xarray

    sample = _sample(X)
    others = [dim for dim in X.dims if dim != sample]
    _check((X.sizes[sample], *(X.sizes[dim] for dim in others)), X.dtype, width)
    result = xarray.apply_ufunc(
        block,
        X if X.chunks is None else X.chunk(dict.fromkeys(others, -1)),
        input_core_dims=[others],
        output_core_dims=[tuple(gives.dims)],
        exclude_dims=set(gives.dims) & set(others),
        dask="parallelized",
        output_dtypes=[np.dtype(gives.dtype)],
        dask_gufunc_kwargs={"output_sizes": dict(gives.dims)},
    )
    return result.rename(gives.name)


def _sample(X: Any) -> Any:
    if not X.dims:
        raise InvalidInput("a DataArray without dimensions holds no rows; give one with the dimension 'sample'")
    return _SAMPLE if _SAMPLE in X.dims else X.dims[0]


def _variable(X: Any, name: str) -> Any:
    if name in X.data_vars:
        return name
    names = list(X.data_vars)
    if len(names) == 1:
        return names[0]
    raise InvalidInput(
        f"a Dataset with the variables {names} does not say which are the rows: name one of them {name!r}, "
        "or give the DataArray"
    )


def _check(shape: tuple[int, ...], dtype: np.dtype[Any], width: int) -> None:
    if len(shape) < 2 or math.prod(shape[1:]) != width:
        features = math.prod(shape[1:]) if len(shape) > 1 else 0
        raise InvalidInput(
            f"X of shape {shape} has {features} features, but the model is expecting {width} features as input: "
            "give rows of the kind it was trained on"
        )
    _check_dtype(dtype)


def _check_dtype(dtype: np.dtype[Any]) -> None:
    if dtype.kind not in "biuf":
        raise InvalidInput(f"rows of dtype {dtype} are no real numbers; convert them to a float or integer type")
