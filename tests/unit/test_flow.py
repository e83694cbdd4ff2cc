"""The flow against autograd, its own inverse and zuko, in float64."""

import math

import numpy as np
import pytest
import torch
import zuko
from torch import Tensor
from torch.distributions import AffineTransform, Transform

from cvae_dist.config import ModelConfig
from cvae_dist.errors import InvalidInput
from cvae_dist.model import posterior
from cvae_dist.model.flow import (
    AutoregressiveStep,
    InverseAutoregressiveFlow,
    choose_flow_length,
    make_flow,
    with_flow_widths,
)

N, HIDDEN = 40, 12


def new_flow(dim: int, length: int) -> InverseAutoregressiveFlow:
    flow = make_flow(with_flow_widths(ModelConfig(dim_latent=dim, iaf_flow_length=length)), HIDDEN)
    assert flow is not None
    return flow


def random_flow(dim: int, length: int = 3, last_gain: float = 60.0) -> InverseAutoregressiveFlow:
    """Return a flow in float64 that is far from the identity."""
    flow = new_flow(dim, length).double()
    flow.initialise(torch.Generator().manual_seed(dim))
    with torch.no_grad():
        for step in flow.steps:
            step.output.weight.mul_(last_gain)
            step.output.bias.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    return flow.requires_grad_(False)


def draws(dim: int, n: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    latent = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    return latent, torch.randn(n, HIDDEN, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("dim", [2, 3, 16, 50])
def test_log_determinant_is_that_of_the_jacobian(dim: int) -> None:
    flow, (latent, hidden) = random_flow(dim), draws(dim)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda z, h: flow(z, h)[0]))(latent, hidden)
    expected = torch.linalg.slogdet(jacobian)
    _, log_determinant = flow(latent, hidden)
    assert log_determinant.std() > 0.1, "nearly the identity: this tests nothing"
    assert (expected.sign == 1).all()
    torch.testing.assert_close(log_determinant, expected.logabsdet, rtol=0, atol=1e-10)


def inverse(flow: InverseAutoregressiveFlow, latent: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the flow makes ``latent`` of, and its log-determinant there, by fixed-point iteration."""
    context = torch.nn.functional.silu(flow.context(hidden))
    total = torch.zeros_like(latent[..., 0])
    for step in reversed(flow.steps):
        before = latent
        for _ in range(latent.shape[-1]):  # every pass settles one more coordinate
            shift, log_scale = step.shift_and_log_scale(before, context)
            before = (latent - shift) * torch.exp(-log_scale)
        total = total + step.shift_and_log_scale(before, context)[1].sum(dim=-1)
        latent = before
    return latent, total


@pytest.mark.parametrize("dim", [2, 3, 16, 50])
def test_the_inverse_undoes_the_flow(dim: int) -> None:
    flow, (latent, hidden) = random_flow(dim), draws(dim)
    pushed, log_determinant = flow(latent, hidden)
    back, same = inverse(flow, pushed, hidden)
    assert (pushed - latent).abs().max() > 0.5
    torch.testing.assert_close(back, latent, rtol=0, atol=1e-10)
    torch.testing.assert_close(same, log_determinant, rtol=0, atol=1e-10)


@pytest.mark.parametrize("descending", [False, True])
def test_a_coordinate_depends_on_those_before_it_and_on_the_context(descending: bool) -> None:
    step = AutoregressiveStep(5, 4, 40, descending=descending)
    step.initialise(torch.Generator().manual_seed(0))
    latent, context = torch.randn(2, 1, 5).unbind()[0], torch.ones(1, 4)
    both = torch.cat(torch.autograd.functional.jacobian(lambda z: step.shift_and_log_scale(z, context), latent))
    depends = both.reshape(2, 5, 5).ne(0).all(dim=0)
    expected = torch.ones(5, 5).triu(1) if descending else torch.ones(5, 5).tril(-1)
    torch.testing.assert_close(depends, expected.bool())
    of_context = torch.autograd.functional.jacobian(lambda c: step.shift_and_log_scale(latent, c)[0], context)
    assert of_context.ne(0).all(), "a coordinate that does not see the context"


def _affine(shift: Tensor, raw: Tensor) -> Transform:
    return AffineTransform(shift, torch.exp(3 * torch.tanh(raw / 3)))


def zuko_twin(step: AutoregressiveStep, dim: int, *, descending: bool) -> torch.nn.Module:
    """Return zuko's transform with the same weights; zuko finds the masks itself and interleaves its outputs."""
    order = torch.arange(dim).flip(0) if descending else torch.arange(dim)
    width = step.latent.out_features
    twin = zuko.flows.MaskedAutoregressiveTransform(
        dim,
        step.context.in_features,
        order=order,
        univariate=_affine,
        hidden_features=(width,),
        activation=torch.nn.SiLU,
    ).double()
    first, last = twin.hyper[0], twin.hyper[2]
    with torch.no_grad():
        first.weight.copy_(torch.cat([step.latent.weight, step.context.weight], dim=1))
        first.bias.copy_(step.latent.bias)
        last.weight.copy_(step.output.weight.unflatten(0, (2, dim)).transpose(0, 1).flatten(0, 1))
        last.bias.copy_(step.output.bias.unflatten(0, (2, dim)).T.flatten())
    return twin


@pytest.mark.parametrize("dim", [2, 5, 16])
def test_latent_determinant_and_divergence_equal_those_of_zuko(dim: int) -> None:
    flow, (latent, hidden) = random_flow(dim, 4), draws(dim)
    context = torch.nn.functional.silu(flow.context(hidden))
    expected, total = latent, torch.zeros(N, dtype=torch.float64)
    for index, step in enumerate(flow.steps):
        assert isinstance(step, AutoregressiveStep)
        twin = zuko_twin(step, dim, descending=bool(index % 2))
        expected, log_determinant = twin(context).call_and_ladj(expected)
        total = total + log_determinant
    pushed, log_determinant = flow(latent, hidden)
    torch.testing.assert_close(pushed, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(log_determinant, total, rtol=0, atol=1e-6)
    standard = torch.zeros_like(latent)
    divergence = posterior.flow_divergence(standard, standard, latent, pushed, log_determinant)
    by_densities = -total + 0.5 * (expected.square() - latent.square()).sum(dim=-1)
    torch.testing.assert_close(divergence, by_densities, rtol=0, atol=1e-6)


def test_the_latent_alone_is_that_of_both() -> None:
    flow, (latent, hidden) = random_flow(5), draws(5)
    torch.testing.assert_close(next(flow.push_each([latent], hidden)), flow(latent, hidden)[0], rtol=0, atol=0)


def test_a_new_flow_is_nearly_the_identity() -> None:
    flow = new_flow(16, 5)
    flow.initialise(torch.Generator().manual_seed(0))
    latent, hidden = (part.float() for part in draws(16))
    pushed, log_determinant = flow(latent, hidden)
    assert 0 < (pushed - latent).abs().max() < 0.2
    assert log_determinant.abs().max() < 0.5


def test_only_weights_are_kept() -> None:
    state = new_flow(4, 2).state_dict()
    assert set(state) == {"context.weight", "context.bias"} | {
        f"steps.{index}.{name}"
        for index in range(2)
        for name in ("latent.weight", "latent.bias", "context.weight", "output.weight", "output.bias")
    }


def test_a_flow_can_be_exported() -> None:
    flow = new_flow(4, 2).requires_grad_(False)
    latent, hidden = torch.randn(64, 4), torch.randn(64, HIDDEN)
    batch = torch.export.Dim("batch", min=2, max=4096)
    exported = torch.export.export(flow, (latent, hidden), dynamic_shapes=({0: batch}, {0: batch})).module()
    for got, expected in zip(exported(latent[:7], hidden[:7]), flow(latent[:7], hidden[:7]), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("requested", "dim_latent", "kl_weight", "likelihood", "length", "reason"),
    [
        (None, 1, 1.0, "bernoulli", 0, ""),
        (5, 1, 1.0, "bernoulli", 0, "no flow: with one latent dimension"),
        (None, 8, 0.0, "bernoulli", 0, ""),
        (5, 8, 0.0, "bernoulli", 0, "no flow: without a KL term"),
        (None, 2, 1.0, "bernoulli", 0, ""),
        (None, 3, 1.0, "bernoulli", 5, "5 steps"),
        (None, 16, 1.0, "gaussian", 0, ""),
        (3, 2, 1.0, "gaussian", 3, "as asked for"),
        (0, 16, 1.0, "bernoulli", 0, "as asked for"),
    ],
)
def test_length_follows_the_dimensions(
    requested: int | None, dim_latent: int, kl_weight: float, likelihood: str, length: int, reason: str
) -> None:
    choice = choose_flow_length(requested, dim_latent, kl_weight, likelihood)
    assert choice.value == length
    assert reason in choice.reason
    assert bool(reason) == bool(choice.reason)


@pytest.mark.parametrize(
    ("dim", "given", "context", "cells"),
    [(2, {}, 16, 16), (3, {}, 24, 24), (8, {}, 64, 64), (50, {}, 64, 100), (4, {"iaf_context": 5}, 5, 8)]
    + [(4, {"iaf_cells": 7}, 32, 7)],
)
def test_widths_follow_the_dimensions_unless_they_are_given(
    dim: int, given: dict[str, int], context: int, cells: int
) -> None:
    config = with_flow_widths(ModelConfig(dim_latent=dim, iaf_flow_length=2, **given))
    assert (config.iaf_context, config.iaf_cells) == (context, cells)
    flow = make_flow(config, HIDDEN)
    assert flow is not None
    assert flow.context.weight.shape == (context, HIDDEN)
    assert {(step.context.weight.shape, step.output.weight.shape) for step in flow.steps} == {
        ((cells, context), (2 * dim, cells))
    }


def test_without_a_flow_there_are_no_widths() -> None:
    config = with_flow_widths(ModelConfig(iaf_flow_length=0, iaf_context=5, iaf_cells=6))
    assert (config.iaf_context, config.iaf_cells) == (None, None)
    assert make_flow(config, HIDDEN) is None


def test_undecided_widths_are_refused() -> None:
    with pytest.raises(InvalidInput, match="must be decided"):
        make_flow(ModelConfig(iaf_flow_length=2), HIDDEN)


def test_gradients_are_finite_far_out() -> None:
    flow = new_flow(3, 5)
    flow.initialise(torch.Generator().manual_seed(0))
    latent = torch.tensor([[1e4, -1e4, 1e3]], requires_grad=True)
    pushed, log_determinant = flow(latent, torch.full((1, HIDDEN), 100.0))
    assert math.isfinite(pushed.detach().abs().sum())
    (pushed.square().sum() - log_determinant.sum()).backward()
    assert all(np.isfinite(weight.grad.numpy()).all() for weight in flow.parameters() if weight.grad is not None)
