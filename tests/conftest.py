"""What several tests need: the command line as a real process, and a small tree of real images."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from tests.servers import NAMES, Served, serve

Process = subprocess.CompletedProcess[str]


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options in the environment of whoever runs the tests must not change what they test."""
    for name in os.environ:
        if name.startswith("CVAE_DIST_"):
            monkeypatch.delenv(name)


@pytest.fixture
def cvae_dist(tmp_path: Path) -> Callable[..., Process]:
    """Run ``python -m cvae_dist ...`` in ``tmp_path`` and return the finished process."""

    def run(*arguments: str, **environment: str) -> Process:
        return subprocess.run(
            [sys.executable, "-m", "cvae_dist", *arguments],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.fixture
def digits_tree(tmp_path: Path) -> Path:
    """300 of scikit-learn's handwritten digits as ``tree/<class>/<nnnn>.npy``, 8x8, uint8."""
    digits = load_digits()
    tree = tmp_path / "tree"
    for number, (image, label) in enumerate(zip(digits.images[:300], digits.target[:300], strict=True)):
        folder = tree / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{number:04d}.npy", image.astype(np.uint8))
    return tree


@pytest.fixture(params=NAMES)
def storage(request: pytest.FixtureRequest) -> Served:
    """A new place in each object store in turn: URL, storage options, environment for child processes."""
    return serve(request.param)
