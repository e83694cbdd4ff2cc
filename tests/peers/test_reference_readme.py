"""Every code block of the README of CompressionVAE, as written, after ``import cvae_dist as cvae``; the data are small.

The text of the blocks is kept to the letter, but for the numbers of steps and widths where a test cannot wait.
"""

import logging
import shutil
import signal
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from sklearn.datasets import load_digits

import cvae_dist as cvae
from cvae_dist.errors import NotFitted, SettingsChanged
from cvae_dist.events import Event

DIGITS = load_digits()
QUICK: dict[str, Any] = {"num_steps": 20, "cells_encoder": [32]}


@pytest.fixture
def mnist() -> SimpleNamespace:
    """What ``fetch_openml`` returns today: a DataFrame of pixels and a Series of strings."""
    pixels = pd.DataFrame(DIGITS.data[:300], columns=[f"pixel{i}" for i in range(1, 65)])
    return SimpleNamespace(data=pixels, target=pd.Series(DIGITS.target[:300].astype(str), dtype="category"))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home directory, which is not the current one; nothing may be written to the latter."""
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir()
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    yield home
    assert {path.suffix for path in work.iterdir()} <= {".png"}


def test_basic_use_case(mnist: SimpleNamespace) -> None:
    X = mnist.data
    embedder = cvae.CompressionVAE(X)
    embedder.num_steps = 200  # as a test cannot wait for the default
    embedder.train()
    z = embedder.embed(X)
    assert z.shape == (300, 2)
    embedder.visualize(z)
    embedder.visualize(z, labels=[int(label) for label in mnist.target])
    embedder.visualize(z, labels=mnist.target)
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    figure = embedder.visualize(
        z, labels=[int(label) for label in mnist.target], categories=names, filename="latents.png"
    )
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == names
    assert Path("latents.png").stat().st_size > 10_000
    X_reconstructed = embedder.decode(z)
    assert X_reconstructed.shape == X.shape
    assert np.mean((X_reconstructed - X.to_numpy()) ** 2) < X.to_numpy().var(axis=0).mean()
    # Combine the two examples and add batch dimension
    z_interp = np.expand_dims(0.5 * z[0] + 0.5 * z[1], axis=0)
    # Decode the new latent vector.
    X_interp = embedder.decode(z_interp)
    assert X_interp.shape == (1, 64)
    embedder.visualize_latent_grid(grid_size=4, shape=(8, 8), clip=(0, 16), filename="grid.png")
    assert Path("grid.png").stat().st_size > 5_000


def test_string_labels_keep_their_colours(mnist: SimpleNamespace) -> None:
    embedder = cvae.CompressionVAE(mnist.data, **QUICK).train()
    z = embedder.embed(mnist.data)
    figures = [embedder.visualize(z, labels=list(mnist.target)) for _ in range(2)]
    names = [[text.get_text() for text in figure.axes[0].get_legend().get_texts()] for figure in figures]
    assert names[0] == names[1] == [str(i) for i in range(10)]


def test_the_grid_of_784_pixels_is_one_of_images() -> None:
    X = np.random.default_rng(0).random((60, 784)).astype(np.float32)
    embedder = cvae.CompressionVAE(X, **QUICK).train()
    assert embedder.visualize_latent_grid().axes[0].images[0].get_array().shape == (280, 280)


def test_customising_the_model_and_its_training(
    mnist: SimpleNamespace, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    X = mnist.data
    embedder = cvae.CompressionVAE(
        X,
        train_valid_split=0.99,
        dim_latent=16,
        iaf_flow_length=10,
        cells_encoder=[64, 32, 16],
        initializer="lecun_normal",
        batch_size=32,
        batch_size_test=128,
        logdir="~/mnist_16d",
        feature_normalization=False,
        tb_logging=True,
    )
    with caplog.at_level(logging.WARNING, logger="cvae_dist"):
        embedder.train(learning_rate=1e-4, num_steps=20, dropout_keep_prob=0.6, test_every=5, lr_scheduling=False)
    without_effect = {message.split("=")[0] for message in caplog.messages if "has no effect" in message}
    assert without_effect == {"initializer", "batch_size_test", "dropout_keep_prob"}
    assert embedder.history_[-1]["learning_rate"] == 1e-4
    assert embedder.embed(X).shape == (300, 16)
    assert embedder.history_[0]["step"] == 5
    model = embedder.model_.config
    assert (model.cells_encoder, model.feature_normalization) == ((64, 32, 16), False)
    assert (home / "mnist_16d" / "model.safetensors").exists()
    assert list((home / "mnist_16d" / "logs").iterdir())


def test_the_rest_of_the_schedule_is_accepted(mnist: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    embedder = cvae.CompressionVAE(mnist.data, **QUICK)
    embedder.train(1e-3, 10, 1.0, False, 50, True, 4, 3, 1e-4, 2000)
    noted = [message.split("=")[0] for message in caplog.messages]
    assert noted == ["lr_scheduling_steps", "lr_scheduling_factor", "lr_scheduling_min"]


def test_validation_rows_of_ones_own(mnist: SimpleNamespace) -> None:
    embedder = cvae.CompressionVAE(mnist.data[:200], X_valid=mnist.data[200:], **QUICK).train()
    assert "validation_loss" in embedder.history_[-1]


def test_a_large_dataset(home: Path) -> None:
    for number, (row, label) in enumerate(zip(DIGITS.data[:100], DIGITS.target[:100], strict=True)):
        folder = home / "my_dataset" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{number:03d}.npy", row)
    embedder = cvae.CompressionVAE(X="~/my_dataset")
    embedder.set_params(**QUICK).train()
    assert embedder.embed("~/my_dataset").shape == (100, 2)
    assert embedder.embed(DIGITS.data[:5]).shape == (5, 2)


def test_restarting_an_existing_model(mnist: SimpleNamespace, home: Path) -> None:
    X = mnist.data
    trained = cvae.CompressionVAE(X, dim_latent=3, logdir="~/digits", **QUICK).train()
    shutil.move(home / "digits", home / "moved")
    for restored in (cvae.CompressionVAE(X, logdir="~/moved"), cvae.CompressionVAE(logdir="~/moved")):
        np.testing.assert_array_equal(restored.embed(X), trained.embed(X))
        assert restored.decode(np.zeros((1, 3))).shape == (1, 64)
    longer = cvae.CompressionVAE(X, dim_latent=3, logdir="~/moved", **QUICK).train(num_steps=40)
    assert longer.history_[-1]["step"] == 40
    assert longer.history_[: len(trained.history_)] == trained.history_
    with pytest.raises(SettingsChanged, match="num_steps: 40 there, 30 asked for"):
        cvae.CompressionVAE(X, dim_latent=3, logdir="~/moved", **QUICK).train(num_steps=30)
    shorter = cvae.CompressionVAE(X, dim_latent=3, logdir="~/moved", **QUICK).train(num_steps=30, overwrite=True)
    assert shorter.history_[-1]["step"] == 30


def test_continuing_without_a_directory(mnist: SimpleNamespace) -> None:
    embedder = cvae.CompressionVAE(mnist.data, **QUICK).train()
    before = embedder.history_
    embedder.train(num_steps=40)
    assert (embedder.history_[: len(before)], embedder.history_[-1]["step"]) == (before, 40)
    assert [record["step"] for record in embedder.train(num_steps=60, overwrite=True).history_] == [50, 60]
    assert [record["step"] for record in embedder.fit(mnist.data).history_] == [20]


def test_ctrl_c_saves_and_training_goes_on(mnist: SimpleNamespace) -> None:
    def interrupt(event: Event) -> None:
        if event.kind == "start":
            signal.raise_signal(signal.SIGINT)

    X = mnist.data
    embedder = cvae.CompressionVAE(X, logdir="~/interrupted", **QUICK)
    with pytest.raises(KeyboardInterrupt):
        embedder.train(on_event=interrupt)
    with pytest.raises(NotFitted, match="holds no finished model"):
        embedder.embed(X)
    events: list[Event] = []
    embedder.train(on_event=events.append)
    whole = cvae.CompressionVAE(X, **QUICK).train()
    np.testing.assert_array_equal(embedder.embed(X), whole.embed(X))


def test_a_directory_called_temp_is_not_deleted(mnist: SimpleNamespace, home: Path) -> None:
    (home / "temp").mkdir()
    (home / "temp" / "thesis.txt").write_text("precious")
    cvae.CompressionVAE(mnist.data, logdir="~/temp", **QUICK).train()
    assert (home / "temp" / "thesis.txt").read_text() == "precious"


def test_what_the_reference_never_had(home: Path) -> None:
    """The block of this README, with its comments."""
    text = (Path(__file__).parents[2] / "README.md").read_text()
    block = text.split("And what it never had:\n")[1].split("The score of rows")[0]
    X = DIGITS.data[:100].astype(np.float32)
    (home / "rows").mkdir()
    np.save(home / "rows" / "all.npy", X)
    cvae.ingest(str(home / "rows"), "rows.zarr")
    names = {"embedder": cvae.CompressionVAE(X, **QUICK).train(), "X": X, "xr": xr}
    exec(textwrap.dedent(block), names)
    assert names["spread"].shape == (100, 2)  # type: ignore[attr-defined]
    shutil.rmtree("rows.zarr")
    Path("embed.pt2").unlink()
    assert Path("diagnosis.png").exists()
