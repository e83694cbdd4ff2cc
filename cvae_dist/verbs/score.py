"""The verb ``score``: how normal every row is to a model."""

import os
from typing import TYPE_CHECKING

from cvae_dist.cluster import StoreResult
from cvae_dist.events import OnEvent, ignore
from cvae_dist.store import ArrayLayout, Location
from cvae_dist.store.urls import StorageOptions

if TYPE_CHECKING:
    from distributed import Client

_ARRAYS = {
    "score": "how normal the row is, nats",
    "negative_elbo": "negative evidence lower bound, nats",
    "reconstruction_error": "mean squared error",
}


def score(
    store: str | os.PathLike[str],
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
    """Compute score, -ELBO and reconstruction error of every row. Rows unlike the training rows score low.

    ``negative_elbo`` (nats) is estimated with one draw of the latent, which depends on the number of the row alone.
    ``score`` is what ``CompressionVAE.score_samples`` returns, from that draw: minus the negative ELBO, as a density
    over the data's units. With the Bernoulli likelihood it is relative to the row's own entropy, without which dark,
    empty rows look normal. ``reconstruction_error`` is the mean squared error of the decoded posterior mean, in the
    data's units squared.

    Parameters
    ----------
    store : path or URL
        Zarr store of rows, made by ingest.
    model : path or URL
        Directory of a trained model.
    out : path or URL
        Zarr store to write.
    batch_size : int
        Rows the model sees at once. It changes no result.
    overwrite : bool
        Replace scores that were made otherwise.
    fsync : bool
        Wait until a local disk has what was written, so that a finished command survives a power loss.
    storage_options, client, on_event
        As for :func:`cvae_dist.embed`, and so are the result and the errors.
    """
    from cvae_dist.cluster.handles import ModelHandle, StoreHandle
    from cvae_dist.cluster.model_map import map_rows
    from cvae_dist.model.scoring import numbered_scores

    handle = ModelHandle.of(Location.of(model, storage_options))
    return map_rows(
        StoreHandle.of(Location.of(store, storage_options), "rows", handle.n_features, handle.location),
        handle,
        numbered_scores,
        Location.of(out, storage_options, fsync),
        stage="score",
        kind="scores",
        arrays=[ArrayLayout(name, "<f4", ("sample",), (), {"long_name": text}) for name, text in _ARRAYS.items()],
        batch_size=batch_size,
        overwrite=overwrite,
        client=client,
        on_event=on_event,
    )
