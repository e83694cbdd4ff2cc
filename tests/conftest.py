"""What several tests need: the command line as a real process, and a small tree of real images."""

import functools
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from sklearn.datasets import load_digits

from tests.servers import NAMES, Served, serve

# An example may take as long as a busy machine needs; the rest is as it was, which depends on where this runs.
settings.register_profile("unhurried", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # which begins when it is imported

Process = subprocess.CompletedProcess[str]


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options in the environment of whoever runs the tests must not change what they test."""
    for name in os.environ:
        if name.startswith("CVAE_DIST_"):
            monkeypatch.delenv(name)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):  # which a rank in this process sets, for good
        monkeypatch.setenv(name, "")
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
    tree = tmp_path / "tree"
    for path, data in _digits().items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(data)
    return tree


@functools.cache
def _digits() -> dict[str, bytes]:
    """Return the files of the tree."""
    digits, files = load_digits(), {}
    for number, (image, label) in enumerate(zip(digits.images[:300], digits.target[:300], strict=True)):
        stream = io.BytesIO()
        np.save(stream, image.astype(np.uint8))
        files[f"{label}/{number:04d}.npy"] = stream.getvalue()
    return files


@pytest.fixture(params=NAMES)
def storage(request: pytest.FixtureRequest) -> Served:
    """A new place in each object store in turn: URL, storage options, environment for child processes."""
    return serve(request.param)
