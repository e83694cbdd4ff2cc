"""Encoder and decoder: multilayer perceptrons with residual blocks where the latent is near."""

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from cvae_dist.errors import InvalidInput
from cvae_dist.model.tiling import keep_freed_memory

MAX_ABS_LOGVAR = 10.0
_HEAD_GAIN = 0.1
_HEAD_LOGVAR_BIAS = -1.0
_BLOCK_GAIN = 0.1
_ALIGNMENT = 4  # inputs
_LARGE = 2**16  # weights: a product of fewer is done before oneDNN has begun
_LARGE_FUSED = 2**12  # the same where it needs no change of layout

Activation = Literal["none", "swish"]  # as oneDNN calls them; swish is SiLU

_DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bf16": torch.bfloat16}
_HAS_ONEDNN = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
_HAS_FUSED = _HAS_ONEDNN and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_HAS_FUSED_BFLOAT16 = _HAS_FUSED and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
_computing: ContextVar[torch.dtype | None] = ContextVar("computing", default=None)


def compute_dtype(precision: str) -> torch.dtype:
    """Return what :func:`computing_in` takes.

    Raises
    ------
    InvalidInput
        There is no such precision.
    """
    if precision not in _DTYPES:
        known = " and ".join(repr(name) for name in _DTYPES)
        raise InvalidInput(f"precision={precision!r} is none to compute in: there are {known}")
    return _DTYPES[precision]


def has_bfloat16(device: torch.device) -> bool:
    """Whether the processor has bfloat16 arithmetic; others compute it by way of float32, and slower."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def drawback(precision: str) -> str:
    """Return what should be said to whoever computes in ``precision`` here; empty where nothing is against it."""
    if compute_dtype(precision) == torch.float32 or has_bfloat16(torch.device("cpu")):
        return ""
    return f"this processor has no bfloat16 arithmetic: precision={precision!r} is slower here than 'float32'"


@contextlib.contextmanager
def inference(dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Compute in ``dtype``, see :func:`computing_in`, and keep nothing for gradients."""
    keep_freed_memory()
    with torch.inference_mode(), computing_in(dtype):
        yield


@contextlib.contextmanager
def computing_in(dtype: torch.dtype) -> Iterator[None]:
    """Let wide layers compute in float32 or bfloat16, the fastest way, in this thread while the context lasts.

    Without it they are what torch makes of them: traced, exported, vectorised like any other.
    """
    token = _computing.set(dtype)
    try:
        yield
    finally:
        _computing.reset(token)


def product(values: Tensor, weight: Tensor, bias: Tensor, activation: Activation = "none") -> Tensor:
    """Return ``activation(values @ weight.T + bias)`` in the type that is asked for.

    oneDNN is asked for large float32 products by name: torch leaves them to MKL, which takes twice as long on
    processors of AMD. Whether a product is large does not depend on the rows, as their results must not.
    """
    dtype = _computing.get()
    if dtype is not None and not torch.is_grad_enabled():
        if values.is_cpu and _is_fused(weight, dtype):
            values, weight, bias = values.to(dtype), weight.to(dtype), bias.to(dtype)
            fused: Tensor = torch.ops.mkldnn._linear_pointwise(values, weight, bias, activation, [], "")
            return fused
        values, weight = _aligned(values, weight)
    result = _differentiable(values, weight, bias, dtype)
    return functional.silu(result) if activation == "swish" else result


def _is_fused(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether one call of oneDNN does product and activation: faster, but without a gradient."""
    return _HAS_FUSED_BFLOAT16 if dtype == torch.bfloat16 else _HAS_FUSED and weight.numel() >= _LARGE_FUSED


def _differentiable(values: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype == torch.bfloat16:
        return functional.linear(values.to(dtype), weight.to(dtype), bias.to(dtype))
    if dtype is not None and weight.numel() >= _LARGE and not values.is_cuda and _HAS_ONEDNN:
        return functional.linear(values.to_mkldnn(), weight, bias).to_dense()
    return functional.linear(values, weight, bias)


def _aligned(values: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Fill the last dimension, which both share, up to a multiple of 4 with zeros: every row is then treated alike.

    Where inputs are no multiple of 4, matrix kernels for few outputs add up the rest of a row in an order that
    depends on its place in the batch; zeros that fill it up change nothing else.
    """
    missing = -values.shape[-1] % _ALIGNMENT
    if not missing:
        return values, weight
    return functional.pad(values, (0, missing)), functional.pad(weight, (0, missing))


class Linear(nn.Linear):
    """A linear layer that computes in the type :func:`computing_in` names; its weights stay float32."""

    def forward(self, values: Tensor) -> Tensor:
        """Return (n, out_features) of (n, in_features)."""
        return product(values, self.weight, self.bias)


class Activated(nn.Linear):
    """A :class:`Linear` and the SiLU that follows it."""

    def forward(self, values: Tensor) -> Tensor:
        """Return (n, out_features) of (n, in_features)."""
        return product(values, self.weight, self.bias, "swish")


class ResidualBlock(nn.Module):
    """Add to its input what two layers make of it, normalised first (He et al. 2016; Xiong et al. 2020)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = Activated(width, width)
        self.outer = Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return (n, width) of (n, width)."""
        weight, bias = self.norm.weight.to(hidden.dtype), self.norm.bias.to(hidden.dtype)
        normal = functional.layer_norm(hidden, self.norm.normalized_shape, weight, bias, self.norm.eps)
        added: Tensor = self.outer(self.inner(normal))
        return hidden + added


def _layers(widths: Sequence[int]) -> Iterator[nn.Module]:
    """Yield a layer for every pair of neighbouring ``widths``, and what keeps the names of those that follow."""
    for pair in itertools.pairwise(widths):
        yield Activated(*pair)
        yield nn.Identity()


def _blocks(width: int, count: int) -> Iterator[nn.Module]:
    return (ResidualBlock(width) for _ in range(count))


class Exact(nn.Linear):
    """A linear layer that computes in float32 whatever :func:`computing_in` names."""

    def forward(self, values: Tensor) -> Tensor:
        """Return (n, out_features) of (n, in_features)."""
        return functional.linear(*_aligned(values, self.weight), self.bias)


class Encoder(nn.Module):
    """Map a standardised row to the mean and log-variance of its posterior.

    The log-variance is bounded, ``10 tanh(./10)``, so that neither it nor its exponential can overflow. Residual
    blocks come last before the head.
    """

    def __init__(self, n_features: int, cells: Sequence[int], dim_latent: int, residual_blocks: int = 0) -> None:
        super().__init__()
        blocks = _blocks(cells[-1], residual_blocks) if cells else ()
        self.body = nn.Sequential(*_layers([n_features, *cells]), *blocks)
        self.head = Exact([n_features, *cells][-1], 2 * dim_latent)

    def forward(self, standardised: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance, each (n, dim_latent), of rows (n, n_features)."""
        return self.moments(self.hidden(standardised))

    def hidden(self, standardised: Tensor) -> Tensor:
        """Return what the head, and a flow, read of rows (n, n_features): (n, cells[-1])."""
        hidden: Tensor = self.body(standardised)
        return hidden.float()

    def moments(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance, each (n, dim_latent), of :meth:`hidden`, (n, cells[-1])."""
        mean, logvar = self.head(hidden).chunk(2, dim=-1)
        return mean, MAX_ABS_LOGVAR * torch.tanh(logvar / MAX_ABS_LOGVAR)

    def initialise(self, generator: torch.Generator) -> None:
        """Draw He-normal weights; the posterior starts narrow (logvar -1) and close to the origin."""
        _he_normal(self, generator)
        with torch.no_grad():
            self.head.weight.mul_(_HEAD_GAIN)
            self.head.bias.chunk(2)[1].fill_(_HEAD_LOGVAR_BIAS)


class Decoder(nn.Module):
    """Map a latent to the likelihood's parameters, one per feature; residual blocks follow the first layer."""

    def __init__(self, dim_latent: int, cells: Sequence[int], n_features: int, residual_blocks: int = 0) -> None:
        super().__init__()
        self.body = nn.Sequential()
        if cells:
            # the latent's few digits are dear: its own layer computes in float32
            first = (Exact(dim_latent, cells[0]), nn.SiLU())
            self.body.extend((*first, *_blocks(cells[0], residual_blocks), *_layers(cells)))
        self.output = Linear([dim_latent, *cells][-1], n_features)

    def forward(self, latent: Tensor) -> Tensor:
        """Return (n, n_features) parameters of latents (n, dim_latent)."""
        result: Tensor = self.output(self.body(latent))
        return result.float()

    def initialise(self, generator: torch.Generator, bias: Tensor) -> None:
        """Draw He-normal weights; the output starts around ``bias``, the parameters of the mean row."""
        _he_normal(self, generator)
        with torch.no_grad():
            self.output.bias.copy_(bias)


def _he_normal(module: nn.Module, generator: torch.Generator) -> None:
    """He et al. 2015, eq. 10: normal weights of variance 2 / fan_in, zero biases; blocks add little at first."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            with torch.no_grad():
                layer.weight.normal_(0.0, math.sqrt(2 / layer.in_features), generator=generator)
                layer.bias.zero_()
    for block in module.modules():
        if isinstance(block, ResidualBlock):
            with torch.no_grad():
                block.outer.weight.mul_(_BLOCK_GAIN)
