"""The estimator: both vocabularies, where rows come from, restoring, and what is refused."""

import inspect
import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline

from cvae_dist.config import TrainConfig
from cvae_dist.errors import Corrupt, InvalidInput, NotFitted, SettingsChanged, SourceNotFound
from cvae_dist.estimator import CompressionVAE
from cvae_dist.store import Location, RowStore
from cvae_dist.store.lineage import digest_bytes
from cvae_dist.verbs.ingest import ingest
from tests.servers import serve

DIGITS = load_digits()
X = DIGITS.data[:300].astype(np.float32)
QUICK: dict[str, Any] = {"num_steps": 20, "cells_encoder": (32,)}


@pytest.fixture(scope="module")
def fitted() -> CompressionVAE:
    return CompressionVAE(X, **QUICK).train()


def positional(function: Any) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [each.name for each in parameters if each.kind == each.POSITIONAL_OR_KEYWORD]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The same rows as one .npy file each; their sorted paths are in the order of the rows."""
    folder = tmp_path / "tree"
    folder.mkdir()
    for number, row in enumerate(X):
        np.save(folder / f"{number:04d}.npy", row)
    return folder


class TestBothVocabularies:
    def test_train_embed_decode(self, fitted: CompressionVAE) -> None:
        z = fitted.embed(X)
        assert (z.shape, z.dtype) == ((300, 2), np.float32)
        back = fitted.decode(z)
        assert (back.shape, back.dtype) == ((300, 64), np.float32)

    def test_fit_transform_inverse_transform_are_the_same(self, fitted: CompressionVAE) -> None:
        other = CompressionVAE(**QUICK)
        z = other.fit_transform(X)
        np.testing.assert_array_equal(z, fitted.embed(X))
        np.testing.assert_array_equal(other.inverse_transform(z), fitted.decode(z))

    def test_it_learns(self) -> None:
        model = CompressionVAE(DIGITS.data, num_steps=600).train()
        z = model.embed(DIGITS.data)
        error = np.mean((model.decode(z) - DIGITS.data) ** 2)
        assert error < 0.75 * DIGITS.data.var(axis=0).mean()
        accuracy = KNeighborsClassifier(5).fit(z[::2], DIGITS.target[::2]).score(z[1::2], DIGITS.target[1::2])
        assert accuracy > 0.5

    def test_the_constructor_only_stores(self) -> None:
        given = {"X": X, "logdir": "~/somewhere", "cells_encoder": [3, 2], "random_state": None}
        model = CompressionVAE(**given)  # type: ignore[arg-type]
        assert all(getattr(model, name) is value for name, value in given.items())
        assert set(vars(model)) == set(CompressionVAE().get_params())

    def test_parameters_are_the_words_of_the_settings(self) -> None:
        own, settings = set(CompressionVAE().get_params()), set(TrainConfig.model_fields)
        assert settings - own == {"seed"}, "the constructor has every setting under its name; the seed is random_state"
        assert own - settings == {
            "X",
            "X_valid",
            "batch_size_test",
            "initializer",
            "logdir",
            "loss",
            "random_state",
            "storage_options",
            "verbose",
        }
        defaults = TrainConfig()
        for name in own & settings - {"tb_logging"}:
            assert getattr(CompressionVAE(), name) == getattr(defaults, name), name

    def test_every_parameter_is_described(self) -> None:
        described = inspect.getdoc(CompressionVAE).split("Attributes\n")[0]  # type: ignore[union-attr]
        assert {name for name in CompressionVAE().get_params() if not re.search(rf"\b{name}\b", described)} == set()

    def test_settings_reach_the_training(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[TrainConfig] = []
        monkeypatch.setattr(CompressionVAE, "_fit", lambda self, X, config, *rest: seen.append(config))
        CompressionVAE(X, buffer_bytes=123_456, random_state=7).train(num_steps=9, lr_scheduling=False)
        assert (seen[0].buffer_bytes, seen[0].seed, seen[0].num_steps, seen[0].lr_scheduling) == (123_456, 7, 9, False)

    def test_reference_positions(self) -> None:
        constructor = "X X_valid train_valid_split dim_latent iaf_flow_length cells_encoder initializer batch_size "
        constructor += "batch_size_test logdir feature_normalization tb_logging"
        assert positional(CompressionVAE) == constructor.split()
        train = "self learning_rate num_steps dropout_keep_prob overwrite test_every lr_scheduling "
        train += "lr_scheduling_steps lr_scheduling_factor lr_scheduling_min checkpoint_every"
        assert positional(CompressionVAE.train) == train.split()

    def test_a_loss_names_its_likelihood(self) -> None:
        assert CompressionVAE(X / 16, loss="bce", **QUICK).train().model_.config.likelihood == "bernoulli"
        with pytest.raises(InvalidInput, match="loss='hinge'"):
            CompressionVAE(X, loss="hinge", **QUICK).train()  # type: ignore[arg-type]

    def test_arguments_of_train_win_and_stay_out_of_the_parameters(self) -> None:
        model = CompressionVAE(X, **QUICK).train(num_steps=5, test_every=1)
        assert [record["step"] for record in model.history_] == [1, 2, 3, 4, 5]
        assert model.num_steps == 20

    def test_names_and_frames(self) -> None:
        frame = pd.DataFrame(X[:50, :5], columns=list("abcde"), index=np.arange(50) * 2)
        model = CompressionVAE(**QUICK).set_output(transform="pandas")
        z = model.fit_transform(frame)
        assert list(z.columns) == ["compressionvae0", "compressionvae1"]
        assert list(z.index) == list(frame.index)
        assert list(model.feature_names_in_) == list("abcde")

    def test_in_a_pipeline_and_a_search(self) -> None:
        pipeline = make_pipeline(CompressionVAE(**QUICK), KNeighborsClassifier(3))
        search = GridSearchCV(pipeline, {"compressionvae__dim_latent": np.array([1, 3])}, cv=2)
        search.fit(X, DIGITS.target[:300])
        assert search.predict(X).shape == (300,)


class TestReproducibility:
    def test_same_seed_same_bits(self, fitted: CompressionVAE) -> None:
        again = CompressionVAE(**QUICK).fit(X)
        np.testing.assert_array_equal(again.embed(X), fitted.embed(X))

    @pytest.mark.parametrize("random_state", [1, None, np.random.RandomState(5)])
    def test_other_seed_other_model(self, fitted: CompressionVAE, random_state: Any) -> None:
        other = CompressionVAE(**QUICK, random_state=random_state).fit(X)
        assert not np.array_equal(other.embed(X), fitted.embed(X))

    def test_random_state_object_is_used_as_scikit_learn_does(self) -> None:
        first, second = (
            CompressionVAE(**QUICK, random_state=np.random.RandomState(5)).fit(X).embed(X) for _ in range(2)
        )
        np.testing.assert_array_equal(first, second)

    def test_a_row_does_not_depend_on_its_company(self, fitted: CompressionVAE) -> None:
        whole = fitted.embed(X)
        np.testing.assert_array_equal(fitted.embed(X[7:8]), whole[7:8])
        np.testing.assert_array_equal(fitted.embed(X, batch_size=13), whole)

    def test_pickle_and_clone(self, fitted: CompressionVAE) -> None:
        back = pickle.loads(pickle.dumps(fitted))
        np.testing.assert_array_equal(back.embed(X), fitted.embed(X))
        copy = clone(fitted)
        assert not hasattr(copy, "model_")
        np.testing.assert_array_equal(copy.train().embed(X), fitted.embed(X))


class TestRows:
    @pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float16, np.float64, ">f4"])
    def test_dtypes(self, fitted: CompressionVAE, dtype: Any) -> None:
        np.testing.assert_array_equal(fitted.embed(X.astype(dtype)), fitted.embed(X))
        assert CompressionVAE(**QUICK).fit(X.astype(dtype)).embed(X).shape == (300, 2)

    def test_booleans(self) -> None:
        z = CompressionVAE(**QUICK).fit_transform(X > 8)
        assert np.isfinite(z).all()

    def test_lists_and_memory_maps(self, fitted: CompressionVAE, tmp_path: Path) -> None:
        np.save(tmp_path / "x.npy", X)
        mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
        np.testing.assert_array_equal(fitted.embed(mapped), fitted.embed(X))
        np.testing.assert_array_equal(fitted.embed(X[:3].tolist()), fitted.embed(X[:3]))

    def test_images_are_flattened_and_remembered(self) -> None:
        images = DIGITS.images[:100]
        model = CompressionVAE(**QUICK).fit(images)
        assert (model.item_shape_, model.n_features_in_) == ((8, 8), 64)
        np.testing.assert_array_equal(model.embed(images), model.embed(images.reshape(100, 64)))

    def test_a_tree_of_files(self, fitted: CompressionVAE, tree: Path) -> None:
        z = CompressionVAE(str(tree), **QUICK).train().embed(tree)
        assert z.shape == (300, 2)
        np.testing.assert_array_equal(fitted.embed(str(tree)), fitted.embed(X))
        assert {path.name for path in tree.parent.iterdir()} == {"tree"}

    def test_a_tree_is_kept_beside_the_model_directory(self, tree: Path, tmp_path: Path) -> None:
        model = CompressionVAE(tree, logdir=tmp_path / "model", **QUICK).train()
        assert (tmp_path / "model.rows.zarr" / "zarr.json").exists()
        again = CompressionVAE(tree, logdir=tmp_path / "model", **QUICK).train()
        np.testing.assert_array_equal(again.embed(X), model.embed(X))

    def test_a_store(self, fitted: CompressionVAE, tree: Path, tmp_path: Path) -> None:
        url = str(tmp_path / "rows.zarr")
        ingest(str(tree), url)
        np.testing.assert_array_equal(fitted.embed(url), fitted.embed(X))
        model = CompressionVAE(url, **QUICK).train()
        assert model.n_features_in_ == 64
        np.testing.assert_array_equal(model.embed(X), fitted.embed(X))

    def test_rows_given_for_validation_validate(self) -> None:
        def run(valid: np.ndarray) -> CompressionVAE:
            return CompressionVAE(X[:200], valid, **QUICK).train(test_every=20)

        same, other = run(X[200:]), run(X[200:] * 0.5)
        assert same.history_[-1]["loss"] == other.history_[-1]["loss"]
        assert same.history_[-1]["validation_loss"] != other.history_[-1]["validation_loss"]

    def test_validation_rows_also_beside_a_store(self, tree: Path, tmp_path: Path) -> None:
        url = str(tmp_path / "rows.zarr")
        ingest(str(tree), url)
        model = CompressionVAE(url, X[:50] * 0.5, logdir=tmp_path / "model", **QUICK).train()
        plain = CompressionVAE(url, **QUICK).train()
        assert model.history_[-1]["validation_loss"] != plain.history_[-1]["validation_loss"]

    def test_validation_rows_may_be_a_store_or_files(self, tree: Path, tmp_path: Path) -> None:
        url = str(tmp_path / "rows.zarr")
        ingest(str(tree), url)
        expected = CompressionVAE(X[:100], X, **QUICK).train().history_[-1]["validation_loss"]
        for valid in (url, RowStore.open(url), tree, pd.DataFrame(X)):
            model = CompressionVAE(X[:100], valid, **QUICK).train()
            assert model.history_[-1]["validation_loss"] == pytest.approx(expected, rel=1e-6)
        with pytest.raises(InvalidInput, match="64 features.* 5 features"):
            CompressionVAE(X[:, :5], url, **QUICK).train()

    def test_all_that_looks_at_rows_takes_stores_and_files(
        self, fitted: CompressionVAE, tree: Path, tmp_path: Path
    ) -> None:
        url = str(tmp_path / "rows.zarr")
        ingest(str(tree), url)
        for rows in (url, RowStore.open(url), tree):
            np.testing.assert_array_equal(fitted.score_samples(rows), fitted.score_samples(X))
            assert fitted.score(rows) == fitted.score(X)
            np.testing.assert_array_equal(fitted.embed(rows, return_std=True), fitted.embed(X, return_std=True))
            draws = fitted.posterior_sample(rows, 2, random_state=0)
            np.testing.assert_array_equal(draws, fitted.posterior_sample(X, 2, random_state=0))
            assert str(fitted.diagnose(rows)) == str(fitted.diagnose(X))
        model = clone(fitted).fit(X)
        stored, given = (model.fit_prior(rows).sample(3, prior="mixture", random_state=0) for rows in (url, X))
        np.testing.assert_array_equal(stored, given)


class TestModelDirectory:
    def test_storage_options_reach_it(self) -> None:
        url, options, _ = serve("moto")
        trained = CompressionVAE(X, logdir=f"{url}/model", storage_options=options, **QUICK).train()
        assert Location.of(f"{url}/model/model.safetensors", options).size()
        restored = CompressionVAE(logdir=f"{url}/model", storage_options=options)
        np.testing.assert_array_equal(restored.embed(X), trained.embed(X))

    def test_restored_without_data_also_after_a_move(self, tmp_path: Path) -> None:
        trained = CompressionVAE(DIGITS.images[:100], logdir=tmp_path / "model", **QUICK).train()
        shutil.move(tmp_path / "model", tmp_path / "moved")
        restored = CompressionVAE(logdir=str(tmp_path / "moved"))
        np.testing.assert_array_equal(restored.embed(X), trained.embed(X))
        assert restored.item_shape_ == (8, 8)
        assert restored.history_ == trained.history_
        assert list(restored.get_feature_names_out()) == ["compressionvae0", "compressionvae1"]

    @pytest.mark.parametrize("name", ["model_", "history_", "item_shape_", "n_features_in_"])
    def test_restored_by_whatever_is_asked_for_first(self, name: str, tmp_path: Path) -> None:
        assert not hasattr(CompressionVAE(logdir=tmp_path / "model"), name)
        trained = CompressionVAE(DIGITS.images[:100], logdir=tmp_path / "model", **QUICK).train()
        found = getattr(CompressionVAE(logdir=tmp_path / "model"), name)
        assert type(found) is type(getattr(trained, name))
        assert CompressionVAE(logdir=tmp_path / "model").visualize_rows(X[:3]).axes[0].images, "of the shape trained on"

    def test_a_damaged_model_is_replaced_when_asked(self, tmp_path: Path) -> None:
        CompressionVAE(X, logdir=tmp_path / "model", **QUICK).train()
        (tmp_path / "model" / "model.safetensors").write_bytes(b"damaged")
        with pytest.raises(Corrupt):
            CompressionVAE(logdir=tmp_path / "model").history_  # noqa: B018
        assert CompressionVAE(X, logdir=tmp_path / "model", **QUICK).train(overwrite=True).history_

    def test_names_of_features_are_restored(self, tmp_path: Path) -> None:
        frame = pd.DataFrame(X[:50, :5], columns=list("abcde"))
        CompressionVAE(frame, logdir=tmp_path / "model", **QUICK).train()
        restored = CompressionVAE(logdir=tmp_path / "model")
        restored.embed(frame)
        assert list(restored.feature_names_in_) == list("abcde")
        with pytest.raises(InvalidInput, match="feature names should match"):
            restored.embed(frame[list("edcba")])
        CompressionVAE(frame.to_numpy(), logdir=tmp_path / "model", **QUICK).train(overwrite=True)
        again = CompressionVAE(logdir=tmp_path / "model")
        assert again.embed(frame.to_numpy()).shape == (50, 2)
        assert not hasattr(again, "feature_names_in_")

    def test_home_is_expanded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        CompressionVAE(X, logdir="~/model", **QUICK).train()
        assert {path.name for path in tmp_path.iterdir()} == {"model"}

    def test_finished_training_is_not_repeated(self, tmp_path: Path) -> None:
        events: list[Any] = []
        for _ in range(2):
            CompressionVAE(X, logdir=tmp_path / "model", **QUICK).train(on_event=events.append)
        assert events[-1].message.startswith("already trained")

    def test_changed_settings_are_refused_unless_overwritten(self, tmp_path: Path) -> None:
        directory = tmp_path / "model"
        CompressionVAE(X, logdir=directory, **QUICK).train()
        with pytest.raises(SettingsChanged, match="dim_latent: 2 there, 3 asked for"):
            CompressionVAE(X, logdir=directory, dim_latent=3, **QUICK).train()
        with pytest.raises(SettingsChanged, match="rows"):
            CompressionVAE(X[:200], logdir=directory, **QUICK).train()
        changed = CompressionVAE(X, logdir=directory, dim_latent=3, **QUICK).train(overwrite=True)
        assert changed.embed(X).shape == (300, 3)

    def test_nothing_is_written_without_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        CompressionVAE(X, **QUICK).train()
        assert not any(tmp_path.iterdir())


class Bomb:
    """Writes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


class TestBrokenModels:
    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        CompressionVAE(X, logdir=tmp_path / "model", **QUICK).train()
        return tmp_path / "model"

    def test_damaged_weights(self, directory: Path) -> None:
        weights = bytearray((directory / "model.safetensors").read_bytes())
        weights[-5] ^= 1
        (directory / "model.safetensors").write_bytes(weights)
        with pytest.raises(Corrupt, match="does not match the digest"):
            CompressionVAE(logdir=directory).embed(X)

    def test_another_directory(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
        with pytest.raises(Corrupt, match="was not written by cvae-dist"):
            CompressionVAE(logdir=tmp_path).embed(X)

    @pytest.mark.parametrize("forged", [False, True])
    def test_a_pickle_is_refused_and_not_executed(self, directory: Path, tmp_path: Path, forged: bool) -> None:
        bomb = pickle.dumps(Bomb(tmp_path / "executed"))
        (directory / "model.safetensors").write_bytes(bomb)
        if forged:
            config = json.loads((directory / "config.json").read_text())
            (directory / "config.json").write_text(json.dumps(config | {"digest": digest_bytes(bomb)}))
        with pytest.raises(Corrupt, match=r"model\.safetensors"):
            CompressionVAE(logdir=directory).embed(X)
        assert not (tmp_path / "executed").exists()
        pickle.loads(bomb)
        assert (tmp_path / "executed").exists()


class TestRefusals:
    def test_unknown_arguments_name_the_nearest(self) -> None:
        with pytest.raises(InvalidInput, match="'dim_latents': did you mean 'dim_latent'"):
            CompressionVAE(X, dim_latents=3)
        with pytest.raises(TypeError, match="'num_step': did you mean 'num_steps'"):
            CompressionVAE(X).train(num_step=3)
        with pytest.raises(InvalidInput, match="'zzz': known: X, X_valid"):
            CompressionVAE(zzz=1)

    @pytest.mark.parametrize(
        ("given", "message"),
        [({"initializer": "ortogonal"}, "did you mean 'orthogonal'"), ({"batch_size": 0}, "batch_size=0")],
    )
    def test_values_nobody_knows(self, given: dict[str, Any], message: str) -> None:
        with pytest.raises(InvalidInput, match=message):
            CompressionVAE(X, **given).train()

    def test_a_probability_out_of_range(self) -> None:
        with pytest.raises(InvalidInput, match=r"dropout_keep_prob=1\.5"):
            CompressionVAE(X).train(dropout_keep_prob=1.5)

    @pytest.mark.parametrize("call", ["embed", "decode", "transform", "inverse_transform"])
    def test_before_training(self, call: str, tmp_path: Path) -> None:
        for model in (CompressionVAE(X), CompressionVAE(logdir=tmp_path / "none")):
            with pytest.raises(NotFitted, match=r"call train\(\)") as caught:
                getattr(model, call)(X)
            assert isinstance(caught.value, NotFittedError)

    def test_no_rows(self) -> None:
        with pytest.raises(InvalidInput, match="X is None"):
            CompressionVAE().train()
        with pytest.raises(InvalidInput, match="X is None"):
            CompressionVAE().fit()

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            (np.where(np.eye(64, dtype=bool), np.nan, 1.0), "NaN"),
            (np.where(np.eye(64, dtype=bool), np.inf, 1.0), "infinity"),
            (X[:5].astype(complex), "[Cc]omplex"),
            (np.full((3, 64), "a", dtype=object), "text or categories in columns '0', .*, such as 'a'"),
            (X[:0], "0 sample"),
            (X[:, :0], "0 feature"),
            (X[0], "1D array"),
            ([[1.0, 2.0], [3.0]], "inhomogeneous"),
        ],
    )
    def test_unusable_rows(self, fitted: CompressionVAE, rows: Any, message: str) -> None:
        with pytest.raises(InvalidInput, match=message):
            CompressionVAE(rows, **QUICK).train()
        with pytest.raises(InvalidInput, match=message):
            fitted.embed(rows)

    def test_wrong_width_says_both_numbers(self, fitted: CompressionVAE, tmp_path: Path) -> None:
        with pytest.raises(InvalidInput, match="63 features.* 64 features"):
            fitted.embed(X[:, :63])
        with pytest.raises(InvalidInput, match="63 features.* 64 features"):
            CompressionVAE(X, X[:, :63], **QUICK).train()
        with pytest.raises(InvalidInput, match=r"\(300, 64\).*\(n, 2\)"):
            fitted.decode(X)
        np.save(tmp_path / "x.npy", X[:, :63])
        ingest(str(tmp_path), str(tmp_path / "rows.zarr"), rows_per_file="many")
        with pytest.raises(InvalidInput, match="63 features.* 64 features"):
            fitted.embed(str(tmp_path / "rows.zarr"))

    def test_latents_must_be_finite(self, fitted: CompressionVAE) -> None:
        with pytest.raises(InvalidInput, match="z contains NaN"):
            fitted.decode(np.array([[0.0, np.nan]]))

    @pytest.mark.parametrize("settings", [{"dim_latent": 0}, {"likelihood": "poisson"}, {"num_steps": -1}])
    def test_settings_out_of_range(self, settings: dict[str, Any]) -> None:
        with pytest.raises(InvalidInput, match=next(iter(settings))):
            CompressionVAE(X, **settings).train()

    def test_missing_source(self, tmp_path: Path) -> None:
        with pytest.raises(SourceNotFound):
            CompressionVAE(str(tmp_path / "nowhere")).train()


class TestPictures:
    def test_scatter(self, fitted: CompressionVAE, tmp_path: Path) -> None:
        target = tmp_path / "latents.png"
        names = [f"digit {i}" for i in range(10)]
        figure = fitted.visualize(fitted.embed(X), DIGITS.target[:300], names, str(target))
        assert target.stat().st_size > 10_000
        assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == names

    def test_grid(self, tmp_path: Path) -> None:
        model = CompressionVAE(DIGITS.images[:100], **QUICK).train()
        figure = model.visualize_latent_grid(filename=str(tmp_path / "grid.png"))
        assert figure.axes[0].images[0].get_array().shape == (80, 80)
        assert tuple(figure.get_size_inches()) == (12, 12)
        assert (tmp_path / "grid.png").stat().st_size > 10_000

    def test_grid_of_rows_that_are_no_images(self, fitted: CompressionVAE) -> None:
        assert not fitted.visualize_latent_grid(grid_size=3).axes[0].images
        assert fitted.visualize_latent_grid(grid_size=3, shape=(8, 8)).axes[0].images

    def test_reconstructions(self, fitted: CompressionVAE, tmp_path: Path) -> None:
        target = tmp_path / "reconstructions.png"
        labels = np.arange(300) + 1000
        figure = fitted.visualize_reconstructions(X, labels, n=3, shape=(8, 8), filename=str(target))
        axes = figure.axes[0]
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1000", "1150", "1299"]
        canvas = axes.images[0].get_array()
        np.testing.assert_array_equal(canvas[:8, 16:], X[299].reshape(8, 8))
        np.testing.assert_allclose(canvas[8:, 16:].ravel(), fitted.decode(fitted.embed(X[299:]))[0])
        assert target.stat().st_size > 5_000

    def test_reconstructions_need_rows_and_their_labels(self, fitted: CompressionVAE) -> None:
        with pytest.raises(InvalidInput, match=r"300 rows, but labels of shape \(299,\)"):
            fitted.visualize_reconstructions(X, labels=DIGITS.target[:299])
        with pytest.raises(InvalidInput, match="0 of 300 rows"):
            fitted.visualize_reconstructions(X, n=0)

    def test_reconstructions_of_a_store_and_of_a_frame(self, fitted: CompressionVAE, tmp_path: Path) -> None:
        (tmp_path / "tree").mkdir()
        np.save(tmp_path / "tree" / "rows.npy", X)
        ingest(tmp_path / "tree", tmp_path / "rows.zarr")
        expected = fitted.visualize_reconstructions(X, n=3, shape=(8, 8)).axes[0].images[0].get_array()
        figure = fitted.visualize_reconstructions(tmp_path / "rows.zarr", n=3, shape=(8, 8))
        np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), expected)
        frame = pd.DataFrame(X).add_prefix("pixel ")
        model = CompressionVAE(frame, **QUICK).train()
        assert model.visualize_reconstructions(frame, n=3, shape=(8, 8)).axes[0].images

    def test_rows(self, tmp_path: Path) -> None:
        model = CompressionVAE(DIGITS.images[:100], **QUICK).train()
        rows = model.interpolate(DIGITS.images[0], DIGITS.images[1], n=6)
        figure = model.visualize_rows(rows, n_columns=3, filename=str(tmp_path / "rows.png"))
        np.testing.assert_allclose(figure.axes[0].images[0].get_array()[8:, 16:].ravel(), rows[5].ravel())
        assert np.ptp(plt.imread(tmp_path / "rows.png")) > 0.9, "black and white, and not blank"
