"""The posterior: a diagonal Gaussian, pushed through a flow where there is one, and its divergence from N(0, I)."""

import math

import torch
from torch import Tensor

_LOG_TWO_PI = math.log(2 * math.pi)


def draw(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """Return ``mean + exp(logvar / 2) * noise`` (Kingma and Welling 2014, 2.4); all (n, dim_latent)."""
    return mean + torch.exp(0.5 * logvar) * noise


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """Return KL(N(mean, exp(logvar)) || N(0, I)) per row, (n,), in nats (Kingma and Welling 2014, app. B)."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=-1)


def flow_correction(before: Tensor, after: Tensor, log_determinant: Tensor) -> Tensor:
    """Return what a flow adds to :func:`kl_divergence` of its Gaussian, per row, (n,), in nats: an unbiased estimate.

    KL(q || p) = E[log q0(z0) - log_determinant - log p(z)] and log p(z) = log p(z0) - (z^2 - z0^2) / 2, so only the
    difference to the Gaussian's own divergence is estimated from the one draw: a flow close to the identity adds no
    noise.

    Parameters
    ----------
    before, after : Tensor, shape (n, dim_latent)
        The draw z0 of the Gaussian and what the flow made of it.
    log_determinant : Tensor, shape (n,)
        Of the flow's Jacobian at ``before``.
    """
    return 0.5 * (after.square() - before.square()).sum(dim=-1) - log_determinant


def log_density(noise: Tensor, logvar: Tensor, log_determinant: Tensor | float = 0.0) -> Tensor:
    """Return log q(z | x) per row, (n,), of the draw that ``noise``, (n, dim_latent), became."""
    return -0.5 * (noise.square() + logvar + _LOG_TWO_PI).sum(dim=-1) - log_determinant


def log_prior(latent: Tensor) -> Tensor:
    """Return log N(latent; 0, I) per row, (n,), of latents (n, dim_latent)."""
    return -0.5 * (latent.square() + _LOG_TWO_PI).sum(dim=-1)
