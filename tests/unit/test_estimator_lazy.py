"""Lazy in, lazy out: nothing is computed by a call, and coordinates stay with their rows."""

from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import xarray as xr
from sklearn.datasets import load_digits

from cvae_dist.errors import InvalidInput
from cvae_dist.estimator import CompressionVAE
from cvae_dist.verbs.embed import embed
from cvae_dist.verbs.ingest import ingest

X = load_digits().data[:100].astype(np.float32)
QUICK: dict[str, Any] = {"num_steps": 20, "cells_encoder": (32,)}


@pytest.fixture(scope="module")
def model() -> CompressionVAE:
    return CompressionVAE(X, **QUICK).train()


class Counted:
    """Rows whose blocks count how often each of them is computed."""

    def __init__(self, chunks: tuple[int, ...], shape: tuple[int, ...] = X.shape) -> None:
        self.blocks = 0
        self.rows = da.from_array(X.reshape(shape), chunks=chunks).map_blocks(self._count, dtype=X.dtype, meta=X[:0])

    def _count(self, block: np.ndarray) -> np.ndarray:
        self.blocks += block.size > 0
        return block


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("something was computed at call time")


def labelled(rows: Any, dims: tuple[str, ...] = ("sample", "feature")) -> xr.DataArray:
    names = {"id": ("sample", [f"row {i}" for i in range(100)]), "label": ("sample", np.arange(100) % 10)}
    return xr.DataArray(rows, dims=dims, coords=names, attrs={"item_shape": [8, 8]})


def dataset(rows: Any) -> xr.Dataset:
    return labelled(rows).to_dataset(name="x")


@pytest.mark.parametrize(("chunks", "shape"), [((30, 64), (100, 64)), ((30, 10), (100, 64)), ((50, 8, 4), (100, 8, 8))])
def test_dask_arrays(model: CompressionVAE, chunks: tuple[int, ...], shape: tuple[int, ...]) -> None:
    counted = Counted(chunks, shape)
    with dask.config.set(scheduler=refuse):
        z, back = model.embed(counted.rows), model.decode(model.transform(counted.rows))
    assert counted.blocks == 0
    assert isinstance(z, da.Array)
    assert (z.shape, z.dtype, back.shape, back.dtype) == ((100, 2), np.float32, (100, 64), np.float32)
    assert z.chunks[0] == counted.rows.chunks[0]
    np.testing.assert_array_equal(z.compute(), model.embed(X))
    assert counted.blocks == np.prod(counted.rows.numblocks)
    np.testing.assert_array_equal(back.compute(), model.decode(model.embed(X)))


def test_data_arrays_keep_their_coordinates(model: CompressionVAE) -> None:
    counted = Counted((30, 64))
    with dask.config.set(scheduler=refuse):
        z = model.embed(labelled(counted.rows))
        back = model.inverse_transform(z)
        spread = model.embed(labelled(counted.rows), return_std=True)[1]
    assert counted.blocks == 0
    assert isinstance(z, xr.DataArray)
    assert (z.name, z.dims, back.name, back.dims) == ("z", ("sample", "latent"), "x", ("sample", "feature"))
    xr.testing.assert_equal(back.coords.to_dataset(), labelled(X).coords.to_dataset())
    np.testing.assert_array_equal(z.values, model.embed(X))
    np.testing.assert_array_equal(back.values, model.decode(model.embed(X)))
    np.testing.assert_array_equal(spread.values, model.embed(X, return_std=True)[1])


def test_data_arrays_in_memory_and_images_in_any_order(model: CompressionVAE) -> None:
    images = labelled(X.reshape(100, 8, 8), ("sample", "row", "column"))
    for given in (labelled(X), images, images.transpose("row", "sample", "column")):
        z = model.embed(given)
        np.testing.assert_array_equal(z.values, model.embed(X))
        assert list(z.id.values) == list(given.id.values)


def test_datasets(model: CompressionVAE) -> None:
    rows = labelled(da.from_array(X, chunks=(40, 64)))
    with dask.config.set(scheduler=refuse):
        z = model.embed(xr.Dataset({"x": rows, "weight": ("sample", np.ones(100))}))
        back = model.decode(z)
    assert list(z.data_vars) == ["z"]
    assert list(back.data_vars) == ["x"]
    assert set(z.coords) == {"id", "label"}
    np.testing.assert_array_equal(z.z.values, model.embed(X))
    np.testing.assert_array_equal(model.embed(xr.Dataset({"pixels": rows})).z.values, model.embed(X))
    with pytest.raises(InvalidInput, match="name one of them 'x'"):
        model.embed(xr.Dataset({"a": rows, "b": rows}))


def test_stores_of_latents_as_xarray_opens_them(model: CompressionVAE, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    for i, row in enumerate(X[:20]):
        np.save(tmp_path / "tree" / f"{i:02d}.npy", row)
    places = [str(tmp_path / name) for name in ("rows.zarr", "model", "latents.zarr")]
    ingest(tmp_path / "tree", places[0])
    CompressionVAE(X, logdir=places[1], **QUICK).train()
    embed(*places)
    stored = xr.open_zarr(places[2])
    assert set(stored.data_vars) == {"z"}
    np.testing.assert_array_equal(stored.z.sel(latent=0), stored.z.values[:, 0])
    back = CompressionVAE(logdir=places[1]).decode(stored)
    np.testing.assert_array_equal(back.x.values, CompressionVAE(logdir=places[1]).decode(stored.z.values))
    assert set(back.coords) == {"id"}


SCORES: dict[str, Any] = {
    "elbo": (lambda model, rows: model.score_samples(rows), "score", ()),
    "iwae": (lambda model, rows: model.score_samples(rows, "iwae", k=3), "score", ()),
    "spread": (lambda model, rows: model.embed(rows, return_std=True)[1], "z", ("latent",)),
    "draws": (lambda model, rows: model.posterior_sample(rows, 3, random_state=0), "z", ("draw", "latent")),
}


@pytest.mark.parametrize("name", SCORES)
def test_scores_and_draws_are_lazy_too(model: CompressionVAE, name: str) -> None:
    call, result_name, dims = SCORES[name]
    counted = Counted((100, 64))
    with dask.config.set(scheduler=refuse):
        bare, labels = call(model, counted.rows), call(model, labelled(counted.rows))
        variables = call(model, dataset(counted.rows))
    assert counted.blocks == 0
    expected = call(model, X)
    assert (bare.shape, bare.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_array_equal(bare.compute(), expected)
    assert (labels.name, labels.dims) == (result_name, ("sample", *dims))
    assert list(variables.data_vars) == [result_name]
    xr.testing.assert_equal(labels.coords.to_dataset(), labelled(X).coords.to_dataset())
    np.testing.assert_array_equal(labels.values, expected)
    np.testing.assert_array_equal(variables[result_name].values, expected)


def test_scores_do_not_depend_on_the_blocks(model: CompressionVAE) -> None:
    for kind in ("elbo", "reconstruction", "iwae"):
        blocks = model.score_samples(da.from_array(X, chunks=(7, 64)), kind)
        np.testing.assert_array_equal(blocks.compute(), model.score_samples(X, kind))


def test_draws_of_lazy_rows_repeat_and_differ_between_blocks(model: CompressionVAE) -> None:
    draws = model.posterior_sample(da.from_array(X, chunks=(50, 64)), random_state=0)
    one, other = draws.compute(), draws.compute()
    np.testing.assert_array_equal(one, other)
    mean, spread = model.embed(X, return_std=True)
    noise = (one[:, 0] - mean) / spread
    assert not np.allclose(noise[:50], noise[50:], atol=1e-2)


def test_what_looks_at_rows_computes_them_once(model: CompressionVAE) -> None:
    counted = Counted((30, 64))
    assert str(model.diagnose(labelled(counted.rows))) == str(model.diagnose(X))
    assert counted.blocks == 4
    model.fit_prior(dataset(counted.rows))
    assert counted.blocks == 8
    valid = CompressionVAE(X, labelled(counted.rows), **QUICK).train().history_[-1]["validation_loss"]
    assert valid == CompressionVAE(X, X, **QUICK).train().history_[-1]["validation_loss"]
    assert counted.blocks == 12


def test_slices_compute_only_their_blocks(model: CompressionVAE) -> None:
    counted = Counted((10, 64))
    z = model.embed(labelled(counted.rows))
    np.testing.assert_array_equal(z[35:38].values, model.embed(X[35:38]))
    assert counted.blocks == 1


@pytest.mark.parametrize("wrap", [da.asarray, labelled, dataset])
def test_training_computes_every_block_once(model: CompressionVAE, wrap: Any) -> None:
    counted = Counted((30, 64))
    trained = CompressionVAE(wrap(counted.rows), **QUICK).train()
    assert counted.blocks == 4
    np.testing.assert_array_equal(trained.embed(X), model.embed(X))


def test_training_remembers_the_shape_of_items() -> None:
    images = labelled(X.reshape(100, 8, 8), ("sample", "row", "column")).transpose("row", "sample", "column")
    assert CompressionVAE(images, **QUICK).train().item_shape_ == (8, 8)
    assert CompressionVAE(**QUICK).fit(images.chunk()).item_shape_ == (8, 8)


def test_refusals(model: CompressionVAE) -> None:
    for wrap in (da.from_array, labelled):
        with pytest.raises(InvalidInput, match=r"63 features.* 64 features"):
            model.embed(wrap(X[:, :63]))
        with pytest.raises(InvalidInput, match="complex64 are no real numbers"):
            model.embed(wrap(X.astype(np.complex64)))
    with pytest.raises(InvalidInput, match="64 features.* 2 features"):
        model.decode(da.from_array(X))
    broken = model.embed(da.from_array(np.where(np.eye(100, 64) > 0, np.nan, X), chunks=(50, 64)))
    with pytest.raises(InvalidInput, match="NaN"):
        broken.compute()
    with pytest.raises(InvalidInput, match="complex64 are no real numbers"):
        CompressionVAE(da.from_array(X.astype(np.complex64)), **QUICK).train()
    unknown = da.from_array(X, chunks=(50, 64))
    with pytest.raises(InvalidInput, match="compute_chunk_sizes"):
        CompressionVAE(unknown[unknown[:, 2] > 3], **QUICK).train()


@pytest.mark.parametrize("kind", [lambda rows: rows, labelled, dataset])
def test_scores_and_pictures_of_lazy_rows(model: CompressionVAE, kind: Any) -> None:
    rows = kind(da.from_array(X, chunks=(40, 64)))
    assert model.score(rows) == pytest.approx(model.score(X))
    expected = model.visualize(model.embed(X)).axes[0].collections[0].get_offsets()
    np.testing.assert_array_equal(model.visualize(model.embed(rows)).axes[0].collections[0].get_offsets(), expected)
    assert model.visualize_reconstructions(rows, n=3, shape=(8, 8)).axes[0].images
