"""What strangers type: arguments in the wrong order, places of other kinds, and the remedies that messages name."""

from pathlib import Path

import numpy as np
import pytest
import zarr

import cvae_dist as cvae
from cvae_dist.errors import CvaeDistError, InvalidInput
from tests.faults.drivers import snapshot


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that can be mistaken for something else."""
    root = tmp_path_factory.mktemp("made")
    (root / "photos").mkdir()
    np.save(root / "photos/a.npy", np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32))
    cvae.ingest(root / "photos", root / "rows.zarr")
    cvae.train(str(root / "rows.zarr"), str(root / "model"), num_steps=3, tb_logging=False)
    cvae.embed(root / "rows.zarr", root / "model", root / "latents.zarr")
    zarr.create_array(str(root / "plain.zarr"), shape=(4, 4), dtype="f4")
    (root / "notes.txt").write_text("mine")
    (root / "thesis").mkdir()
    (root / "thesis/chapter1.tex").write_text("mine")
    return root


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model", "is the directory of a model. A store is named before its model: cvae-dist train STORE MODEL"),
        ("photos", "is a folder of .npy files. Make a store of them first: cvae-dist ingest"),
        ("plain.zarr", "is a Zarr store that cvae-dist did not make"),
        ("notes.txt", "is a file"),
        ("thesis", "holds something else"),
    ],
)
def test_what_is_no_store_is_told_and_left_alone(made: Path, name: str, said: str) -> None:
    place, before = made / name, snapshot(made)
    readers = [lambda: cvae.train(str(place), str(made / "new")), lambda: cvae.score(place, made / "model", made / "s")]
    if name != "model":
        readers += [lambda: cvae.verify(str(place)), lambda: cvae.info(str(place))]
        readers.append(lambda: cvae.ingest(made / "photos", place))
    for read in readers:
        with pytest.raises(CvaeDistError) as refusal:
            read()
        text = str(refusal.value)
        assert said in text
        for dangerous in ("remove", "delete", "overwrite"):
            assert dangerous not in text
    assert snapshot(made) == before


def test_a_store_where_a_model_is_expected_is_told_too(made: Path) -> None:
    for use in (
        lambda: cvae.embed(made / "model", made / "rows.zarr", made / "new"),
        lambda: cvae.sample(made / "rows.zarr", made / "new", 5),
        lambda: cvae.load_model(str(made / "latents.zarr")),
    ):
        with pytest.raises(CvaeDistError, match="zarr is a store, not a model. A store is named before its model"):
            use()
    assert not (made / "new").exists()


def test_nothing_recorded_defends_no_settings(made: Path, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    rows = np.ones((5, 3), np.float32)
    rows[2, 1] = np.nan
    np.save(tmp_path / "tree/a.npy", rows)
    with pytest.raises(InvalidInput, match="leave such rows out with --nonfinite drop"):
        cvae.ingest(tmp_path / "tree", tmp_path / "s")
    assert cvae.ingest(tmp_path / "tree", tmp_path / "s", nonfinite="drop").rows == 4
