"""The products that layers are made of, computed the fastest way that this torch and this processor offer.

All that the package uses of torch's private operators is here, each with what is done where it is missing.

Hidden state: what :func:`computing_in` asks for is a context variable, which every thread has of its own. The
weights prepared for it last as long as the context does. :func:`compiled` uses a global variable, but only while it is
traced: torch does not understand context variables.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from cvae_dist.errors import InvalidInput
from cvae_dist.model.tiling import keep_freed_memory

Activation = Literal["none", "swish"]  # as oneDNN calls them; swish is SiLU

_ALIGNMENT = 4  # inputs
_TYPICAL_ROWS = 1024  # oneDNN lays weights out for some number of rows; the layout does not depend on it
_LARGE = 2**16  # weights: a product of fewer is done before oneDNN has begun
_LARGE_FUSED = 2**12  # the same where no layout has to change
_DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bf16": torch.bfloat16}


def _answer(owner: object, question: str) -> bool:
    """Return ``owner.question()``; False in a torch that has no such function."""
    return bool(getattr(owner, question, bool)())


_HAS_ONEDNN = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
_HAS_FUSED = _HAS_ONEDNN and all(
    hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight")
)
_HAS_FUSED_BFLOAT16 = _HAS_FUSED and _answer(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")


class _Computing:
    """The type that :func:`computing_in` asks for, and the weights that were prepared for it."""

    def __init__(self, dtype: torch.dtype, *, often: bool) -> None:
        self.dtype, self._often = dtype, often
        self._prepared: dict[int, tuple[object, tuple[Tensor, Tensor]]] = {}

    def prepared(self, owner: object, make: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return what ``make()`` returned for ``owner`` the first time."""
        if id(owner) not in self._prepared:
            self._prepared[id(owner)] = owner, make()  # which keeps the owner, so that no other gets its id
        return self._prepared[id(owner)][1]

    def converted(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights of a layer in the type, and in the layout that pays, for oneDNN."""
        values = weight.to(self.dtype)
        if self._often:
            values = torch.ops.mkldnn._reorder_linear_weight(values, _TYPICAL_ROWS)
        return values, bias.to(self.dtype)


_computing: ContextVar[_Computing | None] = ContextVar("computing", default=None)
_compiled_in: torch.dtype | None = None


def compute_dtype(precision: str) -> torch.dtype:
    """Return the type that ``precision`` names, for :func:`computing_in`.

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
    """Whether the device has bfloat16 arithmetic; others convert to float32 and back, which is slower than float32."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return _answer(torch.cpu, "_is_avx512_bf16_supported") or _answer(torch.cpu, "_is_amx_tile_supported")


def drawback(precision: str) -> str:
    """Return a warning for ``precision`` on this processor, or an empty string."""
    if compute_dtype(precision) == torch.float32 or has_bfloat16(torch.device("cpu")):
        return ""
    return f"this processor has no bfloat16 arithmetic: precision={precision!r} is slower here than 'float32'"


@contextlib.contextmanager
def inference(dtype: torch.dtype = torch.float32, *, often: bool = False) -> Iterator[None]:
    """Compute as in :func:`computing_in`, and without gradients."""
    keep_freed_memory()
    with torch.inference_mode(), computing_in(dtype, often=often):
        yield


@contextlib.contextmanager
def computing_in(dtype: torch.dtype, *, often: bool = False) -> Iterator[None]:
    """Let layers compute in ``dtype``, the fastest way, in this thread while the context lasts.

    Without this context layers use only torch's public functions, which can be traced, exported and vectorised.
    Where there are no gradients, the weights must not change while the context lasts.

    Parameters
    ----------
    dtype : torch.dtype
        float32 or bfloat16.
    often : bool
        Every layer computes so many times that it pays to lay its weights out for oneDNN first.
    """
    token = _computing.set(_Computing(dtype, often=often))
    try:
        yield
    finally:
        _computing.reset(token)


def compiled(module: nn.Module, dtype: torch.dtype) -> Callable[..., Any]:
    """Return the forward pass of ``module`` in ``dtype``, which torch compiles when it is first called.

    The call raises InvalidInput where torch cannot.
    """
    from torch._dynamo.exc import TorchDynamoException  # slow to import, and few trainings need it

    def forward(*inputs: Tensor) -> Any:
        global _compiled_in
        _compiled_in = dtype
        return module(*inputs)

    fast = torch.compile(forward)

    def call(*inputs: Tensor) -> Any:
        global _compiled_in
        try:
            return fast(*inputs)
        except TorchDynamoException as error:
            lines = [line for line in str(error).splitlines() if line]
            raise InvalidInput(
                f"torch cannot compile the training step here ({lines[0]}). No step was done; install a C++ compiler "
                "such as g++, or train without --compile"
            ) from error
        finally:
            _compiled_in = None  # an exported program is traced likewise, and is not to compute in this type

    return call


def product(values: Tensor, weight: Tensor, bias: Tensor, activation: Activation = "none") -> Tensor:
    """Return ``activation(values @ weight.T + bias)``, (n, outputs), in the type that the context asks for.

    Large float32 products go to oneDNN explicitly. Torch would give them to MKL, which takes twice as long on
    processors of AMD. Which products are large depends on the weights alone: were it to depend on the number of rows,
    so would the results.
    """
    computing = _inferring()
    if computing is not None:
        dtype = computing.dtype
        if values.is_cpu and _is_fused(weight, dtype):
            weight, bias = computing.prepared(weight, lambda: computing.converted(weight, bias))
            fused: Tensor = torch.ops.mkldnn._linear_pointwise(values.to(dtype), weight, bias, activation, [], "")
            return fused
        values, weight = _aligned(values, weight)
    result = _differentiable(values, weight, bias)
    return functional.silu(result) if activation == "swish" else result


def few_columns(values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return ``values @ weight.T + bias``, (n, outputs), in the weights' own type, fast for few outputs.

    Without gradients the result is laid out column by column. What follows then runs along whole columns instead of
    the few values of a row, and takes a third of the time.
    """
    values = values.to(weight.dtype)
    if _inferring() is None:
        return functional.linear(values, weight, bias)
    values, weight = _aligned(values, weight)
    return torch.addmm(bias[:, None], weight, values.t()).t()


def exact(values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return ``values @ weight.T + bias``, (n, outputs), in float32 whatever the context asks for."""
    return functional.linear(*_aligned(values, weight), bias)


def once(owner: nn.Module, make: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return ``make()``, which must depend on the weights of ``owner`` alone; without gradients it is called once."""
    computing = _inferring()
    return make() if computing is None else computing.prepared(owner, make)


def lerp(averages: list[Tensor], values: list[Tensor], share: float) -> None:
    """Move each of ``averages`` in place towards its value by ``share`` of the way."""
    if hasattr(torch, "_foreach_lerp_"):
        torch._foreach_lerp_(averages, values, share)
        return
    for average, value in zip(averages, values, strict=True):
        average.lerp_(value, share)


def _inferring() -> _Computing | None:
    """Return what :func:`computing_in` asks for, if no gradients are wanted."""
    return None if torch.is_grad_enabled() else _computing.get()


def _is_fused(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether one call of oneDNN computes product and activation: faster, but without a gradient."""
    return _HAS_FUSED_BFLOAT16 if dtype == torch.bfloat16 else _HAS_FUSED and weight.numel() >= _LARGE_FUSED


def _differentiable(values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    compiles = torch.compiler.is_compiling()
    computing = None if compiles else _computing.get()
    dtype = _compiled_in if compiles else computing and computing.dtype
    if dtype == torch.bfloat16:
        return functional.linear(values.to(dtype), weight.to(dtype), bias.to(dtype))
    if computing is not None and weight.numel() >= _LARGE and values.is_cpu and _HAS_ONEDNN:
        return functional.linear(values.to_mkldnn(), weight, bias).to_dense()
    return functional.linear(values, weight, bias)


def _aligned(values: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pad the last dimension, which both share, with zeros up to a multiple of 4.

    Otherwise matrix kernels for few outputs add up the last inputs of a row in an order that depends on the row's
    place in the batch. Zeros change nothing else.
    """
    missing = -values.shape[-1] % _ALIGNMENT
    if not missing:
        return values, weight
    return functional.pad(values, (0, missing)), functional.pad(weight, (0, missing))
