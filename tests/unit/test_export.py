"""Exported programs compute what the model computes, for any number of rows, and need nothing of this package."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from cvae_dist.errors import InvalidInput, MissingExtra, NotFitted
from cvae_dist.estimator import CompressionVAE
from cvae_dist.model import export
from cvae_dist.model.export import export_program

RANDOM = np.random.default_rng(0)
DATA: dict[str, Any] = {
    "mixed": RANDOM.normal(size=(200, 6)).astype(np.float32) * [1, 10, 1e3, 1e-3, 1, 0] + 3,
    "shares": (RANDOM.random((200, 6)) > 0.5).astype(np.float32),
    "far": RANDOM.normal(size=(200, 6)) + 1e8,
}


def trained(name: str, **settings: Any) -> CompressionVAE:
    return CompressionVAE(DATA[name], num_steps=20, cells_encoder=(16,), **settings).train()


OTHERS = [pytest.param(name, marks=pytest.mark.heavy) for name in DATA if name != "mixed"]


@pytest.fixture(scope="module", params=["mixed", *OTHERS])
def model(request: pytest.FixtureRequest) -> CompressionVAE:
    return trained(request.param)


def both_ways(model: CompressionVAE, rows: int) -> dict[str, tuple[str, np.ndarray, np.ndarray]]:
    """Return name and value of the argument, and the result, of both directions."""
    x = np.resize(model.X, (rows, 6)).astype(model.model_.scaling.restored_dtype)
    z = np.random.default_rng(rows).normal(size=(rows, 2)).astype(np.float32)
    return {"embed": ("x", x, model.embed(x)), "decode": ("z", z, model.decode(z))}


@pytest.mark.parametrize("direction", ["embed", "decode"])
def test_programs_equal_the_model(model: CompressionVAE, direction: Any, tmp_path: Path) -> None:
    model.export(tmp_path / "model.pt2", direction)
    program = torch.export.load(tmp_path / "model.pt2").module()
    for rows in (1, 2, 7, 64, 1000):
        _, given, expected = both_ways(model, rows)[direction]
        result = program(torch.from_numpy(given)).numpy(force=True)
        assert result.dtype == expected.dtype
        np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-6)


def test_with_a_flow_and_for_many_features(tmp_path: Path) -> None:
    x = np.random.default_rng(0).random((300, 784)).astype(np.float32)
    model = CompressionVAE(x, dim_latent=4, iaf_flow_length=2, num_steps=5, cells_encoder=(512, 256)).train()
    model.export(tmp_path / "model.pt2")
    result = torch.export.load(tmp_path / "model.pt2").module()(torch.from_numpy(x[:33])).numpy(force=True)
    np.testing.assert_allclose(result, model.embed(x[:33]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("direction", "suffix"),
    [
        ("embed", ".pt2"),
        ("decode", ".pt2"),
        ("embed", ".onnx"),
        pytest.param("decode", ".onnx", marks=pytest.mark.heavy),
    ],
)
def test_a_file_holds_one_direction_and_nothing_of_this_machine(direction: Any, suffix: str, tmp_path: Path) -> None:
    x = np.random.default_rng(0).random((30, 784)).astype(np.float32)
    model = CompressionVAE(x, num_steps=2, cells_encoder=(512, 256), iaf_flow_length=2).train()
    model.export(tmp_path / f"model{suffix}", direction)
    data = (tmp_path / f"model{suffix}").read_bytes()
    assert 4 * (784 * 512 + 512 * 256) < len(data) < 2.5e6
    assert str(Path(export.__file__).parent).encode() not in data
    assert str(Path(torch.__file__).parent).encode() not in data


def test_a_file_runs_without_this_package(tmp_path: Path) -> None:
    model = trained("mixed")
    model.export(tmp_path / "model.pt2")
    np.save(tmp_path / "x.npy", DATA["mixed"][:3].astype(model.model_.scaling.restored_dtype))
    script = (
        "import sys, numpy, torch; sys.modules['cvae_dist'] = None\n"
        "program = torch.export.load('model.pt2').module()\n"
        "print(program(torch.from_numpy(numpy.load('x.npy'))).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    np.testing.assert_allclose(json.loads(done.stdout), model.embed(DATA["mixed"][:3]), rtol=1e-5, atol=1e-6)


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained("mixed")
    with pytest.raises(InvalidInput, match="'encode' is no direction"):
        export_program(model.model_, "encode")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match=r"'\.h5'"):
        model.export(tmp_path / "model.h5")
    with pytest.raises(NotFitted, match=r"call train\(\)"):
        CompressionVAE().export(tmp_path / "model.pt2")
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'cvae-dist\[onnx\]'"):
        model.export(tmp_path / "model.onnx")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("direction", ["embed", "decode"])
def test_onnx_equals_the_model(model: CompressionVAE, direction: Any, tmp_path: Path) -> None:
    model.export(tmp_path / "model.onnx", direction)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for rows in (1, 2, 7, 64, 1000):
        name, given, expected = both_ways(model, rows)[direction]
        (result,) = session.run(None, {name: given})
        assert result.dtype == expected.dtype
        # a value near zero is as exact as the largest of its feature lets float32 be
        scale = np.abs(expected).max(axis=0, initial=1)
        np.testing.assert_allclose(result / scale, expected / scale, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"iaf_flow_length": 3},
        pytest.param({"residual_blocks": 1}, marks=pytest.mark.heavy),
        pytest.param({"likelihood": "bernoulli"}, marks=pytest.mark.heavy),
    ],
)
def test_onnx_of_other_networks(settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = trained("shares", dim_latent=3, **settings)
    with caplog.at_level(logging.WARNING):
        model.export(tmp_path / "model.onnx")
    assert not caplog.messages
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    np.testing.assert_allclose(session.run(None, {"x": model.X})[0], model.embed(model.X), rtol=1e-5, atol=1e-5)
