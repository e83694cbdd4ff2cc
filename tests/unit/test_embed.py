"""Stores and models that do not belong together; `faults/test_embed_kill.py` kills and grows."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from cvae_dist.errors import InvalidInput, SettingsChanged
from cvae_dist.estimator import CompressionVAE
from cvae_dist.events import Event
from cvae_dist.model import kernels
from cvae_dist.store import RowStore
from cvae_dist.verbs.decode import decode
from cvae_dist.verbs.embed import embed
from cvae_dist.verbs.ingest import ingest
from cvae_dist.verbs.score import score
from cvae_dist.verbs.train import train


class Made(NamedTuple):
    rows: str
    model: str
    other: str
    wider: str
    latents: str


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Rows, a model of them with its latents, another of the same widths, and one of three latent dimensions."""
    root = tmp_path_factory.mktemp("made")
    made = Made(*(str(root / name) for name in Made._fields))
    (root / "tree").mkdir()
    np.save(root / "tree" / "rows.npy", np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32))
    ingest(root / "tree", made.rows)
    quick = {"num_steps": 5, "tb_logging": False}
    train(made.rows, made.model, **quick)
    train(made.rows, made.other, seed=1, **quick)
    train(made.rows, made.wider, dim_latent=3, **quick)
    embed(made.rows, made.model, made.latents)
    return made


def test_latents_of_another_model_are_not_decoded(made: Made, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"were made by model \w+, but .*other is \w+"):
        decode(made.latents, made.other, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert decode(made.latents, made.model, tmp_path / "out").rows == 40


def test_latents_of_another_width_are_not_decoded(made: Made, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"has rows of 2 values, but model .*wider takes 3"):
        decode(made.latents, made.wider, tmp_path / "out")


def test_the_precision_is_a_setting_of_the_latents(made: Made, tmp_path: Path) -> None:
    short, exact = embed(made.rows, made.model, tmp_path / "short", precision="bf16"), RowStore.open(made.latents)
    latents = RowStore.open(short.url)
    assert latents.document["settings"] == exact.document["settings"] | {"precision": "bf16"}
    assert "precision" not in exact.document["settings"], "latents of before the choice would no longer count as done"
    difference = latents.read("z", 0, 40) - exact.read("z", 0, 40)
    assert 0 < np.abs(difference).max() < 0.05
    assert embed(made.rows, made.model, short.url, precision="bf16").nothing_to_do
    assert embed(made.rows, made.model, made.latents, precision="float32").nothing_to_do
    with pytest.raises(SettingsChanged, match="precision: 'bf16' there"):
        embed(made.rows, made.model, short.url)
    with pytest.raises(SettingsChanged, match="'bf16' asked for"):
        embed(made.rows, made.model, made.latents, precision="bf16")


def test_the_metric_is_a_setting_of_the_latents_which_decode_undoes(made: Made, tmp_path: Path) -> None:
    stretched, plain = embed(made.rows, made.model, tmp_path / "stretched", metric="data"), RowStore.open(made.latents)
    latents = RowStore.open(stretched.url)
    assert latents.document["settings"] == plain.document["settings"] | {"metric": "data"}
    assert "metric" not in plain.document["settings"], "latents of before the choice would no longer count as done"
    expected = CompressionVAE(logdir=made.model).embed(np.load(Path(made.rows).parent / "tree/rows.npy"), metric="data")
    np.testing.assert_array_equal(latents.read("z", 0, 40), expected)
    there, same = (
        decode(url, made.model, tmp_path / name) for url, name in ((stretched.url, "a"), (made.latents, "b"))
    )
    found, wanted = (RowStore.open(each.url).read("x", 0, 40) for each in (there, same))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
    with pytest.raises(SettingsChanged, match="metric: 'data' there"):
        embed(made.rows, made.model, stretched.url)


def test_an_unknown_metric_is_refused_before_anything_is_written(made: Made, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="metric='cosine' is unknown: choose 'latent'"):
        embed(made.rows, made.model, tmp_path / "out", metric="cosine")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_an_unknown_precision_is_refused_before_anything_is_written(made: Made, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="'float32' and 'bf16'"):
        embed(made.rows, made.model, tmp_path / "out", precision="half")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_what_speaks_against_a_precision_is_told(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "has_bfloat16", lambda device: False)
    events: list[Event] = []
    embed(made.rows, made.model, tmp_path / "out", precision="bf16", on_event=events.append)
    assert [event.message for event in events if event.kind == "note"] == [kernels.drawback("bf16")]


@pytest.mark.parametrize("verb", [embed, score])
def test_latents_are_not_taken_for_rows(made: Made, tmp_path: Path, verb: object) -> None:
    with pytest.raises(InvalidInput, match="holds latents, but rows are needed"):
        verb(made.latents, made.model, tmp_path / "out")


def test_latents_are_not_trained_on(made: Made, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="holds latents, but rows are needed"):
        train(made.latents, str(tmp_path / "model"))


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_scores_are_those_of_the_estimator(tmp_path: Path, likelihood: str) -> None:
    shares = np.random.default_rng(0).random((40, 6)).astype(np.float32) * np.linspace(0.05, 1, 40)[:, None]
    (tmp_path / "tree").mkdir()
    np.save(tmp_path / "tree" / "rows.npy", shares.astype(np.float32))
    rows, model = str(tmp_path / "rows.zarr"), str(tmp_path / "model")
    ingest(tmp_path / "tree", rows)
    train(rows, model, num_steps=5, likelihood=likelihood, tb_logging=False)
    scored = RowStore.open(score(rows, model, tmp_path / "scores").url)
    found = scored.read("score", 0, 40)
    assert found.mean() == pytest.approx(CompressionVAE(logdir=model).score(shares), abs=0.6)  # other draws
    ratio = np.corrcoef(found, -scored.read("negative_elbo", 0, 40))[0, 1]
    assert (ratio > 0.999) == (likelihood == "gaussian"), "shares are relative to the entropy of their row"
