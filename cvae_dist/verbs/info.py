"""The verb ``info``: what a store or a model is."""

import os
from typing import Any

from cvae_dist.errors import SourceNotFound
from cvae_dist.model.files import is_model, read_description
from cvae_dist.store import Location, RowStore
from cvae_dist.store.urls import StorageOptions


def info(url: str | os.PathLike[str], *, storage_options: StorageOptions | None = None) -> dict[str, Any]:
    """Show what a store or a model is, on one screen.

    Parameters
    ----------
    url : path or URL
        Zarr store, or directory of a trained model.
    storage_options : Mapping, optional
        Options of the file system, for fsspec.

    Returns
    -------
    dict
        Printable entries by name. Those of a store: its kind, size, arrays, settings, lineage and the range of its
        values. Those of a model: its settings, lineage and digest.

    Raises
    ------
    SourceNotFound
        There is neither a store nor a model.
    InvalidInput
        Something else is there.
    Corrupt
        The description of the model is not what ``train`` wrote.
    """
    location = Location.of(url, storage_options)
    if is_model(location):
        return _model_entries(location)
    store = RowStore.find(location)
    if store is None:
        raise SourceNotFound(f"there is neither a store nor a model at {location}; mend the path")
    return _store_entries(store)


def _model_entries(location: Location) -> dict[str, Any]:
    description = read_description(location)
    named = {"settings" if name == "model" else name: value for name, value in description.items()}
    return {"model": str(location), **named}


def _store_entries(store: RowStore) -> dict[str, Any]:
    layout = store.layout
    entries: dict[str, Any] = {
        "store": store.url,
        "kind": store.kind,
        "rows": store.rows if store.published else "none yet: begun, not finished",
        "arrays": {
            a.name: f"{a.dtype} ({', '.join(a.dims)})" + (f" x {a.shape[0]:,}" if a.shape else "")
            for a in layout.arrays
        },
        "item_shape": store.item_shape,
        "shards": layout.shards(store.rows),
        "rows_per_shard": layout.rows_per_shard,
        "rows_per_chunk": layout.rows_per_chunk,
        "bytes": sum(array.row_bytes for array in layout.arrays if array.dtype != "string") * store.rows,
        "dropped": store.document["dropped"],
        "settings": store.document["settings"],
        "lineage": store.document["lineage"],
        "fingerprint": store.fingerprint,
        "history": dict(enumerate(store.history.splitlines(), 1)),
    }
    if store.published:
        entries["publication"] = store.publication.path
        moments = store.statistics()
        entries["mean"] = f"{moments.mean.min():.6g} to {moments.mean.max():.6g} over features"
        entries["std"] = f"{moments.std.min():.6g} to {moments.std.max():.6g} over features"
        entries["range"] = f"{moments.minimum.min():.6g} to {moments.maximum.max():.6g}"
        if drift := store.drift():
            names = layout.arrays[0].attributes.get("features", ())
            entries["drift"] = f"{drift.largest:.2g} of the last {drift.new:,} rows; {drift.told(names, 1)}"
    return entries
