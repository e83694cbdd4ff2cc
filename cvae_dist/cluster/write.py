"""The protocol by which every store is written: lease, plan, whole shards, ledger, publish."""

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from cvae_dist.cluster.packs import Packs, Shard, Written
from cvae_dist.cluster.plan import Job, Made, Plan, Span, Staging
from cvae_dist.cluster.regions import map_regions, slots
from cvae_dist.errors import Corrupt, OutputLocked, SettingsChanged, StorageFailed
from cvae_dist.events import Event, EventKind, OnEvent
from cvae_dist.sources.files import BadFile, BadFiles
from cvae_dist.store import (
    ArrayLayout,
    Digest,
    Layout,
    Lease,
    LeaseToken,
    Location,
    Moments,
    Records,
    RowStore,
    Sample,
)
from cvae_dist.store.layout import Block, ShardEncoder
from cvae_dist.store.moments import RunningMoments
from cvae_dist.store.sample import RunningSample
from cvae_dist.store.urls import Buffer

if TYPE_CHECKING:
    from distributed import Client


@dataclass(frozen=True)
class StoreResult:
    """What a verb that writes a store did.

    Attributes
    ----------
    url : str
        The output.
    rows, rows_written, rows_removed, dropped : int
        Rows in it, rows written by this run (0 when all was done before), how many rows fewer it has than before, and
        rows of the source left out.
    seconds : float
        Wall time of this run.
    published : bool
        Whether this run made anything visible, such as rows that an earlier one wrote.
    """

    url: str
    rows: int
    rows_written: int
    rows_removed: int
    dropped: int
    seconds: float
    published: bool

    @property
    def nothing_to_do(self) -> bool:
        """Whether an earlier run had done everything."""
        return not self.published


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
        if self._found is not None and self._found.moving is not None:  # its driver was killed
            self._found = self._found.claimed(lease.token.token).moved(lease.require)
        recorded = self._found is not None and (self._found.published or self._found.journal.is_begun())
        self.existing = self._found if recorded and not overwrite else None  # others have no settings to defend

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
        StorageFailed
            The storage cannot keep it exclusive.
        """
        with Lease.held(output, lambda message: on_event(Event(stage, "note", message=message))) as lease:
            yield cls(output, lease, stage, overwrite, client, on_event)

    def write(self, job: Job) -> StoreResult:
        """Write the shards that are not recorded yet, then publish them all.

        Raises
        ------
        SettingsChanged, InvalidInput, StorageFailed, OutputLocked
            It was made otherwise; a worker is too small; the storage refused; the lease was lost.
        BadFiles
            Files of the source turned out bad when they were read. What was recorded of others is kept.
        """
        store = self._begin(job)
        packs = Packs(store, job, self._lease)
        plan = Plan(job, packs.pending, store.rows, slots(self._client))
        self._tell("start", job.rows - plan.rows, job.rows, str(plan))
        removed = max(0, store.rows - job.rows)
        finished = store.published and store.rows == job.rows and not job.news and not packs.anew
        if not finished:
            if packs.replaced:
                self._tell("note", job.rows - plan.rows, job.rows, packs.news)
            store = store.claimed(self._lease.token.token) if store is self.existing else store
            if self.existing is not None and self.existing.interrupted and job.rows <= store.rows:
                _restore_tail(store)
            try:
                self._write_shards(store, plan, packs)
                store = self._publish(store, job, packs)
            except (Corrupt, StorageFailed):
                with contextlib.suppress(StorageFailed):
                    self._lease.check()  # did another driver take what this one misses?
                raise
        elif store.interrupted:
            _withdraw(store.claimed(self._lease.token.token))
        else:
            store.settle()
        written, dropped = plan.rows - packs.rows_kept, int(store.document["dropped"])
        seconds = time.monotonic() - self._began
        message = "nothing to do, all rows were there" if finished else ""
        self._tell("done", store.rows, store.rows, message, seconds=seconds)
        return StoreResult(str(self._output), store.rows, written, removed, dropped, seconds, not finished)

    def _begin(self, job: Job) -> RowStore:
        """Return the store to write, begun or fit to go on with; what can be refused is refused before any change."""
        if self.existing is not None:
            self.existing.require_settings(job.kind, job.settings)
            _require_layout(self.existing, job)
            # a walk through all shards takes long; a driver that was killed before it claimed the store left one file
            self._output.sweep_partial(deep=self.existing.interrupted)
            return self.existing
        job.require_memory(self._client)
        self._output.sweep_partial()
        token = self._lease.token.token
        if self._found is not None:
            return self._found.retract(job.layout, job.kind, job.settings, token)
        return RowStore.create(self._output, job.kind, job.layout, job.settings, token)

    def _write_shards(self, store: RowStore, plan: Plan, packs: Packs) -> None:
        """Write every shard that has no matching record."""
        job = plan.job
        if plan.pending:
            job.require_memory(self._client)
            job.stage(self._staging(plan))
        began, written, problems = time.monotonic(), 0, list[BadFile]()
        regions = (
            _Region(self._output, job.layout, self._lease.token, packs.shards(shards)) for shards in plan.regions()
        )
        stopping = self._lease.ending  # tasks stop before their next shard
        results = map_regions(_write_region, regions, client=self._client, threads=job.threads, stopping=stopping)
        # closed at once, whatever ends the loop: nothing may be written after the lease is released
        with contextlib.closing(results):
            try:
                for region in results:
                    self._lease.require()
                    if region.problems:
                        problems += region.problems
                        continue
                    written += region.records.rows
                    packs.add(region)
                    rate = written / max(time.monotonic() - began, 1e-9)
                    self._tell("progress", job.rows - plan.rows + written, job.rows, rows_per_second=rate)
            except OutputLocked:
                self._lease.check()  # knows better than a task how it was lost
                raise
        if problems:
            raise BadFiles(problems)

    def _staging(self, plan: Plan) -> Staging:
        def tell(**figures: float) -> None:
            self._tell("progress", plan.job.rows - plan.rows, plan.job.rows, "", **figures)

        return Staging(self._client, plan.job.threads, self._lease, tell)

    def _publish(self, store: RowStore, job: Job, packs: Packs) -> RowStore:
        job.confirm()
        self._lease.check()
        packs.require_written()
        if self._client is not None and packs.pending:
            self._output.sweep_partial()  # of workers that were killed
        if self.existing is not None and self.existing.interrupted:
            self._lease.check()  # again, as the look at all shards takes its time
            store.delete_beyond(max(job.shards, store.layout.shards(store.rows)))
        sample = packs.sample() if job.sampled else None
        drift = packs.drift() if job.sampled else None
        if drift is not None and (job.rows > store.rows or packs.anew):
            job.review(drift)
        published = store.publish(
            job.rows, packs.records(), packs.moments(), job.lineage, f"{self._stage} {self._output.name}",
            job.manifest, job.dropped, sample, drift, packs.moving,
        )  # fmt: skip
        return published if packs.moving is None else published.moved(self._lease.require)

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
    if store.published and job.rows < store.rows and not job.rewrites:
        raise SettingsChanged(
            f"{store.location} holds {store.rows:,} rows, but is now to have {job.rows:,}. Nothing was changed; "
            "rows are never taken away: write to another output, or use --overwrite to make it anew"
        )


def _names(layout: Layout) -> str:
    return ", ".join(f"{array.name} {array.shape} {array.dtype}" for array in layout.arrays)


@dataclass(frozen=True)
class _Region:
    """What one worker is sent: whole shards of every array of one output."""

    output: Location
    layout: Layout
    lease: LeaseToken
    shards: tuple[Shard, ...]


def _write_region(region: _Region) -> Written:
    """Write the shards of a region."""
    records: list[Records] = []
    moments: list[Moments] = []
    samples = [Sample.none(region.layout)]
    versions: dict[str, str] = {}
    problems: list[BadFile] = []
    for _, tile in groupby(region.shards, lambda shard: shard.span.shard // region.layout.shards_per_tile):
        total = Moments.empty(region.layout.n_features)
        for shard in tile:
            try:
                record, new, sample = _write_shard(region, shard, versions)
            except BadFiles as error:  # the other shards may know of more
                problems += error.problems
                continue
            records.append(record)
            samples.append(sample)
            total = total.merge(new)
        moments.append(total)
    first = region.shards[0].span.shard
    if problems:
        return Written(first, Records.none(region.layout), (), samples[0], {}, tuple(problems))
    return Written(first, Records.joined(records), tuple(moments), Sample.joined(samples), versions)


def _write_shard(region: _Region, shard: Shard, versions: dict[str, str]) -> tuple[Records, Moments, Sample]:
    """Write one shard of every array. The one place where rows reach the storage."""
    made, span, layout = shard.task(), shard.span, region.layout
    main, *others = layout.arrays
    encoder = ShardEncoder(layout, main.name)
    running = RunningMoments(layout.n_features, np.dtype(main.dtype))
    sample = RunningSample(span.new, span.stop, shard.level, layout)
    if shard.kept is not None:
        for block in made.main or ():
            running.add(block)
            sample.add(block)
        return shard.kept, running.moments(), sample.sample()
    region.lease.require()  # before it is begun, too: the driver of this task may have died, and another one begun
    _put(region, shard.key(main), _main_parts(layout, made, span, encoder, running, sample), versions)
    digests = [Digest.of_checksums(encoder.size, encoder.checksums)]
    for array in others:
        _require_whole(array, made.blocks[array.name], span)
        buffers = layout.encode(array.name, made.blocks[array.name])
        _put(region, shard.key(array), [buffers], versions)
        digests.append(Digest.of_shard(buffers))
    return Records.one(shard.fingerprint, len(span), digests), running.moments(), sample.sample()


def _main_parts(
    layout: Layout, made: Made, span: Span, encoder: ShardEncoder, running: RunningMoments, sample: RunningSample
) -> Iterator[list[Buffer]]:
    """Yield the bytes of the first array, and add up its new rows on the way: each block is in the cache by then."""
    main, carried, rows = layout.arrays[0], span.new - span.start, 0
    for block in made.main or _steps(layout, made.blocks[main.name]):
        new = block[max(0, carried - rows) :]
        new = new.reshape(len(new), layout.n_features)
        running.add(new)
        sample.add(new)
        yield encoder.add(block)
        rows += len(block)
    if rows != len(span) or block.shape[1:] != main.shape:
        there = (rows, *block.shape[1:])
        raise AssertionError(f"shard {span.shard} of {main.name}: {there} is not the whole shard")
    yield encoder.finish()
    made.check(running.moments())


def _steps(layout: Layout, block: Block) -> Iterator[Block]:
    step = layout.rows_per_step
    return (block[start : start + step] for start in range(0, len(block), step))


def _require_whole(array: ArrayLayout, block: Block, span: Span) -> None:
    if block.shape != (len(span), *array.shape):
        raise AssertionError(f"shard {span.shard} of {array.name}: {block.shape} is not the whole shard")


def _put(region: _Region, key: str, parts: Iterable[Sequence[Buffer]], versions: dict[str, str]) -> None:
    versions[key] = (region.output / key).write_made(parts, region.lease.require)


def _withdraw(store: RowStore) -> None:
    """Take back what was interrupted, and is not asked for any more."""
    _restore_tail(store)
    store.delete_beyond(store.layout.shards(store.rows))
    store.withdrawn()


def _restore_tail(store: RowStore) -> None:
    """Make the partial last shard anew from its published rows: an interrupted append may have put others behind."""
    shards, size = store.layout.shards(store.rows), store.layout.rows_per_shard
    start = store.rows // size * size
    records = store.records()
    for place, array in enumerate(store.layout.arrays) if start < store.rows else ():
        buffers = store.layout.encode(array.name, np.ascontiguousarray(store.read(array.name, start, store.rows)))
        if Digest.of_shard(buffers) != records.digest(shards - 1, place):
            raise Corrupt(
                f"shard {shards - 1} of {store.location}/{array.name} does not begin with its published rows. "
                "Nothing was changed; put it back from a copy, or use --overwrite to make the store anew"
            )
        (store.location / array.key(shards - 1)).write(*buffers)
