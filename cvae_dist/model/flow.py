"""Inverse autoregressive flow (Kingma et al. 2016, arXiv:1606.04934): a posterior richer than a diagonal Gaussian."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from cvae_dist.model.kernels import few_columns, once, product
from cvae_dist.model.scaling import Choice

_DEFAULT_LENGTH = 5
_MOST_WITHOUT_FLOW = 2
_WIDTH, _WIDTH_PER_DIMENSION = 64, 8  # units; more gain no likelihood in two and four dimensions
_MAX_LOG_SCALE = 3.0
_LAST_GAIN = 0.01  # of the last layer's weights: a new flow is the identity but for 1 %


def choose_flow_length(requested: int | None, dim_latent: int, kl_weight: float, likelihood: str) -> Choice:
    """Decide ``iaf_flow_length``: none where it cannot help, none by default where it costs more than it gains.

    At equal computing time a flow gains nats with a Bernoulli likelihood, whose posteriors are wide, and loses some
    with a learned sigma or up to two latent dimensions. The reason is empty where there is nothing to tell.
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


def context_width(dim_latent: int) -> int:
    """Return how many values tell a flow about the row."""
    return min(_WIDTH, _WIDTH_PER_DIMENSION * dim_latent)


def _activated(values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return ``silu(values @ weight.T + bias)``: in float32 while it learns, else in the type that is asked for."""
    if torch.is_grad_enabled():
        return functional.silu(functional.linear(values.to(weight.dtype), weight, bias))
    return product(values, weight, bias, "swish")


class AutoregressiveStep(nn.Module):
    """One affine step whose shift and scale of coordinate j depend on the coordinates before j and the context.

    A masked autoencoder with one hidden layer (Germain et al. 2015, arXiv:1502.03509). The masks are constants: no
    parameters, and not in the state.

    Parameters
    ----------
    dim_latent, dim_context : int
        Widths of the latent and of what the encoder tells the flow.
    descending : bool
        "Before" counts from the last coordinate.
    """

    _hidden_mask: Tensor
    _output_mask: Tensor

    def __init__(self, dim_latent: int, dim_context: int, *, descending: bool) -> None:
        super().__init__()
        width = max(context_width(dim_latent), 2 * dim_latent)
        self.latent = nn.Linear(dim_latent, width)
        self.context = nn.Linear(dim_context, width, bias=False)
        self.output = nn.Linear(width, 2 * dim_latent)
        place = torch.arange(dim_latent)
        place = place.flip(0) if descending else place
        seen = torch.arange(width) % dim_latent  # how many coordinates a hidden unit sees; 0: the context alone
        hidden_mask, output_mask = seen[:, None] > place, place[:, None] >= seen
        self.register_buffer("_hidden_mask", hidden_mask.to(torch.float32), persistent=False)
        self.register_buffer("_output_mask", output_mask.repeat(2, 1).to(torch.float32), persistent=False)

    def shift_and_log_scale(self, latent: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return shift and log-scale, each (n, dim_latent), of latents (n, dim_latent) in contexts (n, dim_context)."""
        inputs = torch.cat([context, latent.to(context.dtype)], dim=-1)
        hidden_weight, output_weight = once(self, self._masked_weights)
        hidden = _activated(inputs, hidden_weight, self.latent.bias)
        shift, raw = few_columns(hidden, output_weight, self.output.bias).chunk(2, dim=-1)
        return shift, _MAX_LOG_SCALE * torch.tanh(raw / _MAX_LOG_SCALE)

    def _masked_weights(self) -> tuple[Tensor, Tensor]:
        """Return the weights of the hidden layer, of context and latent, and of the output."""
        hidden = torch.cat([self.context.weight, self.latent.weight * self._hidden_mask], dim=-1)
        return hidden, self.output.weight * self._output_mask

    def forward(self, latent: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``latent * scale + shift`` and the log-scale, each (n, dim_latent)."""
        shift, log_scale = self.shift_and_log_scale(latent, context)
        return torch.addcmul(shift, latent, log_scale.exp()), log_scale

    def initialise(self, generator: torch.Generator) -> None:
        """Draw normal weights of variance 1 / (inputs seen), and of nearly nothing for the last layer."""
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
    """

    def __init__(self, dim_latent: int, dim_hidden: int, length: int) -> None:
        super().__init__()
        width = context_width(dim_latent)
        self.context = nn.Linear(dim_hidden, width)
        steps = [AutoregressiveStep(dim_latent, width, descending=bool(index % 2)) for index in range(length)]
        self.steps = cast(Sequence[AutoregressiveStep], nn.ModuleList(steps))

    def forward(self, latent: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Push latents through the flow in one pass.

        Parameters
        ----------
        latent : Tensor, shape (n, dim_latent)
            Draws of the Gaussian the encoder gives.
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

    def push(self, latent: Tensor, hidden: Tensor) -> Tensor:
        """Return the latent of :meth:`forward` alone."""
        return next(self.push_each([latent], hidden))

    def push_each(self, latents: Iterable[Tensor], hidden: Tensor) -> Iterator[Tensor]:
        """Yield :meth:`push` of several latents of the same rows."""
        context = self._context(hidden)
        for latent in latents:
            for step in self.steps:
                latent, _ = step(latent, context)
            yield latent

    def _context(self, hidden: Tensor) -> Tensor:
        return _activated(hidden, self.context.weight, self.context.bias)

    def inverse(self, latent: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return what :meth:`forward` makes ``latent`` of, and the log-determinant there; dim_latent passes a step."""
        context = self._context(hidden)
        total = torch.zeros_like(latent[..., 0])
        for step in reversed(self.steps):
            before = latent
            for _ in range(latent.shape[-1]):  # every pass settles one more coordinate
                shift, log_scale = step.shift_and_log_scale(before, context)
                before = (latent - shift) * torch.exp(-log_scale)
            total = total + step.shift_and_log_scale(before, context)[1].sum(dim=-1)
            latent = before
        return latent, total

    def initialise(self, generator: torch.Generator) -> None:
        """Draw weights such that the flow is nearly the identity."""
        with torch.no_grad():
            self.context.weight.normal_(0.0, math.sqrt(2 / self.context.in_features), generator=generator)
            self.context.bias.zero_()
        for step in self.steps:
            step.initialise(generator)
