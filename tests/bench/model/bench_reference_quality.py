"""The reference with its own default settings on MNIST, against what ours has to reach; minutes, so by name only."""

import math
import os
from collections.abc import Iterator

from tests.bench.model.bench_quality import quality
from tests.bench.model.data import mnist
from tests.bench.model.reference import NotAvailable, Reference
from tests.bench.table import Row

_OURS = {2: (0.83, 0.925, 0.0345), 16: (0.975, 0.992, 0.009)}  # what ours must reach with its own
_NAMES = ("5-NN accuracy", "trustworthiness", "pixel MSE")


def rows() -> Iterator[Row]:
    """Train the reference until it stops itself, in 2 and in 16 dimensions; it has no seed to fix."""
    for dim_latent, bars in _OURS.items():
        try:
            yield from _defaults(dim_latent, bars)
        except NotAvailable as reason:
            for name, bar in zip(_NAMES, bars, strict=True):
                yield Row(_title(dim_latent, name), math.nan, bar, note=str(reason))


def _defaults(dim_latent: int, bars: tuple[float, ...]) -> Iterator[Row]:
    with Reference(os.sched_getaffinity(0)) as reference:
        reference.train(mnist().train, dim_latent=dim_latent)
        spent = reference.took
        reached = quality(reference)
    note = f"its training: {spent.wall:.0f} s, {spent.cpu:.0f} CPU-seconds"
    for name, value, bar in zip(_NAMES, reached, bars, strict=True):
        yield Row(_title(dim_latent, name), value, bar, note=note, lower=name != "pixel MSE")


def _title(dim_latent: int, name: str) -> str:
    return f"{dim_latent}-D, the reference's {name} is no better than ours must be"
