"""The posterior, a diagonal Gaussian that a flow may reshape, and its divergence from the prior N(0, I)."""

import math

import torch
from torch import Tensor

_LOG_TWO_PI = math.log(2 * math.pi)
_PRIOR_REACH = 2.0  # standard deviations of the prior


def draw(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """Return ``mean + exp(logvar / 2) * noise`` (Kingma and Welling 2014, 2.4); all (n, dim_latent)."""
    return mean + torch.exp(0.5 * logvar) * noise


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """Return KL(N(mean, exp(logvar)) || N(0, I)) per row, (n,), in nats (Kingma and Welling 2014, app. B)."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=-1)


def flow_divergence(mean: Tensor, logvar: Tensor, before: Tensor, after: Tensor, log_determinant: Tensor) -> Tensor:
    """Return an unbiased estimate of KL(q || N(0, I)) per row, (n,), in nats, where a flow makes q of a Gaussian.

    KL = E[log q0(z0) - log_determinant - log p(z)]. The mean of the first term is known. The last contains z^2, whose
    noise is reduced by a control variate: ``mean^2 + var - z0^2``, which is 0 on average. Near the identity it cancels
    all noise. For Gaussians far from 0 it would add noise. So it is added in full up to twice the spread of the prior,
    and in a smaller share beyond.

    Parameters
    ----------
    mean, logvar : Tensor, shape (n, dim_latent)
        Of the Gaussian q0.
    before, after : Tensor, shape (n, dim_latent)
        The draw z0 of the Gaussian, and z, which the flow makes of it.
    log_determinant : Tensor, shape (n,)
        Of the flow's Jacobian at ``before``.
    """
    known = mean.square() + logvar.exp()
    share = (_PRIOR_REACH**2 / known.detach()).clamp(max=1)
    square = after.square() + share * (known - before.square())
    return 0.5 * (square - 1 - logvar).sum(dim=-1) - log_determinant


def log_density(noise: Tensor, logvar: Tensor, log_determinant: Tensor | float = 0.0) -> Tensor:
    """Return log q(z | x) per row, (n,), at the draw z that ``noise``, (n, dim_latent), gave."""
    return -0.5 * (noise.square() + logvar + _LOG_TWO_PI).sum(dim=-1) - log_determinant


def log_prior(latent: Tensor) -> Tensor:
    """Return log N(latent; 0, I) per row, (n,), of latents (n, dim_latent)."""
    return -0.5 * (latent.square() + _LOG_TWO_PI).sum(dim=-1)
