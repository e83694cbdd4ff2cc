"""Encoder and decoder: multilayer perceptrons with residual blocks where the latent is near."""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

MAX_ABS_LOGVAR = 10.0
_HEAD_GAIN = 0.1
_HEAD_LOGVAR_BIAS = -1.0
_BLOCK_GAIN = 0.1
_ALIGNMENT = 4  # inputs
_LINEAR_AND_SILU = 2  # of few inputs: exact costs nothing


class ResidualBlock(nn.Module):
    """Add to its input what two layers make of it, normalised first (He et al. 2016; Xiong et al. 2020)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return (n, width) of (n, width)."""
        added: Tensor = self.outer(functional.silu(self.inner(self.norm(hidden))))
        return hidden + added


class Mixed(nn.Module):
    """Layers that can compute in another type; inputs, outputs and weights stay float32.

    Attributes
    ----------
    compute_dtype : torch.dtype or None
        Type that matrix products are computed in; None: that of the weights.
    """

    compute_dtype: torch.dtype | None = None

    def mixed(self, layers: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
        """Return ``layers(values)`` in float32, computed in ``compute_dtype``."""
        if self.compute_dtype is None:
            return layers(values)
        with torch.autocast(values.device.type, dtype=self.compute_dtype):
            return layers(values).float()


class Layers(Mixed, nn.Sequential):
    """Layers one after another; the first ``exact`` of them always compute in the type of their weights."""

    exact: int = 0

    def forward(self, values: Tensor) -> Tensor:
        """Return (n, outputs of the last layer) of (n, inputs of the first)."""
        layers = list(self)
        hidden = _chain(layers[: self.exact], values)
        return self.mixed(functools.partial(_chain, layers[self.exact :]), hidden)


def _chain(layers: Sequence[nn.Module], values: Tensor) -> Tensor:
    for layer in layers:
        values = layer(values)
    return values


def perceptron(widths: Sequence[int], blocks: int, blocks_after: int) -> Layers:
    """Return Linear and SiLU for every pair of neighbouring ``widths``, and residual blocks after one such pair."""
    pairs: list[list[nn.Module]] = [[nn.Linear(*pair), nn.SiLU()] for pair in itertools.pairwise(widths)]
    if pairs:
        width = widths[1:][blocks_after]
        pairs[blocks_after].extend(ResidualBlock(width) for _ in range(blocks))
    return Layers(*itertools.chain.from_iterable(pairs))


class Aligned(nn.Linear):
    """A linear layer, usually of few outputs, that treats every row of a batch alike, bit for bit.

    Where inputs are no multiple of 4, matrix kernels for few outputs add up the rest of a row in an order that
    depends on its place in the batch; zeros that fill it up change nothing else.
    """

    def forward(self, values: Tensor) -> Tensor:
        """Return (n, out_features) of (n, in_features)."""
        fill = (0, -self.in_features % _ALIGNMENT)
        return functional.linear(functional.pad(values, fill), functional.pad(self.weight, fill), self.bias)


class Output(Mixed, Aligned):
    """An aligned layer that can compute in another type."""

    def forward(self, values: Tensor) -> Tensor:
        """Return (n, out_features) of (n, in_features)."""
        return self.mixed(super().forward, values)


@contextlib.contextmanager
def computing_in(module: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Let the wide layers of ``module`` compute in ``dtype`` for as long as the context lasts.

    It is the module that changes: two threads must not ask the same one for different types.
    """
    parts = [part for part in module.modules() if isinstance(part, Mixed)]
    before = [part.compute_dtype for part in parts]
    for part in parts:
        part.compute_dtype = dtype
    try:
        yield
    finally:
        for part, former in zip(parts, before, strict=True):
            part.compute_dtype = former


class Encoder(nn.Module):
    """Map a standardised row to the mean and log-variance of its posterior.

    The log-variance is bounded, ``10 tanh(./10)``, so that neither it nor its exponential can overflow. Residual
    blocks come last before the head.
    """

    def __init__(self, n_features: int, cells: Sequence[int], dim_latent: int, residual_blocks: int = 0) -> None:
        super().__init__()
        self.body = perceptron([n_features, *cells], residual_blocks, blocks_after=-1)
        self.head = Aligned([n_features, *cells][-1], 2 * dim_latent)

    def forward(self, standardised: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance, each (n, dim_latent), of rows (n, n_features)."""
        return self.moments(self.hidden(standardised))

    def hidden(self, standardised: Tensor) -> Tensor:
        """Return what the head, and a flow, read of rows (n, n_features): (n, cells[-1])."""
        hidden: Tensor = self.body(standardised)
        return hidden

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
        self.body = perceptron([dim_latent, *cells], residual_blocks, blocks_after=0)
        self.body.exact = _LINEAR_AND_SILU
        self.output = Output([dim_latent, *cells][-1], n_features)

    def forward(self, latent: Tensor) -> Tensor:
        """Return (n, n_features) parameters of latents (n, dim_latent)."""
        result: Tensor = self.output(self.body(latent))
        return result

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
