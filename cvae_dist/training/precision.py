"""Which type the wide layers of a training step compute in."""

import time
from dataclasses import dataclass

import torch
from torch import nn

from cvae_dist.config import ComputePrecision, Precision
from cvae_dist.model.kernels import compute_dtype, computing_in, has_bfloat16
from cvae_dist.model.vae import VAE, Terms

_LEAST_WORK = 40_000_000  # multiply-adds of a step below which conversions eat what bfloat16 gains
_LEAST_GAIN = 0.85  # of float32's time: a smaller gain is not worth the digits, and may be chance
_TIMED_STEPS = 6


@dataclass(frozen=True)
class Decision:
    """A precision and, where a timing decided, what a user should be told; another timing may decide otherwise."""

    value: ComputePrecision
    note: str = ""

    @property
    def compute_dtype(self) -> torch.dtype:
        """What :func:`~cvae_dist.model.kernels.computing_in` takes."""
        return compute_dtype(self.value)


def choose_precision(requested: Precision, vae: VAE, batch_size: int) -> Decision:
    """Decide the precision of training steps: ``auto`` times both where the processor computes in bfloat16.

    Weights, losses, their gradients and averages are float32 either way. No weight and no random number changes.
    """
    if requested != "auto":
        return Decision(requested)
    if multiply_adds(vae, batch_size) < _LEAST_WORK or not has_bfloat16(next(vae.parameters()).device):
        return Decision("float32")
    exact, short = _times(vae, batch_size)
    value: ComputePrecision = "bf16" if short < _LEAST_GAIN * exact else "float32"
    times = f"one takes {1e3 * exact:.3g} ms in float32 and {1e3 * short:.3g} ms in bf16"
    return Decision(value, f"steps in {value}: {times}")


def multiply_adds(vae: VAE, batch_size: int) -> int:
    """Return about how many multiply-adds the forward pass of a batch takes."""
    return sum(weight.numel() for weight in vae.parameters()) * batch_size


def _times(vae: VAE, batch_size: int) -> tuple[float, float]:
    """Return the seconds of the fastest of a few steps in float32 and in bfloat16, taken in turn."""
    device = next(vae.parameters()).device
    rows = torch.zeros(batch_size, vae.n_features, device=device)
    noise = torch.zeros(batch_size, vae.dim_latent, device=device)
    exact, short = [], []
    for _ in range(_TIMED_STEPS):
        exact.append(_seconds(vae, rows, noise, torch.float32))
        short.append(_seconds(vae, rows, noise, torch.bfloat16))
    vae.zero_grad()
    return min(exact), min(short)


def _seconds(vae: nn.Module, rows: torch.Tensor, noise: torch.Tensor, dtype: torch.dtype) -> float:
    began = time.perf_counter()
    with computing_in(dtype):
        terms: Terms = vae(rows, noise)
    terms.negative_elbo.mean().backward()  # type: ignore[no-untyped-call]
    if rows.is_cuda:
        torch.cuda.synchronize(rows.device)
    return time.perf_counter() - began
