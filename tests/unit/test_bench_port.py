"""The yardstick is the reference's model: a wrong one would make every comparison with it worthless."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.bench.model.port import Port, default_cells


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads would wait for each other in layers as small as these, for minutes on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_port(n_features: int, dim_latent: int, flow: int = 3) -> Port:
    """Return an evaluating port in float64 with a flow far from the identity and a posterior wider than the prior."""
    torch.manual_seed(0)
    port = Port(n_features, dim_latent, (24, 12), flow).double().eval().requires_grad_(False)
    for step in port.flow:
        for network in step.coordinates:
            network.outer.weight.mul_(2)
    port.logvar.weight.mul_(2)
    port.logvar.bias.fill_(3)
    return port


@pytest.mark.parametrize("dim_latent", [1, 2, 5])
def test_the_kl_term_is_the_log_density_ratio_by_autograd(dim_latent: int) -> None:
    port, n = make_port(9, dim_latent), 30
    x, noise = torch.randn(n, 9, dtype=torch.float64), torch.randn(n, dim_latent, dtype=torch.float64)

    def pushed(one_noise: Tensor, one_x: Tensor) -> Tensor:
        return port.posterior(one_x[None], one_noise[None])[0][0]

    log_determinant = torch.linalg.slogdet(torch.func.vmap(torch.func.jacrev(pushed))(noise, x)).logabsdet
    log_q = -0.5 * noise.square().sum(1) - log_determinant
    log_p = -0.5 * port.posterior(x, noise)[0].square().sum(1)
    assert log_determinant.std() > 0.05, "nearly the same everywhere: this tests nothing"
    torch.testing.assert_close(port.losses(x, noise)[1], log_q - log_p, rtol=0, atol=1e-4)  # 1e-10 is added to gates


def test_p_over_q_averages_to_one() -> None:
    port = make_port(9, 2)
    x = torch.randn(1, 9, dtype=torch.float64).expand(200_000, 9)
    _, kl = port.losses(x, torch.randn(len(x), 2, dtype=torch.float64))
    assert math.isclose(torch.exp(-kl).mean().item(), 1.0, abs_tol=0.01)


def test_a_step_mixes_by_its_gate_and_reverses_the_order() -> None:
    port = make_port(9, 2, flow=1)
    for network, target, gate in zip(port.flow[0].coordinates, (5.0, -3.0), (0.5, 0.75), strict=True):
        network.outer.weight.zero_()
        network.outer.bias.copy_(torch.tensor([target, math.log(gate / (1 - gate)) - 1]))
    latent, _ = port.flow[0](torch.tensor([[1.0, 2.0]]).double(), torch.zeros(1, 12).double())
    torch.testing.assert_close(latent, torch.tensor([[0.75 * 2 - 0.25 * 3, 0.5 * 1 + 0.5 * 5]]).double())


@pytest.mark.parametrize(
    ("n_features", "dim_latent", "cells"),
    [(784, 2, (512, 128)), (784, 16, (512, 256)), (10_000, 2, (8192, 512)), (50, 2, (32, 32)), (10, 2, (8, 16)),
     (2, 1, (2, 4)), (2, 2, (2, 1)), (1, 1, (1, 0))],
)  # fmt: skip
def test_widths_are_those_the_reference_chooses(n_features: int, dim_latent: int, cells: tuple[int, int]) -> None:
    assert default_cells(n_features, dim_latent) == cells


def test_training_lowers_the_loss_and_embedding_is_repeatable() -> None:
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    rows = (generator.normal(size=(256, 2)) @ generator.normal(size=(2, 20))).astype(np.float32)
    port = Port(20, 2, (64, 64))
    before = port.loss(rows).mean()
    for step in range(300):
        port.train_step(rows[step % 4 :: 4])
    assert port.loss(rows).mean() < 0.7 * before
    latents = port.embed(rows)
    assert latents.shape == (256, 2)
    np.testing.assert_array_equal(latents, port.embed(rows))
