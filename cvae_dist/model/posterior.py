"""The posterior: a diagonal Gaussian, pushed through a flow where there is one, and its divergence from N(0, I)."""

import math

import torch
from torch import Tensor

_LOG_TWO_PI = math.log(2 * math.pi)
_PRIOR_REACH = 2.0


def draw(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """Return ``mean + exp(logvar / 2) * noise`` (Kingma and Welling 2014, 2.4); all (n, dim_latent)."""
    return mean + torch.exp(0.5 * logvar) * noise


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """Return KL(N(mean, exp(logvar)) || N(0, I)) per row, (n,), in nats (Kingma and Welling 2014, app. B)."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=-1)


def flow_divergence(mean: Tensor, logvar: Tensor, before: Tensor, after: Tensor, log_determinant: Tensor) -> Tensor:
    """Return an unbiased estimate of KL(q || N(0, I)) per row, (n,), in nats, where a flow makes q of a Gaussian.

    KL = E[log q0(z0) - log_determinant - log p(z)], and the first term is known. The noise of z^2 in the last is made
    less by what is known of z0: ``mean^2 + var - z0^2`` is nothing on average, and close to the identity all the
    noise there is. Where the Gaussian lies far out and the flow brings it back it is far more than that, so only a
    share of it is added: in full up to twice the spread of the prior.

    Parameters
    ----------
    mean, logvar : Tensor, shape (n, dim_latent)
        Of the Gaussian.
    before, after : Tensor, shape (n, dim_latent)
        The draw z0 of the Gaussian and what the flow made of it, z.
    log_determinant : Tensor, shape (n,)
        Of the flow's Jacobian at ``before``.
    """
    known = mean.square() + logvar.exp()
    share = (_PRIOR_REACH**2 / known.detach()).clamp(max=1)
    square = after.square() + share * (known - before.square())
    return 0.5 * (square - 1 - logvar).sum(dim=-1) - log_determinant


def log_density(noise: Tensor, logvar: Tensor, log_determinant: Tensor | float = 0.0) -> Tensor:
    """Return log q(z | x) per row, (n,), of the draw that ``noise``, (n, dim_latent), became."""
    return -0.5 * (noise.square() + logvar + _LOG_TWO_PI).sum(dim=-1) - log_determinant


def log_prior(latent: Tensor) -> Tensor:
    """Return log N(latent; 0, I) per row, (n,), of latents (n, dim_latent)."""
    return -0.5 * (latent.square() + _LOG_TWO_PI).sum(dim=-1)
