"""The protocol by which every store is written: lease, plan, whole shards, ledger, publish."""

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from cvae_dist.cluster.plan import Job, Made, Plan, Span, Staging, Task
from cvae_dist.cluster.regions import map_regions, slots
from cvae_dist.errors import Corrupt, OutputLocked, SettingsChanged, StorageFailed
from cvae_dist.events import Event, EventKind, OnEvent
from cvae_dist.sources.files import BadFile, BadFiles
from cvae_dist.store import (
    ArrayLayout,
    Digest,
    Drift,
    Layout,
    Lease,
    LeaseToken,
    Location,
    Moments,
    Pack,
    Records,
    RowStore,
    Sample,
)
from cvae_dist.store.columns import Integers
from cvae_dist.store.layout import Block, ShardEncoder
from cvae_dist.store.ledger import STAGED
from cvae_dist.store.moments import RunningMoments
from cvae_dist.store.reader import RowReader, ShardedArray
from cvae_dist.store.sample import RunningSample, level_of
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
    published : bool
        Whether this run made anything visible, such as rows that an earlier one wrote.
    """

    url: str
    rows: int
    rows_written: int
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
        packs = _Packs(store, job, self._lease)
        plan = Plan(job, packs.pending, store.rows, slots(self._client))
        self._tell("start", job.rows - plan.rows, job.rows, str(plan))
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
        dropped, seconds = int(store.document["dropped"]), time.monotonic() - self._began
        message = "nothing to do, all rows were there" if finished else ""
        self._tell("done", store.rows, store.rows, message, seconds=seconds)
        return StoreResult(str(self._output), store.rows, plan.rows - packs.rows_kept, dropped, seconds, not finished)

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
class _Shard:
    """A shard to make.

    It is ``staged`` where it will replace a published one. One that is ``kept`` is as published: only its moments are
    made.
    """

    span: Span
    task: Task
    fingerprint: int
    level: int | None  # at which its new rows are sampled
    staged: bool = False
    kept: Records | None = None

    def key(self, array: ArrayLayout) -> str:
        """Return where its object of an array is written, inside the group."""
        key = array.key(self.span.shard)
        return f"{STAGED}/{key}" if self.staged else key


@dataclass(frozen=True)
class _Reread:
    """The task of a shard that is kept: its published rows."""

    array: ShardedArray
    step: int
    span: Span

    def __call__(self) -> Made:
        return Made({}, self._blocks())

    def _blocks(self) -> Iterator[Block]:
        reader = RowReader(self.array)
        for start in range(self.span.start, self.span.stop, self.step):
            yield reader.read(start, min(start + self.step, self.span.stop))


@dataclass(frozen=True)
class _Region:
    """What one worker is sent: whole shards of every array of one output."""

    output: Location
    layout: Layout
    lease: LeaseToken
    shards: tuple[_Shard, ...]


@dataclass(frozen=True)
class _Written:
    """What a worker made of a region: moments of the new rows of each tile, their sample, objects' versions by key.

    Where files of the source turned out bad, these (``problems``) are all that is told of it.
    """

    first: int
    records: Records
    moments: tuple[Moments, ...]
    sample: Sample
    versions: dict[str, str]
    problems: tuple[BadFile, ...] = ()


class _Packs:
    """The packs of the ledger: those that are recorded, and those that this run records.

    Only what the driver of the store has to know of shards that are written by others is kept in its memory.

    Attributes
    ----------
    pending : tuple of range
        Shards of the packs that are not recorded yet.
    replaced : frozenset of int
        Published shards that are made again: they are staged, and take their places after the publication.
    anew : frozenset of int
        Packs of published rows that are replaced or taken away: the moments of all their rows are made again.
    """

    def __init__(self, store: RowStore, job: Job, lease: Lease) -> None:
        self._store, self._job, self._lease = store, job, lease
        self._size = job.layout.shards_per_pack
        self._published = store.records()
        before = self._published.fingerprints[: job.first_shard]
        self._fingerprints = np.concatenate([before, job.fingerprints(range(job.first_shard, job.shards), store.rows)])
        grows = job.rows > store.rows
        self._first = store.rows // job.layout.rows_per_shard if grows else job.shards
        self._samples: dict[int, Sample] = {}
        self._replace(self._changed())
        self._recorded = self._read_journal()
        self._versions: dict[str, str] = {}
        missing = {number: self._shards(number) for number in self._numbers() if number not in self._recorded}
        self.pending = tuple(missing.values())
        self._missing = {number: len(shards) for number, shards in missing.items()}
        self._parts: dict[int, list[_Written]] = {number: [] for number in missing}

    def _changed(self) -> list[int]:
        """Return the published shards that are asked for, but made from something else."""
        job, store = self._job, self._store
        full = store.rows // job.layout.rows_per_shard
        stop = full if job.rows > store.rows and job.keeps_tail else len(self._published)
        there = self._published.fingerprints[:stop][: job.shards]
        changed: list[int] = np.flatnonzero(there != self._fingerprints[: len(there)]).tolist()
        if changed and not job.rewrites:
            span = job.span(changed[0], store.rows)
            raise SettingsChanged(
                f"rows {span.start} to {span.stop} of {store.location} are published, but what they are made from "
                "has changed since. Nothing was changed; write to another output, or use --overwrite to make it anew"
            )
        return changed

    def _replace(self, changed: list[int]) -> None:
        """Decide which published shards are made again, and of which packs all moments are."""
        anew = {shard // self._size for shard in changed}
        if 0 < self._job.rows < self._store.rows:
            anew.add((self._job.shards - 1) // self._size)
        last = self._first
        if last < min(len(self._published), self._job.shards) and last // self._size in anew and last not in changed:
            changed = [*changed, last]  # it grows
        self.anew, self.replaced = frozenset(anew), frozenset(changed)

    @property
    def moving(self) -> Integers | None:
        """Shards that are staged, ascending; None where no published row is replaced or taken away."""
        return np.array(sorted(self.replaced), np.int64) if self.anew else None

    @property
    def rows_kept(self) -> int:
        """Rows of pending shards that stay as they are."""
        pending = (shard for shards in self.pending for shard in shards)
        return sum(int(self._published.table[shard, 1]) for shard in pending if self._is_kept(shard))

    @property
    def news(self) -> str:
        """What to tell a person of the shards that are replaced."""
        rows = int(self._published.table[sorted(self.replaced), 1].sum())
        return (
            f"{rows:,} of {self._store.rows:,} published rows are in {len(self.replaced):,} shards that are made "
            "again, as what they are made from has changed"
        )

    def _is_kept(self, shard: int) -> bool:
        published = shard < len(self._published)
        return published and shard // self._size in self.anew and shard not in self.replaced

    def shards(self, shards: range) -> tuple[_Shard, ...]:
        """Return what makes some shards of one pack."""
        published = self._rows_before(shards.start // self._size)
        return tuple(self._shard(self._job.span(shard, published)) for shard in shards)

    def _shard(self, span: Span) -> _Shard:
        number = span.shard
        fingerprint = int(self._fingerprints[number])
        level = self._level(number // self._size, span.stop) if self._job.sampled else None
        if self._is_kept(number):
            task = _Reread(ShardedArray.of(self._store), self._job.layout.rows_per_step, span)
            return _Shard(span, task, fingerprint, level, kept=self._published[number : number + 1])
        return _Shard(span, self._job.task(span), fingerprint, level, number in self.replaced)

    def _level(self, pack: int, stop: int) -> int:
        """Return the level at which the new rows of a pack before row ``stop`` are sampled, whatever comes after."""
        return level_of(stop - self._rows_before(pack), self._job.layout)

    def _rows_before(self, pack: int) -> int:
        """Return how many rows of the store are in the published moments already, as far as a pack is concerned."""
        return 0 if pack in self.anew else self._store.rows

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
            last = min((number + 1) * self._size * self._job.layout.rows_per_shard, self._job.rows)
            sample = Sample.joined(part.sample for part in in_order).thinned(self._level(number, last))
            self._store.journal.write(number, Pack(records, moments, sample))
            self._recorded[number], self._samples[number] = records, sample

    def records(self) -> Records:
        """Return the records of all shards."""
        table = np.zeros((self._job.shards, self._published.table.shape[1]), np.uint64)
        there = self._published.table[: self._job.shards]
        table[: len(there)] = there
        for number, records in self._recorded.items():
            shards = self._shards(number)
            table[shards.start : shards.stop] = records.table
        return Records(table)

    def moments(self) -> Iterator[Moments]:
        """Yield the moments of all rows of every pack, in order: of published rows first, then of new ones."""
        published = self._store.pack_moments()
        for number in range(-(-self._job.shards // self._size)):
            before = next(published, Moments.empty(self._job.layout.n_features))
            if number in self.anew:
                yield self._new_moments(number)
            else:
                yield before.merge(self._new_moments(number)) if number in self._recorded else before

    def sample(self) -> Sample:
        """Return the sample of all rows. That of a store which becomes smaller stays as thin as it was."""
        before, new = self._samples_at(0)
        size = self._size * self._job.layout.rows_per_shard
        anew = np.isin(before.rows // size, sorted(self.anew)) | (before.rows >= self._job.rows)
        level = max(level_of(rows, self._job.layout) for rows in (self._job.rows, self._store.rows))
        return Sample.joined([before[~anew], new]).sorted().thinned(level)

    def drift(self) -> Drift | None:
        """Return how the new rows differ from the published ones; without new rows what is known of the last append.

        Where published rows are replaced, all rows are compared with those of before.
        """
        if not self._store.published or not self._recorded:
            return self._store.drift()
        before, new = self._store.statistics(), Moments.empty(self._job.layout.n_features)
        if self.anew:
            for moments in self.moments():
                new = new.merge(moments)
            return Drift.between(before, new, (self._store.sample(), self.sample()), self._job.layout)
        for number in self._numbers():
            new = new.merge(self._new_moments(number))
        samples = self._samples_at(level_of(self._job.rows - self._store.rows, self._job.layout))
        return Drift.between(before, new, samples, self._job.layout)

    def _samples_at(self, level: int) -> tuple[Sample, Sample]:
        """Return the samples of the published rows and of the new ones."""
        parts = (self._samples[number].thinned(level) for number in self._numbers())
        return self._store.sample(), Sample.joined([Sample.none(self._job.layout), *parts])

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
        records = self.records()
        new = sorted({*range(self._first, self._job.shards)} - self.replaced)
        for prefix, shards in (("", new), (f"{STAGED}/", sorted(self.replaced))):
            for place, array in enumerate(self._job.layout.arrays):
                self._require_objects(prefix, array, shards, records.sizes(place)[shards].tolist())

    def _require_objects(self, prefix: str, array: ArrayLayout, shards: list[int], sizes: list[int]) -> None:
        keys = [prefix + array.key(shard) for shard in shards]
        found = self._store.location.look(prefix + array.name, keys) if keys else {}
        for shard, key, size in zip(shards, keys, sizes, strict=True):
            entry = found.pop(key, None)
            if entry is None or entry.size != size or self._versions.get(key, entry.version) != entry.version:
                self._lease.check()
                self._store.journal.forget(shard // self._size)
                raise StorageFailed(
                    f"shard {shard} of {self._store.location}/{array.name} is not as this run wrote it. Another "
                    "writer changed or deleted it, perhaps a worker of a driver that was killed. Nothing was "
                    "published; run the same command again"
                )

    def _numbers(self) -> list[int]:
        """Return the packs with shards that are new or replaced."""
        grown = range(self._first // self._size, -(-self._job.shards // self._size))
        return sorted({*self.anew, *(grown if self._first < self._job.shards else ())})

    def _shards(self, number: int) -> range:
        first = 0 if number in self.anew else self._first
        return range(max(first, number * self._size), min(self._job.shards, (number + 1) * self._size))

    def _read_journal(self) -> dict[int, Records]:
        """Return the records of packs that an interrupted run finished, if they are made from what is asked for."""
        asked, recorded = set(self._numbers()), {}
        for number in asked.intersection(self._store.journal.numbers()) if asked else ():
            pack, shards = self._store.journal.read(number), self._shards(number)
            expected = self._fingerprints[shards.start : shards.stop]
            new = min(shards.stop * self._job.layout.rows_per_shard, self._job.rows)
            new -= max(shards.start * self._job.layout.rows_per_shard, self._rows_before(number))
            if pack and np.array_equal(pack.records.fingerprints, expected) and pack.moments.count == new:
                recorded[number], self._samples[number] = pack.records, pack.sample
        return recorded


def _write_region(region: _Region) -> _Written:
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
        return _Written(first, Records.none(region.layout), (), samples[0], {}, tuple(problems))
    return _Written(first, Records.joined(records), tuple(moments), Sample.joined(samples), versions)


def _write_shard(region: _Region, shard: _Shard, versions: dict[str, str]) -> tuple[Records, Moments, Sample]:
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
        yield from encoder.add(block)
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
