"""Inverse autoregressive flow (Kingma et al. 2016, arXiv:1606.04934): a posterior richer than a diagonal Gaussian."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from cvae_dist.config import Config, ModelConfig
from cvae_dist.errors import InvalidInput
from cvae_dist.model.kernels import few_columns, once, product
from cvae_dist.model.scaling import Choice

_DEFAULT_LENGTH = 5
_MOST_WITHOUT_FLOW = 2
_MOST_CONTEXT, _CONTEXT_PER_DIMENSION = 64, 8  # values; more gain no likelihood in two and four dimensions
_MAX_LOG_SCALE = 3.0
_LAST_GAIN = 0.01  # of the last layer's weights: a new flow is the identity but for 1 %


def choose_flow_length(requested: int | None, dim_latent: int, kl_weight: float, likelihood: str) -> Choice:
    """Decide ``iaf_flow_length``. There is no flow where it cannot help, and none by default where it does not pay.

    At equal computing time a flow gains nats with a Bernoulli likelihood, whose posteriors are wide. It loses some
    with a learned sigma, and with one or two latent dimensions. The reason is empty where nobody asked for a flow.
    """
    if requested and dim_latent == 1:
        return Choice(0, "no flow: with one latent dimension it would leave the posterior a Gaussian")
    if requested and kl_weight == 0:
        return Choice(0, "no flow: without a KL term there is no posterior to shape")
    if requested is not None:
        return Choice(requested, f"iaf_flow_length={requested}, as asked for")
    if dim_latent <= _MOST_WITHOUT_FLOW or kl_weight == 0 or likelihood != "bernoulli":
        return Choice(0, "")
    return Choice(
        _DEFAULT_LENGTH, f"{_DEFAULT_LENGTH} steps of flow: {dim_latent} latent dimensions, Bernoulli likelihood"
    )


def with_flow_widths(config: Config) -> Config:
    """Return the settings with ``iaf_context`` and ``iaf_cells`` filled in; None where there is no flow."""
    if not config.iaf_flow_length:
        return config.model_copy(update={"iaf_context": None, "iaf_cells": None})
    context = config.iaf_context or min(_MOST_CONTEXT, _CONTEXT_PER_DIMENSION * config.dim_latent)
    cells = config.iaf_cells or max(context, 2 * config.dim_latent)
    return config.model_copy(update={"iaf_context": context, "iaf_cells": cells})


def make_flow(config: ModelConfig, dim_hidden: int) -> "InverseAutoregressiveFlow | None":
    """Return the flow that ``config`` describes, behind an encoder whose last layer is ``dim_hidden`` wide."""
    if not config.iaf_flow_length:
        return None
    if config.iaf_context is None or config.iaf_cells is None:
        raise InvalidInput("the widths of the flow must be decided before the model is built; see `decide`")
    return InverseAutoregressiveFlow(
        config.dim_latent, dim_hidden, config.iaf_flow_length, config.iaf_context, config.iaf_cells
    )


def _activated(values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return ``silu(values @ weight.T + bias)``: in float32 where there are gradients, else as the context asks."""
    if torch.is_grad_enabled():
        return functional.silu(functional.linear(values.to(weight.dtype), weight, bias))
    return product(values, weight, bias, "swish")


class AutoregressiveStep(nn.Module):
    """One affine step. Shift and scale of coordinate j depend on the context and on the coordinates before j.

    A masked autoencoder with one hidden layer (Germain et al. 2015, arXiv:1502.03509). The masks are constants, so
    they are not in the state.

    Parameters
    ----------
    dim_latent : int
        Width of the latent.
    dim_context : int
        Width of the context: what the encoder tells the flow about the row.
    cells : int
        Width of the hidden layer.
    descending : bool
        Count from the last coordinate, so that "before" means a higher number.
    """

    def __init__(self, dim_latent: int, dim_context: int, cells: int, *, descending: bool) -> None:
        super().__init__()
        self.latent = nn.Linear(dim_latent, cells)
        self.context = nn.Linear(dim_context, cells, bias=False)
        self.output = nn.Linear(cells, 2 * dim_latent)
        place = torch.arange(dim_latent)
        place = place.flip(0) if descending else place
        seen = torch.arange(cells) % dim_latent  # how many coordinates a hidden unit sees; 0: the context alone
        hidden_mask, output_mask = seen[:, None] > place, place[:, None] >= seen
        self._hidden_mask = nn.Buffer(hidden_mask.to(torch.float32), persistent=False)
        self._output_mask = nn.Buffer(output_mask.repeat(2, 1).to(torch.float32), persistent=False)

    def shift_and_log_scale(self, latent: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return shift and log-scale, each (n, dim_latent), of latents (n, dim_latent) in contexts (n, dim_context)."""
        inputs = torch.cat([context, latent.to(context.dtype)], dim=-1)
        hidden_weight, output_weight = once(self, self._masked_weights)
        hidden = _activated(inputs, hidden_weight, self.latent.bias)
        shift, raw = few_columns(hidden, output_weight, self.output.bias).chunk(2, dim=-1)
        return shift, _MAX_LOG_SCALE * torch.tanh(raw / _MAX_LOG_SCALE)

    def _masked_weights(self) -> tuple[Tensor, Tensor]:
        """Return the weights of the hidden layer, for context and latent side by side, and of the output."""
        hidden = torch.cat([self.context.weight, self.latent.weight * self._hidden_mask], dim=-1)
        return hidden, self.output.weight * self._output_mask

    def forward(self, latent: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``latent * scale + shift`` and the log-scale, each (n, dim_latent)."""
        shift, log_scale = self.shift_and_log_scale(latent, context)
        return torch.addcmul(shift, latent, log_scale.exp()), log_scale

    def initialise(self, generator: torch.Generator) -> None:
        """Draw normal weights of variance 1 / inputs; those of the last layer are nearly zero."""
        with torch.no_grad():
            for layer, gain in ((self.latent, 1.0), (self.context, 1.0), (self.output, _LAST_GAIN)):
                layer.weight.normal_(0.0, gain / math.sqrt(layer.in_features), generator=generator)
            self.latent.bias.zero_()
            self.output.bias.zero_()


class InverseAutoregressiveFlow(nn.Module):
    """``length`` autoregressive steps, every other one from the last coordinate to the first.

    Parameters
    ----------
    dim_latent : int
        At least 2: an affine step of one coordinate leaves a Gaussian a Gaussian.
    dim_hidden : int
        Width of the encoder's last layer.
    length : int
        Number of steps.
    dim_context, cells : int
        Widths of the context, and of the hidden layer of every step.
    """

    def __init__(self, dim_latent: int, dim_hidden: int, length: int, dim_context: int, cells: int) -> None:
        super().__init__()
        self.context = nn.Linear(dim_hidden, dim_context)
        steps = [
            AutoregressiveStep(dim_latent, dim_context, cells, descending=bool(index % 2)) for index in range(length)
        ]
        self.steps = cast(Sequence[AutoregressiveStep], nn.ModuleList(steps))

    def forward(self, latent: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Push latents through the flow in one pass.

        Parameters
        ----------
        latent : Tensor, shape (n, dim_latent)
            Draws of the encoder's Gaussian.
        hidden : Tensor, shape (n, dim_hidden)
            The encoder's last layer.

        Returns
        -------
        latent : Tensor, shape (n, dim_latent)
        log_determinant : Tensor, shape (n,)
            Of the Jacobian, in nats.
        """
        context = self._context(hidden)
        total = torch.zeros_like(latent[..., 0])
        for step in self.steps:
            latent, log_scale = step(latent, context)
            total = total + log_scale.sum(dim=-1)
        return latent, total

    def push_each(self, latents: Iterable[Tensor], hidden: Tensor) -> Iterator[Tensor]:
        """Yield the latent alone that :meth:`forward` returns, for each of several ``latents`` of the same rows."""
        context = self._context(hidden)
        for latent in latents:
            for step in self.steps:
                latent, _ = step(latent, context)
            yield latent

    def _context(self, hidden: Tensor) -> Tensor:
        return _activated(hidden, self.context.weight, self.context.bias)

    def initialise(self, generator: torch.Generator) -> None:
        """Draw weights such that the flow is nearly the identity."""
        with torch.no_grad():
            self.context.weight.normal_(0.0, math.sqrt(2 / self.context.in_features), generator=generator)
            self.context.bias.zero_()
        for step in self.steps:
            step.initialise(generator)
