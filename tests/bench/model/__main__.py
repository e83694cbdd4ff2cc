"""Print every figure of the model with its limit: ``python -m tests.bench.model [quality|nats|... ...]``."""

import importlib
import sys
from collections.abc import Iterator

import torch

from tests.bench.table import Row, show

_PARTS = ("speed", "reference", "small", "notebook", "outliers", "scale", "vectors", "widths", "quality", "nats")


def _rows(parts: list[str]) -> Iterator[Row]:
    for part in parts or _PARTS:
        yield from importlib.import_module(f"tests.bench.model.bench_{part}").rows()


if __name__ == "__main__":
    torch.set_num_threads(1)  # budgets are CPU-seconds of one thread
    sys.exit(0 if show(_rows(sys.argv[1:])) else 1)
