"""Quality is measured on the rows that were held out, and on no others."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

import cvae_dist
from cvae_dist.store import RowStore
from cvae_dist.verbs.quality import evenly, neighbour_accuracy, read_scattered, reconstruction_error


@pytest.fixture
def rows(tmp_path: Path) -> RowStore:
    """600 rows of two overlapping classes, as a store with the column ``label``."""
    rng = np.random.default_rng(3)
    for name, centre in (("a", 0.0), ("b", 1.5)):
        (tmp_path / "tree" / name).mkdir(parents=True)
        np.save(tmp_path / "tree" / name / "rows.npy", rng.normal(centre, size=(300, 2)))
    cvae_dist.ingest(str(tmp_path / "tree"), str(tmp_path / "rows.zarr"), rows_per_file="many", label="folder")
    return RowStore.open(str(tmp_path / "rows.zarr"))


def test_scattered_rows_are_the_rows_asked_for(rows: RowStore) -> None:
    chosen = np.array([0, 1, 255, 256, 257, 599])
    np.testing.assert_array_equal(read_scattered(rows, "x", chosen), rows.read("x", 0, 600)[chosen])
    assert [str(name) for name in read_scattered(rows, "label", chosen)] == list("aaaaab")


def test_evenly_keeps_the_ends() -> None:
    assert evenly(np.arange(10), 4).tolist() == [0, 3, 6, 9]
    assert evenly(np.arange(3), 4).tolist() == [0, 1, 2]


def test_neighbours_come_from_the_training_rows_alone(rows: RowStore) -> None:
    held_out = np.arange(0, 600, 7)
    x, labels = rows.read("x", 0, 600), np.array([str(name) for name in rows.read("label", 0, 600)])
    training = np.setdiff1d(np.arange(600), held_out)
    expected = KNeighborsClassifier(5).fit(x[training], labels[training]).score(x[held_out], labels[held_out])
    assert neighbour_accuracy(rows, held_out) == pytest.approx(expected)
    assert 0.6 < expected < 1


def test_the_reconstruction_error_is_that_of_the_held_out_rows(rows: RowStore, tmp_path: Path) -> None:
    x = rows.read("x", 0, 600)
    shift = np.zeros((600, 1))
    held_out = np.array([5, 300, 599])
    shift[held_out] = 2.0
    (tmp_path / "other").mkdir()
    np.save(tmp_path / "other" / "rows.npy", x + shift)
    cvae_dist.ingest(str(tmp_path / "other"), str(tmp_path / "other.zarr"), rows_per_file="many")
    other = RowStore.open(str(tmp_path / "other.zarr"))
    assert reconstruction_error(rows, other, held_out) == pytest.approx(4.0)
    assert reconstruction_error(rows, other, held_out[:2] + 1) == 0.0
