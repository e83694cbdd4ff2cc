"""Encoder and decoder: multilayer perceptrons with residual blocks where the latent is near."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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
_TYPICAL_ROWS = 1024  # oneDNN lays weights out for some number of rows; what they become does not depend on it
_LARGE = 2**16  # weights: a product of fewer is done before oneDNN has begun
_LARGE_FUSED = 2**12  # the same where it needs no change of layout

Activation = Literal["none", "swish"]  # as oneDNN calls them; swish is SiLU

_DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bf16": torch.bfloat16}
_HAS_ONEDNN = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
_HAS_FUSED = _HAS_ONEDNN and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_HAS_FUSED_BFLOAT16 = _HAS_FUSED and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _Computing:
    """What :func:`computing_in` asks for, and the weights that are ready for it."""

    def __init__(self, dtype: torch.dtype, *, often: bool) -> None:
        self.dtype, self._often = dtype, often
        self._ready: dict[int, tuple[object, tuple[Tensor, Tensor]]] = {}

    def ready(self, owner: object, make: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return what ``make()`` returned for ``owner`` the first time."""
        if id(owner) not in self._ready:
            self._ready[id(owner)] = owner, make()  # which keeps the owner, so that no other gets its id
        return self._ready[id(owner)][1]

    def converted(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights of a layer as :func:`product` gives them to oneDNN."""
        values = weight.to(self.dtype)
        if self._often:
            values = torch.ops.mkldnn._reorder_linear_weight(values, _TYPICAL_ROWS)
        return values, bias.to(self.dtype)


_computing: ContextVar[_Computing | None] = ContextVar("computing", default=None)


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
def inference(dtype: torch.dtype = torch.float32, *, often: bool = False) -> Iterator[None]:
    """Compute as :func:`computing_in`, and keep nothing for gradients."""
    keep_freed_memory()
    with torch.inference_mode(), computing_in(dtype, often=often):
        yield


@contextlib.contextmanager
def computing_in(dtype: torch.dtype, *, often: bool = False) -> Iterator[None]:
    """Let layers compute in float32 or bfloat16, the fastest way, in this thread while the context lasts.

    Without it they are what torch makes of them: traced, exported, vectorised like any other. Without gradients
    the weights must not change meanwhile. Where every layer computes ``often``, its weights are first laid out as
    oneDNN reads them.
    """
    token = _computing.set(_Computing(dtype, often=often))
    try:
        yield
    finally:
        _computing.reset(token)


def product(values: Tensor, weight: Tensor, bias: Tensor, activation: Activation = "none") -> Tensor:
    """Return ``activation(values @ weight.T + bias)`` in the type that is asked for.

    oneDNN is asked for large float32 products by name: torch leaves them to MKL, which takes twice as long on
    processors of AMD. Whether a product is large does not depend on the rows, as their results must not.
    """
    computing = _inferring()
    if computing is not None:
        dtype = computing.dtype
        if values.is_cpu and _is_fused(weight, dtype):
            weight, bias = computing.ready(weight, lambda: computing.converted(weight, bias))
            fused: Tensor = torch.ops.mkldnn._linear_pointwise(values.to(dtype), weight, bias, activation, [], "")
            return fused
        values, weight = _aligned(values, weight)
    result = _differentiable(values, weight, bias)
    return functional.silu(result) if activation == "swish" else result


def few_columns(values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return ``values @ weight.T + bias`` in float32 (the weights' own type), fast where it has few columns.

    Without gradients it is laid out in memory column by column: what follows then runs along whole columns, not
    along a few values of a row, and takes a third of the time.
    """
    values = values.to(weight.dtype)
    if _inferring() is None:
        return functional.linear(values, weight, bias)
    values, weight = _aligned(values, weight)
    return torch.addmm(bias[:, None], weight, values.t()).t()


def once(owner: nn.Module, make: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return ``make()``, which depends on the weights of ``owner`` alone; made once where they do not change."""
    computing = _inferring()
    return make() if computing is None else computing.ready(owner, make)


def _inferring() -> _Computing | None:
    """Return what :func:`computing_in` asks for where there are no gradients to be had."""
    return None if torch.is_grad_enabled() else _computing.get()


def _is_fused(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether one call of oneDNN does product and activation: faster, but without a gradient."""
    return _HAS_FUSED_BFLOAT16 if dtype == torch.bfloat16 else _HAS_FUSED and weight.numel() >= _LARGE_FUSED


def _differentiable(values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    computing = _computing.get()
    dtype = computing and computing.dtype
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
        self.head = nn.Linear([n_features, *cells][-1], 2 * dim_latent)

    def forward(self, standardised: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance, each (n, dim_latent), of rows (n, n_features)."""
        return self.moments(self.hidden(standardised))

    def hidden(self, standardised: Tensor) -> Tensor:
        """Return what the head, and a flow, read of rows (n, n_features): (n, cells[-1])."""
        hidden: Tensor = self.body(standardised)
        return hidden

    def moments(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance, each (n, dim_latent), of :meth:`hidden`, (n, cells[-1])."""
        mean, logvar = few_columns(hidden, self.head.weight, self.head.bias).chunk(2, dim=-1)
        return mean, MAX_ABS_LOGVAR * torch.tanh(logvar / MAX_ABS_LOGVAR)

    def mean(self, hidden: Tensor) -> Tensor:
        """Return the mean alone of :meth:`moments`."""
        dim_latent = self.head.out_features // 2
        return few_columns(hidden, self.head.weight[:dim_latent], self.head.bias[:dim_latent])

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
