"""The VAE of a well-known notebook, as ``pipelines/examples/manifold.py`` trains it: its test loss, its time."""

import time
from collections.abc import Iterator

import numpy as np

import cvae_dist as cvae
from tests.bench.model.data import mnist
from tests.bench.table import Row, seconds

_BUDGET = 45  # CPU-seconds of one thread
_STEPS = 3000


def rows() -> Iterator[Row]:
    """Measure binary cross-entropy plus KL with one draw of the posterior for every test row, in nats."""
    data = mnist()
    embedder = cvae.CompressionVAE(
        data.train, dim_latent=2, loss="bce", cells_encoder=(256,), residual_blocks=2, num_steps=_STEPS
    )
    spent = seconds(embedder.train, clock=time.process_time)
    noise = np.random.default_rng(0).standard_normal((len(data.test), 2), np.float32)
    loss = float(np.sum(embedder.model_.score_rows(data.test, noise), axis=0).mean())
    case = "the notebook's MNIST VAE:"
    yield Row(f"{case} test loss in nats", loss, 139, lower=True, reference="156.1 after 50 epochs")
    yield Row(f"{case} CPU-seconds", spent, _BUDGET, lower=True, reference="157")
