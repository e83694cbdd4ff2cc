"""What default settings make of MNIST: trained on its 60,000 training images, scored on its 10,000 test images."""

import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from sklearn.manifold import trustworthiness
from sklearn.neighbors import KNeighborsClassifier

import cvae_dist as cvae
from tests.bench.model.data import mnist
from tests.bench.table import Row, seconds

_BUDGET = 60  # CPU-seconds of one thread
_LONG_BUDGET = 300
_LONG_STEPS = 18_000  # about what the long budget pays for
_COMPARED = 2000  # test rows whose neighbourhoods are compared


class Quality(NamedTuple):
    """Of the latents of the test rows: 5-NN accuracy and trustworthiness; of their reconstruction: the error."""

    accuracy: float
    trust: float
    mse: float


def quality(embedder: cvae.CompressionVAE) -> Quality:
    data = mnist()
    latents = embedder.embed(data.test)
    neighbours = KNeighborsClassifier(5).fit(embedder.embed(data.train), data.train_labels)
    compared = data.test[:_COMPARED] / 255
    return Quality(
        neighbours.score(latents, data.test_labels),
        trustworthiness(compared, latents[:_COMPARED], n_neighbors=10),
        float(np.mean(((embedder.decode(latents) - data.test) / 255) ** 2)),
    )


def trained(**settings: object) -> tuple[cvae.CompressionVAE, float]:
    """Return a model of the training images and the CPU-seconds it took."""
    embedder = cvae.CompressionVAE(mnist().train, **settings)
    return embedder, seconds(embedder.train, clock=time.process_time)


def rows() -> Iterator[Row]:
    """Measure the defaults in 2 and 16 dimensions, and 2 dimensions with five times the time."""
    yield from _defaults(2, Quality(0.83, 0.925, 0.0345), Quality(0.61, 0.85, 0.0450))
    yield from _defaults(16, Quality(0.975, 0.992, 0.009), Quality(0.853, 0.948, 0.0363))
    embedder, spent = trained(dim_latent=2, num_steps=_LONG_STEPS)
    yield Row("2-D, 5 CPU-minutes: 5-NN accuracy", quality(embedder).accuracy, 0.86, reference="0.683 in 170 s")
    yield Row("2-D, 5 CPU-minutes: CPU-seconds", spent, _LONG_BUDGET, lower=True)


def _defaults(dim_latent: int, bar: Quality, reference: Quality) -> Iterator[Row]:
    embedder, spent = trained(dim_latent=dim_latent)
    reached = quality(embedder)
    case = f"{dim_latent}-D, defaults:"
    yield Row(f"{case} 5-NN accuracy", reached.accuracy, bar.accuracy, reference=f"{reference.accuracy}")
    yield Row(f"{case} trustworthiness", reached.trust, bar.trust, reference=f"{reference.trust}")
    yield Row(f"{case} pixel MSE", reached.mse, bar.mse, lower=True, reference=f"{reference.mse}")
    yield Row(f"{case} CPU-seconds", spent, _BUDGET, lower=True)
