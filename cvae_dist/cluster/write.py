"""The protocol by which every store is written: lease, plan, whole shards, ledger, publish."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cvae_dist.cluster.plan import Job, Plan, Span, Task
from cvae_dist.cluster.regions import map_regions, slots
from cvae_dist.errors import Corrupt, SettingsChanged, StorageFailed
from cvae_dist.events import Event, EventKind, OnEvent
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


class Output:
    """An output under this driver's lease.

    Attributes
    ----------
    existing : RowStore or None
        The store to go on with; None where there is none, nothing is recorded in it, or it is to be made anew.
    """

    def __init__(
        self, output: Location, lease: Lease, stage: str, overwrite: bool, client: "Client | None", on_event: OnEvent
    ) -> None:
        self._began = time.monotonic()
        self._output, self._lease, self._stage = output, lease, stage
        self._client, self._on_event = client, on_event
        self._found = RowStore.find(output)
        begun = self._found is not None and not self._found.published and not self._found.has_records
        self.existing = None if overwrite or begun else self._found  # what records nothing has no settings to defend

    @classmethod
    @contextlib.contextmanager
    def held(
        cls, output: Location, stage: str, *, overwrite: bool, client: "Client | None", on_event: OnEvent
    ) -> Iterator["Output"]:
        """Hold the lease of an output while it is written.

        ``stage`` is the name of the verb, for events and history. ``overwrite`` makes the store anew, where there is
        one of ours.

        Raises
        ------
        OutputLocked, InvalidInput
            Another driver holds it; something else is there.
        """
        with Lease.held(output) as lease:
            yield cls(output, lease, stage, overwrite, client, on_event)

    def write(self, job: Job) -> StoreResult:
        """Write the shards that are not recorded yet, then publish them all.

        Raises
        ------
        SettingsChanged, InvalidInput, StorageFailed, OutputLocked
            It was made otherwise; a worker is too small; the storage refused; the lease was lost.
        """
        store = self._begin(job)
        shards = _Shards(store, job)
        written = self._write_shards(job, shards)
        finished = store.published and not written and store.rows == job.rows
        if not finished:
            self._lease.check()
            command = f"{self._stage} {self._output.name}"
            store = store.publish(job.rows, shards.finished(), job.lineage, command, job.manifest)
        dropped, seconds = int(store.document["dropped"]), time.monotonic() - self._began
        message = "nothing to do, all rows were there" if finished else ""
        self._tell("done", store.rows, store.rows, message, seconds=seconds)
        return StoreResult(str(self._output), store.rows, written, dropped, seconds)

    def _begin(self, job: Job) -> RowStore:
        """Return the store to write, begun or fit to go on with; what can be refused is refused before any change."""
        if self.existing is not None:
            self.existing.require_settings(job.kind, job.settings)
            _require_layout(self.existing, job)
            self._output.sweep_partial()
            return self.existing
        job.require_memory(self._client)
        self._output.sweep_partial()
        if self._found is not None:
            self._found.retract()
        return RowStore.create(self._output, job.kind, job.layout, job.settings)

    def _write_shards(self, job: Job, shards: "_Shards") -> int:
        """Write every shard that has no matching record; return the number of rows written."""
        plan = Plan(job, shards.pending(), slots(self._client))
        done = job.rows - plan.rows
        self._tell("start", done, job.rows, str(plan))
        if not plan.pending:
            return 0
        job.require_memory(self._client)
        began, written = time.monotonic(), 0
        regions = (_Region(self._output, job.layout, shards.of(spans)) for spans in plan.regions())
        results = map_regions(_write_region, regions, client=self._client, threads=job.threads)
        # closed at once, whatever ends the loop: nothing may be written after the lease is released
        with contextlib.closing(results):
            for rows in results:
                written += rows
                self._lease.require()
                rate = written / max(time.monotonic() - began, 1e-9)
                self._tell("progress", done + written, job.rows, rows_per_second=rate)
        return written

    def _tell(self, kind: EventKind, done: int, total: int, message: str = "", **values: float) -> None:
        self._on_event(Event(self._stage, kind, done, total, message=message, values=values))


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


@dataclass(frozen=True)
class _Shard:
    span: Span
    task: Task
    fingerprint: int


class _Shards:
    """The shards of a job. The task of each, with its fingerprint, is asked for once a run."""

    def __init__(self, store: RowStore, job: Job) -> None:
        self._store, self._job = store, job
        self._fingerprints: dict[int, int] = {}
        self._compared: dict[int, _Shard] = {}  # pending, though there is a record

    def pending(self) -> tuple[Span, ...]:
        """Return the spans whose shards are not recorded as they should be."""
        records = self._records()
        for shard, record in enumerate(records[: self._job.first_shard]):
            _require_record(self._store, shard, record)
        return tuple(span for span in self._job.spans() if self._is_pending(span, records[span.shard]))

    def of(self, spans: tuple[Span, ...]) -> tuple[_Shard, ...]:
        """Return what makes the shards of pending spans."""
        return tuple(
            self._compared.pop(span.shard) if span.shard in self._compared else self._shard(span) for span in spans
        )

    def finished(self) -> list[Record]:
        """Return the records of all shards, each made from what this run was asked for."""
        records = self._records()
        for shard, record in enumerate(records):
            if record is None or self._fingerprints.get(shard, record.fingerprint) != record.fingerprint:
                raise StorageFailed(
                    f"shard {shard} of {self._store.location} was changed by another writer while this run wrote it, "
                    "perhaps by a worker of a driver that was killed. Nothing was published; run the same command again"
                )
        return [record for record in records if record is not None]

    def _is_pending(self, span: Span, record: Record | None) -> bool:
        """Whether a shard is to be written. Where it has no record, its fingerprint is found only when it is sent."""
        if record is not None:
            shard = self._shard(span)
            if record.fingerprint == shard.fingerprint:
                return False
            self._compared[span.shard] = shard
        _refuse_published(self._store, self._job, span, record)
        return True

    def _shard(self, span: Span) -> _Shard:
        task = self._job.task(span)
        fingerprint = self._fingerprints[span.shard] = self._job.fingerprint(span, task)
        return _Shard(span, task, fingerprint)

    def _records(self) -> list[Record | None]:
        return self._store.ledger.read_all(self._job.shards)


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


def _require_record(store: RowStore, shard: int, record: Record | None) -> None:
    if record is None:
        raise Corrupt(
            f"the record of shard {shard} is missing from {store.location}/ledger, or damaged, so nobody knows what "
            "its published rows are. Nothing was changed; restore it from a copy, or use --overwrite to make the "
            "store anew"
        )


@dataclass(frozen=True)
class _Region:
    """What one worker is sent: whole shards of every array of one output."""

    output: Location
    layout: Layout
    shards: tuple[_Shard, ...]


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
    made = shard.task()
    number, rows = shard.span.shard, len(shard.span)
    digests = []
    for array in region.layout.arrays:
        block = made.blocks[array.name]
        if block.shape != (rows, *array.shape):
            raise AssertionError(f"shard {number} of {array.name}: {block.shape} is not the whole shard")
        buffers = region.layout.encode(array.name, block)
        (region.output / array.key(number)).write(*buffers)
        digests.append(Digest.of_shard(buffers))
    main = made.blocks[region.layout.arrays[0].name]
    moments = made.moments or Moments.of(main.reshape(rows, int(np.prod(main.shape[1:]))))
    ledger.write(number, Record(shard.fingerprint, rows, made.dropped, tuple(digests)), moments)
