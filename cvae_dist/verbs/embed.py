"""The verb ``embed``: rows to latents."""

import functools
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from cvae_dist.cluster import StoreResult
from cvae_dist.config import ComputePrecision
from cvae_dist.events import Event, OnEvent, ignore
from cvae_dist.store import ArrayLayout, Location
from cvae_dist.store.layout import Block
from cvae_dist.store.urls import StorageOptions

if TYPE_CHECKING:
    from distributed import Client

    from cvae_dist.model.vae import VAE


def embed(
    store: str | os.PathLike[str],
    model: str | os.PathLike[str],
    latents: str | os.PathLike[str],
    *,
    batch_size: int = 16_384,
    precision: ComputePrecision = "float32",
    metric: Literal["latent", "data"] = "latent",
    overwrite: bool = False,
    fsync: bool = False,
    storage_options: StorageOptions | None = None,
    client: "Client | None" = None,
    on_event: OnEvent = ignore,
) -> StoreResult:
    """Compute the latents of every row. Ids and carried columns travel along.

    A latent is the mean of the row's posterior. The output is a Zarr group with ``z (sample, latent)``,
    float32.

    Parameters
    ----------
    store : path or URL
        Zarr store of rows, made by ingest.
    model : path or URL
        Directory of a trained model.
    latents : path or URL
        Zarr store to write.
    batch_size : int
        Rows the model sees at once. It changes no result.
    precision : {"float32", "bf16"}
        Type to compute in. bf16 is about 1.6 times as fast on processors that have it, and errs by 1 %.
    metric : {"latent", "data"}
        What Euclidean distances mean. latent: the latents as they are, where every direction weighs alike. data: every
        direction is stretched by how much it changes the rows, and where rows have one length, as embeddings do,
        lengths of latents count less; for searching neighbours and for clustering. decode undoes it, as the store says
        which it is.
    overwrite : bool
        Replace latents that were made otherwise.
    fsync : bool
        Wait until a local disk has what was written, so that a finished command survives a power loss.
    storage_options : Mapping, optional
        Options of the file system, for fsspec.
    client : distributed.Client, optional
        Dask cluster to use; this process when None.
    on_event : callable
        Listener for progress.

    Returns
    -------
    StoreResult

    Raises
    ------
    SourceNotFound, InvalidInput, Corrupt
        There is no such store, model, precision or metric, they do not fit each other, or their bytes have changed.
    SettingsChanged, OutputLocked, StorageFailed
        The output was made otherwise, is being written, or cannot be written. What was recorded is kept.
    """
    from cvae_dist.cluster.handles import ModelHandle, StoreHandle
    from cvae_dist.cluster.model_map import map_rows
    from cvae_dist.model.kernels import drawback

    if told := drawback(precision):
        on_event(Event("embed", "note", message=told))
    handle = ModelHandle.of(Location.of(model, storage_options))
    handle.load().check_metric(metric)
    asked = {"precision": (precision, "float32"), "metric": (metric, "latent")}
    return map_rows(
        StoreHandle.of(Location.of(store, storage_options), "rows", handle.n_features, handle.location),
        handle,
        functools.partial(_latents, precision=precision, metric=metric),
        Location.of(latents, storage_options, fsync),
        stage="embed",
        kind="latents",
        arrays=[ArrayLayout("z", "<f4", ("sample", "latent"), (handle.dim_latent,))],
        batch_size=batch_size,
        settings={name: value for name, (value, default) in asked.items() if value != default},
        overwrite=overwrite,
        client=client,
        on_event=on_event,
    )


def _latents(
    vae: "VAE",
    rows: Block,
    start: int,
    batch_size: int,
    precision: ComputePrecision,
    metric: Literal["latent", "data"],
) -> Mapping[str, Block]:
    return {"z": vae.embed_rows(rows, batch_size, precision, metric)}
