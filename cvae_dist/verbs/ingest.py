"""The verb ``ingest``: rows from a source into a Zarr store with statistics."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np

from cvae_dist.cluster import Job, Output, ShuffledMap, SourceMap, StoreResult, map_regions
from cvae_dist.errors import DriftTooLarge, InvalidInput, SettingsChanged
from cvae_dist.events import Event, OnEvent, ignore
from cvae_dist.sources import (
    BadFile,
    BadFiles,
    Batch,
    Changes,
    Column,
    FileOptions,
    Files,
    FileTable,
    Format,
    Pieces,
    Places,
    Reader,
    RowsPerFile,
    Schema,
    Source,
    Spool,
    TableOptions,
    compare,
    file_name,
    open_source,
    to_read,
)
from cvae_dist.store import STRING, ArrayLayout, Drift, Layout, Location, RowStore
from cvae_dist.store.columns import Integers
from cvae_dist.store.layout import is_name, is_worth_compressing, rows_to_try, shard_bytes_at
from cvae_dist.store.ledger import JOURNAL
from cvae_dist.store.lineage import without_credentials
from cvae_dist.store.manifest import NOWHERE, Batches, Entries, as_spans, dropped_count
from cvae_dist.store.permutation import STORED_ORDER, derive_key
from cvae_dist.store.publication import METADATA, PUBLICATIONS
from cvae_dist.store.urls import StorageOptions

if TYPE_CHECKING:
    from distributed import Client

Nonfinite = Literal["raise", "drop"]
Bad = Literal["raise", "skip"]
Changed = Literal["raise", "rewrite"]

_REMOTE_THREADS = 4
_SCAN_BYTES = 16_000_000  # of rows that one task looks through
_NAMED = 5  # files in one message
_LISTED = 100  # files in a list of messages
_KEPT = (
    "Nothing of it was used and rows recorded before are kept; mend or remove the file and run the same command again"
)


# Names of arrays and dimensions of stores, and of what lies beside them.
_TAKEN = (
    "x", "z", "score", "negative_elbo", "reconstruction_error", "sample", "feature", "latent", JOURNAL, PUBLICATIONS,
    METADATA,
)  # fmt: skip
_MOST_ROW_BYTES = 1_000_000_000
_MODELS = 1000  # files that are tried, if need be, until one can be used


@dataclass(frozen=True)
class IngestResult(StoreResult):
    """What an ingest did.

    Attributes
    ----------
    files, changed, deleted : int
        Files that were new, that were others than before, and that were gone.
    bad_files : int
        New and changed files that were left out.
    """

    files: int
    changed: int
    deleted: int
    bad_files: int

    @property
    def nothing_to_do(self) -> bool:
        """Whether an earlier run had done everything."""
        return super().nothing_to_do and not self.changed and not self.deleted


def ingest(
    source: str | os.PathLike[str] | Source,
    store: str | os.PathLike[str],
    *,
    format: Format = "auto",
    rows_per_file: RowsPerFile = "auto",
    array: str | None = None,
    columns: tuple[str, ...] = (),
    id: str | None = None,
    carry: tuple[str, ...] = (),
    label: Literal["folder"] | None = None,
    nonfinite: Nonfinite = "raise",
    shuffle: int | None = None,
    bad: Bad = "raise",
    max_bad: int | None = None,
    changed: Changed = "raise",
    max_drift: float | None = None,
    overwrite: bool = False,
    fsync: bool = False,
    storage_options: StorageOptions | None = None,
    source_storage_options: StorageOptions | None = None,
    client: "Client | None" = None,
    on_event: OnEvent = ignore,
) -> IngestResult:
    """Copy rows from files anywhere into a chunked Zarr store, with statistics.

    New files of a known source are appended, and only they are read. The output is a Zarr group with
    ``x (sample, feature)`` in the dtype of the source (float16, float32, float64 or integers; one item shape and dtype
    in all files), its ids and its carried columns.

    Parameters
    ----------
    source : path, URL or Source
        A folder or prefix of files, nested as you like, or one file; or a Zarr array.
    store : path or URL
        Zarr store to write.
    format : {"auto", "npy", "npz", "parquet", "csv", "laion", "zarr", "hdf5"}
        What the files are; auto: what their names say. laion: img_emb_*.npy and metadata_*.parquet in the same order.
    rows_per_file : {"auto", "one", "many"}
        Of .npy files: whether a file is one row of any shape, or its first axis counts rows. auto: a file with one
        axis is one row.
    array : str, optional
        Which array of an .npz, Zarr or HDF5 file; needed where there are several.
    columns : tuple of str, optional
        Columns of a table that are the features. By default its only list column, or else every numeric one.
    id : str, optional
        Column of a table, of integers or strings, that becomes `id`.
    carry : tuple of str, optional
        Columns of a table that travel with the rows, and on to the latents.
    label : {"folder"}, optional
        'folder' carries the name of each file's folder along as the column `label`.
    nonfinite : {"raise", "drop"}
        What to do about rows with NaN or infinity. drop reads the source twice and counts what it left out.
    shuffle : int, optional
        Seed of a random order in which rows are stored; by default it is that of the files. Files of many rows are
        written twice for it. Without `id` their rows get one: the number that a row would have without shuffling.
    bad : {"raise", "skip"}
        What to do about files that cannot be used. raise names them all, after the others were looked at; skip leaves
        them out, records why, and tries them again in the next run.
    max_bad : int, optional
        With skip: how many such files are accepted.
    changed : {"raise", "rewrite"}
        What to do about files whose rows are in the store, and that have changed or were deleted since. rewrite reads
        the shards with their rows anew, and takes the rows of deleted files away.
    max_drift : float, optional
        Publish nothing if appended rows drift by more. New rows are compared with all rows that the store had before:
        the drift of a feature is the difference of the means in standard deviations, or the logarithm of the ratio of
        the standard deviations, whichever is larger; that of an append is the largest of all features. Chance alone
        gives n new rows of many features about 3 / sqrt(n).
    overwrite : bool
        Replace a store that was made with other settings.
    fsync : bool
        Wait until a local disk has what was written, so that a finished command survives a power loss.
    storage_options : Mapping, optional
        Options of the store's file system, for fsspec; those of the source, too, where it has none of its own.
    source_storage_options : Mapping, optional
        Options of the source's file system.
    client : distributed.Client, optional
        Dask cluster to use; threads of this process when None.
    on_event : callable
        Listener for progress.

    Returns
    -------
    IngestResult

    Raises
    ------
    SourceNotFound, InvalidInput
        No source, or a mixture of formats; bad files or a non-finite row, named.
    DriftTooLarge
        Appended rows drift by more than ``max_drift``. They are not published, but kept for the next run.
    SettingsChanged, OutputLocked, StorageFailed
        The store was made otherwise, files that it was made from have changed, it is being written, or cannot be
        written. What was recorded is kept.
    """
    for name, value, choices in (
        ("format", format, get_args(Format)),
        ("rows_per_file", rows_per_file, get_args(RowsPerFile)),
        ("label", label, (None, "folder")),
        ("nonfinite", nonfinite, get_args(Nonfinite)),
        ("bad", bad, get_args(Bad)),
        ("changed", changed, get_args(Changed)),
    ):
        _require_choice(name, value, choices)
    if max_bad is not None and bad == "raise":
        raise InvalidInput(
            "max_bad counts files that are skipped; say bad='skip' (--bad skip), too. Nothing was written"
        )
    if max_drift is not None and not max_drift >= 0:
        raise InvalidInput(f"max_drift={max_drift} allows no rows at all; use 0 or more. Nothing was written")
    for name, names in (("columns", columns), ("carry", carry)):
        if isinstance(names, str):
            raise InvalidInput(f"{name}={names!r} is no list of names; say {name}=[{names!r}]. Nothing was written")
    place = Location.of(store, storage_options, fsync)
    options = FileOptions(format, rows_per_file, array, TableOptions(tuple(columns), id, tuple(carry)))
    if source_storage_options is None and _protocol(source) == _protocol(store):
        source_storage_options = storage_options
    if (
        not isinstance(source, Source)
        and RowStore.claims(place)
        and Location.of(source, source_storage_options).lies_in(place)
    ):
        raise InvalidInput(f"the source {source} lies in the store {place}, or is it. Nothing was changed")

    def listed() -> Source:
        return open_source(source, options, source_storage_options)

    before, opened = _publication(place), listed()
    run = _Run(
        opened, place, options.given, label, nonfinite, shuffle, bad, max_bad, changed, max_drift, client, on_event
    )
    return run.write(overwrite, lambda: opened if _publication(place) == before else listed())


def _publication(place: Location) -> str:
    """Return the name of what is published at a location; empty where nothing is, or nothing of ours."""
    if not RowStore.claims(place):
        return ""
    store = RowStore.find(place)
    return str(store.document.get("publication", "")) if store is not None else ""


def _require_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise InvalidInput(f"{name}={value!r} is none of {', '.join(map(repr, choices))}; nothing was written")


def _protocol(place: object) -> str:
    return str(place).partition("://")[0] if "://" in str(place) else ""


@dataclass(frozen=True)
class _Run:
    """One run of the verb: decides which rows go where, knowing what the store holds already."""

    source: Source
    place: Location
    asked: Mapping[str, Any]
    label: str | None
    nonfinite: Nonfinite
    shuffle: int | None
    bad: Bad
    max_bad: int | None
    changed: Changed
    max_drift: float | None
    client: "Client | None"
    on_event: OnEvent

    def write(self, overwrite: bool, listed: Callable[[], Source]) -> IngestResult:
        """Write the store, again without files that turned out bad where these are to be skipped.

        ``listed`` gives the source once the store is held: it is listed again where another driver published meanwhile.
        """
        skipped: dict[str, BadFile] = {}
        while True:
            try:
                with Output.held(
                    self.place, "ingest", overwrite=overwrite, client=self.client, on_event=self.on_event
                ) as output:
                    job, counts = replace(self, source=listed())._plan(output.existing, skipped)
                    overwrite = False  # it is begun anew by now, and keeps what is recorded
                    return IngestResult(**vars(output.write(job)), **counts._asdict())
            except BadFiles as error:
                if self.bad == "raise" or skipped.keys() >= {problem.path for problem in error.problems}:
                    self._name_all(error.problems)
                    raise self._refusal(error.problems) from None
                skipped |= {problem.path: problem for problem in error.problems}

    def _plan(self, store: RowStore | None, skipped: Mapping[str, BadFile]) -> tuple[Job, "_Counts"]:
        """Describe the whole store after this run: the published rows, then those of new files."""
        grown = store if store is not None and store.published else None
        reader = self._reader(grown)
        settings = {**reader.schema.to_json(), "label": self.label, "nonfinite": self.nonfinite}
        settings |= {f"{name}_asked": self.asked[name] for name in ("array", "columns", "id") if name in self.asked}
        if self.shuffle is not None:
            settings["shuffle"] = self.shuffle
        if grown is not None:  # told before anything is compared with a manifest made otherwise
            grown.require_settings("rows", settings)
        known = _known(grown)
        changes = compare(self.source.list(), known())
        self._report(changes, grown)
        fresh, bad = self._fresh(reader, to_read(changes), skipped, _aside(known()), grown is None)
        layout = self._layout(reader, store, fresh)
        if remark := reader.remark(fresh.files, fresh.rows):
            self.on_event(Event("ingest", "note", message=remark))
        published = grown.rows if grown is not None else 0
        if self.shuffle is not None and not reader.schema.one_per_file:
            self._require_no_changes(changes)
        key = derive_key(self.shuffle, published, STORED_ORDER) if self.shuffle is not None else None
        places = Places(known, changes, fresh, published, key if reader.schema.one_per_file else None)
        if places.rows == 0:
            what = f"{fresh.files:,} files" if fresh.files else "no files"
            raise InvalidInput(f"{self.source.url} holds {what} but no usable rows. Nothing was written")
        if places.moved_up:
            message = f"{places.moved_up:,} rows move up, as no files have as many rows as those that went"
            self.on_event(Event("ingest", "note", message=message))
        shards: SourceMap | ShuffledMap
        if self.shuffle is not None and not reader.schema.one_per_file:
            shards = self._shuffled(reader, fresh, layout, grown, settings)
        else:
            shards = self._shards(reader, places, layout, grown)
        job = Job(
            kind="rows",
            layout=layout,
            rows=places.rows,
            settings=settings,
            task=shards.task,
            identity=shards.identity,
            stage=shards.stage,
            lineage={"source": without_credentials(self.source.url)},
            task_bytes=shards.task_bytes,
            dropped=_dropped(changes, fresh, grown),
            first_shard=shards.first_shard,
            threads=self._threads(reader.schema),
            manifest=places.files,
            news=len(changes.changed) + len(changes.deleted) > 0 or self._is_news(fresh, bad, grown),
            rewrites=self.changed == "rewrite",
            keeps_tail=places.last <= published // layout.rows_per_shard * layout.rows_per_shard,
            sampled=True,
            review=lambda drift: self._review(drift, reader.schema.features),
        )
        return job, _Counts(len(changes.new), len(changes.changed), len(changes.deleted), len(bad))

    def _shards(self, reader: Reader, places: Places, layout: Layout, grown: RowStore | None) -> SourceMap:
        """Return what makes the shards from the first one on that may have other rows than before."""
        changes = grown is None or places.first < grown.rows or places.rows > grown.rows
        first = places.first // layout.rows_per_shard if changes else layout.shards(places.rows)
        batch, start = places.behind(first * layout.rows_per_shard)
        journal, labelled = self.place / JOURNAL, self.label is not None
        return SourceMap(reader, batch, start, self.source.url, journal, labelled, grown, layout, places.rows, first)

    def _shuffled(
        self, reader: Reader, fresh: Batch, layout: Layout, grown: RowStore | None, settings: Mapping[str, Any]
    ) -> ShuffledMap:
        """Return what makes the shards with new rows, shuffled, of files of many rows."""
        assert self.shuffle is not None
        start = grown.rows if grown is not None else 0
        rows, labelled = start + fresh.rows, self.label is not None
        first = start // layout.rows_per_shard if fresh.rows else layout.shards(rows)
        journal = self.place / JOURNAL
        files = SourceMap(reader, fresh, start, self.source.url, journal, labelled, grown, layout, rows, first)
        shuffled = ShuffledMap(files, self.shuffle, settings)
        if fresh.rows:
            message = (
                f"{fresh.rows:,} rows are shuffled on their way: until they are published, they need "
                f"{shuffled.bytes_on_the_way / 1e6:,.0f} MB more at {self.place}"
            )
            self.on_event(Event("ingest", "note", message=message))
        return shuffled

    def _require_no_changes(self, changes: Changes) -> None:
        """Refuse to replace some of the rows that were shuffled with others."""
        count = len(changes.changed) + len(changes.deleted)
        if count:
            raise SettingsChanged(
                f"{count:,} files that {self.place} was made from have changed or been deleted since, and as it was "
                "shuffled, their rows lie among all others. Nothing was changed; write to another store, or use "
                "--overwrite to make it anew"
            )

    def _reader(self, grown: RowStore | None) -> Reader:
        """Return what reads the files: one that was read before decides how, or else the first that can be used."""
        problems: list[BadFile] = []
        for model in self._models(grown):
            try:
                return self._checked(self.source.reader(model))
            except BadFile as error:
                problems.append(error)
        raise self._refusal(problems)

    def _checked(self, reader: Reader) -> Reader:
        """Refuse rows that are too large to be held."""
        if reader.schema.row_bytes > _MOST_ROW_BYTES:
            raise InvalidInput(
                f"{self.source.url} has items of shape {reader.schema.item_shape}, {reader.schema.row_bytes:,} bytes "
                f"each. A row has {_MOST_ROW_BYTES:,} bytes at most. Nothing was written"
            )
        return reader

    def _models(self, grown: RowStore | None) -> Iterator[Files]:
        for entries in _known(grown)():
            read = entries[entries.rows > 0]
            if len(read):
                yield Files(read.path, read.size, read.version)[:1]
                break
        looked = 0
        for files in self.source.list().batches():
            for number in range(min(len(files), _MODELS - looked)):
                yield files[number : number + 1]
            looked += len(files)

    def _fresh(
        self, reader: Reader, files: FileTable, skipped: Mapping[str, BadFile], aside: set[str], first: bool
    ) -> tuple[Batch, list[BadFile]]:
        """Return files with the rows of each that are wanted, and those files that are bad.

        The ``first`` files of a store decide what all others have to be like.
        """
        bad: list[BadFile] = []
        batch = Batch(_counted(reader, files, skipped, aside, bad))
        self._name_all(bad)
        allowed = 0 if self.bad == "raise" else len(bad) if self.max_bad is None else self.max_bad
        if len(bad) > allowed:
            raise self._refusal(bad)
        strange = [problem for problem in bad if problem.code in ("shape", "dtype", "schema")]
        if first and len(strange) > batch.files - len(bad):
            raise InvalidInput(
                f"most files of {self.source.url} differ from those that decide ({self._name(strange[0].path)} "
                f"{strange[0].detail}). Nothing was written; take away what does not belong there"
            )
        if self.nonfinite == "drop" and reader.schema.dtype.kind == "f" and batch.rows:
            batch = self._without_nonfinite(reader, batch)
        return batch, bad

    def _without_nonfinite(self, reader: Reader, batch: Batch) -> Batch:
        """Return the batch without the rows that hold NaN or infinity."""
        found: dict[str, list[Integers]] = {}
        step = max(1, _SCAN_BYTES // reader.schema.row_bytes)
        scans = (_Scan(reader, pieces) for pieces in batch.pieces(step))
        for part in map_regions(_nonfinite_rows, scans, client=self.client):
            for path, rows in part.items():
                found.setdefault(path, []).append(rows)
        dropped = {path: np.sort(np.concatenate(parts)) for path, parts in found.items()}
        if not dropped:
            return batch
        count = sum(map(len, dropped.values()))
        message = f"{count:,} of {batch.rows:,} rows hold NaN or infinity and are left out"
        self.on_event(Event("ingest", "note", message=message))
        return Batch(_without(batch, dropped))

    def _name_all(self, problems: Iterable[BadFile]) -> None:
        for problem in problems:
            message = f"unusable file: {self._name(problem.path)} {problem.detail}"
            self.on_event(Event("ingest", "note", message=message))

    def _refusal(self, problems: Sequence[BadFile]) -> InvalidInput:
        said = [f"{self._name(problem.path)} {problem.detail}" for problem in problems[:_NAMED]]
        more = f"; and {len(problems) - _NAMED:,} more" if len(problems) > _NAMED else ""
        count = f"{len(problems):,} unusable files: " if len(problems) > 1 else ""
        remedy = f", or accept so many with --max-bad {len(problems)}" if self.max_bad is not None else ""
        remedy = ", or leave such files out with --bad skip" if self.bad == "raise" else remedy
        return InvalidInput(f"{count}{'; '.join(said)}{more}. {_KEPT}{remedy}")

    def _name(self, path: str) -> str:
        return file_name(self.source.url, path)

    def _report(self, changes: Changes, grown: RowStore | None) -> None:
        """Say what became of the files, and refuse changed and deleted ones where they are not to be rewritten."""
        if grown is None:
            return
        before, now = grown.document["lineage"].get("source"), without_credentials(self.source.url)
        if before != now and not changes.unchanged and not len(changes.changed):
            raise SettingsChanged(
                f"{grown.location} was made from {before}, and {now} holds none of its files. Nothing was changed; "
                "name the same source, write to another store, or use --overwrite to make it anew"
            )
        gone = (("changed", changes.changed), ("deleted", changes.deleted))
        for what, files in gone:
            for path in islice(_paths(files), _LISTED):
                self.on_event(Event("ingest", "note", message=f"{what}: {self._name(path)}"))
        counts = {"new": len(changes.new), "unchanged": changes.unchanged, **{what: len(files) for what, files in gone}}
        if changes.unchanged < sum(counts.values()) > counts["new"]:
            said = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
            self.on_event(Event("ingest", "note", message=f"files: {said}"))
        named = "; ".join(f"{len(files):,} {what}: {_some(files)}" for what, files in gone if len(files))
        if named and self.changed == "raise":
            raise SettingsChanged(
                f"files that {grown.location} was made from are not as they were: {named}. Nothing was changed; "
                "--changed rewrite reads the shards with their rows anew (a file that was only touched makes the same "
                "bytes again), --overwrite the whole store"
            )

    def _review(self, drift: Drift, names: Sequence[str]) -> None:
        """Tell how the new rows differ from those before, and refuse to publish them where they differ too much."""
        what = f"{drift.new:,} new rows drift by {drift.largest:.2g} from the {drift.before:,} rows before"
        message = f"{what}. Largest: {drift.told(names)}"
        self.on_event(Event("ingest", "note", message=message, values={"drift": drift.largest}))
        if self.max_drift is not None and not drift.largest <= self.max_drift:
            raise DriftTooLarge(
                f"{what}, by more than max_drift={self.max_drift:g} ({drift.told(names, 1)}). Nothing was published, "
                "and what was written is kept. Run the same command with a larger --max-drift, or without, to publish "
                "it; or take the new files away and run it again, to leave the store as it was"
            )

    def _is_news(self, batch: Batch, bad: Sequence[BadFile], grown: RowStore | None) -> bool:
        """Whether the manifest changes though no row may be new: files are bad, or empty, that were not before."""
        if grown is None or batch.rows:
            return True
        known = {row for entries in _known(grown)() for row in _without_rows(entries)}
        return any(row not in known for entries in batch for row in _without_rows(entries))

    def _threads(self, schema: Schema) -> int:
        """Return how many threads serve: reads, arithmetic and writes overlap, and object stores make writers wait."""
        if not self.place.is_local or "://" in self.source.url:
            return _REMOTE_THREADS
        # one file an item is bound by system calls, where a second thread only fights for the interpreter
        return 1 if schema.one_per_file else min(3, os.cpu_count() or 1)

    def _layout(self, reader: Reader, store: RowStore | None, fresh: Batch) -> Layout:
        """Return the shard grid of a store that is there, else the best one."""
        raw = store.layout.arrays[0].raw if store is not None else _is_better_raw(reader, fresh)
        layout = Layout.of(self._arrays(reader.schema, raw), shard_bytes=shard_bytes_at(self.place))
        return store.layout if store is not None and store.layout.arrays == layout.arrays else layout

    def _arrays(self, schema: Schema, raw: bool) -> tuple[ArrayLayout, ...]:
        columns = (*schema.columns, *([Column("label", STRING)] if self.label is not None else []))
        if self.shuffle is not None and not schema.one_per_file and all(column.name != "id" for column in columns):
            columns = (Column("id", "<i8"), *columns)
        _require_names(columns)
        attributes: dict[str, Any] = {"item_shape": list(schema.item_shape)}
        if columns:
            attributes["coordinates"] = " ".join(column.name for column in columns)
        if schema.features:
            attributes["features"] = list(schema.features)
        dtype = schema.dtype.newbyteorder("<").str
        main = ArrayLayout("x", dtype, ("sample", "feature"), (schema.n_features,), attributes, raw)
        return (main, *(ArrayLayout(column.name, column.dtype, ("sample",)) for column in columns))


def _is_better_raw(reader: Reader, fresh: Batch) -> bool:
    """Whether the first rows are bytes that hardly become smaller."""
    schema = reader.schema
    count = rows_to_try(schema.dtype, schema.row_bytes)
    pieces = next(fresh.pieces(count), None) if count else None
    if pieces is None:
        return False
    block = np.empty((pieces.total, schema.n_features), schema.dtype)
    try:
        reader.read(pieces, block)
    except BadFiles:  # they are named once all files were looked at
        return False
    return not is_worth_compressing(block)


def _require_names(columns: Sequence[Column]) -> None:
    """Refuse columns that would hide one another, or whose names are no names in a store."""
    names = [column.name for column in columns]
    for name in names:
        if names.count(name) > 1 or name in _TAKEN or not is_name(name):
            why = (
                "is there twice" if names.count(name) > 1 else "is taken" if name in _TAKEN else "is no name in a store"
            )
            raise InvalidInput(
                f"the name of the carried column {name!r} {why}. Nothing was written; rename the column (letters, "
                "digits and _ . - are allowed), or do not carry it"
            )


class _Counts(NamedTuple):
    files: int
    changed: int
    deleted: int
    bad_files: int


def _counted(
    reader: Reader, new: FileTable, skipped: Mapping[str, BadFile], aside: set[str], bad: list[BadFile]
) -> Iterator[Entries]:
    """Yield files with their rows, which have no place in the store yet. Bad ones are collected.

    Those that an earlier run set ``aside`` are read at once: where they are as they were, nothing is to be written.
    """
    for files in new.batches():
        rows, problems = reader.count(files)
        if aside:
            again = np.fromiter((path in aside for path in files.path), bool, len(files))
            problems += _still_bad(reader, files[again], rows[again]) if again.any() else []
        known = {problem.path: problem for problem in problems}
        known |= {path: skipped[path] for path in skipped.keys() & set(files.path.tolist())}
        status, detail = (np.full(len(files), "", dtype=object) for _ in range(2))
        if known:
            bad.extend(known[path] for path in sorted(known))
            for number in np.flatnonzero([path in known for path in files.path]):
                problem = known[files.path[number]]
                rows[number], status[number], detail[number] = 0, problem.code, problem.detail
        starts, dropped = np.full(len(files), NOWHERE), np.full(len(files), "", dtype=object)
        yield Entries(files.path, files.size, files.version, starts, rows, dropped, status, detail)


def _aside(known: Iterable[Entries]) -> set[str]:
    """Return the files that an earlier run set aside."""
    return {path for entries in known for path in entries.path[entries.status != ""]}


def _still_bad(reader: Reader, files: Files, rows: Integers) -> list[BadFile]:
    """Read files and return what is wrong with them."""
    pieces = Pieces(files.path, files.size, files.version, np.zeros_like(rows), rows)
    step = max(1, _SCAN_BYTES // reader.schema.row_bytes)
    problems: dict[str, BadFile] = {}
    for start in range(0, pieces.total, step):
        part = pieces.cut(start, min(start + step, pieces.total))
        try:
            reader.read(part, np.empty((part.total, reader.schema.n_features), reader.schema.dtype))
        except BadFiles as error:
            problems |= {problem.path: problem for problem in error.problems}
    return list(problems.values())


def _without(batch: Batch, dropped: Mapping[str, Integers]) -> Iterator[Entries]:
    """Yield the files of a batch without some rows of them."""
    for entries in batch:
        numbers = [dropped.get(path) for path in entries.path]
        rows = entries.rows - np.array([0 if one is None else len(one) for one in numbers], dtype=np.int64)
        texts = np.array(["" if one is None else as_spans(one) for one in numbers], dtype=object)
        yield replace(entries, rows=rows, dropped=texts)


@dataclass(frozen=True)
class _Scan:
    reader: Reader
    pieces: Pieces


def _nonfinite_rows(scan: _Scan) -> dict[str, Integers]:
    """Return the rows of each file that hold NaN or infinity."""
    schema, pieces = scan.reader.schema, scan.pieces
    block = np.empty((pieces.total, schema.n_features), schema.dtype)
    scan.reader.read(pieces, block)
    found: dict[str, list[int]] = {}
    for row in np.flatnonzero(~np.isfinite(block).all(axis=1)).tolist():
        path, number = pieces.locate(row)
        found.setdefault(path, []).append(number)
    return {path: np.array(rows, dtype=np.int64) for path, rows in found.items()}


def _without_rows(entries: Entries) -> Iterator[tuple[str, int, str, str]]:
    """Yield path, size, version and status of files that have no rows in the store."""
    empty = entries[entries.rows == 0]
    return zip(empty.path, empty.size.tolist(), empty.version, empty.status, strict=True)


def _known(store: RowStore | None) -> Batches:
    """Return what yields the files that a published store was made from."""
    manifest = store.manifest() if store is not None else None
    return manifest.batches if manifest is not None else lambda: ()


def _dropped(changes: Changes, fresh: Batch, grown: RowStore | None) -> int:
    """Return how many rows of all files are left out."""
    before = int(grown.document["dropped"]) if grown is not None else 0
    gone = (text for part in itertools.chain(changes.changed, changes.deleted) for text in part.dropped)
    return before - sum(map(dropped_count, gone)) + fresh.dropped


def _paths(files: Iterable[Entries]) -> Iterator[str]:
    return itertools.chain.from_iterable(part.path.tolist() for part in files)


def _some(files: Spool[Any]) -> str:
    """Name the first few files."""
    more = f" and {len(files) - _NAMED:,} more" if len(files) > _NAMED else ""
    return ", ".join(islice(_paths(files), _NAMED)) + more
