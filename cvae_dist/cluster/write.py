"""The protocol by which every store is written: lease, plan, whole shards, ledger, publish."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from cvae_dist.cluster.plan import Job, Made, Plan, Span, Staging, Task
from cvae_dist.cluster.regions import map_regions, slots
from cvae_dist.errors import Corrupt, OutputLocked, SettingsChanged, StorageFailed
from cvae_dist.events import Event, EventKind, OnEvent
from cvae_dist.sources.files import BadFile, BadFiles
from cvae_dist.store import ArrayLayout, Digest, Layout, Lease, LeaseToken, Location, Moments, Pack, Records, RowStore
from cvae_dist.store.layout import Block, ShardEncoder
from cvae_dist.store.moments import RunningMoments
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
        packs = _Packs(store, job, self._lease)
        plan = Plan(job, packs.pending, store.rows, slots(self._client))
        self._tell("start", job.rows - plan.rows, job.rows, str(plan))
        finished = store.published and store.rows == job.rows and not job.news
        if not finished:
            store = store.claimed(self._lease.token.token) if store is self.existing else store
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
        dropped, seconds = int(store.document["dropped"]), time.monotonic() - self._began
        message = "nothing to do, all rows were there" if finished else ""
        self._tell("done", store.rows, store.rows, message, seconds=seconds)
        return StoreResult(str(self._output), store.rows, plan.rows, dropped, seconds)

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

    def _write_shards(self, store: RowStore, plan: Plan, packs: "_Packs") -> None:
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

    def _publish(self, store: RowStore, job: Job, packs: "_Packs") -> RowStore:
        job.confirm()
        self._lease.check()
        packs.require_written()
        if self.existing is not None and self.existing.interrupted:
            self._lease.check()  # again, as the look at all shards takes its time
            _delete_beyond(store, job.shards)
        command = f"{self._stage} {self._output.name}"
        return store.publish(
            job.rows, packs.records(), packs.moments(), job.lineage, command, job.manifest, job.dropped
        )

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


@dataclass(frozen=True)
class _Region:
    """What one worker is sent: whole shards of every array of one output."""

    output: Location
    layout: Layout
    lease: LeaseToken
    shards: tuple[_Shard, ...]


@dataclass(frozen=True)
class _Written:
    """What a worker made of a region: the moments of the new rows of each tile, and the objects' versions by key.

    Where files of the source turned out bad, these (``problems``) are all that is told of it.
    """

    first: int
    records: Records
    moments: tuple[Moments, ...]
    versions: dict[str, str]
    problems: tuple[BadFile, ...] = ()


class _Packs:
    """The packs of the ledger: those that are recorded, and those that this run records.

    Only what the driver of the store has to know of shards that are written by others is kept in its memory.
    """

    def __init__(self, store: RowStore, job: Job, lease: Lease) -> None:
        self._store, self._job, self._lease = store, job, lease
        self._size = job.layout.shards_per_pack
        self._published = store.records()
        self._fingerprints = job.fingerprints(range(job.first_shard, job.shards), store.rows)
        self._require_published()
        grows = job.rows > store.rows
        self._first = store.rows // job.layout.rows_per_shard if grows else job.shards
        self._recorded = self._read_journal()
        self._versions: dict[str, str] = {}
        missing = {number: self._shards(number) for number in self._numbers() if number not in self._recorded}
        self.pending = tuple(missing.values())
        self._missing = {number: len(shards) for number, shards in missing.items()}
        self._parts: dict[int, list[_Written]] = {number: [] for number in missing}

    def shards(self, shards: range) -> tuple[_Shard, ...]:
        """Return what makes some shards."""
        spans = (self._job.span(shard, self._store.rows) for shard in shards)
        return tuple(
            _Shard(span, self._job.task(span), int(self._fingerprints[span.shard - self._job.first_shard]))
            for span in spans
        )

    def add(self, written: _Written) -> None:
        """Take in a finished region. With the last one of its pack the pack is recorded."""
        number = written.first // self._size
        parts = self._parts[number]
        parts.append(written)
        self._missing[number] -= len(written.records)
        self._versions |= written.versions
        if not self._missing[number]:
            in_order = sorted(self._parts.pop(number), key=lambda part: part.first)
            moments = Moments.empty(self._job.layout.n_features)
            for part in in_order:
                for tile in part.moments:
                    moments = moments.merge(tile)
            records = Records.joined(part.records for part in in_order)
            self._store.journal.write(number, Pack(records, moments))
            self._recorded[number] = records

    def records(self) -> Records:
        """Return the records of all shards."""
        return Records.joined([self._published[: self._first], *(self._recorded[n] for n in self._numbers())])

    def moments(self) -> Iterator[Moments]:
        """Yield the moments of all rows of every pack, in order: of published rows first, then of new ones."""
        published = self._store.pack_moments()
        for number in range(-(-self._job.shards // self._size)):
            before = next(published, Moments.empty(self._job.layout.n_features))
            yield before.merge(self._new_moments(number)) if number in self._recorded else before

    def _new_moments(self, number: int) -> Moments:
        pack = self._store.journal.read(number)
        if pack is None or not np.array_equal(pack.records.table, self._recorded[number].table):
            raise StorageFailed(
                f"pack {number} of the journal of {self._store.location} was changed by another writer while this run "
                "wrote it. Nothing was published; run the same command again"
            )
        return pack.moments

    def require_written(self) -> None:
        """Refuse to publish shards that are not as they were written; the next run makes their packs anew.

        The storage says of each object how long it is, and whether somebody wrote it after this run did.
        """
        records = self.records()[self._first :]
        for place, array in enumerate(self._job.layout.arrays):
            keys = [array.key(shard) for shard in range(self._first, self._job.shards)]
            found = self._store.location.look(array.name, keys)
            for shard, (key, size) in enumerate(zip(keys, records.sizes(place).tolist(), strict=True), self._first):
                entry = found.pop(key, None)
                if entry is None or entry.size != size or self._versions.get(key, entry.version) != entry.version:
                    self._lease.check()
                    self._store.journal.forget(shard // self._size)
                    raise StorageFailed(
                        f"shard {shard} of {self._store.location}/{array.name} is not as this run wrote it. Another "
                        "writer changed or deleted it, perhaps a worker of a driver that was killed. Nothing was "
                        "published; run the same command again"
                    )

    def _numbers(self) -> range:
        """Return the packs that hold the shards which are not published for good."""
        return (
            range(self._first // self._size, -(-self._job.shards // self._size))
            if self._first < self._job.shards
            else range(0)
        )

    def _shards(self, number: int) -> range:
        return range(max(self._first, number * self._size), min(self._job.shards, (number + 1) * self._size))

    def _read_journal(self) -> dict[int, Records]:
        """Return the records of packs that an interrupted run finished, if they are made from what is asked for."""
        asked, recorded = set(self._numbers()), {}
        for number in asked.intersection(self._store.journal.numbers()) if asked else ():
            pack, shards = self._store.journal.read(number), self._shards(number)
            first = shards.start - self._job.first_shard
            expected = self._fingerprints[first : first + len(shards)]
            new = min(shards.stop * self._job.layout.rows_per_shard, self._job.rows)
            new -= max(shards.start * self._job.layout.rows_per_shard, self._store.rows)
            if pack and np.array_equal(pack.records.fingerprints, expected) and pack.moments.count == new:
                recorded[number] = pack.records
        return recorded

    def _require_published(self) -> None:
        """Refuse to go on where published rows would now be made from something else."""
        job, store = self._job, self._store
        full = store.rows // job.layout.rows_per_shard
        stop = full if job.rows > store.rows else len(self._published)  # a partial last shard grows
        there = self._published.fingerprints[job.first_shard : stop]
        changed = np.flatnonzero(there != self._fingerprints[: len(there)])
        if len(changed):
            span = job.span(job.first_shard + int(changed[0]), store.rows)
            raise SettingsChanged(
                f"rows {span.start} to {span.stop} of {store.location} are published, but what they are made from "
                "has changed since. Nothing was changed; write to another output, or use --overwrite to make it anew"
            )


def _write_region(region: _Region) -> _Written:
    """Write the shards of a region."""
    records: list[Records] = []
    moments: list[Moments] = []
    versions: dict[str, str] = {}
    problems: list[BadFile] = []
    for _, tile in groupby(region.shards, lambda shard: shard.span.shard // region.layout.shards_per_tile):
        total = Moments.empty(region.layout.n_features)
        for shard in tile:
            try:
                record, new = _write_shard(region, shard, versions)
            except BadFile as error:  # the other shards may know of more
                problems.append(error)
                continue
            records.append(record)
            total = total.merge(new)
        moments.append(total)
    first = region.shards[0].span.shard
    if problems:
        return _Written(first, Records.none(region.layout), (), {}, tuple(problems))
    return _Written(first, Records.joined(records), tuple(moments), versions)


def _write_shard(region: _Region, shard: _Shard, versions: dict[str, str]) -> tuple[Records, Moments]:
    """Write one shard of every array. The one place where rows reach the storage."""
    made, span, layout = shard.task(), shard.span, region.layout
    main, *others = layout.arrays
    encoder = ShardEncoder(layout, main.name)
    running = RunningMoments(layout.n_features, np.dtype(main.dtype))
    region.lease.require()  # before it is begun, too: the driver of this task may have died, and another one begun
    _put(region, main.key(span.shard), _main_buffers(layout, made, span, encoder, running), versions)
    digests = [Digest.of_checksums(encoder.size, encoder.checksums)]
    for array in others:
        _require_whole(array, made.blocks[array.name], span)
        buffers = layout.encode(array.name, made.blocks[array.name])
        _put(region, array.key(span.shard), buffers, versions)
        digests.append(Digest.of_shard(buffers))
    return Records.one(shard.fingerprint, len(span), digests), running.moments()


def _main_buffers(
    layout: Layout, made: Made, span: Span, encoder: ShardEncoder, running: RunningMoments
) -> Iterator[Buffer]:
    """Yield the bytes of the first array, and add up its new rows on the way: each block is in the cache by then."""
    main, carried, rows = layout.arrays[0], span.new - span.start, 0
    for block in made.main or _steps(layout, made.blocks[main.name]):
        new = block[max(0, carried - rows) :]
        running.add(new.reshape(len(new), layout.n_features))
        yield from encoder.add(block)
        rows += len(block)
    if rows != len(span) or block.shape[1:] != main.shape:
        there = (rows, *block.shape[1:])
        raise AssertionError(f"shard {span.shard} of {main.name}: {there} is not the whole shard")
    yield from encoder.finish()
    made.check(running.moments())


def _steps(layout: Layout, block: Block) -> Iterator[Block]:
    step = layout.rows_per_step
    return (block[start : start + step] for start in range(0, len(block), step))


def _require_whole(array: ArrayLayout, block: Block, span: Span) -> None:
    if block.shape != (len(span), *array.shape):
        raise AssertionError(f"shard {span.shard} of {array.name}: {block.shape} is not the whole shard")


def _put(region: _Region, key: str, buffers: Iterable[Buffer], versions: dict[str, str]) -> None:
    versions[key] = (region.output / key).write_made(buffers, region.lease.require)


def _withdraw(store: RowStore) -> None:
    """Take back an append that was interrupted, and whose rows are not asked for any more.

    The partial last shard may hold new rows after the published ones. It is made anew from these.
    """
    shards, size = store.layout.shards(store.rows), store.layout.rows_per_shard
    start = store.rows // size * size
    records = store.records()
    for place, array in enumerate(store.layout.arrays):
        if start < store.rows:
            buffers = store.layout.encode(array.name, np.ascontiguousarray(store.read(array.name, start, store.rows)))
            if Digest.of_shard(buffers) != records.digest(shards - 1, place):
                raise Corrupt(
                    f"shard {shards - 1} of {store.location}/{array.name} does not begin with its published rows. "
                    "Nothing was changed; put it back from a copy, or use --overwrite to make the store anew"
                )
            (store.location / array.key(shards - 1)).write(*buffers)
    _delete_beyond(store, shards)
    store.withdrawn()


def _delete_beyond(store: RowStore, shards: int) -> None:
    """Delete the objects of shards that the store does not have."""
    for array in store.layout.arrays:
        place = store.location / array.name / "c"
        for entry in place.list():
            number = entry.name.partition("/")[0]
            if number.isdecimal() and int(number) >= shards:
                (place / entry.name).delete()
