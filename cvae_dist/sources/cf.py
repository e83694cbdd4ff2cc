"""What the numbers of a variable stand for: the CF attributes that NetCDF files and xarray's data sets have."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from cvae_dist.store.layout import Block

_NUMBERS = "iuf"


class BadValues(ValueError):
    """Attributes that make no sense, or values missing from integers. The text begins with a verb."""


@dataclass(frozen=True)
class Packing:
    """How stored numbers become values.

    Attributes
    ----------
    stored : numpy.dtype
        What lies there, read as unsigned or signed where the attribute ``_Unsigned`` says so.
    dtype : numpy.dtype
        Of the values: native byte order; floating where numbers are scaled.
    scale, offset : numpy scalar or None
        value = number * scale + offset.
    missing : tuple of numpy scalar
        Numbers that stand for no value.
    """

    stored: np.dtype[Any]
    dtype: np.dtype[Any]
    scale: Any = None
    offset: Any = None
    missing: tuple[Any, ...] = ()

    @classmethod
    def of(cls, attributes: Mapping[str, Any], stored: np.dtype[Any]) -> Self:
        """Read the attributes of a variable of numbers.

        Raises
        ------
        BadValues
            One of them is no number.
        """
        seen = _seen(stored, attributes.get("_Unsigned"))
        scale, offset = (_one(name, attributes) for name in ("scale_factor", "add_offset"))
        marks = [mark for name in ("_FillValue", "missing_value") for mark in _numbers(name, attributes)]
        missing = {_as(mark, stored, seen) for mark in marks} - {None}
        values = seen.newbyteorder("=") if scale is None and offset is None else _floating(seen, scale, offset)
        return cls(seen, values, scale, offset, tuple(sorted(missing)))

    @property
    def plain(self) -> bool:
        """Whether the numbers are the values."""
        return self.scale is None and self.offset is None and not self.missing

    @property
    def remark(self) -> str:
        """What is done with the numbers, for a person; empty where nothing is."""
        scaled = [f"* {self.scale}"] * (self.scale is not None) + [f"+ {self.offset}"] * (self.offset is not None)
        missing = [f"{', '.join(map(str, self.missing))} as missing"] * bool(self.missing)
        parts = [f"as number {' '.join(scaled)}"] * bool(scaled) + missing
        return f"its attributes say how numbers are read: {', and '.join(parts)}" if parts else ""

    def is_missing(self, number: Any) -> bool:
        """Whether a stored number becomes NaN."""
        one = np.array([0 if number is None else number]).astype(self.stored)
        return self.dtype.kind == "f" and bool(np.isnan(self.decode(one)[0]))

    def decode(self, numbers: Block) -> Block:
        """Return the values of numbers, in an array of its own unless :attr:`plain`; missing ones are NaN.

        Raises
        ------
        BadValues
            Values are missing from integers.
        """
        numbers = numbers.view(self.stored.newbyteorder(numbers.dtype.byteorder))
        if self.plain:
            return numbers
        absent = np.isin(numbers, np.array(self.missing, numbers.dtype)) if self.missing else None
        if absent is not None and self.dtype.kind != "f":
            if count := np.count_nonzero(absent):
                marks = ", ".join(map(str, self.missing))
                raise BadValues(
                    f"has {count:,} missing values (marked as {marks}), and {self.dtype} has no NaN for them"
                )
            return numbers
        values: Block = numbers.astype(self.dtype)
        if self.scale is not None:
            values *= self.scale
        if self.offset is not None:
            values += self.offset
        if absent is not None:
            values[absent] = np.nan
        return values


def _numbers(name: str, attributes: Mapping[str, Any]) -> Block:
    """Return the numbers of an attribute, shape (n,); none where it is not there."""
    found = np.ravel(attributes.get(name, ()))
    if len(found) and found.dtype.kind not in _NUMBERS:
        raise BadValues(f"has the attribute {name} = {str(attributes[name])[:40]!r}, which is no number")
    return found


def _one(name: str, attributes: Mapping[str, Any]) -> Any:
    found = _numbers(name, attributes)
    if len(found) > 1 or not np.isfinite(found).all():
        raise BadValues(f"has the attribute {name} = {str(attributes[name])[:40]!r}, which is not one finite number")
    return found[0] if len(found) else None


def _seen(stored: np.dtype[Any], unsigned: Any) -> np.dtype[Any]:
    """Return the type that numbers are meant to have: NetCDF once knew no unsigned ones, and OPeNDAP no signed byte."""
    kind = {"true": "u", "false": "i"}.get(str(unsigned).lower())
    if kind is None or stored.kind not in "iu":
        return stored
    return np.dtype(f"{stored.byteorder}{kind}{stored.itemsize}")


def _as(mark: Any, stored: np.dtype[Any], seen: np.dtype[Any]) -> Any:
    """Return a mark as the number that is stored; None where none can be equal to it."""
    number = seen.newbyteorder("=").type
    if stored.kind == "f":
        return None if np.isnan(mark) else number(mark)
    if mark != mark // 1:
        return None
    limits = np.iinfo(seen)
    whole = int(mark)
    if stored != seen:  # the mark may be written as either type
        whole = (whole - int(limits.min)) % 2 ** (8 * stored.itemsize) + int(limits.min)
    return number(whole) if limits.min <= whole <= limits.max else None


def _floating(stored: np.dtype[Any], scale: Any, offset: Any) -> np.dtype[Any]:
    """Choose the type of scaled values as xarray does: that of the attributes unless digits could be lost."""
    types = {np.dtype(type(one)) for one in (scale, offset) if one is not None}
    only = types.pop() if len(types) == 1 else None
    wide = offset is not None and (scale is None or (stored.kind in "iu" and stored.itemsize >= 4))
    small = only is not None and only.kind == "f" and only.itemsize == 4
    return np.dtype(np.float32 if small and not wide else np.float64)
