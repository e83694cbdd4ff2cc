"""Rows embedded per CPU second, and the CPU time of a training step, on one thread."""

import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

from cvae_dist.config import ComputePrecision, TrainConfig
from cvae_dist.model.kernels import compute_dtype, inference
from cvae_dist.model.networks import Linear
from cvae_dist.model.vae import VAE
from cvae_dist.store import Moments
from cvae_dist.training.trainer import Trainer
from cvae_dist.training.validation import Validation
from tests.bench.model.port import Port
from tests.bench.table import Row, alternate, median, seconds

_FEATURES, _DIM_LATENT, _FLOW = 784, 16, 5
_CELLS = (512, 256)
_ROWS, _BATCH = 16_384, 4096
_STEPS = 30  # of one measurement
_TRAIN_ROWS, _DEFAULT_BATCH, _EPOCHS = 54_000, 256, 20
_PRECISIONS: tuple[ComputePrecision, ...] = ("float32", "bf16")
_cpu_seconds = partial(seconds, clock=time.process_time)


def rows() -> Iterator[Row]:
    """Measure on rows like MNIST's: the time does not depend on what they hold."""
    torch.set_num_threads(1)
    x = np.random.default_rng(0).integers(0, 256, (_ROWS, _FEATURES)).astype(np.uint8)
    yield from _embedding(x)
    yield _step_against_the_port(x[:64])
    yield _default_training(x[:_DEFAULT_BATCH])


def _embedding(x: np.ndarray) -> Iterator[Row]:
    vae = _model(x, residual_blocks=2).eval()
    runs = [partial(_cpu_seconds, partial(vae.embed_rows, x, _BATCH, precision)) for precision in _PRECISIONS]
    for precision, bar, times in zip(_PRECISIONS, (40_000, 100_000), alternate(7, *runs), strict=True):
        peak, work = _peak(precision), _multiply_adds(vae)
        note = f"rows/CPU-s; the bare products at {peak / 1e9:.0f} Gflop/s would allow {peak / (2 * work):,.0f}"
        yield Row(f"embed 784 -> 16, batch {_BATCH}, {precision}", _ROWS / median(times), bar, note=note)


def _step_against_the_port(x: np.ndarray) -> Row:
    port = Port(_FEATURES, _DIM_LATENT, _CELLS, _FLOW)
    standardised = ((x - x.mean()) / x.std()).astype(np.float32)
    steps = [_step(x, precision, residual_blocks=0) for precision in _PRECISIONS]
    runs = [partial(_cpu_ms, step) for step in (*steps, partial(port.train_step, standardised))]
    exact, short, theirs = (median(times) for times in alternate(7, *runs))
    note = f"{exact:.1f} ms in float32, {short:.1f} ms in bf16, the port {theirs:.1f} ms; all 512-256"
    return Row("training step, dim 16, flow 5, batch 64, of the port's", exact / theirs, 0.45, note=note, lower=True)


def _default_training(x: np.ndarray) -> Row:
    exact, short = (_step(x, precision, residual_blocks=2, iaf_flow_length=0) for precision in _PRECISIONS)
    times = [median(each) for each in alternate(7, partial(_cpu_ms, exact), partial(_cpu_ms, short))]
    steps = _EPOCHS * -(-_TRAIN_ROWS // _DEFAULT_BATCH)
    note = f"a step takes {times[0]:.1f} ms in float32, {times[1]:.1f} ms in bf16"
    return Row(f"{steps:,} default steps of MNIST, CPU-s", min(times) / 1e3 * steps, 60, note=note, lower=True)


def _model(x: np.ndarray, **settings: object) -> VAE:
    return VAE.of(_config(**settings), Moments.of(x), x.dtype)


def _config(**settings: object) -> TrainConfig:
    fixed = {"dim_latent": _DIM_LATENT, "cells_encoder": _CELLS, "iaf_flow_length": _FLOW, "likelihood": "gaussian"}
    config = TrainConfig(**{**fixed, "feature_normalization": False, **settings})  # type: ignore[arg-type]
    return config.resolve(_TRAIN_ROWS, _FEATURES)


def _step(x: np.ndarray, precision: ComputePrecision, **settings: object) -> Callable[[], None]:
    config = _config(batch_size=len(x), **settings)
    nothing = Validation(x[:0], np.zeros((0, _DIM_LATENT), np.float32), 0)
    trainer = Trainer(_model(x, **settings), config, nothing, 10**6, compute_dtype(precision))
    return partial(trainer.advance, torch.from_numpy(x), np.arange(len(x)), len(x))


def _cpu_ms(step: Callable[[], object]) -> float:
    return 1e3 * _cpu_seconds(lambda: [step() for _ in range(_STEPS)]) / _STEPS


def _peak(precision: ComputePrecision) -> float:
    """Return the operations per CPU second of the widest layer alone."""
    values, layer = torch.randn(_BATCH, _FEATURES), Linear(_FEATURES, _CELLS[0])
    with inference(compute_dtype(precision)):
        values, layer = values.to(compute_dtype(precision)), layer.to(compute_dtype(precision))
        fastest = min(_cpu_seconds(lambda: layer(values)) for _ in range(10))
    return 2 * _BATCH * _FEATURES * _CELLS[0] / fastest


def _multiply_adds(vae: VAE) -> int:
    """Return the multiply-adds of one embedding: every weight of encoder and flow is used once."""
    return sum(weight.numel() for name, weight in vae.named_parameters() if name.startswith(("encoder", "flow")))
