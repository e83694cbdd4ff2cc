"""The posterior's density and divergence against scipy and Monte Carlo."""

import math

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from cvae_dist.model import posterior
from cvae_dist.model.flow import InverseAutoregressiveFlow

DRAWS = 400_000


def posterior_of_a_flow(draws: int, last_gain: float = 30) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return mean, logvar, noise, draw of the Gaussian, latent and log-determinant of one row, in float64."""
    generator = torch.Generator().manual_seed(3)
    flow = InverseAutoregressiveFlow(3, 4, 3, 24, 24).double().requires_grad_(False)
    flow.initialise(generator)
    with torch.no_grad():
        for step in flow.steps:
            step.output.weight.mul_(last_gain)
    mean, logvar = torch.tensor([0.3, -0.2, 0.5]).double(), torch.tensor([-0.3, 0.1, -0.5]).double()
    noise = torch.randn(draws, 3, generator=generator, dtype=torch.float64)
    drawn = posterior.draw(mean, logvar, noise)
    latent, log_determinant = flow(drawn, torch.ones(draws, 4, dtype=torch.float64))
    return mean, logvar, noise, drawn, latent, log_determinant


def test_the_density_of_a_flow_integrates_to_one() -> None:
    _, logvar, noise, drawn, latent, log_determinant = posterior_of_a_flow(DRAWS)
    assert (latent - drawn).abs().max() > 0.5, "nearly the identity: this tests nothing"
    ratio = torch.exp(posterior.log_prior(latent) - posterior.log_density(noise, logvar, log_determinant))
    error = (ratio.std() / DRAWS**0.5).item()
    assert error < 0.01
    assert abs(ratio.mean().item() - 1) < 5 * error


def test_the_estimated_divergence_is_unbiased() -> None:
    mean, logvar, noise, drawn, latent, log_determinant = posterior_of_a_flow(DRAWS)
    plain = posterior.log_density(noise, logvar, log_determinant) - posterior.log_prior(latent)
    ours = posterior.flow_divergence(mean, logvar, drawn, latent, log_determinant)
    error = ((plain - ours).std() / DRAWS**0.5).item()
    assert abs((plain - ours).mean().item()) < 5 * error
    assert error < 0.01


def test_a_flow_close_to_the_identity_adds_little_noise() -> None:
    mean, logvar, noise, drawn, latent, log_determinant = posterior_of_a_flow(1000, last_gain=1)
    plain = posterior.log_density(noise, logvar, log_determinant) - posterior.log_prior(latent)
    assert posterior.flow_divergence(mean, logvar, drawn, latent, log_determinant).std() < 0.1 * plain.std()


def test_a_flow_that_brings_a_distant_gaussian_back_adds_little_noise() -> None:
    mean, logvar = torch.tensor([300.0, -40.0]).double(), torch.tensor([9.0, 6.0]).double()
    noise = torch.randn(DRAWS, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = posterior.draw(mean, logvar, noise)
    scale, shift = torch.exp(-0.5 * logvar) * 0.7, torch.tensor([0.4, -0.1]).double()
    latent = (drawn - mean) * scale + shift
    estimate = posterior.flow_divergence(mean, logvar, drawn, latent, scale.log().sum())
    exact = posterior.kl_divergence(shift[None], 2 * math.log(0.7) * torch.ones(1, 2))
    assert abs(estimate.mean() - exact.item()) < 5 * estimate.std() / DRAWS**0.5
    assert estimate.std() < 3


def test_without_a_flow_the_divergence_is_exact() -> None:
    mean, logvar, noise = 0.5 * torch.randn(3, 5, 3, generator=torch.Generator().manual_seed(0)).double()
    latent = posterior.draw(mean, logvar, noise)
    estimate = posterior.flow_divergence(mean, logvar, latent, latent, torch.zeros(5))
    torch.testing.assert_close(estimate, posterior.kl_divergence(mean, logvar))


def test_densities_match_scipy() -> None:
    mean, logvar, noise = np.random.default_rng(0).normal(size=(3, 6, 4))
    latent = posterior.draw(*(torch.from_numpy(part) for part in (mean, logvar, noise)))
    expected = stats.norm.logpdf(latent.numpy(), mean, np.exp(logvar / 2)).sum(axis=1)
    np.testing.assert_allclose(posterior.log_density(torch.from_numpy(noise), torch.from_numpy(logvar)), expected)
    np.testing.assert_allclose(posterior.log_prior(latent), stats.norm.logpdf(latent).sum(axis=1))


def test_the_divergence_of_a_gaussian_matches_scipy() -> None:
    mean, logvar = np.random.default_rng(0).normal(size=(2, 6, 3))
    result = posterior.kl_divergence(torch.from_numpy(mean), torch.from_numpy(logvar)).numpy()
    entropy = stats.norm.entropy(mean, np.exp(logvar / 2))
    cross = 0.5 * (mean**2 + np.exp(logvar) + np.log(2 * np.pi))
    np.testing.assert_allclose(result, (cross - entropy).sum(axis=1), rtol=1e-12)
