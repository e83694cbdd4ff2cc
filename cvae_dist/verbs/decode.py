"""The verb ``decode``: latents back to rows."""

import functools
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from cvae_dist.cluster import StoreResult
from cvae_dist.errors import InvalidInput
from cvae_dist.events import OnEvent, ignore
from cvae_dist.store import Location, RowStore
from cvae_dist.store.layout import Block
from cvae_dist.store.urls import StorageOptions

if TYPE_CHECKING:
    from distributed import Client

    from cvae_dist.cluster.handles import ModelHandle
    from cvae_dist.model.vae import VAE


def decode(
    latents: str | os.PathLike[str],
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    batch_size: int = 2048,
    overwrite: bool = False,
    fsync: bool = False,
    storage_options: StorageOptions | None = None,
    client: "Client | None" = None,
    on_event: OnEvent = ignore,
) -> StoreResult:
    """Turn latents back into rows, in the units of the data. Ids and carried columns travel along.

    The store of latents says which metric they were embedded with.

    Parameters
    ----------
    latents : path or URL
        Zarr store made by embed.
    model : path or URL
        Directory of the model that made them.
    out : path or URL
        Zarr store to write.
    batch_size : int
        Rows the model sees at once. It changes no result.
    overwrite : bool
        Replace rows that were made otherwise.
    fsync : bool
        Wait until a local disk has what was written, so that a finished command survives a power loss.
    storage_options, client, on_event
        As for :func:`cvae_dist.embed`, and so are the result and the errors.
    """
    from cvae_dist.cluster.handles import ModelHandle, StoreHandle
    from cvae_dist.cluster.model_map import map_rows

    handle = ModelHandle.of(Location.of(model, storage_options))
    source = StoreHandle.of(Location.of(latents, storage_options), "latents", handle.dim_latent, handle.location)
    made, _ = source.open()
    _require_made_by(handle, made)
    metric = made.document["settings"].get("metric", "latent")
    return map_rows(
        source,
        handle,
        functools.partial(_rows, metric=metric),
        Location.of(out, storage_options, fsync),
        stage="decode",
        kind="rows",
        arrays=[handle.row_layout()],
        batch_size=batch_size,
        overwrite=overwrite,
        client=client,
        on_event=on_event,
    )


def _rows(
    vae: "VAE", latents: Block, start: int, batch_size: int, metric: Literal["latent", "data"]
) -> Mapping[str, Block]:
    return {"x": vae.decode_rows(latents, batch_size, metric=metric)}


def _require_made_by(model: "ModelHandle", latents: RowStore) -> None:
    """Refuse latents of another model: they would decode to rows that look right."""
    made_by = latents.document["settings"].get("model")
    if made_by != model.digest:
        raise InvalidInput(
            f"the latents in {latents.url} were made by model {made_by}, but {model.location} is {model.digest}. "
            "Nothing was written; give the model that made them"
        )
