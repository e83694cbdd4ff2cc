"""Reversible, generative embeddings (a variational autoencoder) for datasets that outgrow one machine.

    npy tree  --ingest-->  rows.zarr  --train-->  model/  --embed-->  latents.zarr  --decode-->  rows again

Importing this package is cheap: each name below loads its module (and torch or Dask with it) when it is
first used, so that an ingest worker never pays for torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cvae_dist.config import ModelConfig, TrainConfig
    from cvae_dist.embed import decode, embed, sample, score
    from cvae_dist.errors import CvaeDistError
    from cvae_dist.estimator import CompressionVAE
    from cvae_dist.events import Event
    from cvae_dist.ingest import ingest
    from cvae_dist.model.directory import load_model
    from cvae_dist.pipeline import run
    from cvae_dist.prior import fit_prior
    from cvae_dist.store import RowStore
    from cvae_dist.training.loop import train
    from cvae_dist.verify import info, verify

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
    "decode": "cvae_dist.embed",
    "embed": "cvae_dist.embed",
    "fit_prior": "cvae_dist.prior",
    "info": "cvae_dist.verify",
    "ingest": "cvae_dist.ingest",
    "load_model": "cvae_dist.model.directory",
    "run": "cvae_dist.pipeline",
    "sample": "cvae_dist.embed",
    "score": "cvae_dist.embed",
    "train": "cvae_dist.training.loop",
    "verify": "cvae_dist.verify",
}


class _Package(ModuleType):
    """The package, where a verb keeps its name when the module of the same name is imported.

    Importing ``cvae_dist.ingest`` binds that module as ``ingest`` on the package; whether
    ``cvae_dist.ingest(...)`` works must not depend on who imported what before.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        is_own_module = isinstance(value, ModuleType) and value.__name__ == _HOME.get(name)
        super().__setattr__(name, getattr(value, name) if is_own_module else value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
