"""The verb ``decode``: latents back to rows."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from cvae_dist.cluster import StoreResult
from cvae_dist.errors import InvalidInput
from cvae_dist.events import OnEvent, ignore
from cvae_dist.store import Location
from cvae_dist.store.layout import Block
from cvae_dist.store.urls import StorageOptions

if TYPE_CHECKING:
    from distributed import Client

    from cvae_dist.cluster.handles import ModelHandle, StoreHandle
    from cvae_dist.model.vae import VAE


def decode(
    latents: str | os.PathLike[str],
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    batch_size: int = 2048,
    overwrite: bool = False,
    storage_options: StorageOptions | None = None,
    client: "Client | None" = None,
    on_event: OnEvent = ignore,
) -> StoreResult:
    """Turn latents back into rows, in the units of the data. Ids and carried columns travel along.

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
    storage_options, client, on_event
        As for :func:`cvae_dist.embed`, and so are the result and the errors.
    """
    from cvae_dist.cluster.handles import ModelHandle, StoreHandle
    from cvae_dist.cluster.model_map import map_rows

    handle = ModelHandle.of(Location.of(model, storage_options))
    source = StoreHandle.of(Location.of(latents, storage_options), "latents", handle.dim_latent, handle.location)
    _require_made_by(handle, source)
    return map_rows(
        source,
        handle,
        _rows,
        Location.of(out, storage_options),
        stage="decode",
        kind="rows",
        arrays=[handle.row_layout()],
        batch_size=batch_size,
        overwrite=overwrite,
        client=client,
        on_event=on_event,
    )


def _rows(vae: "VAE", latents: Block, start: int, batch_size: int) -> Mapping[str, Block]:
    return {"x": vae.decode_rows(latents, batch_size)}


def _require_made_by(model: "ModelHandle", source: "StoreHandle") -> None:
    """Refuse latents of another model: they would decode to rows that look right."""
    latents, _ = source.open()
    made_by = latents.document["settings"].get("model")
    if made_by != model.digest:
        raise InvalidInput(
            f"the latents in {latents.url} were made by model {made_by}, but {model.location} is {model.digest}. "
            "Nothing was written; give the model that made them"
        )
