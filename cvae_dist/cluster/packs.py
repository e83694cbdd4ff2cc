"""The packs of the ledger while a store is written: which shards are made, and what is known of those that are."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cvae_dist.cluster.plan import Job, Made, Span, Task
from cvae_dist.errors import SettingsChanged, StorageFailed
from cvae_dist.sources.files import BadFile
from cvae_dist.store import ArrayLayout, Drift, Lease, Moments, Pack, Records, RowStore, Sample
from cvae_dist.store.columns import Integers
from cvae_dist.store.layout import Block
from cvae_dist.store.ledger import STAGED
from cvae_dist.store.reader import RowReader, ShardedArray
from cvae_dist.store.sample import level_of


@dataclass(frozen=True)
class Written:
    """What a worker made of a region: moments of the new rows of each tile, their sample, objects' versions by key.

    Where files of the source turned out bad, these (``problems``) are all that is told of it.
    """

    first: int
    records: Records
    moments: tuple[Moments, ...]
    sample: Sample
    versions: dict[str, str]
    problems: tuple[BadFile, ...] = ()


@dataclass(frozen=True)
class Shard:
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


class Packs:
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
        self._parts: dict[int, list[Written]] = {number: [] for number in missing}

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

    def shards(self, shards: range) -> tuple[Shard, ...]:
        """Return what makes some shards of one pack."""
        published = self._rows_before(shards.start // self._size)
        return tuple(self._shard(self._job.span(shard, published)) for shard in shards)

    def _shard(self, span: Span) -> Shard:
        number = span.shard
        fingerprint = int(self._fingerprints[number])
        level = self._level(number // self._size, span.stop) if self._job.sampled else None
        if self._is_kept(number):
            task = _Reread(ShardedArray.of(self._store), self._job.layout.rows_per_step, span)
            return Shard(span, task, fingerprint, level, kept=self._published[number : number + 1])
        return Shard(span, self._job.task(span), fingerprint, level, number in self.replaced)

    def _level(self, pack: int, stop: int) -> int:
        """Return the level at which the new rows of a pack before row ``stop`` are sampled, whatever comes after."""
        return level_of(stop - self._rows_before(pack), self._job.layout)

    def _rows_before(self, pack: int) -> int:
        """Return how many rows of the store are in the published moments already, as far as a pack is concerned."""
        return 0 if pack in self.anew else self._store.rows

    def add(self, written: Written) -> None:
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
