from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from cvae_dist.config import ComputePrecision, ModelConfig, TrainConfig
from cvae_dist.errors import InvalidInput
from cvae_dist.model import kernels, tiling
from cvae_dist.model.kernels import computing_in
from cvae_dist.model.threads import torch_threads
from cvae_dist.model.vae import VAE, decide
from cvae_dist.store import Moments

PRECISIONS: tuple[ComputePrecision, ...] = ("float32", "bf16")
WIDE = {"cells_encoder": (256, 256), "residual_blocks": 1}  # enough weights for the products of large layers


def build(rows: np.ndarray, seed: int = 0, **settings: object) -> VAE:
    config = TrainConfig(**settings).resolve(*rows.shape)  # type: ignore[arg-type]
    decided, _ = decide(config, Moments.of(rows), rows.dtype, rows.shape[1:])
    return VAE.of(decided, Moments.of(rows), rows.dtype, seed).eval()


def bend(vae: VAE) -> None:
    """Take the flow away from the identity it starts at."""
    assert vae.flow is not None
    with torch.no_grad():
        for step in vae.flow.steps:
            step.output.weight.mul_(40)


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return np.random.default_rng(0).normal(3, 2, (3000, 50)).astype(np.float32)


SHAPES = {
    "plain": {},
    "odd widths and flow": {"dim_latent": 16, "cells_encoder": (96, 33), "iaf_flow_length": 5},
    "flow": {"dim_latent": 3, "cells_encoder": (64, 48), "iaf_flow_length": 5},
    "even widths, flow in two dimensions": {"dim_latent": 2, "cells_encoder": (512, 128), "iaf_flow_length": 5},
    "odd widths, few outputs": {"dim_latent": 3, "cells_encoder": (37, 33), "iaf_flow_length": 5},
    "few and odd": {"dim_latent": 5, "cells_encoder": (33, 6, 5), "residual_blocks": 1},
    "flow of odd widths": {
        "dim_latent": 3,
        "cells_encoder": (64, 48),
        "iaf_flow_length": 5,
        "iaf_context": 33,
        "iaf_cells": 37,
    },
    "one output": {"dim_latent": 1, "cells_encoder": (35,)},
    "no cells": {"dim_latent": 2, "cells_encoder": ()},
    "wide": WIDE | {"dim_latent": 5},
}


# where a processor has no bf16, the largest take seconds in it
LARGEST = {"odd widths and flow", "even widths, flow in two dimensions", "wide"}
COMPANY = [
    pytest.param(settings, precision, id=f"{precision}-{name}", marks=marks)
    for precision in PRECISIONS
    for name, settings in SHAPES.items()
    for marks in [pytest.mark.heavy if precision == "bf16" and name in LARGEST else ()]
]


@pytest.mark.parametrize(("settings", "precision"), COMPANY)
def test_a_latent_does_not_depend_on_the_company_of_its_row(
    rows: np.ndarray, settings: dict[str, object], precision: ComputePrecision
) -> None:
    vae = build(rows, **settings)
    if vae.flow is not None:
        bend(vae)
    embed = partial(vae.embed_rows, precision=precision)
    whole = embed(rows)
    for size in (1, 7, 16, 100, 1000, 4096):
        np.testing.assert_array_equal(embed(rows[:200], size), whole[:200])
    for row in (0, 17, 2999):
        np.testing.assert_array_equal(embed(rows[row : row + 1])[0], whole[row])
    order = np.random.default_rng(1).permutation(len(rows))
    np.testing.assert_array_equal(embed(rows[order]), whole[order])


@pytest.mark.parametrize("settings", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_latent_does_not_depend_on_how_many_rows_a_cache_holds(
    rows: np.ndarray, settings: dict[str, object], precision: ComputePrecision, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = build(rows, **settings)
    if vae.flow is not None:
        bend(vae)
    whole = vae.embed_rows(rows, precision=precision)
    monkeypatch.setattr(tiling, "_CACHED_BYTES", 300 * 4 * 50)
    assert tiling.cached_rows(50, len(rows)) == 256
    np.testing.assert_array_equal(vae.embed_rows(rows, precision=precision), whole)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_latent_does_not_depend_on_the_number_of_threads(rows: np.ndarray, precision: ComputePrecision) -> None:
    vae = build(rows, **WIDE)
    latents = []
    for threads in (1, 2, 5):
        with torch_threads(threads):
            latents.append(np.concatenate([vae.embed_rows(rows[:n], precision=precision) for n in (1, 500, 3000)]))
            assert torch.get_num_threads() == threads
    np.testing.assert_array_equal(latents[1], latents[0])
    np.testing.assert_array_equal(latents[2], latents[0])


def test_with_one_thread_the_number_of_threads_is_left_alone(rows: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = build(rows)
    latents = vae.embed_rows(rows)
    with torch_threads(1), monkeypatch.context() as patch:
        patch.setattr(torch, "set_num_threads", lambda count: pytest.fail("a task sets the number of threads"))
        np.testing.assert_array_equal(vae.embed_rows(rows), latents)
        np.testing.assert_array_equal(vae.decode_rows(latents[:9]), vae.decode_rows(latents)[:9])


def test_what_fails_on_another_thread_is_raised(rows: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = build(rows)
    monkeypatch.setattr(vae, "_latents_of", lambda hidden: 1 / 0)
    with torch_threads(2):
        with pytest.raises(ZeroDivisionError):
            vae.embed_rows(rows)
        assert torch.get_num_threads() == 2


def test_bf16_is_close_to_float32_and_not_the_same(rows: np.ndarray) -> None:
    vae = build(rows, **WIDE, dim_latent=8, iaf_flow_length=5)
    bend(vae)
    exact, short = (vae.embed_rows(rows, precision=precision).astype(np.float64) for precision in PRECISIONS)
    error = short - exact
    assert 0 < np.abs(error).max() < 0.05
    assert np.sqrt(np.square(error).mean()) < 0.01 * exact.std()


def test_threads_may_embed_one_model_in_different_precisions(rows: np.ndarray) -> None:
    vae = build(rows, **WIDE)
    alone = [vae.embed_rows(rows, precision=precision) for precision in PRECISIONS]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda precision: vae.embed_rows(rows, 64, precision), PRECISIONS * 2))
    for latents, expected in zip(together, alone * 2, strict=True):
        np.testing.assert_array_equal(latents, expected)


def test_an_unknown_precision_is_refused(rows: np.ndarray) -> None:
    with pytest.raises(InvalidInput, match="precision='fp16' .* 'float32' and 'bf16'"):
        build(rows).embed_rows(rows, precision="fp16")  # type: ignore[arg-type]


def test_bf16_without_arithmetic_for_it_is_said_to_be_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "has_bfloat16", lambda device: False)
    assert "slower here than 'float32'" in kernels.drawback("bf16")
    assert not kernels.drawback("float32")
    monkeypatch.setattr(kernels, "has_bfloat16", lambda device: True)
    assert not kernels.drawback("bf16")


def test_a_torch_without_its_private_functions_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    averages, values = (list(torch.randn(2, 3, 4).unbind()) for _ in range(2))
    others = [average.clone() for average in averages]
    kernels.lerp(averages, values, 0.1)
    monkeypatch.delattr(torch, "_foreach_lerp_")
    kernels.lerp(others, values, 0.1)
    assert all(map(torch.equal, averages, others))
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name)
    assert not kernels.has_bfloat16(torch.device("cpu"))


def test_wide_layers_are_the_same_function_however_they_are_computed(rows: np.ndarray) -> None:
    vae = build(rows, **WIDE)
    x, noise = torch.from_numpy(rows[:64]), torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    gradients = []
    for context in (nullcontext(), computing_in(torch.float32)):
        vae.zero_grad()
        with context:
            vae(x, noise).negative_elbo.sum().backward()
        gradients.append([weight.grad.clone() for weight in vae.parameters() if weight.grad is not None])
    for plain, fast in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-5 * float(plain.abs().max()))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_without_fused_products_latents_are_close_and_depend_on_no_company_either(
    rows: np.ndarray, precision: ComputePrecision, monkeypatch: pytest.MonkeyPatch
) -> None:
    if precision == "bf16" and not kernels._HAS_FUSED_BFLOAT16:
        pytest.skip("nothing is fused in bf16 on this processor")
    vae = build(rows, dim_latent=5, cells_encoder=(256, 256, 5), residual_blocks=1, iaf_flow_length=5)
    fused = vae.embed_rows(rows, precision=precision)
    for name in ("_HAS_FUSED", "_HAS_FUSED_BFLOAT16"):
        monkeypatch.setattr(kernels, name, False)
    plain = vae.embed_rows(rows, precision=precision)
    tolerance = {"float32": 1e-5, "bf16": 2e-2}[precision]
    np.testing.assert_allclose(fused, plain, rtol=0, atol=tolerance)
    assert not np.array_equal(fused, plain), "both computed alike: this tests nothing"
    np.testing.assert_array_equal(vae.embed_rows(rows[61:94], precision=precision), plain[61:94])


@pytest.mark.parametrize("settings", SHAPES.values(), ids=SHAPES)
def test_a_decoded_row_does_not_depend_on_its_company(rows: np.ndarray, settings: dict[str, object]) -> None:
    vae = build(rows, **settings)
    latents = vae.embed_rows(rows)
    whole = vae.decode_rows(latents)
    np.testing.assert_array_equal(vae.decode_rows(latents[5:6]), whole[5:6])
    np.testing.assert_array_equal(vae.decode_rows(latents[61:94]), whole[61:94])
    np.testing.assert_array_equal(vae.decode_rows(latents, batch_size=100), whole)


def test_the_seed_decides_the_weights_and_nothing_else(rows: np.ndarray) -> None:
    torch.manual_seed(1)
    first = build(rows, seed=3).embed_rows(rows[:9])
    torch.manual_seed(2)
    np.testing.assert_array_equal(build(rows, seed=3).embed_rows(rows[:9]), first)
    assert not np.array_equal(build(rows, seed=4).embed_rows(rows[:9]), first)


@pytest.mark.parametrize(
    "likelihood",
    ["gaussian", "gaussian_per_feature", "gaussian_unit", "student_t", "bernoulli", "continuous_bernoulli"],
)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("dim_latent", [2, 5])
def test_terms_and_gradients_are_finite(rows: np.ndarray, likelihood: str, scale: float, dim_latent: int) -> None:
    scaled = rows * scale
    vae = build(scaled, likelihood=likelihood, dim_latent=dim_latent, iaf_flow_length=0 if dim_latent == 2 else 5)
    assert (vae.flow is not None) == (dim_latent > 2)
    far = np.concatenate([scaled[:50], scaled[:50] * 1e4])
    noise = torch.randn(100, dim_latent, generator=torch.Generator().manual_seed(0))
    terms = vae(torch.from_numpy(far), noise)
    assert terms.reconstruction.shape == terms.kl.shape == (100,)
    assert terms.latents.shape == (100, dim_latent)
    terms.negative_elbo.sum().backward()
    gradients = [weight.grad for weight in vae.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert any(gradient is not None and gradient.any() for gradient in gradients)


def test_terms_match_a_float64_computation_by_hand(rows: np.ndarray) -> None:
    vae = build(rows, cells_encoder=(8,), feature_normalization=True)
    x, noise = rows[:20], np.random.default_rng(1).normal(size=(20, 2)).astype(np.float32)
    weights = {name: value.detach().numpy().astype(np.float64) for name, value in vae.named_parameters()}

    def linear(values: np.ndarray, name: str) -> np.ndarray:
        return values @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def silu(values: np.ndarray) -> np.ndarray:
        return values / (1 + np.exp(-values))

    standardised = (x - rows.mean(0, dtype=np.float64)) / rows.std(0, dtype=np.float64)
    mean, raw = np.split(linear(silu(linear(standardised, "encoder.body.0")), "encoder.head"), 2, axis=1)
    logvar = 10 * np.tanh(raw / 10)
    latent = mean + np.exp(logvar / 2) * noise
    output = linear(silu(linear(latent, "decoder.body.0")), "decoder.output")
    nll = 0.5 * ((standardised - output) ** 2 + np.log(2 * np.pi)).sum(axis=1)
    terms = vae(torch.from_numpy(x), torch.from_numpy(noise))
    kl = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).sum(axis=1)
    np.testing.assert_allclose(terms.reconstruction.detach(), nll, rtol=1e-5)
    np.testing.assert_allclose(terms.kl.detach(), kl, rtol=1e-4)
    np.testing.assert_allclose(terms.negative_elbo.detach(), nll + kl, rtol=1e-5)
    np.testing.assert_allclose(terms.latents.detach(), latent, atol=1e-5)
    np.testing.assert_allclose(vae.embed_rows(x), mean, atol=1e-5)


def test_scores_are_the_terms_of_the_forward_pass(rows: np.ndarray) -> None:
    vae = build(rows)
    noise = np.random.default_rng(1).normal(size=(37, 2)).astype(np.float32)
    reconstruction, kl = vae.score_rows(rows[:37], noise, batch_size=16)
    expected = vae(torch.from_numpy(rows[:37]), torch.from_numpy(noise))
    np.testing.assert_allclose(reconstruction, expected.reconstruction.detach(), rtol=1e-5)
    np.testing.assert_allclose(kl, expected.kl.detach(), rtol=1e-5)


def test_decoding_starts_around_the_mean_row(rows: np.ndarray) -> None:
    vae = build(rows)
    assert np.abs(vae.decode_rows(np.zeros((1, 2), np.float32)) - rows.mean(0)).max() < 1e-4


def test_decoding_to_integers_rounds_and_stays_in_range(rows: np.ndarray) -> None:
    vae = build(rows)
    latents = np.random.default_rng(0).normal(0, 30, (50, 2)).astype(np.float32)
    exact = vae.decode_rows(latents)
    assert exact.min() < 0, "nothing to clip: this tests nothing"
    decoded = vae.decode_rows(latents, dtype=np.uint8)
    np.testing.assert_array_equal(decoded, np.clip(np.rint(exact), 0, 255))
    assert decoded.dtype == np.uint8


@pytest.mark.parametrize("dtype", ["f2", "f8", "u1", "u2", "u4", "i8", ">f4", "?"])
def test_any_real_type_is_embedded_as_its_values(rows: np.ndarray, dtype: str) -> None:
    vae = build(rows)
    typed = np.abs(rows[:100]).astype(dtype)
    np.testing.assert_allclose(vae.embed_rows(typed), vae.embed_rows(typed.astype(np.float32)), atol=1e-6)


def test_views_and_read_only_rows_are_taken(rows: np.ndarray) -> None:
    vae = build(rows)
    frozen = rows[:64].copy()
    frozen.flags.writeable = False
    np.testing.assert_array_equal(vae.embed_rows(frozen), vae.embed_rows(rows[:64]))
    np.testing.assert_array_equal(vae.embed_rows(rows[:64][::-1]), vae.embed_rows(rows[:64])[::-1])
    assert vae.embed_rows(rows[:0]).shape == (0, 2)


def test_rows_and_latents_of_another_width_are_refused(rows: np.ndarray) -> None:
    vae = build(rows)
    with pytest.raises(InvalidInput, match="trained on rows of 50 features"):
        vae.embed_rows(rows[:, :49])
    with pytest.raises(InvalidInput, match=r"it takes \(n, 2\)"):
        vae.decode_rows(np.zeros((3, 3), np.float32))


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, None, "a"])
def test_batches_are_whole_numbers_of_rows(rows: np.ndarray, batch_size: Any) -> None:
    with pytest.raises(InvalidInput, match=f"batches of {batch_size!r} rows"):
        build(rows).embed_rows(rows, batch_size)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8"])
@pytest.mark.parametrize("place", [(0, 0), (2999, 49), (1500, 7)])
def test_rows_that_are_not_finite_are_refused(
    rows: np.ndarray, value: float, dtype: str, place: tuple[int, int]
) -> None:
    broken = rows.astype(dtype)
    broken[place] = value
    with pytest.raises(InvalidInput, match=f"1 such values among .* rows, the first is {value}"):
        build(rows).embed_rows(broken)


def test_rows_whose_sum_overflows_have_latents(rows: np.ndarray) -> None:
    far = rows.copy()
    far[3] = np.finfo(np.float32).max
    latents = build(rows).embed_rows(far)
    assert np.isfinite(latents).all()
    np.testing.assert_array_equal(latents[4:], build(rows).embed_rows(rows)[4:])


def test_weights_that_change_between_two_calls_change_the_latents(rows: np.ndarray) -> None:
    vae = build(rows, dim_latent=3, cells_encoder=(64, 48), iaf_flow_length=2)
    bend(vae)
    before = vae.embed_rows(rows)
    for weight in vae.parameters():
        weight.data *= 1.5
    assert not np.isclose(vae.embed_rows(rows), before).all(axis=1).any()


def test_what_the_statistics_decide_is_explained(rows: np.ndarray) -> None:
    decided, reasons = decide(ModelConfig(cells_encoder=(8,)), Moments.of(rows), rows.dtype, (50,))
    assert (decided.likelihood, decided.feature_normalization) == ("gaussian", False)
    assert decided.iaf_flow_length == 0
    assert len(reasons) == 2
    assert all(reasons)


def test_a_flow_leaves_the_other_weights_as_they_are(rows: np.ndarray) -> None:
    plain = build(rows, dim_latent=4, iaf_flow_length=0).state_dict()
    with_flow = build(rows, dim_latent=4, iaf_flow_length=3).state_dict()
    assert not any(name.startswith("flow") for name in plain)
    assert all(torch.equal(with_flow[name], value) for name, value in plain.items())


def test_the_latent_is_the_mean_pushed_through_the_flow(rows: np.ndarray) -> None:
    vae = build(rows, dim_latent=4, iaf_flow_length=2)
    bend(vae)
    x = torch.from_numpy(rows[:9])
    with torch.no_grad():
        mean, _ = vae.encode(x)
        latent = vae.embed(x)
        reconstruction = vae(x, torch.zeros(9, 4)).reconstruction
        expected = vae.likelihood.negative_log_likelihood(vae.decoder(latent), vae.scaling(x))
    assert (mean - latent).abs().max() > 0.01
    torch.testing.assert_close(reconstruction, expected)


@pytest.mark.parametrize("length", [0, 3])
def test_the_terms_are_the_mean_of_the_log_weights(rows: np.ndarray, length: int) -> None:
    vae = build(rows, dim_latent=3, iaf_flow_length=length)
    if length:
        bend(vae)
    x = torch.from_numpy(rows[:1]).expand(20_000, 50)
    noise = torch.randn(len(x), 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = vae.log_weights(x, noise) + vae(x, noise).negative_elbo
    error = difference.std().item() / len(x) ** 0.5
    assert 0 < error < 0.05
    assert abs(difference.mean().item()) < 5 * error


def test_without_a_kl_term_it_is_an_autoencoder(rows: np.ndarray) -> None:
    vae = build(rows, kl_weight=0, dim_latent=4)
    assert vae.flow is None
    x = torch.from_numpy(rows[:9])
    first, second = vae(x, torch.zeros(9, 4)), vae(x, torch.ones(9, 4))
    torch.testing.assert_close(first.reconstruction, second.reconstruction, rtol=0, atol=0)
    assert not first.kl.any()
    assert not second.kl.any()
    first.reconstruction.sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in vae.parameters())


def test_the_encoder_sees_no_further_than_eight_units(rows: np.ndarray) -> None:
    vae = build(rows, feature_normalization=True)
    far = np.repeat(rows[:1], 3, axis=0)
    far[:, 0] = rows[:, 0].mean() + rows[:, 0].std() * np.array([7.9, 9, 1e6])
    latents = vae.embed_rows(far)
    np.testing.assert_array_equal(latents[1], latents[2])
    assert not np.array_equal(latents[0], latents[1])
