"""Multilayer perceptrons of the encoder and the decoder."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

MAX_ABS_LOGVAR = 10.0
_HEAD_GAIN = 0.1
_HEAD_LOGVAR_BIAS = -1.0


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """Return Linear and SiLU for every pair of neighbouring ``widths``."""
    layers = [(nn.Linear(before, after), nn.SiLU()) for before, after in itertools.pairwise(widths)]
    return nn.Sequential(*itertools.chain.from_iterable(layers))


class Encoder(nn.Module):
    """Map a standardised row to the mean and log-variance of its posterior.

    The log-variance is bounded, ``10 tanh(./10)``, so that neither it nor its exponential can overflow.
    """

    def __init__(self, n_features: int, cells: Sequence[int], dim_latent: int) -> None:
        super().__init__()
        self.body = mlp([n_features, *cells])
        self.head = nn.Linear([n_features, *cells][-1], 2 * dim_latent)

    def forward(self, standardised: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance, each (n, dim_latent), of rows (n, n_features)."""
        mean, logvar = self.head(self.body(standardised)).chunk(2, dim=-1)
        return mean, MAX_ABS_LOGVAR * torch.tanh(logvar / MAX_ABS_LOGVAR)

    def initialise(self, generator: torch.Generator) -> None:
        """Draw He-normal weights; the posterior starts narrow (logvar -1) and close to the origin."""
        _he_normal(self, generator)
        with torch.no_grad():
            self.head.weight.mul_(_HEAD_GAIN)
            self.head.bias.chunk(2)[1].fill_(_HEAD_LOGVAR_BIAS)


class Decoder(nn.Module):
    """Map a latent to the likelihood's parameters, one per feature."""

    def __init__(self, dim_latent: int, cells: Sequence[int], n_features: int) -> None:
        super().__init__()
        self.body = mlp([dim_latent, *cells])
        self.output = nn.Linear([dim_latent, *cells][-1], n_features)

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
    """He et al. 2015, eq. 10: normal weights of variance 2 / fan_in, zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            with torch.no_grad():
                layer.weight.normal_(0.0, math.sqrt(2 / layer.in_features), generator=generator)
                layer.bias.zero_()
