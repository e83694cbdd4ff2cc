"""The protocol by which every store is written: plan, whole shards, ledger, publish."""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cvae_dist.cluster.plan import Job, Made, Plan, Span
from cvae_dist.cluster.regions import map_regions, slots
from cvae_dist.errors import Corrupt, SettingsChanged, StorageFailed
from cvae_dist.events import Event, OnEvent
from cvae_dist.store import Digest, Layout, Lease, Ledger, Location, Moments, Record, RowStore

if TYPE_CHECKING:
    from distributed import Client


@dataclass(frozen=True)
class StoreResult:
    """What a verb that writes a store did.

    Attributes
    ----------
    url : str
        The output.
    rows, rows_written, dropped : int
        Rows in it, rows written by this run (0 when all was done before), and rows of the source left out.
    seconds : float
        Wall time of this run.
    """

    url: str
    rows: int
    rows_written: int
    dropped: int
    seconds: float

    @property
    def nothing_to_do(self) -> bool:
        """Whether an earlier run had done everything."""
        return self.rows_written == 0


@dataclass(frozen=True)
class _Shard:
    span: Span
    fingerprint: int
    inputs: Any


@dataclass(frozen=True)
class _Region:
    """One task: whole shards of every array of one output."""

    output: Location
    layout: Layout
    make: Callable[[Span, Any], Made]
    shards: tuple[_Shard, ...]


def write_rows(
    output: Location,
    job: Callable[[RowStore | None], Job],
    *,
    stage: str,
    overwrite: bool,
    client: "Client | None",
    on_event: OnEvent,
) -> StoreResult:
    """Write an output under its lease: what is recorded already stays, the rest is made, then all is published.

    Parameters
    ----------
    output : Location
        The store to write.
    job : callable
        Called once the lease is held, with the store as it is (None when there is none), to say what to write.
    stage : str
        Name of the verb, for events and history.
    overwrite : bool
        Delete an existing store of ours first.
    client : distributed.Client, optional
        Cluster to use; this process when None.
    on_event : callable
        Listener for progress.

    Raises
    ------
    OutputLocked, SettingsChanged, InvalidInput, StorageFailed
        Another driver writes it; it was made otherwise; a worker is too small; the storage refused.
    """
    began = time.monotonic()
    with Lease.held(output) as lease:
        store = RowStore.find(output)
        work = job(None if overwrite else store)
        store = _begin(output, store, work, overwrite, client)
        planned = _wanted(work)
        written = _write_shards(store, work, planned, lease, stage, client, on_event)
        finished = store.published and not written and store.rows == work.rows
        if not finished:
            lease.check()
            records = _finished(store, work, planned)
            store = store.publish(work.rows, records, work.lineage, f"{stage} {output.name}", work.manifest)
    result = StoreResult(str(output), store.rows, written, int(store.document["dropped"]), time.monotonic() - began)
    message = "nothing to do, all rows were there" if finished else ""
    on_event(Event(stage, "done", store.rows, store.rows, message=message, values={"seconds": result.seconds}))
    return result


def _begin(output: Location, store: RowStore | None, job: Job, overwrite: bool, client: "Client | None") -> RowStore:
    """Return the store to write, begun or fit to go on with; what can be refused is refused before any change."""
    if store is not None and not overwrite:
        store.require_settings(job.kind, job.settings)
        _require_layout(store, job)
        output.sweep_partial()
        return store
    Plan(job, tuple(_wanted(job)), slots(client)).require_memory(client)
    output.sweep_partial()
    if store is not None:
        store.retract()
    return RowStore.create(output, job.kind, job.layout, job.settings)


def _require_layout(store: RowStore, job: Job) -> None:
    """Refuse rows that do not fit the arrays or the shard grid that are there."""
    if store.layout.to_json() != job.layout.to_json():
        old, new = (
            f"{_names(layout)} in shards of {layout.rows_per_shard:,} rows" for layout in (store.layout, job.layout)
        )
        raise SettingsChanged(
            f"{store.location} has {old}, but {new} are asked for. Nothing was changed; "
            "write to another output, or use --overwrite to make it anew"
        )
    if store.published and job.rows < store.rows:
        raise SettingsChanged(
            f"{store.location} holds {store.rows:,} rows, but is now to have {job.rows:,}. Nothing was changed; "
            "rows are never taken away: write to another output, or use --overwrite to make it anew"
        )


def _names(layout: Layout) -> str:
    return ", ".join(f"{array.name} {array.shape} {array.dtype}" for array in layout.arrays)


def _wanted(job: Job) -> list[tuple[Span, int]]:
    """Return the spans that may have to be written, with the fingerprints they have to have."""
    return [(span, job.fingerprint(span)) for span in itertools.islice(job.spans(), job.first_shard, None)]


def _write_shards(
    store: RowStore,
    job: Job,
    planned: Sequence[tuple[Span, int]],
    lease: Lease,
    stage: str,
    client: "Client | None",
    on_event: OnEvent,
) -> int:
    """Write every shard that has no matching record; return the number of rows written."""
    plan = Plan(job, tuple(_pending(store, job, planned)), slots(client))
    done = job.rows - plan.rows
    on_event(Event(stage, "start", done, job.rows, message=str(plan)))
    if not plan.pending:
        return 0
    plan.require_memory(client)
    began, written = time.monotonic(), 0
    regions = _regions(store, job, plan)
    # closed at once, whatever ends the loop: nothing may be written after the lease is released
    with contextlib.closing(map_regions(_write_region, regions, client=client, threads=job.threads)) as results:
        for rows in results:
            written += rows
            lease.require()
            rate = written / max(time.monotonic() - began, 1e-9)
            on_event(Event(stage, "progress", done + written, job.rows, values={"rows_per_second": rate}))
    return written


def _pending(store: RowStore, job: Job, planned: Sequence[tuple[Span, int]]) -> list[tuple[Span, int]]:
    """Return the spans, with their fingerprints, that are not recorded yet."""
    records = _records(store.ledger, range(job.layout.shards(job.rows)))
    for shard, record in enumerate(records[: job.first_shard]):
        _require_record(store, shard, record)
    pending = []
    for (span, fingerprint), record in zip(planned, records[job.first_shard :], strict=True):
        if record is None or record.fingerprint != fingerprint:
            pending.append((span, fingerprint))
            _refuse_published(store, job, span, record)
    return pending


def _refuse_published(store: RowStore, job: Job, span: Span, record: Record | None) -> None:
    """Refuse to rewrite published rows, but for the last shard of a store that grows."""
    is_partial = span.start + store.layout.rows_per_shard > store.rows
    if not store.published or (is_partial and job.rows > store.rows):
        return
    _require_record(store, span.shard, record)
    raise SettingsChanged(
        f"rows {span.start} to {span.stop} of {store.location} are published, but what they are made from "
        "has changed since. Nothing was changed; write to another output, or use --overwrite to make it anew"
    )


def _require_record(store: RowStore, shard: int, record: Record | None) -> Record:
    if record is None:
        raise Corrupt(
            f"the record of shard {shard} is missing from {store.location}/ledger, or damaged, so nobody knows what "
            "its published rows are. Nothing was changed; restore it from a copy, or use --overwrite to make the "
            "store anew"
        )
    return record


def _finished(store: RowStore, job: Job, planned: Sequence[tuple[Span, int]]) -> list[Record]:
    """Return the records of all shards, each made from what this run was asked for."""
    records = _records(store.ledger, range(job.layout.shards(job.rows)))
    expected = dict.fromkeys(range(job.first_shard)) | {span.shard: mark for span, mark in planned}
    for shard, record in enumerate(records):
        if record is None or expected[shard] not in (None, record.fingerprint):
            raise StorageFailed(
                f"shard {shard} of {store.location} was changed by another writer while this run wrote it, perhaps "
                "by a worker of a driver that was killed. Nothing was published; run the same command again"
            )
    return [record for record in records if record is not None]


def _regions(store: RowStore, job: Job, plan: Plan) -> Iterator[_Region]:
    for pending in plan.tasks():
        shards = tuple(_Shard(span, mark, job.inputs(span)) for span, mark in pending)
        yield _Region(store.location, job.layout, job.make, shards)


def _write_region(region: _Region) -> int:
    """Write the shards of a region that are not recorded yet; return its number of rows."""
    ledger = Ledger(region.output, region.layout)
    for shard in region.shards:
        record = ledger.read(shard.span.shard)
        if record is None or record.fingerprint != shard.fingerprint:
            _write_shard(region, shard, ledger)
    return sum(len(shard.span) for shard in region.shards)


def _write_shard(region: _Region, shard: _Shard, ledger: Ledger) -> None:
    """Write one shard of every array and then its ledger row. The one place where rows reach the disk."""
    made = region.make(shard.span, shard.inputs)
    digests = []
    for array in region.layout.arrays:
        block = made.blocks[array.name]
        if block.shape != (len(shard.span), *array.shape):
            raise AssertionError(f"shard {shard.span.shard} of {array.name}: {block.shape} is not the whole shard")
        buffers = region.layout.encode(array.name, block)
        (region.output / array.key(shard.span.shard)).write(*buffers)
        digests.append(Digest.of_shard(buffers))
    main = made.blocks[region.layout.arrays[0].name]
    moments = made.moments or Moments.of(main.reshape(len(main), int(np.prod(main.shape[1:]))))
    ledger.write(shard.span.shard, Record(shard.fingerprint, len(shard.span), made.dropped, tuple(digests)), moments)


def _records(ledger: Ledger, shards: Iterable[int]) -> list[Record | None]:
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(ledger.read, shards))
