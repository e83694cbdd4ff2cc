"""Reversible, generative embeddings (a variational autoencoder) for datasets that outgrow one machine.

    npy tree  --ingest-->  rows.zarr  --train-->  model/  --embed-->  latents.zarr  --decode-->  rows again

Importing this package is cheap: each name below loads its module (and torch or Dask with it) when it is
first used, so that an ingest worker never pays for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cvae_dist.config import ModelConfig, TrainConfig
    from cvae_dist.errors import CvaeDistError
    from cvae_dist.estimator import CompressionVAE
    from cvae_dist.events import Event
    from cvae_dist.model.directory import load_model
    from cvae_dist.pipeline import run
    from cvae_dist.store import RowStore
    from cvae_dist.training.loop import train
    from cvae_dist.verbs.decode import decode
    from cvae_dist.verbs.embed import embed
    from cvae_dist.verbs.fit_prior import fit_prior
    from cvae_dist.verbs.info import info
    from cvae_dist.verbs.ingest import ingest
    from cvae_dist.verbs.sample import sample
    from cvae_dist.verbs.score import score
    from cvae_dist.verbs.verify import verify

__version__ = "0.1.0"
__all__ = [
    "CompressionVAE",
    "CvaeDistError",
    "Event",
    "ModelConfig",
    "RowStore",
    "TrainConfig",
    "decode",
    "embed",
    "fit_prior",
    "info",
    "ingest",
    "load_model",
    "run",
    "sample",
    "score",
    "train",
    "verify",
]

_HOME = {
    "CompressionVAE": "cvae_dist.estimator",
    "CvaeDistError": "cvae_dist.errors",
    "Event": "cvae_dist.events",
    "ModelConfig": "cvae_dist.config",
    "RowStore": "cvae_dist.store",
    "TrainConfig": "cvae_dist.config",
    "decode": "cvae_dist.verbs.decode",
    "embed": "cvae_dist.verbs.embed",
    "fit_prior": "cvae_dist.verbs.fit_prior",
    "info": "cvae_dist.verbs.info",
    "ingest": "cvae_dist.verbs.ingest",
    "load_model": "cvae_dist.model.directory",
    "run": "cvae_dist.pipeline",
    "sample": "cvae_dist.verbs.sample",
    "score": "cvae_dist.verbs.score",
    "train": "cvae_dist.training.loop",
    "verify": "cvae_dist.verbs.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
