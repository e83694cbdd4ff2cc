"""Few rows, odd rows and models that are none: a sensible result, or one clear message from estimator and commands."""

import io
import itertools
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cvae_dist.cli import main
from cvae_dist.errors import CvaeDistError, InvalidInput, NotFitted, TrainingDiverged
from cvae_dist.estimator import CompressionVAE
from cvae_dist.events import Event
from cvae_dist.verbs.ingest import ingest
from cvae_dist.verbs.train import train

QUICK: dict[str, Any] = {"num_steps": 40}
RANDOM = np.random.default_rng(0)
PLENTY = RANDOM.normal(size=(60, 4))

FEW: dict[str, np.ndarray] = {
    "one row": PLENTY[:1],
    "two rows": PLENTY[:2],
    "two equal rows": PLENTY[[0, 0]],
    "five rows": PLENTY[:5],
    "20 rows": PLENTY[:20],
    "one feature": PLENTY[:, :1],
    "one row of one feature": PLENTY[:1, :1],
    "a constant feature": PLENTY * [1, 0, 1, 1] + [0, 7, 0, 0],
    "only constants": np.full((30, 3), 7.0),
    "one constant feature": np.full((30, 1), -1e30),
    "more features than rows": RANDOM.normal(size=(5, 500)),
    "the ends of float32": np.where(PLENTY > 0, 3e38, -3e38).astype(np.float32),
    "the smallest of float32": (PLENTY * 1e-44).astype(np.float32),
    "large and small in one feature": np.where(np.arange(60)[:, None] == 7, 1e38, PLENTY).astype(np.float32),
}


# by default every data as usual, and every share of the rows that train for very few of them
SPLITS = [
    pytest.param(rows, split, marks=() if split is None or rows in ("one row", "five rows") else pytest.mark.heavy)
    for rows, split in itertools.product(FEW, [None, 0.999, 0.01, 1.0])
]


@pytest.mark.parametrize(("rows", "split"), SPLITS)
def test_few_or_odd_rows_are_learned(rows: str, split: float | None) -> None:
    data = FEW[rows]
    model = CompressionVAE(train_valid_split=split, **QUICK).fit(data)
    assert np.isfinite(model.embed(data)).all()
    assert np.isfinite(model.decode(model.embed(data))).all()
    assert np.isfinite(model.sample(50, random_state=0)).all()
    assert np.isfinite(model.score_samples(data)).all()


def test_constant_features_come_back_as_they_were() -> None:
    data = FEW["a constant feature"]
    model = CompressionVAE(**QUICK).fit(data)
    for rows in (model.decode(model.embed(data)), model.sample(20, random_state=0)):
        assert (rows[:, 1] == 7).all()


def test_rows_to_validate_on_may_be_few_but_not_none() -> None:
    model = CompressionVAE(X_valid=PLENTY[:1], **QUICK).fit(PLENTY)
    assert all(np.isfinite(record["validation_loss"]) for record in model.history_)
    with pytest.raises(InvalidInput, match="0 sample"):
        CompressionVAE(X_valid=PLENTY[:0], **QUICK).fit(PLENTY)
    with pytest.raises(InvalidInput, match="NaN"):
        CompressionVAE(X_valid=PLENTY * np.nan, **QUICK).fit(PLENTY)


@pytest.mark.heavy
def test_a_hundred_numbers_are_learned_from_all_of_them() -> None:
    """Rows held out would be missed in the mean, and what ten rows say of the best step is noise."""
    numbers = np.random.default_rng(4).normal(100, 10, (100, 1))
    model = CompressionVAE(dim_latent=1).fit(numbers)
    drawn = model.sample(15_000, random_state=0)
    assert abs(drawn.mean() - numbers.mean()) <= 0.3
    assert abs(drawn.std() / numbers.std() - 1) <= 0.03


def test_a_diverged_estimator_can_be_used_where_something_was_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are no numbers cannot come in, but memory that is shared can change while it is trained on."""
    rows = PLENTY.astype(np.float32)
    model = CompressionVAE(num_steps=2000, test_every=20, train_valid_split=1.0, multi_start=False)

    def spoil(event: Event) -> None:
        if event.kind == "progress" and event.done > 20:
            rows[::6] = np.nan

    monkeypatch.setattr("cvae_dist.training.loop._SECONDS_BETWEEN_EVENTS", 0)
    model.X = rows
    with pytest.raises(TrainingDiverged, match=r"The model holds the last good weights, of step \d+"):
        model.train(on_event=spoil)
    assert np.isfinite(model.embed(PLENTY)).all()
    assert np.isfinite(model.history_[-1]["loss"])


def test_an_estimator_that_was_never_good_is_not_fitted() -> None:
    model = CompressionVAE(kl_weight=1e38, num_steps=300)
    with pytest.raises(TrainingDiverged, match=r"No weights were worth keeping.* kl_weight=1e\+38.*--learning-rate"):
        model.fit(PLENTY)
    with pytest.raises(NotFitted):
        model.embed(PLENTY)


# ------------------------------------------------------------------------------------------- models


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``rows.zarr``, ``wide.zarr`` and the ``model`` of the rows."""
    root = tmp_path_factory.mktemp("finished")
    for name, rows in {"rows": PLENTY, "wide": np.ones((10, 5))}.items():
        (root / name).mkdir()
        np.save(root / name / "x.npy", rows)
        ingest(root / name, root / f"{name}.zarr", rows_per_file="many")
    train(str(root / "rows.zarr"), str(root / "model"), num_steps=5, tb_logging=False)
    return root


def cut_weights(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def other_json(model: Path) -> None:
    (model / "config.json").write_text('{"architectures": ["BertModel"]}')


def other_version(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"version": 99}))


class Bomb:
    """Creates a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def pickled_weights(model: Path) -> None:
    stream = io.BytesIO()
    pickle.dump({"encoder": Bomb(model / "executed")}, stream)
    (model / "model.safetensors").write_bytes(stream.getvalue())


def reference_model(model: Path) -> None:
    """What CompressionVAE leaves: TensorFlow's checkpoints and pickles beside JSON of its own."""
    shutil.rmtree(model)
    model.mkdir()
    (model / "params.json").write_text('{"dim_latent": 2, "cells_encoder": [4]}')
    (model / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-40"\n')
    for name in ("model.ckpt-40.index", "model.ckpt-40.meta", "model.ckpt-40.data-00000-of-00001"):
        (model / name).write_bytes(b"\0" * 10)
    (model / "norm.pkl").write_bytes(pickle.dumps(Bomb(model / "executed")))


BROKEN: dict[Callable[[Path], None], str] = {
    cut_weights: "does not match the digest",
    no_weights: "model.safetensors is missing",
    other_json: "was not written by cvae-dist",
    other_version: "has model format 99, this release reads",
    pickled_weights: "does not match the digest",
    reference_model: "written by CompressionVAE",
}


TRAINING_GOES_ON = ("train", reference_model)  # nothing there is in the way of a new model


@pytest.mark.parametrize(
    ("command", "damage"),
    [pair for pair in itertools.product(["embed", "train", "score", "sample"], BROKEN) if pair != TRAINING_GOES_ON],
)
def test_a_model_that_is_none_is_one_message(
    finished: Path, tmp_path: Path, command: str, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(finished / "model", model)
    damage(model)
    before = sorted(path.name for path in model.iterdir())
    rows, out = str(finished / "rows.zarr"), str(tmp_path / "out.zarr")
    arguments = {
        "embed": [rows, str(model), out],
        "score": [rows, str(model), out],
        "sample": [str(model), out, "--n", "3"],
        "train": [rows, str(model), "--num-steps", "6"],
    }
    assert main([command, *arguments[command]]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert BROKEN[damage] in told
    assert "Traceback" not in told
    assert not (model / "executed").exists()
    assert sorted(path.name for path in model.iterdir()) == before
    assert not (tmp_path / "out.zarr" / "zarr.json").exists()


@pytest.mark.parametrize("damage", BROKEN)
def test_an_estimator_refuses_it_too(finished: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    model = tmp_path / "model"
    shutil.copytree(finished / "model", model)
    damage(model)
    message = "holds no finished model" if damage is reference_model else BROKEN[damage]
    with pytest.raises(CvaeDistError, match=message):
        CompressionVAE(logdir=model).embed(PLENTY)
    assert not (model / "executed").exists()


def test_commands_say_what_is_missing_or_does_not_fit(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 1
        return " ".join(capsys.readouterr().err.split())

    out = tmp_path / "out.zarr"
    assert "there is no model at" in told("embed", finished / "rows.zarr", tmp_path / "none", out)
    message = told("embed", finished / "wide.zarr", finished / "model", out)
    assert "rows of 5 values" in message
    assert "takes 4" in message
    with pytest.raises(InvalidInput, match="5 features.* 4 features"):
        CompressionVAE(logdir=finished / "model").embed(np.ones((3, 5)))
    assert not out.exists()
