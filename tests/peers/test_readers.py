"""Other people's readers on what `ingest` and `embed` write: plain xarray, tensorstore, zarrs."""

import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import xarray as xr
import zarr

from cvae_dist.estimator import CompressionVAE
from cvae_dist.store import RowStore
from cvae_dist.verbs.embed import embed
from cvae_dist.verbs.ingest import ingest

# Rows of each dtype that fill more than one shard of 16 MB, the last of them only in part.
N_FEATURES = 1000
ROWS = {"<f2": 8300, "<f4": 4300, "<f8": 2300, "|u1": 16_700}
FILES = 3


@dataclass(frozen=True)
class Written:
    """What was ingested and embedded, and where."""

    rows: np.ndarray
    store: str
    latents: str
    model: CompressionVAE


def values(dtype: str, shape: tuple[int, int]) -> np.ndarray:
    rng = np.random.default_rng(0)
    if dtype == "|u1":
        return rng.integers(0, 256, shape, dtype=np.uint8)
    return rng.normal(size=shape).astype(dtype)


@pytest.fixture(
    scope="module", params=["<f4", "|u1", *(pytest.param(dtype, marks=pytest.mark.heavy) for dtype in ("<f2", "<f8"))]
)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("readers")
    rows = values(request.param, (ROWS[request.param], N_FEATURES))
    for number, part in enumerate(np.array_split(rows, FILES)):
        (folder / "tree" / f"class{number}").mkdir(parents=True)
        np.save(folder / "tree" / f"class{number}" / "part.npy", part)
    store, latents, logdir = (str(folder / name) for name in ("rows.zarr", "latents.zarr", "model"))
    ingest(str(folder / "tree"), store, rows_per_file="many", label="folder")
    model = CompressionVAE(rows[:200], logdir=logdir, num_steps=3, cells_encoder=(8,)).train()
    embed(store, logdir, latents)
    return Written(rows, store, latents, model)


def test_these_stores_have_several_shards_and_a_ragged_end(written: Written) -> None:
    store = RowStore.open(written.store)
    assert store.layout.shards(store.rows) > 1
    assert store.rows % store.layout.rows_per_shard % store.layout.rows_per_chunk != 0


def test_xarray(written: Written) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with xr.open_zarr(written.store) as rows, xr.open_zarr(written.latents) as latents:
            assert rows["x"].dims == ("sample", "feature")
            assert rows["x"].dtype == written.rows.dtype
            np.testing.assert_array_equal(rows["x"].to_numpy(), written.rows)
            labels = np.repeat(
                [f"class{i}" for i in range(FILES)], [len(p) for p in np.array_split(written.rows, FILES)]
            )
            for dataset in (rows, latents):
                assert "label" in dataset.coords
                np.testing.assert_array_equal(dataset["label"].to_numpy().tolist(), labels)
            assert latents["z"].dims == ("sample", "latent")
            np.testing.assert_array_equal(latents["z"].to_numpy(), written.model.embed(written.rows))


def test_xarray_statistics(written: Written) -> None:
    with xr.open_zarr(written.store, group=RowStore.open(written.store).publication.path) as rows:
        np.testing.assert_allclose(rows["mean"], written.rows.mean(axis=0, dtype=np.float64), atol=1e-9)
        np.testing.assert_allclose(rows["std"], written.rows.std(axis=0, dtype=np.float64), rtol=1e-9)
        np.testing.assert_array_equal(rows["min"], written.rows.min(axis=0))
        np.testing.assert_array_equal(rows["max"], written.rows.max(axis=0))


def test_tensorstore(written: Written) -> None:
    for url, name, expected in (
        (written.store, "x", written.rows),
        (written.latents, "z", written.model.embed(written.rows)),
    ):
        kvstore = {"driver": "file", "path": f"{url}/{name}/"}
        array = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True).result()
        assert array.domain.labels[0] == "sample"
        np.testing.assert_array_equal(array.read().result(), expected)
        np.testing.assert_array_equal(array[len(expected) - 7 :].read().result(), expected[-7:])


def test_tensorstore_reads_what_describes_the_rows(written: Written) -> None:
    publication = RowStore.open(written.store).publication
    numeric = [name for name, stored in publication.arrays.items() if stored.dtype != "string"]  # it knows no strings
    assert {"mean", "std", "min", "max", "record", "manifest_rows"} <= {*numeric}
    for name in numeric:
        kvstore = {"driver": "file", "path": f"{written.store}/{publication.path}/{name}/"}
        array = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True).result()
        np.testing.assert_array_equal(array.read().result(), publication.read(name))
    kvstore["path"] = f"{written.store}/{publication.path}/mean/"
    mean = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True).result().read().result()
    np.testing.assert_allclose(mean, np.asarray(written.rows, np.float64).mean(axis=0), rtol=1e-12, atol=1e-14)


ZARRS = """
import sys, numpy as np, zarr, zarrs
zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True})
array = zarr.open_array(sys.argv[1], mode="r")
assert type(array._async_array.codec_pipeline).__name__ == "ZarrsCodecPipeline"
np.save(sys.argv[2], array[...])
np.save(sys.argv[3], array[-7:])
"""


def test_zarrs(written: Written, tmp_path: Path) -> None:
    for url, name, expected in (
        (written.store, "x", written.rows),
        (written.latents, "z", written.model.embed(written.rows)),
    ):
        whole, end = tmp_path / f"{name}.npy", tmp_path / f"{name}-end.npy"
        done = subprocess.run(
            [sys.executable, "-c", ZARRS, f"{url}/{name}", str(whole), str(end)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        np.testing.assert_array_equal(np.load(whole), expected)
        np.testing.assert_array_equal(np.load(end), expected[-7:])


def test_plain_zarr(written: Written) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = zarr.open_group(written.store, mode="r")
        np.testing.assert_array_equal(group["x"][...], written.rows)  # type: ignore[index]


def test_ids_of_one_vector_files_are_coordinates(digits_tree: Path, tmp_path: Path) -> None:
    store, latents, logdir = (str(tmp_path / name) for name in ("rows.zarr", "latents.zarr", "model"))
    ingest(str(digits_tree), store, rows_per_file="one", label="folder")
    CompressionVAE(store, logdir=logdir, num_steps=3, cells_encoder=(8,)).train()
    embed(store, logdir, latents)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for url in (store, latents):
            with xr.open_zarr(url) as dataset:
                assert {"id", "label"} <= set(dataset.coords)
                ids = dataset["id"].to_numpy().tolist()
                assert sorted(ids) == sorted(
                    path.relative_to(digits_tree).as_posix() for path in digits_tree.rglob("*.npy")
                )
                assert dataset["label"].to_numpy().tolist() == [name.split("/")[0] for name in ids]
        with xr.open_zarr(store) as dataset:
            for row in (0, 150, 299):
                original = np.load(digits_tree / str(dataset["id"].to_numpy()[row]))
                np.testing.assert_array_equal(dataset["x"][row].to_numpy(), original.ravel())
                assert list(dataset["x"].attrs["item_shape"]) == [8, 8]
