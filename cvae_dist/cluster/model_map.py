"""A trained model over the shards of a store: what ``embed``, ``decode`` and ``score`` have in common."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from cvae_dist.cluster.handles import ModelHandle, StoreHandle
from cvae_dist.cluster.plan import Job, Made, Span
from cvae_dist.cluster.process import reused_block
from cvae_dist.cluster.write import Output, StoreResult
from cvae_dist.errors import InvalidInput
from cvae_dist.events import OnEvent
from cvae_dist.model.threads import one_thread_each
from cvae_dist.model.vae import VAE
from cvae_dist.store import ArrayLayout, Layout, Location, Records, RowStore
from cvae_dist.store.layout import Block, shard_bytes_at
from cvae_dist.store.lineage import without_credentials

if TYPE_CHECKING:
    from distributed import Client

_MOST_INPUT_SHARDS = 16  # input shards behind one output shard: enough work for a task, little to repeat
_LEAST_OUTPUT_SHARDS = 8  # so that several workers have something to do

Compute = Callable[[VAE, Block, int, int], Mapping[str, Block]]


def map_rows(
    source: StoreHandle,
    model: ModelHandle,
    compute: Compute,
    out: Location,
    *,
    stage: str,
    kind: str,
    arrays: Sequence[ArrayLayout],
    batch_size: int,
    settings: Mapping[str, str] = MappingProxyType({}),
    overwrite: bool,
    client: "Client | None",
    on_event: OnEvent,
) -> StoreResult:
    """Write what a model makes of the rows of a store; ids and carried columns travel along.

    ``compute(vae, rows, start, batch_size)`` returns the blocks of ``arrays``, by name, of the rows that begin with
    number ``start``. It is picklable and pure. The statistics are those of the first array. ``stage`` and ``kind``
    name the verb and what it writes; ``settings`` decide the result, beside the model.
    """
    if batch_size < 1:
        raise InvalidInput(f"batch_size={batch_size} shows the model no rows; use 1 or more")
    out.require_apart(source.location, model.location)
    store, _ = source.open()
    layout = _output_layout(store, arrays, shard_bytes_at(out))
    records = store.records()
    job = Job(
        kind=kind,
        layout=layout,
        rows=store.rows,
        settings={"model": model.digest, **settings},
        task=lambda span: _MapShard(source, model, compute, batch_size, span),
        identity=lambda span: _identity(store, records, span),
        confirm=store.require_unchanged,
        lineage={
            "store": without_credentials(store.url),
            "store_fingerprint": store.fingerprint,
            "model": without_credentials(str(model.location)),
        },
        task_bytes=layout.rows_per_shard * store.layout.arrays[0].row_bytes,
    )
    # shards are made side by side in this process: one is read while another is computed
    with (
        contextlib.nullcontext(1) if client else one_thread_each() as threads,
        Output.held(out, stage, overwrite=overwrite, client=client, on_event=on_event) as output,
    ):
        remote = not (source.location.is_local and out.is_local)
        waiting = -(-threads // 2) if remote else 0  # for requests, while others compute; more only take memory
        job = _follow(_keep_grid(job, output.existing), store, output.existing)
        return output.write(replace(job, threads=threads + waiting))


@dataclass(frozen=True)
class _MapShard:
    """Read the rows of one shard, send them through the model, and carry the columns."""

    source: StoreHandle
    model: ModelHandle
    compute: Compute
    batch_size: int
    span: Span

    def __call__(self) -> Made:
        store, reader = self.source.open()
        start, stop = self.span.start, self.span.stop
        rows = reused_block((len(self.span), reader.n_features), reader.dtype)
        reader.read_into(rows, np.array([start]), np.array([len(rows)]), verify=True)
        columns = {name: store.read(name, start, stop) for name in store.columns}
        return Made({**self.compute(self.model.load(), rows, start, self.batch_size), **columns})


def _keep_grid(job: Job, existing: RowStore | None) -> Job:
    """Keep the shard grid of an output that is there: it was chosen for the size its source had at first."""
    if existing is None or {a.name for a in existing.layout.arrays} != {a.name for a in job.layout.arrays}:
        return job
    return replace(job, layout=existing.layout)


def _follow(job: Job, store: RowStore, existing: RowStore | None) -> Job:
    """Make rows again that were replaced in the store, but only where the output was made from this one."""
    if existing is None or not existing.published:
        return job
    made_from = existing.document["lineage"]
    follows = made_from.get("store") == job.lineage["store"]
    return replace(job, rewrites=follows, keeps_tail=store.holds_rows_of(made_from.get("store_fingerprint", "")))


def _output_layout(store: RowStore, made: Sequence[ArrayLayout], shard_bytes: int) -> Layout:
    """Choose output shards that cover whole input shards: enough for a task, but many of them.

    The carried columns come after the arrays that are made, which name them as their coordinates (CF conventions).
    """
    named = {"coordinates": " ".join(store.columns)} if store.columns else {}
    described = (replace(array, attributes={**array.attributes, **named}) for array in made)
    arrays = (*described, *map(store.layout.array, store.columns))
    rows = store.layout.rows_per_shard
    fitting = shard_bytes // (rows * max(array.row_bytes for array in arrays))
    spread = store.layout.shards(store.rows) // _LEAST_OUTPUT_SHARDS
    return Layout.of(arrays, rows_per_shard=rows * max(1, min(fitting, spread, _MOST_INPUT_SHARDS)))


def _identity(store: RowStore, records: Records, span: Span) -> bytes:
    """Return what the ledger says of the bytes of the input shards behind a span."""
    size = store.layout.rows_per_shard
    return records.table[span.start // size : -(-span.stop // size), 2:].tobytes()
