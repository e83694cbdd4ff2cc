"""The examples: every script as a user runs it, and the figures it prints."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "pipelines" / "examples"
MNIST = Path(__file__).parents[3] / "shared" / "data" / "mnist.npz"

PICTURES = {
    "walkthrough": ["latents", "reconstructions", "grid", "interpolation"],
    "s_curve": [""],
    "normal": [""],
    "manifold": [""],
    "autoencoder": ["latents", "reconstructions"],
}
SHORT = {"walkthrough": ["--num-steps", "200"], "manifold": ["--num-steps", "200"], "autoencoder": ["--epochs", "5"]}

on_mnist = [
    pytest.mark.heavy,
    pytest.mark.timeout(900),  # minutes each, and others run beside them
    pytest.mark.skipif(not MNIST.exists(), reason="the MNIST images are not beside this checkout"),
]


def pictures(script: str) -> list[str]:
    return [f"{script}-{name}.png" if name else f"{script}.png" for name in PICTURES[script]]


def run(script: str, folder: Path, *options: str | Path) -> str:
    """Run a script to its end, where every warning is an error, and return what it printed."""
    command = [sys.executable, "-W", "error", EXAMPLES / f"{script}.py", "--out", folder / "made", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"(?<![\w,.])\d+\.\d+(?:e-?\d+)?", text)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples")


def run_all(scripts: Sequence[str], folder: Path) -> dict[str, str]:
    """Run scripts at once and return what each printed."""
    with ThreadPoolExecutor() as threads:
        outputs = threads.map(lambda script: run(script, folder, *SHORT.get(script, [])), scripts)
    return dict(zip(scripts, outputs, strict=True))


@pytest.fixture(scope="module")
def printed(folder: Path) -> dict[str, str]:
    """Run the scripts whose data are images, with few steps."""
    return run_all(list(SHORT), folder)


@pytest.fixture(scope="module")
def printed_in_full(folder: Path) -> dict[str, str]:
    """Run the scripts that take their time."""
    return run_all([script for script in PICTURES if script not in SHORT], folder)


@pytest.mark.heavy
@pytest.mark.parametrize("script", SHORT)
def test_pictures_are_written_and_not_blank(script: str, printed: dict[str, str], folder: Path) -> None:
    require_pictures(script, folder)


def require_pictures(script: str, folder: Path) -> None:
    for name in pictures(script):
        with Image.open(folder / "made" / name) as picture:
            grey = np.asarray(picture.convert("L"))
        assert min(grey.shape) > 100
        assert grey.std() > 10


@pytest.mark.heavy
def test_s_curve(printed_in_full: dict[str, str], folder: Path) -> None:
    require_pictures("s_curve", folder)
    error, variance, correlation = numbers(printed_in_full["s_curve"])
    assert variance == pytest.approx(0.12, abs=0.005)
    assert error <= 1e-4
    assert correlation >= 0.999


@pytest.mark.heavy
def test_normal(printed_in_full: dict[str, str], folder: Path) -> None:
    require_pictures("normal", folder)
    mean, std, drawn_mean, drawn_std = numbers(printed_in_full["normal"])
    assert drawn_mean == pytest.approx(mean, abs=0.3)
    assert drawn_std == pytest.approx(std, rel=0.03)


@pytest.mark.heavy
def test_walkthrough_restores_its_model(printed: dict[str, str], folder: Path) -> None:
    assert "active units     2 of 2" in printed["walkthrough"]
    assert "restored from" in printed["walkthrough"]
    assert (folder / "made" / "model" / "model.safetensors").exists()


@pytest.mark.heavy
def test_short_trainings_learn(printed: dict[str, str]) -> None:
    """A model of 64 pixels that knows only their means has a cross-entropy of 27.1 nats per image, 0.42 per pixel."""
    assert numbers(printed["manifold"])[0] < 26
    assert numbers(printed["autoencoder"])[0] < 0.40


def test_the_readme_shows_every_script_and_every_committed_picture() -> None:
    text = (EXAMPLES / "README.md").read_text()
    made = {name for script in PICTURES for name in pictures(script)}
    assert {path.name for path in EXAMPLES.glob("*.png")} == made
    assert all(f"({name})" in text for name in made)
    assert all(f"({script}.py)" in text for script in PICTURES)
    assert all(path.stat().st_size < 200_000 for path in EXAMPLES.glob("*.png"))


class TestOnMnist:
    pytestmark = on_mnist

    def test_manifold(self, tmp_path: Path) -> None:
        assert numbers(run("manifold", tmp_path, "--mnist", MNIST))[0] <= 139

    def test_autoencoder(self, tmp_path: Path) -> None:
        assert numbers(run("autoencoder", tmp_path, "--mnist", MNIST))[0] <= 0.171
