"""Embedding a store against the bare network over rows in memory."""

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from cvae_dist.config import ModelConfig
from cvae_dist.model.directory import save_model
from cvae_dist.model.kernels import inference
from cvae_dist.model.vae import VAE
from cvae_dist.store import Moments
from cvae_dist.verbs.embed import embed
from cvae_dist.verbs.ingest import ingest
from tests.bench.table import Row, alternate, median, seconds

_ROWS, _FEATURES = 300_000, 768
_BATCHES = (512, 1024, 2048, 4096, 8192)


def rows() -> Iterator[Row]:
    """Measure `embed` of 768-wide float32 rows."""
    with TemporaryDirectory() as folder:
        yield _embed(Path(folder))


def _embed(folder: Path) -> Row:
    x = np.random.default_rng(0).normal(size=(_ROWS, _FEATURES)).astype(np.float32)
    (folder / "src").mkdir()
    np.save(folder / "src/rows.npy", x)
    ingest(folder / "src", folder / "rows.zarr")
    config = ModelConfig(dim_latent=16, cells_encoder=(512, 256), feature_normalization=True, likelihood="gaussian")
    vae = VAE.of(config, Moments.of(x), x.dtype)
    save_model(str(folder / "model"), vae, {})

    def ours() -> float:
        shutil.rmtree(folder / "latents.zarr", ignore_errors=True)
        return seconds(lambda: embed(folder / "rows.zarr", folder / "model", folder / "latents.zarr"))

    times = {batch: seconds(partial(_bare, vae, x, batch)) for batch in _BATCHES}
    best = min(times, key=lambda batch: times[batch])
    embedded, bare = (median(values) for values in alternate(5, ours, lambda: seconds(partial(_bare, vae, x, best))))
    note = f"{_ROWS / embedded:,.0f} rows/s, bare network at batch {best} {_ROWS / bare:,.0f}, 768-512-256-16"
    return Row("embed 768-wide float32 / bare network in memory", bare / embedded, 0.85, 0.92, note)


def _bare(vae: VAE, x: np.ndarray, batch: int) -> None:
    latents = np.empty((len(x), vae.dim_latent), np.float32)
    with inference(torch.float32):
        for start in range(0, len(x), batch):
            latents[start : start + batch] = vae.embed(torch.from_numpy(x[start : start + batch])).numpy()
