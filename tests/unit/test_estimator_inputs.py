"""What people bring: every kind that is no table of numbers is refused by name, with the line that converts it."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sklearn.impute
import torch
import xarray as xr
import zarr
from PIL import Image

from cvae_dist.errors import CvaeDistError, InvalidInput
from cvae_dist.estimator import CompressionVAE
from cvae_dist.store import RowStore
from cvae_dist.verbs.ingest import ingest

N = 40
RANDOM = np.random.default_rng(0)
NUMBERS = RANDOM.normal(size=(N, 3))
TABLE = pd.DataFrame({"age": RANDOM.normal(size=N), "income": RANDOM.integers(0, 9, N)})
IMAGES = RANDOM.random((N, 3, 4))
QUICK: dict[str, Any] = {"num_steps": 1, "cells_encoder": (4,), "multi_start": False, "verbose": False}


def npz() -> Any:
    file = io.BytesIO()
    np.savez(file, data=NUMBERS, labels=np.arange(N))
    file.seek(0)
    return np.load(file)


def group() -> Any:
    made = zarr.group()
    made.create_array("data", data=NUMBERS)
    return made


def loader() -> Any:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.from_numpy(NUMBERS)), batch_size=8)


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "NaN": (lambda: TABLE.assign(age=TABLE["age"].where(TABLE["age"] > 0)), r"NaN.* column 'age': \d+ of 40 rows"),
    "NA": (lambda: TABLE.assign(income=TABLE["income"].astype("Int64").where(TABLE["income"] > 3)), "column 'income'"),
    "only NaN": (lambda: TABLE.assign(none=np.nan), "column 'none': 40 of 40"),
    "NaN in an array": (lambda: np.where(NUMBERS > 1, np.nan, NUMBERS), r"NaN.* column \d: \d+"),
    "NaN in images": (lambda: np.where(IMAGES > 0.9, np.nan, IMAGES), r"NaN.* position \(\d, \d\): \d+"),
    "infinity": (lambda: TABLE.assign(age=np.where(TABLE["age"] > 0, np.inf, 0)), r"infinity in column 'age': \d+"),
    "infinity in images": (lambda: np.where(IMAGES > 0.998, np.inf, IMAGES), r"infinity in position \(\d, \d\)"),
    "text": (lambda: TABLE.assign(city=["Bonn", "Rome"] * 20), "column 'city', such as 'Bonn'"),
    "categories": (lambda: TABLE.assign(city=pd.Categorical(["a", "b"] * 20)), "column 'city', such as 'a'"),
    "text in an array": (lambda: np.array([["a", 1], ["b", 2]] * 20, dtype=object), "column '0', such as 'a'"),
    "text in lists": (lambda: [[1, "a"], [2, "b"]] * 20, "column '1', such as 'a'"),
    "dates": (lambda: TABLE.assign(when=pd.date_range("2020", periods=N, tz="UTC")), "dates .* column 'when'"),
    "durations": (lambda: TABLE.assign(when=pd.to_timedelta(range(N), unit="h")), "durations in column 'when'"),
    "periods": (lambda: TABLE.assign(when=pd.period_range("2020", periods=N)), "dates .* column 'when'"),
    "dates in an array": (lambda: np.arange(2 * N).reshape(N, 2).astype("M8[s]"), r"dates .*datetime64\[s\]"),
    "complex": (lambda: NUMBERS + 1j, "X is complex128"),
    "masked": (lambda: np.ma.masked_greater(NUMBERS, 1), r"masked in column \d: \d+"),
    "dict": (lambda: {"a": NUMBERS[:, 0], "b": NUMBERS[:, 1]}, "dict with the keys 'a', 'b'"),
    "generator": (lambda: iter(NUMBERS), "can be read only once"),
    "npz": (npz, "NpzFile with the arrays 'data', 'labels'"),
    "zarr group": (group, "zarr.Group with the arrays 'data'"),
    "DataLoader": (loader, "DataLoader, which gives batches"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_table_of_numbers_is_refused_and_the_printed_line_converts_it(name: str) -> None:
    make, message = BAD[name]
    X = make()
    with pytest.raises(InvalidInput, match=message) as refusal:
        CompressionVAE(X, **QUICK).train()
    assert len(str(refusal.value)) < 400
    names = {"X": X, "numpy": np, "pandas": pd, "sklearn": sklearn, "torch": torch}
    with pytest.warns() if name == "only NaN" else nothing():  # scikit-learn tells that it leaves the column out
        exec("X = " + str(refusal.value).partition(": X = ")[2], names)
    CompressionVAE(names["X"], **QUICK).train()


class nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


def test_what_is_a_table_of_numbers_after_all_works() -> None:
    for X in (
        np.ma.masked_greater(NUMBERS, 100),
        pd.DataFrame({"a": ["1", "2"] * 20, "b": pd.Categorical([1, 2] * 20)}),
        NUMBERS.astype(object),
        torch.from_numpy(NUMBERS),
    ):
        assert CompressionVAE(X, **QUICK).train().embed(X).shape == (N, 2)


def test_columns_are_named_when_a_trained_model_is_used() -> None:
    frame = CompressionVAE(TABLE, **QUICK).train()
    with pytest.raises(InvalidInput, match="column 'age': 40 of 40"):
        frame.embed(TABLE.assign(age=np.nan))
    plain = CompressionVAE(NUMBERS.astype(np.float32), **QUICK).train()
    with pytest.raises(InvalidInput, match=r"column 1: 1 of 40 rows \(first in row 7\)"):
        plain.embed(np.where(np.arange(120).reshape(40, 3) == 22, np.nan, NUMBERS).astype(np.float32))


@pytest.mark.parametrize("n", [1, 3])
def test_a_few_rows_are_not_learned_without_a_word(n: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "cvae_dist"):
        CompressionVAE(NUMBERS[:n], **QUICK | {"verbose": True}).train()
    assert any(f"{n} row" in message and "by heart" in message for message in caplog.messages)


@pytest.mark.parametrize("random_state", [np.random.default_rng(3), np.random.RandomState(3), 3, None])
def test_every_kind_of_random_state(random_state: Any) -> None:
    embedder = CompressionVAE(NUMBERS, random_state=random_state, **QUICK).train()
    assert embedder.sample(3, random_state=random_state).shape == (3, 3)


def test_a_wrong_random_state_is_told() -> None:
    with pytest.raises(InvalidInput, match="'seven'"):
        CompressionVAE(NUMBERS, random_state="seven", **QUICK).train()


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("n_components", "did you mean 'dim_latent'"),
        ("use_gpu", "did you mean 'device'"),
        ("n_jobs", "torch.set_num_threads"),
        ("epochs", "did you mean 'num_steps'"),
    ],
)
def test_words_of_other_libraries_are_answered(name: str, hint: str) -> None:
    with pytest.raises(TypeError, match=re.escape(f"unknown argument {name!r}: ") + f".*{hint}"):
        CompressionVAE(**{name: 2})


# ------------------------------------------------------------------------------------------- files of other kinds


def write_files(folder: Path) -> dict[str, Path]:
    folder.mkdir()
    TABLE.to_csv(folder / "table.csv", index=False)
    TABLE.to_csv(folder / "table.tsv", index=False, sep="\t")
    np.savez(folder / "arrays.npz", rows=NUMBERS)
    xr.Dataset({"x": (("sample", "feature"), NUMBERS)}).to_netcdf(folder / "grid.nc", engine="scipy")
    zarr.create_array(folder / "array.zarr", data=NUMBERS)
    zarr.create_group(folder / "group.zarr").create_array("data", data=NUMBERS)
    (folder / "photos" / "cats").mkdir(parents=True)
    (folder / "tables").mkdir()
    Image.fromarray((IMAGES[3] * 255).astype(np.uint8)).save(folder / "photo.png")
    for number in range(3):
        Image.fromarray((IMAGES[number] * 255).astype(np.uint8)).save(folder / "photos" / "cats" / f"{number}.png")
        TABLE.to_csv(folder / "tables" / f"{number}.csv", index=False)
    return {path.name: path for path in folder.iterdir()}


READ = {
    "table.csv": (40, 2), "table.tsv": (40, 2), "arrays.npz": (40, 3), "tables": (120, 2), "array.zarr": (40, 3),
    "group.zarr": (40, 3),
}  # fmt: skip
CONVERTED = {"grid.nc": (40, 3), "photos": (3, 12), "photo.png": (1, 12)}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("face", ["ingest", "estimator"])
def test_files_of_other_formats_are_read(name: str, face: str, tmp_path: Path) -> None:
    place = write_files(tmp_path / "data")[name]
    if face == "ingest":
        ingest(place, tmp_path / "rows.zarr")
        store = RowStore.open(str(tmp_path / "rows.zarr"))
        assert (store.rows, store.n_features) == READ[name]
    else:
        trained = CompressionVAE(place, **QUICK).train()
        assert trained.n_features_in_ == READ[name][1]


@pytest.mark.parametrize("name", CONVERTED)
@pytest.mark.parametrize("face", ["ingest", "estimator"])
def test_files_that_are_refused_are_converted_by_the_printed_line(name: str, face: str, tmp_path: Path) -> None:
    place = write_files(tmp_path / "data")[name]
    with pytest.raises(CvaeDistError) as refusal:
        ingest(place, tmp_path / "rows.zarr") if face == "ingest" else CompressionVAE(place, **QUICK).train()
    print(refusal.value)
    exec(str(refusal.value).partition("convert it with Python: ")[2].partition(". Nothing of it")[0], {})
    made = next(path for path in (place.with_suffix(".npy"), place.with_suffix(".zarr")) if path.exists())
    ingest(made, tmp_path / "rows.zarr")
    store = RowStore.open(str(tmp_path / "rows.zarr"))
    assert (store.rows, store.n_features) == CONVERTED[name]


def test_files_that_nothing_here_reads(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"")
    with pytest.raises(InvalidInput, match=re.escape("numpy.save(")):
        ingest(tmp_path / "t.txt", tmp_path / "rows.zarr")
    assert [path.name for path in tmp_path.iterdir()] == ["t.txt"]


def test_a_single_npy_file_is_a_source(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", NUMBERS)
    np.save(tmp_path / "other.npy", NUMBERS[:, :2])
    assert ingest(tmp_path / "rows.npy", tmp_path / "rows.zarr").rows == N
    assert ingest(tmp_path / "rows.npy", tmp_path / "rows.zarr").nothing_to_do
    np.testing.assert_array_equal(xr.open_zarr(tmp_path / "rows.zarr")["x"], NUMBERS)
    assert CompressionVAE(tmp_path / "rows.npy", **QUICK).train().embed(NUMBERS).shape == (N, 2)


# ------------------------------------------------------------------------------------------- shapes and names


class TestImagesInImagesOut:
    @pytest.fixture(scope="class")
    @staticmethod
    def trained() -> CompressionVAE:
        return CompressionVAE(IMAGES, **QUICK).train()

    def test_of_arrays(self, trained: CompressionVAE) -> None:
        z = trained.embed(IMAGES)
        flat = trained.model_.decode_rows(z)
        for decoded in (trained.decode(z), trained.inverse_transform(z)):
            np.testing.assert_array_equal(decoded, flat.reshape(N, 3, 4))
        assert trained.sample(5, random_state=0).shape == (5, 3, 4)
        assert trained.interpolate(IMAGES[0], IMAGES[1], n=6).shape == (6, 3, 4)

    def test_of_lazy_latents(self, trained: CompressionVAE) -> None:
        z = xr.DataArray(trained.embed(IMAGES), dims=("sample", "latent"), coords={"sample": np.arange(N) * 10})
        decoded = trained.decode(z.chunk(sample=7))
        assert decoded.dims == ("sample", "feature_0", "feature_1")
        assert decoded["sample"].values[1] == 10
        np.testing.assert_array_equal(decoded, trained.decode(z.values))
        np.testing.assert_array_equal(trained.decode(z.chunk(sample=7).data), trained.decode(z.values))

    def test_of_a_store_and_of_a_restored_model(self, tmp_path: Path) -> None:
        np.save(tmp_path / "images.npy", IMAGES)
        trained = CompressionVAE(tmp_path / "images.npy", logdir=tmp_path / "model", **QUICK).train()
        z = trained.embed(IMAGES)
        restored = CompressionVAE(logdir=tmp_path / "model")
        assert trained.decode(z).shape == restored.decode(z).shape == restored.embed(IMAGES).shape[:1] + (3, 4)

    def test_rows_stay_rows(self) -> None:
        trained = CompressionVAE(NUMBERS, **QUICK).train()
        assert trained.decode(trained.embed(NUMBERS)).shape == NUMBERS.shape


class TestNamesOfColumns:
    @pytest.fixture(scope="class")
    @staticmethod
    def trained() -> CompressionVAE:
        return CompressionVAE(TABLE, **QUICK).train().set_output(transform="pandas")

    def test_decode_and_sample_have_them(self, trained: CompressionVAE) -> None:
        renamed = TABLE.set_index(pd.Index(np.arange(N) + 100))
        decoded = trained.decode(trained.transform(renamed))
        pd.testing.assert_index_equal(decoded.index, renamed.index)
        for frame in (decoded, trained.sample(4), trained.inverse_transform(np.zeros((2, 2)))):
            assert list(frame.columns) == ["age", "income"]
        assert list(trained.interpolate(TABLE.iloc[0], TABLE.iloc[1], n=3).columns) == ["age", "income"]

    def test_diagnose_has_them(self, trained: CompressionVAE) -> None:
        assert re.search(r"worst features +(age|income) \(", str(trained.diagnose(TABLE)))

    def test_without_names_features_are_numbered(self) -> None:
        trained = CompressionVAE(NUMBERS, **QUICK).train().set_output(transform="pandas")
        assert list(trained.sample(2).columns) == ["x0", "x1", "x2"]
        assert re.search(r"worst features +\d \(", str(trained.diagnose(NUMBERS)))
