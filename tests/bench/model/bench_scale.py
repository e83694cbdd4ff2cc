"""Whether `feature_normalization="auto"` is right, against True and False, where features share a unit and where not.

Trustworthiness compares neighbours in the data's own units, where features share their unit. In a table of mixed units
it would see the largest column alone; there every column is first divided by its standard deviation.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.manifold import trustworthiness
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize, scale

import cvae_dist as cvae
from cvae_dist.model.scaling import choose_normalization
from cvae_dist.store import Moments
from tests.bench.model.data import mnist, text
from tests.bench.table import Row

_ROWS = 4000
_STEPS = 1000
_COMPARED = 2000
_TIE = 0.01

Array = NDArray[np.float32]


class Set(NamedTuple):
    """Rows, their classes if there are any, and whether their features have different units."""

    name: str
    rows: Array
    classes: NDArray[np.generic] | None
    mixed: bool = False


class Figures(NamedTuple):
    trust: float
    accuracy: float


def rows() -> Iterator[Row]:
    """Measure every set in 2 and 16 dimensions."""
    for data in sets():
        chosen = choose_normalization("auto", Moments.of(data.rows), data.rows.dtype, data.rows.shape[1:])
        for dim_latent in (2, 16):
            found = {per_feature: _figures(data, dim_latent, per_feature) for per_feature in (True, False)}
            yield _row(data, dim_latent, found, bool(chosen.value), chosen.reason)


def _row(data: Set, dim_latent: int, found: dict[bool, Figures], chosen: bool, reason: str) -> Row:
    lost = max(each.trust for each in found.values()) - found[chosen].trust
    told = ", ".join(f"{choice} {each.trust:.3f}/{each.accuracy:.3f}" for choice, each in found.items())
    name = f"scale, {data.name}, {dim_latent}-D: trust lost by auto"
    return Row(name, lost, _TIE, note=f"trust/5-NN {told}; {reason}", lower=True)


def _figures(data: Set, dim_latent: int, per_feature: bool) -> Figures:
    embedder = cvae.CompressionVAE(
        dim_latent=dim_latent, feature_normalization=per_feature, num_steps=_STEPS, precision="float32", random_state=0
    )
    latents = embedder.fit(data.rows).embed(data.rows)
    rows = scale(data.rows[:_COMPARED]) if data.mixed else data.rows[:_COMPARED]
    trust = trustworthiness(rows, latents[:_COMPARED], n_neighbors=10)
    if data.classes is None:
        return Figures(trust, float("nan"))
    return Figures(trust, cross_val_score(KNeighborsClassifier(5), latents, data.classes, cv=5).mean())


def sets() -> Iterator[Set]:
    """Yield real sets, and made ones where the machine has none."""
    rng = np.random.default_rng(0)
    vectors, classes = (values[:_ROWS] for values in text())
    yield Set("embedding, unit vectors", vectors, classes)
    norms = rng.lognormal(0, 0.3, (len(vectors), 1)).astype(np.float32)
    yield Set("embedding, norms varied, offset", vectors * norms + rng.normal(0, 0.2, 384).astype(np.float32), classes)
    large = vectors.copy()
    large[:, rng.choice(384, 4, replace=False)] *= 5
    yield Set("embedding, 4 large dimensions", large, classes)
    yield Set("embedding, 100 constants beside it", np.pad(vectors, ((0, 0), (50, 50)), constant_values=3.0), classes)
    images = mnist().train[:_ROWS].astype(np.float32) / 255
    digits = mnist().train_labels[:_ROWS]
    yield Set("MNIST as floats", images, digits)
    yield Set("MNIST, every image of mean 0 and variance 1", scale(images, axis=1), digits)
    yield Set("MNIST, every image of unit norm", normalize(images), digits)
    yield Set("spectra", *_spectra(rng))
    yield Set("windows of time series", *_windows(rng))
    yield Set("columns of 0 and 1", *_one_hot(rng))
    for name, load in (("wine", load_wine), ("breast cancer", load_breast_cancer)):
        table, of_table = load(return_X_y=True)
        yield Set(name, table, of_table, mixed=True)
    table, outcome = load_diabetes(return_X_y=True, scaled=False)
    yield Set("diabetes", table, outcome > np.median(outcome), mixed=True)


def _spectra(rng: np.random.Generator) -> tuple[Array, NDArray[np.int64]]:
    """Return mixtures of 8 substances at 300 wavelengths: bands of many heights over a sloping baseline."""
    wavelengths = np.linspace(0, 1, 300)
    centres, widths = rng.uniform(0, 1, (8, 3, 1)), rng.uniform(0.01, 0.06, (8, 3, 1))
    bands = rng.lognormal(0, 1, (8, 3, 1)) * np.exp(-(((wavelengths - centres) / widths) ** 2))
    classes = rng.integers(0, 5, _ROWS)
    shares = rng.dirichlet(np.ones(8), 5)[classes] * rng.lognormal(0, 0.4, (_ROWS, 8))
    baseline = rng.normal(0.1, 0.03, (_ROWS, 1)) * (1 - wavelengths / 2)
    return (shares @ bands.sum(1) + baseline + rng.normal(0, 0.005, (_ROWS, 300))).astype(np.float32), classes


def _windows(rng: np.random.Generator) -> tuple[Array, NDArray[np.int64]]:
    """Return 128 samples from the onset of decaying waves of 5 frequencies, of any phase."""
    time = np.arange(128)
    classes = rng.integers(0, 5, _ROWS)
    rate = (0.1 * 1.6**classes * rng.lognormal(0, 0.05, _ROWS))[:, None]
    waves = rng.lognormal(0, 0.3, (_ROWS, 1)) * np.sin(rate * time + rng.uniform(0, 2 * np.pi, (_ROWS, 1)))
    return (waves * np.exp(-time / 50) + rng.normal(0, 0.05, (_ROWS, 128))).astype(np.float32), classes


def _one_hot(rng: np.random.Generator) -> tuple[Array, NDArray[np.int64]]:
    """Return 12 categorical columns of 6 values, of unlike frequencies that depend on the class, as 72 columns."""
    classes = rng.integers(0, 5, _ROWS)
    weights = rng.dirichlet(np.full(6, 0.5), (5, 12)).cumsum(axis=-1)
    values = (rng.uniform(size=(_ROWS, 12, 1)) > weights[classes]).sum(axis=-1).clip(max=5)
    return np.eye(6, dtype=np.float32)[values].reshape(_ROWS, 72), classes
