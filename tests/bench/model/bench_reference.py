"""The reference itself side by side with ours: the same network, the same rows, the same cores, taking turns.

First on all cores, by wall clock and with as many threads as each likes, which is what a user sees and what must
hold; then on one core, to compare.
"""

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

import cvae_dist as cvae
from cvae_dist.config import ComputePrecision
from cvae_dist.model.kernels import compute_dtype, inference, product
from tests.bench.model.data import mnist
from tests.bench.model.reference import NotAvailable, Reference, Took
from tests.bench.table import Row, alternate, seconds

_FEATURES, _CELLS, _DIM_LATENT = 784, (512, 128), 2
_BATCHES = (64, 4096)  # of the reference: its default, and its best; the faster counts
_REPEATS, _DECODE_REPEATS, _CALLS = 15, 20, 10
_FEW_STEPS = 50  # of training: what the weights are does not change what they cost
_TILE = 2048

_EMBED_BARS: dict[ComputePrecision, float] = {"float32": 1.5, "bf16": 4.0}
_DECODE_BAR = 100.0


def rows() -> Iterator[Row]:
    """Measure embed and decode; without the reference's environment nothing is measured, and the rows say so."""
    cores = os.sched_getaffinity(0)
    with _only(cores):
        yield from _beside(cores)
    with _only({max(cores)}):
        yield from (row._replace(bar=None, goal=row.bar) for row in _beside({max(cores)}))


@contextmanager
def _only(cores: set[int]) -> Iterator[None]:
    """Run this process on these cores alone, with a thread for each."""
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
        torch.set_num_threads(threads)


def _beside(cores: set[int]) -> Iterator[Row]:
    where = "1 core" if len(cores) == 1 else f"all {len(cores)} cores"
    try:
        with Reference(cores) as reference:
            yield from _measured(reference, where)
    except NotAvailable as reason:
        bars = {_embed_name(precision, where): bar for precision, bar in _EMBED_BARS.items()}
        bars[_decode_name(where)] = _DECODE_BAR
        yield from (Row(name, math.nan, bar, note=str(reason)) for name, bar in bars.items())


def _embed_name(precision: ComputePrecision, where: str) -> str:
    return f"embed, the reference's network, {precision}, {where}: of its rows/s"


def _decode_name(where: str) -> str:
    return f"decode one row, {where}: of the reference's calls/s"


def _measured(reference: Reference, where: str) -> Iterator[Row]:
    x = mnist().train.astype(np.float32)
    reference.train(x, num_steps=_FEW_STEPS, dim_latent=_DIM_LATENT)
    network = {"cells_encoder": _CELLS, "dim_latent": _DIM_LATENT, "iaf_flow_length": 5, "residual_blocks": 0}
    ours = cvae.CompressionVAE(x, num_steps=_FEW_STEPS, **network).train()
    yield from _embed(reference, ours, x, where)
    yield _decode(reference, ours, where)


def _embed(reference: Reference, ours: cvae.CompressionVAE, x: np.ndarray, where: str) -> Iterator[Row]:
    place = reference.hand_over(x)
    runs: list[Callable[[], Took]] = [
        partial(_its, reference, partial(reference.embed, place, batch_size=size)) for size in _BATCHES
    ]
    runs += [partial(_own, partial(ours.embed, x, precision=precision)) for precision in _EMBED_BARS]
    *theirs, float32, bf16 = alternate(_REPEATS, *runs)
    beside = ", ".join(f"{_rate(x, each)} at batch {size}" for size, each in zip(_BATCHES, theirs, strict=True))
    best = min(theirs, key=_wall)
    for (precision, bar), own in zip(_EMBED_BARS.items(), (float32, bf16), strict=True):
        ceiling = f"the two wide products alone {_wall(best) / _products(len(x), precision):.3g}"
        yield _row(_embed_name(precision, where), bar, best, own, beside, f"{_rate(x, own)}; {ceiling}")


def _products(n: int, precision: ComputePrecision) -> float:
    """Return the seconds that nothing but the wide products of ``n`` rows takes: more speed there is not."""
    dtype = compute_dtype(precision)
    total = 0.0
    with inference(dtype):
        for inputs, outputs in zip((_FEATURES, *_CELLS), _CELLS, strict=False):
            values, weight = torch.randn(_TILE, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
            run = partial(product, values, weight, torch.zeros(outputs, dtype=dtype))
            total += statistics.median(seconds(run) for _ in range(20))
    return total * n / _TILE


def _decode(reference: Reference, ours: cvae.CompressionVAE, where: str) -> Row:
    latent = np.zeros((1, _DIM_LATENT), np.float32)
    place = reference.hand_over(latent)

    def several() -> Took:
        """Return the mean of calls in a row: one between two of the reference's would time the refilling of caches."""
        took = _own(lambda: [ours.decode(latent) for _ in range(_CALLS)])
        return Took(took.wall / _CALLS, took.cpu / _CALLS)

    its = partial(_its, reference, partial(reference.decode, place))
    theirs, own = alternate(_DECODE_REPEATS, its, several)
    beside, figure = f"{1e3 * _wall(theirs):.1f} ms", f"{1e3 * _wall(own):.3f} ms"
    return _row(_decode_name(where), _DECODE_BAR, theirs, own, beside, figure)


def _row(name: str, bar: float, theirs: list[Took], own: list[Took], reference: str, ours: str) -> Row:
    cpu = statistics.median(took.cpu for took in theirs) / statistics.median(took.cpu for took in own)
    note = f"ours {ours}; by CPU time {cpu:.3g}; load {os.getloadavg()[0]:.1f}"
    return Row(name, _wall(theirs) / _wall(own), bar, reference=reference, note=note)


def _its(reference: Reference, run: Callable[[], object]) -> Took:
    run()
    return reference.took


def _own(run: Callable[[], object]) -> Took:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Took(time.perf_counter() - wall, time.process_time() - cpu)


def _wall(times: list[Took]) -> float:
    return statistics.median(took.wall for took in times)


def _rate(x: np.ndarray, times: list[Took]) -> str:
    return f"{len(x) / _wall(times):,.0f} rows/s"
