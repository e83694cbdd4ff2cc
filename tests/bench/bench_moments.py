"""Moments against plain NumPy in float64: CPU seconds per GB, and how far they are from two passes."""

import contextlib
import importlib.util
from collections.abc import Iterator
from time import process_time
from unittest import mock

import numpy as np

from cvae_dist.store import compiled
from cvae_dist.store.moments import Moments
from tests.bench.table import Row, alternate, median, seconds

_BYTES = 16_000_000  # of a block, as large as a shard
_REPEATS = 5
_KINDS = (("f2", 8), ("f4", 8), ("f4", 64), ("f4", 768), ("f8", 64), ("u1", 784))


def rows() -> Iterator[Row]:
    """Measure every dtype and width, by numba and by NumPy alone."""
    for code, features in _KINDS:
        yield from _kind(code, features)
    yield from _errors()


def _kind(code: str, features: int) -> Iterator[Row]:
    block = _block(code, features, offset=0.0)
    compiles = code in compiled._CODES and importlib.util.find_spec("numba") is not None

    def plain() -> float:
        return seconds(lambda: [reduce(axis=0, dtype=np.float64) for reduce in (block.mean, block.std)], process_time)

    def ours(numba: bool) -> float:
        with _path(code, numba):
            return seconds(lambda: Moments.of(block), process_time)

    with _path(code, compiles):
        Moments.of(block)  # and NumPy's first call is not measured either
    numpy_alone, by_numba, reference = (
        median(values) for values in alternate(_REPEATS, lambda: ours(False), lambda: ours(compiles), plain)
    )
    per_gb = 1e9 / block.nbytes
    for name, took in [("numba", by_numba)] * compiles + [("NumPy alone", numpy_alone)]:
        bar = 0.3 if code == "f4" and (name == "numba" or not compiles) else None
        note = f"{took * per_gb:.3f} CPU s per GB, mean and std in float64 {reference * per_gb:.2f}"
        yield Row(f"moments of {code} x {features}, {name} / mean + std", took / reference, bar, note=note, lower=True)


def _errors() -> Iterator[Row]:
    """Compare with two passes in float64, in standard deviations, where a mean is far away, too."""
    for code in ("f2", "f4", "f8", "u1"):
        worst = 0.0
        for offset in (0.0, 100.0) if code in ("f2", "u1") else (0.0, 100.0, 1e6):
            block = _block(code, 64, offset)
            exact = block.astype(np.float64)
            mean = exact.mean(axis=0)
            std = np.sqrt(np.square(exact - mean).mean(axis=0))
            moments = Moments.of(block)
            worst = max(worst, *(np.abs(moments.mean - mean) / std), *(np.abs(moments.std - std) / std))
        yield Row(f"moments of {code}, error in standard deviations", worst, 1e-6, lower=True)


def _block(code: str, features: int, offset: float) -> np.ndarray:
    generator, shape = np.random.default_rng(0), (_BYTES // np.dtype(code).itemsize // features, features)
    values = generator.normal(size=shape)
    return (np.clip(values * 20 + 100, 0, 255) if code == "u1" else values + offset).astype(code)


@contextlib.contextmanager
def _path(code: str, numba: bool) -> Iterator[None]:
    with mock.patch.dict(compiled._ready, {code: compiled._compile(code) if numba else None}):
        yield
