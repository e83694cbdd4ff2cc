"""What a source of rows is: it lists pieces without reading their rows, and then reads some of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from cvae_dist.sources.pieces import Pieces
from cvae_dist.store.layout import Block

RowsPerFile = Literal["auto", "one", "many"]


@dataclass(frozen=True)
class Schema:
    """What every piece of a source has in common.

    Attributes
    ----------
    item_shape : tuple of int
        Shape of one item; a row is the item flattened.
    dtype : numpy.dtype
        Native byte order.
    one_per_file : bool
        Each file is one item, and the file's path the item's id.
    """

    item_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    one_per_file: bool

    @property
    def n_features(self) -> int:
        """Values of a row."""
        return math.prod(self.item_shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.n_features * self.dtype.itemsize

    def to_json(self) -> dict[str, Any]:
        """Return the schema as settings of a store."""
        return {"item_shape": list(self.item_shape), "dtype": self.dtype.name, "one_per_file": self.one_per_file}


@dataclass(frozen=True)
class Listing:
    """What a source holds, or a part of it.

    Attributes
    ----------
    schema : Schema
    pieces : Pieces
        All rows, in the order in which they are to be stored.
    read : callable
        ``read(pieces, out)`` reads the rows of some pieces into ``out``, shape (n_rows, n_features). Picklable and
        small: it travels with every task. It raises ``InvalidInput`` where a file is not what was listed.
    note : str
        What a person should be told of how the source was understood; may be empty.
    """

    schema: Schema
    pieces: Pieces
    read: Callable[[Pieces, Block], None]
    note: str = ""


@runtime_checkable
class Source(Protocol):
    """Where rows come from."""

    @property
    def url(self) -> str:
        """Where it is, without credentials."""

    def list(self) -> Listing:
        """List what is there; no rows are read."""
