"""What default settings make of vectors of text, against PCA, and what `metric="data"` adds to them.

The texts are docstrings. Of short ones, about 10 words each, a model finds far more neighbours than PCA does. Long ones
have more words than a latent has dimensions, so that there is less that a nonlinear embedding could know better.

`metric="data"` cannot make latents know more of the classes than the vectors do. So its gain is judged where these are
clearly ahead: random projections of short texts. Of the others, a note says how little there is to gain.
"""

import functools
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

import cvae_dist as cvae
from tests.bench.model.data import mnist, text
from tests.bench.table import Row, seconds

LONG, SHORT = 1000, 100  # characters of a text
_COMPARED = 2000  # rows whose neighbourhoods are compared
_ASKED = 1000  # rows whose neighbours are searched for
_NEIGHBOURS, _FOUND_AMONG = 10, 100
_AHEAD = 0.06  # 5-NN accuracy that the rows have and the latents lack: with less, no metric could be judged
_TEST_SHARE = 6  # every how manieth row is held out

Array = NDArray[np.float32]


class Split(NamedTuple):
    """Rows to train on and rows to score, with their classes."""

    train: Array
    test: Array
    train_classes: NDArray[np.generic]
    test_classes: NDArray[np.generic]


class Neighbours(NamedTuple):
    """How well latents keep neighbourhoods: 5-NN accuracy, trustworthiness, recall of the 10 nearest among 10 and 100.

    Neighbours are searched for among the training rows.
    """

    accuracy: float
    trust: float
    recall_10: float
    recall: float

    def __str__(self) -> str:
        return "5-NN {:.3f}, trust {:.3f}, recall {:.3f}/{:.3f}".format(*self)


@functools.cache
def vectors(longest: int, most: int | None = None, *, projected: bool = False) -> Split:
    """Return vectors of texts of ``longest`` characters, at most so many to train on; see :func:`text`."""
    rows, classes = text(longest, projected=projected)
    held_out = np.arange(len(rows)) % _TEST_SHARE == 0
    return Split(rows[~held_out][:most], rows[held_out], classes[~held_out][:most], classes[held_out])


@functools.cache
def images(most: int) -> Split:
    """Return MNIST, at most so many images to train on."""
    data = mnist()
    return Split(data.train[:most], data.test, data.train_labels[:most], data.test_labels)


def judged(split: Split, train: Array, test: Array) -> Neighbours:
    """Compare latents of the rows to train on and of those to score with the rows themselves."""
    accuracy = _accuracy(split, train, test)
    compared = split.test[:_COMPARED].astype(np.float32)
    trust = trustworthiness(compared, test[:_COMPARED], n_neighbors=_NEIGHBOURS)
    true = _nearest(split.train.astype(np.float32), compared[:_ASKED], _NEIGHBOURS)
    found = _nearest(train, test[:_ASKED], _FOUND_AMONG)
    near, far = (np.mean([np.isin(a, b).mean() for a, b in zip(true, found[:, :k], strict=True)]) for k in (10, 100))
    return Neighbours(accuracy, trust, float(near), float(far))


def _accuracy(split: Split, train: Array, test: Array) -> float:
    return float(KNeighborsClassifier(5).fit(train, split.train_classes).score(test, split.test_classes))


def _nearest(rows: Array, asked: Array, count: int) -> NDArray[np.int64]:
    return NearestNeighbors(n_neighbors=count).fit(rows).kneighbors(asked, return_distance=False)


def of_pca(split: Split, dim_latent: int) -> Neighbours:
    pca = PCA(dim_latent, random_state=0).fit(split.train)
    return judged(split, pca.transform(split.train), pca.transform(split.test))


def trained(split: Split, **settings: object) -> tuple[cvae.CompressionVAE, float]:
    """Return a model and the CPU-seconds it took."""
    embedder = cvae.CompressionVAE(random_state=0, precision="float32", **settings)
    return embedder, seconds(lambda: embedder.fit(split.train), clock=time.process_time)


def of_model(split: Split, embedder: cvae.CompressionVAE, metric: str = "latent") -> Neighbours:
    return judged(split, embedder.embed(split.train, metric=metric), embedder.embed(split.test, metric=metric))


def rows() -> Iterator[Row]:
    """Measure defaults in 16 and 64 dimensions, and both metrics."""
    for longest in (SHORT, LONG):
        for dim_latent in (16, 64):
            yield from _rows(f"texts of {longest} characters, {dim_latent}-D", vectors(longest), dim_latent)
    yield from _rows("projected texts of 100 characters, 64-D", vectors(SHORT, projected=True), 64, bar=None)
    yield from _rows("MNIST, 20,000 images, 16-D", images(20_000), 16, bar=None)


def _rows(name: str, split: Split, dim_latent: int, bar: float | None = 1.7) -> Iterator[Row]:
    embedder, spent = trained(split, dim_latent=dim_latent)
    pca, plain, data = of_pca(split, dim_latent), of_model(split, embedder), of_model(split, embedder, "data")
    ahead = _accuracy(split, split.train, split.test) - plain.accuracy
    note = f"PCA {pca}; latent {plain}; data {data}; {spent:.0f} CPU-s"
    note += f"; a recall of 1 would be {1 / pca.recall:.2f} times PCA's"
    yield Row(f"{name}: recall / that of PCA", plain.recall / pca.recall, bar, note=note)
    yield Row(f"{name}, metric data: recall / that of plain latents", data.recall / plain.recall, 0.97)
    least = 0.03 if dim_latent == 64 and ahead >= _AHEAD else None
    note = f"the rows themselves: {ahead:+.3f}"
    yield Row(f"{name}, metric data: 5-NN gained", data.accuracy - plain.accuracy, least, note=note)
    yield Row(f"{name}, metric data: trust gained", data.trust - plain.trust, None)
