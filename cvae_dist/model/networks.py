"""Encoder and decoder: multilayer perceptrons with residual blocks where the latent is near."""

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from cvae_dist.model.kernels import exact, few_columns, product

MAX_ABS_LOGVAR = 10.0
_HEAD_GAIN = 0.1
_HEAD_LOGVAR_BIAS = -1.0
_BLOCK_GAIN = 0.1


class Linear(nn.Linear):
    """A linear layer with float32 weights that computes in the type ``kernels.computing_in`` asks for."""

    def forward(self, values: Tensor) -> Tensor:
        """Return (n, out_features) of (n, in_features)."""
        return product(values, self.weight, self.bias)


class Activated(nn.Linear):
    """A :class:`Linear` and the SiLU that follows it."""

    def forward(self, values: Tensor) -> Tensor:
        """Return (n, out_features) of (n, in_features)."""
        return product(values, self.weight, self.bias, "swish")


class ResidualBlock(nn.Module):
    """Two layers whose result is added to their input, normalised first (He et al. 2016; Xiong et al. 2020)."""

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
    """Yield a layer for every pair of neighbouring ``widths``.

    An identity follows each: it keeps the names that weights have on disk.
    """
    for pair in itertools.pairwise(widths):
        yield Activated(*pair)
        yield nn.Identity()


def _blocks(width: int, count: int) -> Iterator[nn.Module]:
    return (ResidualBlock(width) for _ in range(count))


class Exact(nn.Linear):
    """A linear layer that always computes in float32."""

    def forward(self, values: Tensor) -> Tensor:
        """Return (n, out_features) of (n, in_features)."""
        return exact(values, self.weight, self.bias)


class Encoder(nn.Module):
    """Map a standardised row to the mean and log-variance of its posterior.

    The log-variance is bounded, ``10 tanh(./10)``, so that neither it nor its exponential overflows. Residual blocks
    come right before the head.
    """

    def __init__(self, n_features: int, cells: Sequence[int], dim_latent: int, residual_blocks: int = 0) -> None:
        super().__init__()
        blocks = _blocks(cells[-1], residual_blocks) if cells else ()
        self.body = nn.Sequential(*_layers([n_features, *cells]), *blocks)
        self.head = nn.Linear([n_features, *cells][-1], 2 * dim_latent)

    def hidden(self, standardised: Tensor) -> Tensor:
        """Return the last layer before the head, (n, cells[-1]), of rows (n, n_features)."""
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
            # every digit of a latent counts, so its own layer computes in float32
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
