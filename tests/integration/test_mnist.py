"""The 60,000 MNIST training images, one file each, through the command line."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from sklearn.neighbors import KNeighborsClassifier

import cvae_dist as cvae

_MNIST = Path(__file__).parents[3] / "shared" / "data" / "mnist.npz"

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(not _MNIST.exists(), reason="the MNIST images are not beside this checkout"),
]


def cvae_dist(*arguments: str | Path) -> dict[str, object]:
    command = [sys.executable, "-m", "cvae_dist", *map(str, arguments), "--json"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, object] = json.loads(output.splitlines()[-1])
    return result


def test_mnist_from_files_to_latents(tmp_path: Path) -> None:
    images = np.load(_MNIST)
    for digit in range(10):
        (tmp_path / f"src/{digit}").mkdir(parents=True)
    for number, (image, digit) in enumerate(zip(images["x_train"], images["y_train"], strict=True)):
        np.save(tmp_path / f"src/{digit}/{number:05}.npy", image)

    rows, model, latents = (tmp_path / name for name in ("rows.zarr", "model", "latents.zarr"))
    assert cvae_dist("ingest", tmp_path / "src", rows, "--rows-per-file", "one", "--label", "folder")["rows"] == 60_000
    cvae_dist("train", rows, model, "--dim-latent", "16", "--num-steps", "600")
    assert cvae_dist("embed", rows, model, latents)["rows"] == 60_000

    stored = xr.open_zarr(rows)
    numbers = [int(Path(name).stem) for name in stored.id.values]
    assert sorted(numbers) == list(range(60_000))
    assert (stored.x.values == images["x_train"].reshape(60_000, -1)[numbers]).all()
    assert (stored.label.values.astype(object) == images["y_train"][numbers].astype(str).astype(object)).all()
    embedded = xr.open_zarr(latents)
    assert (embedded.label.values == stored.label.values).all()
    test = cvae.CompressionVAE(logdir=str(model)).embed(images["x_test"].reshape(10_000, -1))
    neighbours = KNeighborsClassifier(5).fit(embedded.z.values, embedded.label.values.astype(object))
    assert neighbours.score(test, images["y_test"].astype(str).astype(object)) > 0.93


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_a_flow_in_two_dimensions_leaves_the_divergence_measurable(likelihood: str) -> None:
    images = np.load(_MNIST)
    rows, test = (images[part].reshape(-1, 784) for part in ("x_train", "x_test"))
    settings = {"dim_latent": 2, "iaf_flow_length": 5, "likelihood": likelihood}
    vae = cvae.CompressionVAE(rows, num_steps=1000, **settings).train().model_
    noises = np.random.default_rng(0).standard_normal((3, len(test), 2), np.float32)
    divergences = np.array([vae.score_rows(test, noise)[1] for noise in noises])
    assert np.abs(divergences).max() < 100, "an estimate of a few nats with noise of hundreds"
    assert np.ptp(divergences.mean(axis=1)) < 0.2
    assert divergences.mean() > 4
