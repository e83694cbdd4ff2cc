"""How good a model's latents and reconstructions are, measured on rows it was not trained on."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cvae_dist.store import RowStore

Rows = NDArray[np.int64]

MAX_NEIGHBOUR_ROWS = 50_000  # 5-NN over more training rows takes minutes and changes the third digit only
MAX_COMPARED_ROWS = 2_000  # held-out rows lie in different chunks: each costs one read of about 1 MB


@dataclass(frozen=True)
class Reconstruction:
    """Mean squared error per feature: in the data's units squared, and as a fraction of its variance."""

    mse: float
    fraction_of_variance: float


def read_rows(store: RowStore, name: str, rows: Rows) -> NDArray[Any]:
    """Read scattered rows of one array, each of its chunks once.

    Parameters
    ----------
    store : RowStore
    name : str
        The array.
    rows : (n,) sorted int64 array

    Returns
    -------
    (n, ...) array in the dtype of the store
    """
    chunks, starts = np.unique(rows // store.layout.rows_per_chunk, return_index=True)
    parts = []
    for chunk, wanted in zip(chunks, np.split(rows, starts[1:]), strict=True):
        first = int(chunk) * store.layout.rows_per_chunk
        block = store.read(name, first, min(first + store.layout.rows_per_chunk, store.rows))
        parts.append(block[wanted - first])
    return np.concatenate(parts)


def evenly(rows: Rows, at_most: int) -> Rows:
    """Return at most so many of the rows, evenly spaced in their order."""
    return rows if len(rows) <= at_most else rows[np.linspace(0, len(rows) - 1, at_most).astype(np.int64)]


def neighbour_accuracy(
    latents: RowStore, held_out: Rows, *, label: str = "label", neighbours: int = 5
) -> float:
    """Return how often the majority of the nearest training rows has the class of a held-out row.

    Latents are compared by Euclidean distance. At most 50,000 training rows take part.

    Parameters
    ----------
    latents : RowStore
        With ``label`` as a carried column.
    held_out : (n,) sorted int64 array
        Rows the model was not trained on; all others are training rows.

    Returns
    -------
    float
        Share of the held-out rows, in [0, 1].
    """
    from sklearn.neighbors import KNeighborsClassifier

    training = np.setdiff1d(np.arange(latents.rows), held_out, assume_unique=True)
    training = evenly(training, MAX_NEIGHBOUR_ROWS)
    classifier = KNeighborsClassifier(n_neighbors=min(neighbours, len(training)))
    classifier.fit(
        read_rows(latents, latents.main, training), read_rows(latents, label, training).astype(str)
    )
    accuracy = classifier.score(
        read_rows(latents, latents.main, held_out), read_rows(latents, label, held_out).astype(str)
    )
    return float(accuracy)


def reconstruction_error(rows: RowStore, reconstructions: RowStore, held_out: Rows) -> Reconstruction:
    """Compare held-out rows (at most 2,000 of them) with what the decoder made of their latents.

    The fraction is the mean squared error over the mean variance of the features: 0 is perfect, 1 is what
    the mean row alone would give.

    Parameters
    ----------
    rows, reconstructions : RowStore
        The same rows in the same order.
    held_out : (n,) sorted int64 array
    """
    compared = evenly(held_out, MAX_COMPARED_ROWS)
    truth = read_rows(rows, rows.main, compared).astype(np.float64)
    decoded = read_rows(reconstructions, reconstructions.main, compared).astype(np.float64)
    mse = float(np.mean((truth - decoded) ** 2))
    variance = float(np.mean(rows.statistics().std ** 2))
    return Reconstruction(mse, mse / variance if variance > 0 else float("nan"))
