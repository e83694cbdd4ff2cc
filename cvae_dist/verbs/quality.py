"""How good a model's latents and reconstructions are, measured on rows it was not trained on."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cvae_dist.store import Location, RowStore
from cvae_dist.store.layout import Block
from cvae_dist.store.ranges import RowNumbers
from cvae_dist.store.urls import StorageOptions

_NEIGHBOURS = 5
MAX_NEIGHBOUR_ROWS = 50_000  # 5-NN over more training rows takes minutes and changes the third digit only
MAX_COMPARED_ROWS = 2_000  # held-out rows lie in different chunks: each costs one read of about 1 MB


@dataclass(frozen=True)
class Quality:
    """How good a model is, on rows it was not trained on. A figure that was not measured is None.

    Attributes
    ----------
    held_out_rows : int
        Rows that were measured.
    negative_elbo : float
        Validation -ELBO per row, in nats.
    neighbour_accuracy : float
        Share of the held-out rows that have the class of the majority of their 5 nearest training rows.
    reconstruction_mse : float
        Mean squared error per feature, in the data's units squared.
    reconstruction_fraction : float
        The same as a fraction of the variance: 0 is perfect, 1 is what the mean row alone would give.
    """

    held_out_rows: int
    negative_elbo: float | None = None
    neighbour_accuracy: float | None = None
    reconstruction_mse: float | None = None
    reconstruction_fraction: float | None = None


def read_scattered(store: RowStore, name: str, rows: RowNumbers) -> Block:
    """Read scattered, sorted rows of one array, each of its chunks once: (n, ...), in the dtype of the store."""
    chunks, starts = np.unique(rows // store.layout.rows_per_chunk, return_index=True)
    parts = []
    for chunk, wanted in zip(chunks, np.split(rows, starts[1:]), strict=True):
        first = int(chunk) * store.layout.rows_per_chunk
        block = store.read(name, first, min(first + store.layout.rows_per_chunk, store.rows))
        parts.append(block[wanted - first])
    return np.concatenate(parts)


def evenly(rows: RowNumbers, at_most: int) -> RowNumbers:
    """Return at most ``at_most`` of the rows, evenly spaced in their order."""
    return rows if len(rows) <= at_most else rows[np.linspace(0, len(rows) - 1, at_most).astype(np.int64)]


def neighbour_accuracy(latents: RowStore, held_out: RowNumbers, *, label: str = "label") -> float:
    """Return the share of held-out rows that have the class of the majority of their 5 nearest training rows.

    Latents are compared by Euclidean distance; the column ``label`` carries the classes. All rows that are not in
    ``held_out``, which is sorted, are training rows. At most 50,000 of them take part.
    """
    from sklearn.neighbors import KNeighborsClassifier

    training = np.setdiff1d(np.arange(latents.rows), held_out, assume_unique=True)
    training = evenly(training, MAX_NEIGHBOUR_ROWS)
    classifier = KNeighborsClassifier(n_neighbors=min(5, len(training)))
    classifier.fit(read_scattered(latents, latents.main, training), _classes(latents, label, training))
    accuracy = classifier.score(read_scattered(latents, latents.main, held_out), _classes(latents, label, held_out))
    return float(accuracy)


def _classes(store: RowStore, label: str, rows: RowNumbers) -> NDArray[np.str_]:
    """Return a column in the kind of string that scikit-learn knows."""
    return np.array([str(name) for name in read_scattered(store, label, rows)])


def reconstruction_error(rows: RowStore, reconstructions: RowStore, held_out: RowNumbers) -> float:
    """Return the mean squared error per feature of held-out rows (sorted), in the data's units squared.

    Both stores have the same rows in the same order. At most 2,000 rows are compared.
    """
    compared = evenly(held_out, MAX_COMPARED_ROWS)
    truth = read_scattered(rows, rows.main, compared).astype(np.float64)
    decoded = read_scattered(reconstructions, reconstructions.main, compared).astype(np.float64)
    return float(np.mean((truth - decoded) ** 2))


def measure(
    store: str,
    model: str,
    *,
    latents: str | None = None,
    reconstructions: str | None = None,
    label: str = "label",
    storage_options: StorageOptions | None = None,
) -> Quality:
    """Measure a model on the rows that its training held out.

    Parameters
    ----------
    store : path or URL
        Zarr store of the rows it was trained on.
    model : path or URL
        Directory of the model.
    latents : path or URL, optional
        Zarr store made by embed from those rows.
    reconstructions : path or URL, optional
        Zarr store made by decode from those latents.
    label : str
        Column with the classes. Without such a column there is no neighbour accuracy.
    storage_options : Mapping, optional
        Options of the file system, for fsspec.
    """
    from cvae_dist.model.files import read_description
    from cvae_dist.store.permutation import hold_out

    lineage = read_description(Location.of(model, storage_options))["lineage"]
    held_out, _ = hold_out(**lineage["held_out"])
    if not len(held_out):
        return Quality(0)
    accuracy = mse = fraction = None
    if latents is not None:
        embedded = RowStore.open(latents, storage_options)
        accuracy = neighbour_accuracy(embedded, held_out, label=label) if label in embedded.columns else None
        embedded.require_unchanged()
    if reconstructions is not None:
        rows = RowStore.open(store, storage_options)
        decoded = RowStore.open(reconstructions, storage_options)
        mse = reconstruction_error(rows, decoded, held_out)
        rows.require_unchanged()
        decoded.require_unchanged()
        variance = float(np.mean(rows.statistics().std ** 2))
        fraction = mse / variance if variance > 0 else None
    return Quality(len(held_out), lineage["figures"]["validation_loss"], accuracy, mse, fraction)
