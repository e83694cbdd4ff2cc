"""Every command under "Your data" and "Every night" of the README, as written, on small data."""

import re
import shlex
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import xarray as xr

from cvae_dist.cli import main
from cvae_dist.store import Location, RowStore
from cvae_dist.verbs.verify import verify
from tests.servers import Served, serve

README = (Path(__file__).parents[2] / "README.md").read_text()
SECTION = README.partition("## Your data\n")[2].partition("\n## Train on a cluster")[0]
COMMANDS = [line.partition("#")[0].strip() for line in re.findall(r"^    cvae-dist .*$", SECTION, flags=re.MULTILINE)]
ROWS = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
NAMES = [f"row {number}" for number in range(12)]


def vectors(root: Path) -> None:
    for number, row in enumerate(ROWS):
        (root / "vectors").mkdir(exist_ok=True)
        np.save(root / f"vectors/{number:02}.npy", row)


def photos(root: Path) -> None:
    for number in range(12):
        (root / f"photos/class {number % 3}").mkdir(parents=True, exist_ok=True)
        np.save(root / f"photos/class {number % 3}/{number:02}.npy", np.full((4, 3), number, np.uint8))


def blocks(root: Path) -> None:
    (root / "blocks").mkdir()
    for number, block in enumerate(np.split(ROWS, [5, 7])):
        np.save(root / f"blocks/{number}.npy", block)


def features(root: Path) -> None:
    np.savez(root / "features.npz", train=ROWS, test=ROWS[:2] + 9)


def embeddings(root: Path) -> None:
    (root / "embeddings").mkdir()
    table = {"key": np.arange(12) + 100, "url": NAMES, "embedding": list(ROWS), "width": np.arange(12)}
    pd.DataFrame(table).to_parquet(root / "embeddings/0.parquet")


def people(root: Path) -> None:
    frame = pd.DataFrame(ROWS[:, :3].astype(float), columns=["age", "height", "weight"])
    frame.assign(name=NAMES).to_csv(root / "people.csv", index=False)


def laion(root: Path) -> None:
    for folder in ("img_emb", "metadata"):
        (root / "laion" / folder).mkdir(parents=True)
    for number, part in enumerate((slice(0, 7), slice(7, 12))):
        np.save(root / f"laion/img_emb/img_emb_{number:04}.npy", ROWS[part].astype(np.float16))
        table = pd.DataFrame({"caption": NAMES[part], "similarity": 0.3})
        table.to_parquet(root / f"laion/metadata/metadata_{number:04}.parquet")


def climate(root: Path) -> None:
    fields = ROWS[:, :4].reshape(12, 2, 2)
    dataset = xr.Dataset({"t2m": (("time", "lat", "lon"), fields), "mean": (("lat", "lon"), fields[0])})
    dataset.to_zarr(root / "climate.zarr", consolidated=False)


def spectra(root: Path) -> None:
    with h5py.File(root / "spectra.h5", "w") as file:
        file["flux"], file["error"] = ROWS, ROWS * 0.1


MAKERS = {
    "vectors": vectors, "photos": photos, "blocks": blocks, "features.npz": features, "embeddings": embeddings,
    "people.csv": people, "laion": laion, "climate.zarr": climate, "spectra.h5": spectra,
}  # fmt: skip
EXPECTED = {
    "photos": np.repeat(np.array(sorted(range(12), key=lambda number: number % 3)), 12).reshape(12, 12),
    "people.csv": ROWS[:, :2], "laion": ROWS.astype(np.float16), "climate.zarr": ROWS[:, :4],
}  # fmt: skip
LOCAL = [command for command in COMMANDS if "s3://" not in command]


@pytest.mark.parametrize("command", LOCAL)
def test_a_source_on_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(command)[1:]
    source = arguments[1]
    MAKERS[source](tmp_path)
    assert main(arguments) == 0
    store = RowStore.open("rows.zarr")
    np.testing.assert_allclose(store.read("x"), EXPECTED.get(source, ROWS), rtol=1e-6)
    for flag, names in (("--id", ["id"]), ("--label", ["label"]), ("--carry", arguments[-1:])):
        if flag in arguments:
            assert set(names) <= set(store.columns)
            assert len(set(store.read(names[0]).tolist())) > 1
    assert verify("rows.zarr").ok
    assert main(arguments) == 0, "again, with nothing new"
    assert len(RowStore.open("rows.zarr").history.splitlines()) == 1


def test_every_kind_of_source_has_a_command() -> None:
    assert {shlex.split(command)[2] for command in LOCAL} == MAKERS.keys()


@pytest.fixture(scope="module")
def served() -> Served:
    return serve("moto")


@pytest.mark.parametrize("command", [command for command in COMMANDS if "s3://" in command and " ingest " in command])
def test_a_source_in_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, served: Served, command: str) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in served.environment.items():
        monkeypatch.setenv(name, value)
    vectors(tmp_path)
    place = f"{served.url}/{abs(hash(command))}"
    for file in (tmp_path / "vectors").iterdir():
        (Location.of(place) / "vectors" / file.name).write(file.read_bytes())
    arguments = [word.replace("s3://bucket", place) for word in shlex.split(command)[1:]]
    assert main(arguments) == 0
    np.testing.assert_array_equal(RowStore.open(arguments[2]).read("x"), ROWS)
