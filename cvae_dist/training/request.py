"""What passes between a sampler, which knows the order of the rows, and the loader, which reads them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from cvae_dist.store.ranges import RowNumbers


@dataclass(frozen=True, eq=False)
class Request:
    """Rows to read at once, and the order in which they come.

    Attributes
    ----------
    starts, counts : numpy.ndarray, int64
        Row ranges of the store.
    take : numpy.ndarray, int64
        The rows that come, one after the other. They are counted from 0 through all ranges; each comes once at most.
    """

    starts: RowNumbers
    counts: RowNumbers
    take: RowNumbers


@dataclass(frozen=True, eq=False)
class Part:
    """A rank's part of one step.

    Attributes
    ----------
    epoch, step : int
        Position of the step.
    positions : numpy.ndarray, shape (n,), int64
        Where the rank's rows stand inside the global batch.
    n_global : int
        Rows of the step over all ranks.
    """

    epoch: int
    step: int
    positions: RowNumbers
    n_global: int


class Order(Protocol):
    """The order of the rows as one rank reads them: all that a loader knows of a sampler."""

    @property
    def stored_rows(self) -> int:
        """Rows of the store, those among them that are not trained on."""

    @property
    def request_rows(self) -> int:
        """Rows of the largest request."""

    @property
    def part_rows(self) -> int:
        """Rows of the largest part of a step."""

    def requests(self, epoch: int, step: int) -> Iterator[Request]:
        """Return what to read from a position on, without end: the rows of :meth:`parts`, in their order."""

    def parts(self, epoch: int, step: int) -> Iterator[Part]:
        """Return the steps from a position on, epoch after epoch without end.

        Raises
        ------
        InvalidInput
            There is no such step; at once, and not when the first part is asked for.
        """
