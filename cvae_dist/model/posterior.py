"""The diagonal Gaussian posterior: drawing from it and its divergence from the prior N(0, I)."""

import torch
from torch import Tensor


def draw(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """Return ``mean + exp(logvar / 2) * noise`` (Kingma and Welling 2014, 2.4); all (n, dim_latent)."""
    return mean + torch.exp(0.5 * logvar) * noise


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """Return KL(N(mean, exp(logvar)) || N(0, I)) per row, (n,), in nats (Kingma and Welling 2014, app. B)."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=-1)
