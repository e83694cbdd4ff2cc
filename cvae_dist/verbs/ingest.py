"""The verb ``ingest``: rows from a source into a Zarr store with statistics."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from cvae_dist.cluster import Asked, Job, Output, ShuffledMap, SourcePlan, StoreResult, without_nonfinite
from cvae_dist.errors import DriftTooLarge, InvalidInput
from cvae_dist.events import Event, OnEvent, ignore
from cvae_dist.sources import (
    BadFile,
    BadFiles,
    FileOptions,
    Format,
    Intake,
    RowsPerFile,
    Source,
    Spool,
    TableOptions,
    compare,
    is_news,
    open_source,
    to_read,
)
from cvae_dist.store import Drift, Location, RowStore
from cvae_dist.store.lineage import without_credentials
from cvae_dist.store.manifest import Batches, Entries
from cvae_dist.store.urls import StorageOptions

if TYPE_CHECKING:
    from distributed import Client

Nonfinite = Literal["raise", "drop"]
Bad = Literal["raise", "skip"]
Changed = Literal["raise", "rewrite"]


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
        and Location.of(source, source_storage_options).lies_in(place)
        and RowStore.claims(place)
    ):
        raise InvalidInput(f"the source {source} lies in the store {place}, or is it. Nothing was changed")

    def listed() -> Source:
        return open_source(source, options, source_storage_options)

    before, opened = RowStore.publication_at(place), listed()
    asked = Asked(options.given, label, nonfinite, shuffle)
    run = _Run(place, asked, bad == "skip", max_bad, changed == "rewrite", max_drift, client, on_event)
    return run.write(overwrite, lambda: opened if RowStore.publication_at(place) == before else listed())


def _require_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise InvalidInput(f"{name}={value!r} is none of {', '.join(map(repr, choices))}; nothing was written")


def _protocol(place: object) -> str:
    return str(place).partition("://")[0] if "://" in str(place) else ""


@dataclass(frozen=True)
class _Run:
    """One run of the verb."""

    place: Location
    asked: Asked
    skip: bool
    max_bad: int | None
    rewrite: bool
    max_drift: float | None
    client: "Client | None"
    on_event: OnEvent

    def write(self, overwrite: bool, listed: Callable[[], Source]) -> IngestResult:
        """Write the store, again without files that turned out bad where these are to be skipped.

        ``listed`` gives the source once the store is held: it is listed again where another driver published meanwhile.
        """
        skipped: dict[str, BadFile] = {}
        while True:
            with Output.held(
                self.place, "ingest", overwrite=overwrite, client=self.client, on_event=self.on_event
            ) as output:
                source = listed()
                intake = Intake(source, self.skip, self.max_bad, self._note)
                try:
                    job, counts = self._plan(source, intake, output.existing, skipped)
                    overwrite = False  # it is begun anew by now, and keeps what is recorded
                    return IngestResult(**vars(output.write(job)), **counts._asdict())
                except BadFiles as error:
                    problems = error.problems
            if not self.skip or skipped.keys() >= {problem.path for problem in problems}:
                intake.tell(problems)
                raise intake.refusal(problems)
            skipped |= {problem.path: problem for problem in problems}

    def _plan(
        self, source: Source, intake: Intake, store: RowStore | None, skipped: Mapping[str, BadFile]
    ) -> tuple[Job, "_Counts"]:
        """Describe the whole store after this run: the published rows, then those of new files."""
        known = _known(store)
        reader = intake.reader(known())
        plan = SourcePlan(self.asked, source.url, self.place, reader, store)
        settings, grown = plan.settings, plan.grown
        if grown is not None:  # told before anything is compared with a manifest made otherwise
            grown.require_settings("rows", settings)
        changes = compare(intake.listed, known())
        if grown is not None:
            intake.report(changes, grown, self.rewrite)
        fresh, bad = intake.take(reader, to_read(changes), skipped, known(), first=grown is None)
        if self.asked.nonfinite == "drop" and reader.schema.dtype.kind == "f" and fresh.rows:
            fresh = without_nonfinite(reader, fresh, self.place.beside(".scan"), self.client)
            if fresh.dropped:
                rows = fresh.rows + fresh.dropped
                self._note(f"{fresh.dropped:,} of {rows:,} rows hold NaN or infinity and are left out")
        layout = plan.layout(fresh)
        if remark := reader.remark(fresh.files, fresh.rows):
            self._note(remark)
        places = plan.places(known, changes, fresh)
        if places.moved_up:
            self._note(f"{places.moved_up:,} rows move up, as no files have as many rows as those that went")
        shards = plan.shards(layout, places, fresh)
        if isinstance(shards, ShuffledMap) and fresh.rows:
            self._note(
                f"{fresh.rows:,} rows are shuffled on their way: until they are published, they need "
                f"{shards.bytes_on_the_way / 1e6:,.0f} MB more at {self.place}"
            )
        counts = _Counts(len(changes.new), len(changes.changed), len(changes.deleted), len(bad))
        job = Job(
            kind="rows",
            layout=layout,
            rows=places.rows,
            settings=settings,
            task=shards.task,
            identity=shards.identity,
            stage=shards.stage,
            lineage={"source": without_credentials(source.url)},
            task_bytes=shards.task_bytes,
            dropped=plan.dropped(changes, fresh),
            first_shard=shards.first_shard,
            threads=plan.threads,
            manifest=places.files,
            news=grown is None or counts.changed + counts.deleted > 0 or is_news(fresh, known()),
            rewrites=self.rewrite,
            keeps_tail=places.last <= plan.published // layout.rows_per_shard * layout.rows_per_shard,
            sampled=True,
            review=lambda drift: self._review(drift, reader.schema.features),
        )
        return job, counts

    def _note(self, message: str, **values: float) -> None:
        self.on_event(Event("ingest", "note", message=message, values=values))

    def _review(self, drift: Drift, names: Sequence[str]) -> None:
        """Tell how the new rows differ from those before, and refuse to publish them where they differ too much."""
        what = f"{drift.new:,} new rows drift by {drift.largest:.2g} from the {drift.before:,} rows before"
        self._note(f"{what}. Largest: {drift.told(names)}", drift=drift.largest)
        if self.max_drift is not None and not drift.largest <= self.max_drift:
            raise DriftTooLarge(
                f"{what}, by more than max_drift={self.max_drift:g} ({drift.told(names, 1)}). Nothing was published, "
                "and what was written is kept. Run the same command with a larger --max-drift, or without, to publish "
                "it; or take the new files away and run it again, to leave the store as it was"
            )


class _Counts(NamedTuple):
    files: int
    changed: int
    deleted: int
    bad_files: int


def _known(store: RowStore | None) -> Batches:
    """Return what yields the files that a published store was made from. A distant manifest is read once."""
    manifest = store.manifest() if store is not None and store.published else None
    if store is None or manifest is None:
        return lambda: ()
    if store.location.is_local:
        return manifest.batches

    @cache
    def read() -> Spool[Entries]:
        spool = Spool(Entries)
        for entries in manifest.batches():
            spool.append(entries)
        return spool

    return lambda: iter(read())
