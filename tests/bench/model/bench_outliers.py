"""How well the score of a row tells images of another kind: AUROC of `score_samples`, with default settings."""

from collections.abc import Iterator

import numpy as np
from sklearn.metrics import roc_auc_score

import cvae_dist as cvae
from tests.bench.model.data import Images, fashion, mnist
from tests.bench.table import Row

_DIM_LATENT = 16
_STEPS = 3000


def rows() -> Iterator[Row]:
    """Measure clothes against digits, and digits against digits lying on their side."""
    clothes, digits = fashion(), mnist()
    name = "out of distribution, AUROC: trained on"
    yield Row(f"{name} Fashion-MNIST, MNIST is foreign", _auroc(*clothes, digits.test), 0.97, reference="no score")
    lying = np.rot90(digits.test.reshape(-1, 28, 28), axes=(1, 2)).reshape(-1, 784)
    yield Row(f"{name} MNIST, rotated MNIST is foreign", _auroc(digits.train, digits.test, lying), 0.95)


def _auroc(train: Images, usual: Images, foreign: Images) -> float:
    embedder = cvae.CompressionVAE(train, dim_latent=_DIM_LATENT, num_steps=_STEPS).train()
    scores = np.concatenate([embedder.score_samples(usual), embedder.score_samples(foreign)])
    return float(roc_auc_score(np.arange(len(scores)) < len(usual), scores))
