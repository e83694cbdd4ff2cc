"""The reference itself side by side with ours: the same network, the same rows, the same CPU, taking turns."""

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np

import cvae_dist as cvae
from tests.bench.model.data import mnist
from tests.bench.model.reference import NotAvailable, Reference, Took
from tests.bench.table import Row, alternate

_DIM_LATENT = 2
_ITS_DEFAULT_BATCH = 64
_EMBED_REPEATS, _DECODE_REPEATS, _CALLS = 9, 30, 10
_FEW_STEPS = 50  # of training: what the weights are does not change what they cost

_FLOAT32 = "embed, the reference's network, float32: rows/s / the reference's"
_BF16 = "embed, the reference's network, bf16: rows/s / the reference's"
_DECODE = "decode one row: calls/s / the reference's"
_BARS = {_FLOAT32: 1.5, _BF16: 4.0, _DECODE: 100.0}


def rows() -> Iterator[Row]:
    """Measure embed and decode; without the reference's environment nothing is measured, and the rows say so."""
    before = os.sched_getaffinity(0)
    cpu = max(before)
    os.sched_setaffinity(0, {cpu})
    try:
        with Reference({cpu}) as reference:
            yield from _measured(reference)
    except NotAvailable as reason:
        yield from (Row(name, math.nan, bar, note=str(reason)) for name, bar in _BARS.items())
    finally:
        os.sched_setaffinity(0, before)


def _measured(reference: Reference) -> Iterator[Row]:
    x = mnist().train.astype(np.float32)
    reference.train(x, num_steps=_FEW_STEPS, dim_latent=_DIM_LATENT)
    network = {"cells_encoder": (512, 128), "dim_latent": _DIM_LATENT, "iaf_flow_length": 5, "residual_blocks": 0}
    ours = cvae.CompressionVAE(x, num_steps=_FEW_STEPS, **network).train()
    yield from _embed(reference, ours, x)
    yield _decode(reference, ours)


def _embed(reference: Reference, ours: cvae.CompressionVAE, x: np.ndarray) -> Iterator[Row]:
    place = reference.hand_over(x)
    theirs, at_default, float32, bf16 = alternate(
        _EMBED_REPEATS,
        lambda: _its(reference, lambda: reference.embed(place)),
        lambda: _its(reference, lambda: reference.embed(place, batch_size=_ITS_DEFAULT_BATCH)),
        lambda: _own(lambda: ours.embed(x)),
        lambda: _own(lambda: ours.embed(x, precision="bf16")),
    )
    beside = f"{_rate(x, theirs)} at its best batch, {_rate(x, at_default)} at its default"
    for name, own in ((_FLOAT32, float32), (_BF16, bf16)):
        yield _row(name, theirs, own, beside, _rate(x, own))


def _decode(reference: Reference, ours: cvae.CompressionVAE) -> Row:
    latent = np.zeros((1, _DIM_LATENT), np.float32)
    place = reference.hand_over(latent)

    def several() -> Took:
        """Return the mean of calls in a row: one between two of the reference's would time the refilling of caches."""
        took = _own(lambda: [ours.decode(latent) for _ in range(_CALLS)])
        return Took(took.wall / _CALLS, took.cpu / _CALLS)

    theirs, own = alternate(_DECODE_REPEATS, lambda: _its(reference, lambda: reference.decode(place)), several)
    return _row(_DECODE, theirs, own, f"{1e3 * _wall(theirs):.1f} ms", f"{1e3 * _wall(own):.3f} ms")


def _row(name: str, theirs: list[Took], own: list[Took], reference: str, ours: str) -> Row:
    cpu = statistics.median(took.cpu for took in theirs) / statistics.median(took.cpu for took in own)
    note = f"ours {ours}; by CPU time {cpu:.3g}"
    return Row(name, _wall(theirs) / _wall(own), _BARS[name], reference=reference, note=note)


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
