"""Print every figure with its limit: ``python -m tests.bench [ingest|loader|embed ...]``."""

import importlib
import sys
from collections.abc import Iterator

from tests.bench.table import Row, show

_PARTS = ("moments", "ingest", "loader", "embed")


def _rows(parts: list[str]) -> Iterator[Row]:
    for part in parts or _PARTS:
        yield from importlib.import_module(f"tests.bench.bench_{part}").rows()


if __name__ == "__main__":
    sys.exit(0 if show(_rows(sys.argv[1:])) else 1)
