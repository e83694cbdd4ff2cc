"""What X may not be: refused with the name of the column or the kind of the object, and the line that converts it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cvae_dist.errors import InvalidInput

_NAMED = 5  # columns named in one message
_GET_DUMMIES = "X = pandas.get_dummies({frame}, columns={names}, dtype=float)"


def refuse_kind(X: Any) -> None:
    """Refuse an object that is no array of real numbers.

    Raises
    ------
    InvalidInput
        It holds arrays, gives them one after another, or its values are masked, complex, dates or text.
    """
    _refuse_container(X)
    if np.ma.isMaskedArray(X):
        _refuse_masked(X)
    if isinstance(X, pd.DataFrame):
        _refuse_columns(X, "X")
    elif isinstance(X, np.ndarray) and X.dtype.kind in "cmMUSO":
        _refuse_dtype(X)


def require_finite(rows: NDArray[Any], names: Sequence[Hashable] | None, item_shape: tuple[int, ...]) -> None:
    """Refuse rows (n, n_features) that hold NaN or infinity; say in which columns, how often and what to do.

    ``names`` are those of the columns where they have some; ``item_shape`` is the shape of an item.

    Raises
    ------
    InvalidInput
        A value is not finite.
    """
    if rows.dtype.kind != "f":
        return
    missing, infinite = np.isnan(rows).sum(axis=0), np.isinf(rows).sum(axis=0)
    row = int(np.argmin(np.isfinite(rows).all(axis=1)))
    where = f"X has {{}} in {{}} of {len(rows):,} rows (first in row {row})"
    if missing.any():
        counts = _counts(missing, names, item_shape)
        impute = "sklearn.impute.SimpleImputer()" + ("" if names is None else ".set_output(transform='pandas')")
        line = f"X = {impute}.fit_transform(X)" if len(item_shape) == 1 else "X = numpy.nan_to_num(X)"
        raise InvalidInput(f"{where.format('missing values (NaN)', counts)}. Fill them in first: {line}")
    if infinite.any():
        flat = "" if len(item_shape) == 1 else ".reshape(len(X), -1)"
        line = f"X = X[numpy.isfinite(X){flat}.all(axis=1)]"
        counts = _counts(infinite, names, item_shape)
        raise InvalidInput(f"{where.format('infinity', counts)}. Leave these rows out: {line}")


def _refuse_container(X: Any) -> None:
    kind, package = type(X).__name__, type(X).__module__.partition(".")[0]
    if package == "h5py" and isinstance(X, Mapping):
        _refuse(f"X is an open HDF5 file or group with {_listed(list(X))}", f"X = X[{next(iter(X), '')!r}][:]")
    if package == "zarr" and hasattr(X, "array_keys"):
        names = list(X.array_keys())
        _refuse(f"X is a zarr.Group with the arrays {_listed(names)}", f"X = X[{next(iter(names), '')!r}]")
    if isinstance(X, np.lib.npyio.NpzFile):
        _refuse(f"X is an NpzFile with the arrays {_listed(X.files)}", f"X = X[{next(iter(X.files), '')!r}]")
    if isinstance(X, Mapping):
        _refuse(f"X is a {kind} with the keys {_listed(list(X))}", "X = pandas.DataFrame(X)")
    if package == "torch" and hasattr(X, "batch_sampler"):
        first = "batch[0] if isinstance(batch, (list, tuple)) else batch"
        _refuse("X is a DataLoader, which gives batches", f"X = torch.cat([{first} for batch in X])")
    if isinstance(X, Iterator):
        _refuse(f"X is a {kind}, which can be read only once", "X = numpy.stack(list(X))")


def _refuse_masked(X: Any) -> None:
    if np.ma.is_masked(X):
        counts = np.ma.getmaskarray(X).reshape(len(X), -1).sum(axis=0)
        what = f"X is a masked array; values are masked in {_counts(counts, None, X.shape[1:])} of {len(X):,} rows"
        _refuse(what, "X = numpy.where(X.mask, X.mean(axis=0), X.data)")


def _refuse_dtype(X: Any) -> None:
    """Refuse an array whose values are not real numbers; text and objects that are numbers pass."""
    if X.dtype.kind == "c":
        _refuse(f"Complex data not supported: X is {X.dtype}", "X = numpy.concatenate([X.real, X.imag], axis=-1)")
    if X.dtype.kind in "mM":
        _refuse(f"X holds dates or durations ({X.dtype})", "X = X.astype('int64')")
    if X.ndim == 2:
        _refuse_columns(pd.DataFrame(X), "pandas.DataFrame(X)")


def _refuse_columns(frame: pd.DataFrame, given: str) -> None:
    """Refuse a table with columns that are no numbers; ``given`` is the expression that makes it of X."""
    if not all(isinstance(name, str) for name in frame):
        frame, given = frame.rename(columns=str), f"{given}.rename(columns=str)"  # scikit-learn takes no mixed names
    dates = [name for name, column in frame.items() if _is_date(column)]
    if dates:
        to_numbers = dict.fromkeys(dates, "int64")
        _refuse(f"X has dates or durations in {_columns(dates)}", f"X = {given}.astype({to_numbers!r})")
    words = {name: word for name, column in frame.items() if (word := _word(column)) is not None}
    if words:
        what = f"X has text or categories in {_columns(list(words))}, such as {next(iter(words.values()))!r}"
        _refuse(what, _GET_DUMMIES.format(frame=given, names=list(words)))


def _is_date(column: Any) -> bool:
    return column.dtype.kind in "mM" or isinstance(column.dtype, pd.PeriodDtype)


def _word(column: Any) -> str | None:
    """Return a value of a column that is text, and no number written as text."""
    if pd.api.types.is_numeric_dtype(column.dtype):
        return None
    texts = pd.Series([value for value in column.dropna() if isinstance(value, str)], dtype=object)
    words = texts[pd.to_numeric(texts, errors="coerce").isna()]
    return None if words.empty else str(words.iloc[0])


def _counts(counts: NDArray[Any], names: Sequence[Hashable] | None, item_shape: tuple[int, ...]) -> str:
    """Return columns and how many of their values are meant, the most first."""
    worst = np.argsort(-counts, kind="stable")[: min(_NAMED, np.count_nonzero(counts))]
    told = ", ".join(f"{_column(int(index), names, item_shape)}: {counts[index]:,}" for index in worst)
    others = np.count_nonzero(counts) - len(worst)
    return told + (f" and {others:,} more columns" if others else "")


def _column(index: int, names: Sequence[Hashable] | None, item_shape: tuple[int, ...]) -> str:
    if names is not None:
        return f"column {names[index]!r}"
    if len(item_shape) == 1:
        return f"column {index}"
    return f"position {tuple(int(axis) for axis in np.unravel_index(index, item_shape))}"


def _columns(names: Sequence[Hashable]) -> str:
    return f"column{'s' if len(names) > 1 else ''} {_listed(names)}"


def _listed(names: Sequence[Hashable]) -> str:
    more = len(names) - _NAMED
    return ", ".join(map(repr, names[:_NAMED])) + (f" and {more:,} more" if more > 0 else "")


def _refuse(what: str, line: str) -> None:
    raise InvalidInput(f"{what}, but rows are real numbers. Convert it first: {line}")
