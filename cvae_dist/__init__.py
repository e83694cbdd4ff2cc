"""Reversible, generative embeddings (a variational autoencoder) for datasets that outgrow one machine.

    npy tree  --ingest-->  rows.zarr  --train-->  model/  --embed-->  latents.zarr  --decode-->  rows again

Importing this package is cheap: each name below loads its module (and torch or Dask with it) when it is
first used, so that an ingest worker never pays for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cvae_dist.config import ModelConfig as ModelConfig
    from cvae_dist.config import TrainConfig as TrainConfig
    from cvae_dist.errors import CvaeDistError as CvaeDistError
    from cvae_dist.estimator import CompressionVAE as CompressionVAE
    from cvae_dist.events import Event as Event
    from cvae_dist.model.directory import load_model as load_model
    from cvae_dist.pipeline import run as run
    from cvae_dist.store import RowStore as RowStore
    from cvae_dist.verbs.decode import decode as decode
    from cvae_dist.verbs.embed import embed as embed
    from cvae_dist.verbs.fit_prior import fit_prior as fit_prior
    from cvae_dist.verbs.info import info as info
    from cvae_dist.verbs.ingest import ingest as ingest
    from cvae_dist.verbs.sample import sample as sample
    from cvae_dist.verbs.score import score as score
    from cvae_dist.verbs.train import train as train
    from cvae_dist.verbs.verify import verify as verify

__version__ = "0.1.0"

_VERBS = ("decode", "embed", "fit_prior", "info", "ingest", "sample", "score", "train", "verify")
_HOMES = {
    "CompressionVAE": "estimator",
    "CvaeDistError": "errors",
    "Event": "events",
    "ModelConfig": "config",
    "RowStore": "store",
    "TrainConfig": "config",
    "load_model": "model.directory",
    "run": "pipeline",
    **{verb: f"verbs.{verb}" for verb in _VERBS},
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
