"""What a user says about the columns of tables."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TableOptions:
    """Which columns become rows, and which travel with them.

    Attributes
    ----------
    columns : tuple of str
        Columns that are features, in this order; empty: chosen automatically.
    id : str, optional
        Column that identifies the rows.
    carry : tuple of str
        Columns that travel with the rows.
    """

    columns: tuple[str, ...] = ()
    id: str | None = None
    carry: tuple[str, ...] = ()
