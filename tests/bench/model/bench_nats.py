"""Likelihoods of MNIST's test images, by published protocols."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from cvae_dist.config import TrainConfig
from cvae_dist.model import diagnosis, scoring
from cvae_dist.store import Moments
from cvae_dist.store.reader import ArrayRows
from cvae_dist.training.fit import fit
from cvae_dist.training.prepare import TrainingData
from tests.bench.model.bench_quality import trained
from tests.bench.model.data import Images, mnist
from tests.bench.table import Row

_PAPER_EPOCHS, _PAPER_BATCH = 100, 128
_NETWORK = "cells 512-256, 2 residual blocks; prototype without: 97.1 and 96.3"
_TEST_SEED = 7  # of the one binarisation of the test rows
_DRAWS = 100
_LESS_THAN_ALL = 16_000_000  # of the 47 MB of images, so that every epoch reads and draws them anew


def rows() -> Iterator[Row]:
    """Measure -ELBO of grey images after 20 epochs, and the importance-sampled NLL of the IWAE paper's network."""
    yield Row("16-D, Bernoulli, 20 epochs: test -ELBO in nats, no flow", _elbo(0), 97.1, lower=True, note=_NETWORK)
    yield Row("16-D, Bernoulli, 20 epochs: test -ELBO in nats, IAF 5", _elbo(5), 95.5, lower=True, note=_NETWORK)
    yield from _paper()


def _elbo(iaf_flow_length: int) -> float:
    """Train with the defaults: 20 epochs of 54,000 rows, cells 512 and 256 with 2 residual blocks."""
    embedder, _ = trained(dim_latent=16, likelihood="bernoulli", iaf_flow_length=iaf_flow_length)
    test = mnist().test
    noise = np.random.default_rng(0).standard_normal((len(test), 16), np.float32)
    reconstruction, kl = embedder.model_.score_rows(test, noise)
    return float(np.mean(reconstruction + kl))


class Binarised:
    """Rows whose pixels are drawn anew, 0 or 1 by their grey value, every time they are read."""

    block_rows_hint = 1

    def __init__(self, grey: Images) -> None:
        self._grey = ArrayRows(grey)
        self.n_rows, self.n_features = grey.shape
        self.dtype = grey.dtype
        self._random = np.random.default_rng(0)

    def read_into(
        self, out: Images, starts: NDArray[np.int64], counts: NDArray[np.int64], verify: bool = False
    ) -> None:
        self._grey.read_into(out, starts, counts, verify)
        out[:] = binarise(out, self._random)


def binarise(grey: Images, random: np.random.Generator) -> Images:
    return (random.random(grey.shape, np.float32) * 255 < grey).astype(np.uint8)


def _paper() -> Iterator[Row]:
    """Train 784-200-200-50 on stochastically binarised images (Burda et al. 2015, table 1, one layer, k = 1)."""
    data = mnist()
    random = np.random.default_rng(_TEST_SEED)
    config = TrainConfig(
        dim_latent=50,
        cells_encoder=(200, 200),
        likelihood="bernoulli",
        iaf_flow_length=0,
        batch_size=_PAPER_BATCH,
        num_steps=_PAPER_EPOCHS * -(-len(data.train) // _PAPER_BATCH),
        learning_rate=2e-3,
        kl_warmup=0,
        train_valid_split=1.0,
        buffer_bytes=_LESS_THAN_ALL,
    )
    moments = Moments.of(binarise(data.train, random))
    vae = fit(TrainingData.in_memory(Binarised(data.train), moments, (28, 28)), config).vae
    test = binarise(data.test, np.random.default_rng(_TEST_SEED))
    draws = [random.standard_normal((len(test), 50), np.float32) for _ in range(_DRAWS)]
    with torch.inference_mode():
        nll = -float(scoring.log_marginal(vae, test, draws).mean())
    yield Row(
        "IWAE paper's VAE, 100 epochs: NLL in nats, 100 samples",
        nll,
        90.0,
        lower=True,
        note="paper: 86.76, of 5,000 samples after 3,280 epochs",
    )
    units = diagnosis.diagnose(vae, test).active_units
    name = "IWAE paper's VAE, 100 epochs: active units"
    yield Row(name, units, 20, note="paper: 19 after 3,280 epochs")
    yield Row(name, units, 24, lower=True)
