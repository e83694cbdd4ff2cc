"""Rows that are shuffled on their way from files into a store, in two passes and bounded memory.

The new rows are dealt like cards. In the first pass a task reads one run of neighbouring rows, shuffles them, and deals
them to the shards in turn: what each shard gets lies together in one object below the journal. In the second pass the
task of a shard takes its part of every run, and shuffles these together.

So each shard holds the same share of every run: sorted classes are spread more evenly than by chance. And where a row
goes is a matter of arithmetic: nothing about single rows is kept anywhere, or sent to anybody.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from cvae_dist.cluster.plan import Made, Span, Staging
from cvae_dist.cluster.process import reused_block
from cvae_dist.cluster.regions import map_regions
from cvae_dist.cluster.source_map import Carried, SourceMap, folder_names, refuse_nonfinite
from cvae_dist.errors import StorageFailed
from cvae_dist.sources import BadFile, BadFiles, Interval, Reader, StagedBatch
from cvae_dist.store import STRING, ArrayLayout, LeaseToken, Location, Moments
from cvae_dist.store.columns import Integers
from cvae_dist.store.layout import Block, checksummed, decode_chunk, encode_chunk
from cvae_dist.store.ledger import SHUFFLED
from cvae_dist.store.lineage import digest_json
from cvae_dist.store.permutation import STORED_ORDER, derive_key, shuffled
from cvae_dist.store.urls import Buffer

_RUN_BYTES = 100_000_000  # of rows, which a task holds: larger runs make fewer, larger parts
_ORDER_BYTES = 16  # of a row, while its run or shard is put in order
_RUN, _SHARD = 0, 1  # what is put in order
_CHECKSUM = 4  # bytes


@dataclass(frozen=True)
class Deal:
    """How rows that come in runs are dealt to shards.

    Attributes
    ----------
    rows, runs : int
        How many there are. All runs are as long, but for one row.
    rows_per_shard, lead : int
        Size of a shard, and rows of the first one that are there already.
    key : int
        What the order depends on.
    """

    rows: int
    runs: int
    rows_per_shard: int
    lead: int
    key: int

    @cached_property
    def run_edges(self) -> Integers:
        """First row of each run, and the number of all rows; shape (runs + 1,)."""
        number = np.arange(self.runs + 1, dtype=np.int64)
        return number * (self.rows // self.runs) + np.minimum(number, self.rows % self.runs)

    @cached_property
    def shard_edges(self) -> Integers:
        """How many rows are dealt before each shard, and in all; shape (shards + 1,)."""
        shards = -(-(self.lead + self.rows) // self.rows_per_shard)
        edges = np.arange(shards + 1, dtype=np.int64) * self.rows_per_shard - self.lead
        return np.clip(edges, 0, self.rows)

    def given(self, run: "int | Integers", dealt: "int | Integers") -> Any:
        """Return how many of the first ``dealt`` rows are from a run: every run gives one in turn."""
        return -((run - dealt) // self.runs)

    def order_of_run(self, run: int) -> Integers:
        """Return the numbers of a run's rows, counted in the run, in the order in which it gives them."""
        return shuffled(int(np.diff(self.run_edges[run : run + 2])[0]), derive_key(self.key, _RUN, run))

    def order_of_shard(self, shard: int) -> Integers:
        """Return the new rows of a shard in the order in which they are stored.

        They are numbered as they are read: what the first run gave, then what the second one gave.
        """
        first, stop = self.shard_edges[shard : shard + 2].tolist()
        runs = np.arange(self.runs)
        before = self.given(runs, first)
        counts = self.given(runs, stop) - before
        rank, run = np.divmod(first + shuffled(stop - first, derive_key(self.key, _SHARD, shard)), self.runs)
        order: Integers = (np.cumsum(counts) - counts - before)[run] + rank
        return order


@dataclass(frozen=True)
class _Dealt:
    """What is dealt, on its way: one object for each run, with a part for each shard.

    A part has the rows of every array, one array after the other, each with its CRC32C. Where there are strings, whose
    length is not known, the object begins with a table: for each part, where its arrays begin and where it ends, and a
    CRC32C.
    """

    place: Location
    deal: Deal
    arrays: tuple[ArrayLayout, ...]

    def write(self, run: int, rows: Mapping[str, Block], guard: Callable[[], None]) -> None:
        """Write all rows of a run, in the order in which they were read."""
        (self.place / str(run)).write_made(self._object(run, rows), guard)

    def read(self, shard: int) -> dict[str, Block]:
        """Return the new rows of a shard as they lie here, those of the first array in memory that is used again.

        Raises
        ------
        StorageFailed
            Some of them are missing or damaged.
        """
        count = int(np.diff(self.deal.shard_edges[shard : shard + 2])[0])
        main, *others = self.arrays
        rows = {array.name: np.empty(count, object if array.dtype == STRING else array.dtype) for array in others}
        rows[main.name] = reused_block((count, main.shape[0]), np.dtype(main.dtype))
        stop = 0
        for run, (given, parts) in enumerate(zip(self._given(shard), self._parts(shard), strict=True)):
            start, stop = stop, stop + given
            with self._trusted(run):
                for array, part in zip(self.arrays, parts, strict=True):
                    if given:
                        rows[array.name][start:stop] = _decoded(part, array, given)
        return rows

    def _given(self, shard: int) -> list[int]:
        """Return how many rows each run gives to a shard."""
        runs = np.arange(self.deal.runs)
        before, after = (self.deal.given(runs, edge) for edge in self.deal.shard_edges[shard : shard + 2])
        given: list[int] = (after - before).tolist()
        return given

    def _object(self, run: int, rows: Mapping[str, Block]) -> Iterator[Sequence[Buffer]]:
        order, edges = self.deal.order_of_run(run), self.deal.given(run, self.deal.shard_edges)
        parts = [order[start:stop] for start, stop in itertools.pairwise(edges.tolist())]
        texts = {
            array.name: [_encoded_text(rows[array.name][part]) for part in parts]
            for array in self.arrays
            if array.dtype == STRING
        }
        if texts:
            yield [self._table(parts, texts)]
        for number, part in enumerate(parts):
            for array in self.arrays:
                if array.dtype == STRING:
                    yield [texts[array.name][number]]
                else:
                    given = np.take(rows[array.name], part, axis=0)
                    yield checksummed(given.data.cast("B") if given.size else b"")

    def _table(self, parts: Sequence[Integers], texts: Mapping[str, Sequence[bytes]]) -> bytes:
        sizes = [
            [
                len(texts[array.name][number]) if array.dtype == STRING else len(part) * array.row_bytes + _CHECKSUM
                for array in self.arrays
            ]
            for number, part in enumerate(parts)
        ]
        offsets = np.cumsum([len(parts) * self._entry_bytes, *itertools.chain.from_iterable(sizes)], dtype="<i8")
        count = len(self.arrays)
        entries = (offsets[count * number : count * (number + 1) + 1].tobytes() for number in range(len(parts)))
        return b"".join(itertools.chain.from_iterable(map(checksummed, entries)))

    @property
    def _entry_bytes(self) -> int:
        """Bytes of the table for one part."""
        return 8 * (len(self.arrays) + 1) + _CHECKSUM

    def _parts(self, shard: int) -> Iterator[list[memoryview]]:
        """Yield what each run gives to a shard: the bytes of every array."""
        offsets = self._offsets(shard)
        for data, ends in zip(self._fetch(offsets[:, 0], offsets[:, -1]), offsets - offsets[:, :1], strict=True):
            view = memoryview(data)
            yield [view[start:stop] for start, stop in itertools.pairwise(ends.tolist())]

    def _offsets(self, shard: int) -> Integers:
        """Return where the rows of every array begin in a shard's part of every run, and where the last ones end.

        Shape (runs, arrays + 1).
        """
        count = len(self.arrays)
        if any(array.dtype == STRING for array in self.arrays):
            first = np.full(self.deal.runs, self._entry_bytes * shard)
            found = np.empty((self.deal.runs, count + 1), np.int64)
            for run, entry in enumerate(self._fetch(first, first + self._entry_bytes)):
                with self._trusted(run):
                    found[run] = np.frombuffer(_checked(memoryview(entry), 8 * (count + 1)), "<i8")
            return found
        widths = np.cumsum([0, *(array.row_bytes for array in self.arrays)])
        before = self.deal.given(np.arange(self.deal.runs), self.deal.shard_edges[shard])
        starts = before * widths[-1] + _CHECKSUM * count * shard
        offsets: Integers = (
            starts[:, np.newaxis] + np.outer(self._given(shard), widths) + _CHECKSUM * np.arange(count + 1)
        )
        return offsets

    def _fetch(self, starts: Integers, stops: Integers) -> Iterator[Buffer]:
        """Yield a range of bytes of the object of every run."""
        places = [self.place / str(run) for run in range(self.deal.runs)]
        ranges = list(zip(places, starts.tolist(), stops.tolist(), strict=True))
        try:
            if self.place.is_local:
                yield from (place.read_range(start, stop) for place, start, stop in ranges)
            else:
                yield from Location.read_many(ranges)
        except FileNotFoundError as error:
            raise self._lost(error.filename or self.place, "is missing") from error

    @contextlib.contextmanager
    def _trusted(self, run: int) -> Iterator[None]:
        """Delete what a run dealt where it turns out to be damaged: the next command makes it anew."""
        try:
            yield
        except (ValueError, RuntimeError) as error:
            (self.place / str(run)).delete()
            raise self._lost(self.place / str(run), f"cannot be trusted ({error})") from error

    def _lost(self, place: object, what: str) -> StorageFailed:
        return StorageFailed(
            f"{place}, which holds rows on their way into the store, {what}. Nothing was published; run the same "
            "command again, which makes it anew"
        )


def _encoded_text(texts: Block) -> bytes:
    return b"".join(encode_chunk(texts, len(texts))) if len(texts) else b""


def _decoded(data: memoryview, array: ArrayLayout, count: int) -> Block:
    """Return some rows of one array; ``ValueError`` where they are not as they were written."""
    if array.dtype == STRING:
        return decode_chunk(bytes(data), STRING, (count,))
    payload = _checked(data, count * array.row_bytes)
    return np.frombuffer(payload, array.dtype).reshape(count, *array.shape)


def _checked(data: memoryview, size: int) -> memoryview:
    """Return bytes without the CRC32C behind them; ``ValueError`` where they do not match it."""
    payload = data[:-_CHECKSUM]
    if len(payload) != size or checksummed(payload)[1] != data[-_CHECKSUM:]:
        raise ValueError("its bytes do not match their CRC32C")
    return payload


@dataclass(frozen=True)
class ShuffledMap:
    """Turns the spans of a store into the tasks that make their shards of shuffled rows.

    Attributes
    ----------
    files : SourceMap
        The new rows, in the order of their files.
    seed : int
        What their new order depends on, beside the number of rows that are published.
    settings : Mapping
        Those of the store.
    """

    files: SourceMap
    seed: int
    settings: Mapping[str, Any]

    @property
    def first_shard(self) -> int:
        """The first shard with new rows."""
        return self.files.first_shard

    @property
    def task_bytes(self) -> int:
        """Memory that a task needs beside its shard: rows of a run, their order, and the bytes that are written."""
        rows = self._run_rows
        return rows * (2 * self._row_bytes + _ORDER_BYTES) + self.files.text_bytes(rows)

    @property
    def bytes_on_the_way(self) -> int:
        """What is written beside the store until its rows are published."""
        return self.files.batch.rows * self._row_bytes

    def stage(self, staging: Staging) -> None:
        """Deal all rows, but for the runs that an earlier run of the same command has dealt.

        Raises
        ------
        BadFiles
            Files turned out bad when they were read.
        """
        self.files.stage(staging)
        found = {entry.name for entry in self._folder.list()}
        for name in {name.partition("/")[0] for name in found} - {self._name}:
            (self._folder / name).delete()
        missing = [run for run in range(self._deal.runs) if f"{self._name}/{run}" not in found]
        dealt, problems = self._deal.rows - sum(map(self._rows_of, missing)), list[BadFile]()
        runs = (self._run(run, staging.lease.token) for run in missing)
        results = map_regions(
            _deal_run, runs, client=staging.client, threads=staging.threads, stopping=staging.lease.ending
        )
        with contextlib.closing(results):  # nothing may be written after the lease is released
            for run in results:
                staging.lease.require()
                problems += run.problems
                dealt += run.rows
                staging.tell(rows_dealt=dealt)
        if problems:
            raise BadFiles(problems)

    def task(self, span: Span) -> "_GatherShard":
        """Return what makes a shard."""
        return _GatherShard(
            self._dealt, span.shard - self.files.first_shard, self.files.layout.rows_per_step, self.files.carried(span)
        )

    def identity(self, span: Span) -> bytes:
        """Return what tells the rows of a span from others: any new row may be among them, behind published ones."""
        return self._name.encode()

    @property
    def _row_bytes(self) -> int:
        return sum(array.row_bytes for array in self.files.layout.arrays)

    @property
    def _run_rows(self) -> int:
        return max(1, _RUN_BYTES // self._row_bytes)

    def _rows_of(self, run: int) -> int:
        return int(np.diff(self._deal.run_edges[run : run + 2])[0])

    @cached_property
    def _deal(self) -> Deal:
        rows, size, published = self.files.batch.rows, self.files.layout.rows_per_shard, self.files.start
        lead = published - self.files.first_shard * size
        return Deal(rows, -(-rows // self._run_rows), size, lead, derive_key(self.seed, published, STORED_ORDER))

    @property
    def _folder(self) -> Location:
        return self.files.journal / SHUFFLED

    @cached_property
    def _name(self) -> str:
        """What the rows and their order are made from."""
        document = {**asdict(self._deal), "settings": dict(self.settings), "files": self.files.batch.digest}
        return digest_json(document)

    @property
    def _dealt(self) -> _Dealt:
        return _Dealt(self._folder / self._name, self._deal, self.files.layout.arrays)

    @cached_property
    def _intervals(self) -> list[Interval]:
        return self.files.batch.cut(self._deal.run_edges)

    def _run(self, run: int, lease: LeaseToken) -> "_Run":
        files, first = self.files, self.files.start + int(self._deal.run_edges[run])
        return _Run(
            files.reader, files.staged, self._intervals[run], files.url, files.labelled, run, first, self._dealt, lease
        )


class _Ended(NamedTuple):
    rows: int
    problems: tuple[BadFile, ...]


@dataclass(frozen=True)
class _Run:
    """What a worker is sent to deal the rows of a run, the first of which would be row ``first`` of the store."""

    reader: Reader
    batch: StagedBatch
    interval: Interval
    url: str
    labelled: bool
    number: int
    first: int
    dealt: _Dealt
    lease: LeaseToken


def _deal_run(run: _Run) -> _Ended:
    """Read the rows of a run, and deal them."""
    run.lease.require()
    schema, pieces = run.reader.schema, run.batch.pieces(run.interval)
    block = reused_block((pieces.total, schema.n_features), schema.dtype)
    try:
        columns = dict(run.reader.read(pieces, block))
    except BadFiles as error:  # the other runs may know of more
        return _Ended(0, error.problems)
    if not Moments.of(block).is_finite:
        refuse_nonfinite(run.url, block, pieces)
    if run.labelled:
        columns["label"] = folder_names(pieces)
    columns.setdefault("id", np.arange(run.first, run.first + pieces.total))
    run.dealt.write(run.number, {"x": block, **columns}, run.lease.require)
    return _Ended(pieces.total, ())


@dataclass(frozen=True)
class _GatherShard:
    """Take what the runs give to one shard, and shuffle it."""

    dealt: _Dealt
    number: int
    step: int
    carried: Carried

    def __call__(self) -> Made:
        rows, order = self.dealt.read(self.number), self.dealt.deal.order_of_shard(self.number)
        main = rows.pop("x")
        columns = {name: self.carried.before(name, values[order]) for name, values in rows.items()}
        return Made(columns, self._blocks(main, order))

    def _blocks(self, rows: Block, order: Integers) -> Iterator[Block]:
        """Yield all rows, some whole chunks at a time."""
        before = self.carried.read("x")
        for start in range(0, len(self.carried.span), self.step):
            first = max(0, start - len(before))
            known, new = before[start : start + self.step], order[first : max(0, start + self.step - len(before))]
            block = np.take(rows, new, axis=0)
            yield np.concatenate([known, block]) if len(known) else block
