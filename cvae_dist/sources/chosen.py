"""Which columns of a table become features, ids and carried columns."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cvae_dist.errors import suggestion
from cvae_dist.sources.files import BadFile
from cvae_dist.sources.options import TableOptions
from cvae_dist.sources.source import Column
from cvae_dist.store.layout import STRING

if TYPE_CHECKING:
    import pyarrow as pa

_INDEX = ("__index_level_0__", "")  # what pandas calls the index in Parquet and in CSV
_NAMED = 5  # columns named in one message


@dataclass(frozen=True)
class Chosen:
    """Columns of a table and what they are used as.

    Attributes
    ----------
    features : tuple of str
        Columns of numbers, or one of lists of numbers; none where only columns are carried.
    kinds : tuple of str
        NumPy codes of their values, such as "<f4".
    lists : bool
        The feature column holds lists.
    carried : tuple of (str, Column)
        Name in the file, and the column that travels with the rows. That of ``--id`` travels as ``id``.
    """

    features: tuple[str, ...]
    kinds: tuple[str, ...]
    lists: bool
    carried: tuple[tuple[str, Column], ...]

    @property
    def names(self) -> list[str]:
        """Columns that have to be read."""
        return list(dict.fromkeys((*self.features, *(name for name, _ in self.carried))))

    @property
    def full(self) -> list[str]:
        """Columns in which no value may be missing: all but carried text."""
        carried = (name for name, column in self.carried if column.dtype != STRING or column.name == "id")
        return list(dict.fromkeys((*self.features, *carried)))

    @property
    def columns(self) -> tuple[Column, ...]:
        """Columns that travel with the rows."""
        return tuple(column for _, column in self.carried)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The NumPy type that holds every feature; float64 where int64 meets float32."""
        return np.result_type(*self.kinds)

    def require(self, other: "Chosen", path: str) -> None:
        """Refuse a file whose columns are ``other``: the same are needed, in any order."""
        mine, its = self._types(), other._types()
        if mine == its and self.lists == other.lists:
            return
        lost, new = _quoted(mine.keys() - its.keys()), _quoted(its.keys() - mine.keys())
        found = [f"lacks {lost}"] if lost else []
        found += [f"has {new} besides"] if new else []
        found += [
            f"has {its[name]} in {name!r}, not {mine[name]}" for name in mine.keys() & its if mine[name] != its[name]
        ]
        what = "; ".join(found[:_NAMED]) or "has single numbers where lists are, or the reverse"
        raise BadFile(path, "schema", f"has other columns than the first file: it {what}")

    def _types(self) -> dict[str, str]:
        carried = {name: column.dtype for name, column in self.carried}
        return {**carried, **dict(zip(self.features, self.kinds, strict=True))}


def choose(schema: "pa.Schema", options: TableOptions, path: str) -> Chosen:
    """Choose columns of a file as its user says, or else by their types.

    Without ``columns`` the only column of lists of numbers is taken, or else every column of numbers that is neither
    id nor carried.

    Raises
    ------
    BadFile
        A column is missing, is there twice, or is of a type that cannot be used so.
    """
    carried = choose_carried(schema, options, path)
    taken = {name for name, _ in carried}
    names = options.columns or _automatic(schema, taken, path)
    _require_columns(schema, names, path)
    lists = [name for name in names if _is_list(schema.field(name).type)]
    if lists and len(names) > 1:
        raise BadFile(path, "dtype", f"holds lists in {_quoted(lists)}: --columns takes one such column, or numbers")
    kinds = [number(element(schema.field(name).type)) for name in names]
    wrong = [name for name, kind in zip(names, kinds, strict=True) if kind is None]
    if wrong:
        raise BadFile(path, "dtype", f"holds no numbers in {_typed(schema, wrong)}: name others with --columns")
    return Chosen(tuple(names), tuple(kind for kind in kinds if kind), bool(lists), carried)


def choose_carried(schema: "pa.Schema", options: TableOptions, path: str) -> tuple[tuple[str, Column], ...]:
    """Choose the columns of a file that travel with its rows; see :func:`choose`."""
    names = ((options.id,) if options.id else ()) + options.carry
    _require_columns(schema, names, path)
    found = [(name, Column(name, _carried_type(schema.field(name).type))) for name in options.carry]
    wrong = [name for name, column in found if not column.dtype]
    if wrong:
        raise BadFile(path, "dtype", f"holds {_typed(schema, wrong)}: only numbers, text and times are carried")
    if options.id:
        kind = _carried_type(schema.field(options.id).type)
        if kind != STRING and (not kind or np.dtype(kind).kind not in "iu"):
            raise BadFile(path, "dtype", f"holds {_typed(schema, [options.id])}: ids are whole numbers or text")
        found.insert(0, (options.id, Column("id", STRING if kind == STRING else "<i8")))
    twice = [column.name for _, column in found[1:] if options.id and column.name == "id"]
    if twice:
        raise BadFile(path, "schema", f"has a column 'id' beside {options.id!r}, which travels as 'id': say --id id")
    return tuple(found)


def number(kind: "pa.DataType") -> str | None:
    """Return the NumPy code of numbers of an Arrow type; bool is uint8. None where they are none."""
    import pyarrow as pa

    if pa.types.is_boolean(kind):
        return "|u1"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return str(np.dtype(kind.to_pandas_dtype()).str)
    return None


def element(kind: "pa.DataType") -> "pa.DataType":
    """Return the type of a list's elements; of anything else the type itself."""
    kind = _stored(kind)
    return kind.value_type if _is_list(kind) else kind


def is_text(kind: "pa.DataType") -> bool:
    """Whether an Arrow type is text, or codes for text."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _automatic(schema: "pa.Schema", taken: set[str], path: str) -> list[str]:
    fields = [field for field in schema if field.name not in taken and field.name not in _INDEX]
    lists = [field.name for field in fields if _is_list(field.type) and number(element(field.type))]
    if len(lists) == 1:
        return lists
    wrong = [field.name for field in fields if number(_stored(field.type)) is None]
    if wrong:
        what = f"holds no single numbers in {_typed(schema, wrong)}"
        raise BadFile(path, "dtype", f"{what}: name the features with --columns, or these with --id or --carry")
    if not fields:
        raise BadFile(path, "schema", "has no column of numbers")
    return [field.name for field in fields]


def _carried_type(kind: "pa.DataType") -> str:
    import pyarrow as pa

    kind = _stored(kind)
    if is_text(kind) or pa.types.is_temporal(kind) or pa.types.is_decimal(kind):
        return STRING
    return number(kind) or ""


def _is_list(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    kind = _stored(kind)
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _stored(kind: "pa.DataType") -> "pa.DataType":
    return getattr(kind, "storage_type", kind)  # extension types are labels on others


def _require_columns(schema: "pa.Schema", names: Iterable[str], path: str) -> None:
    names = list(names)
    for name in names:
        count = len(schema.get_all_field_indices(name))
        if not count:
            raise BadFile(path, "schema", f"has no column {name!r}; {suggestion(name, set(schema.names))}")
        if count > 1:
            raise BadFile(path, "schema", f"has {count} columns named {name!r}; rename them")
    if len(set(names)) < len(names):
        raise BadFile(path, "schema", f"is asked for a column twice: {', '.join(names)}; name each once")


def _quoted(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(map(repr, names[:_NAMED])) + more


def _typed(schema: "pa.Schema", names: list[str]) -> str:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(f"{name!r} ({schema.field(name).type})" for name in names[:_NAMED]) + more
