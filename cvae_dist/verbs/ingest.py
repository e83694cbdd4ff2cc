"""The verb ``ingest``: rows from a source into a Zarr store with statistics."""

import os
import threading
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from cvae_dist.cluster import Job, Made, Output, Span, StoreResult, map_regions, reused_block
from cvae_dist.errors import InvalidInput, SettingsChanged
from cvae_dist.events import Event, OnEvent, ignore
from cvae_dist.sources import Listing, Pieces, RowsPerFile, Schema, Source, open_source
from cvae_dist.store import STRING, ArrayLayout, Layout, Location, Moments, RowStore
from cvae_dist.store.layout import Block, shard_bytes_at
from cvae_dist.store.lineage import without_credentials
from cvae_dist.store.ranges import RowNumbers
from cvae_dist.store.urls import StorageOptions

if TYPE_CHECKING:
    from distributed import Client

Nonfinite = Literal["raise", "drop"]

# Two threads of short NumPy calls only fight for the interpreter: one computes while the others read and write.
_ARITHMETIC = threading.Lock()
_REMOTE_THREADS = 4


def ingest(
    source: str | os.PathLike[str] | Source,
    store: str | os.PathLike[str],
    *,
    rows_per_file: RowsPerFile = "auto",
    label: Literal["folder"] | None = None,
    nonfinite: Nonfinite = "raise",
    overwrite: bool = False,
    fsync: bool = False,
    storage_options: StorageOptions | None = None,
    client: "Client | None" = None,
    on_event: OnEvent = ignore,
) -> StoreResult:
    """Copy rows from a tree of .npy files into a chunked Zarr store, with statistics.

    New files of a known tree are appended. The output is a Zarr group with ``x (sample, feature)`` in the dtype of
    the files (float16, float32, float64 or integers, one item shape and dtype in all of them).

    Parameters
    ----------
    source : path or Source
        Directory of the .npy files, nested as you like.
    store : path or URL
        Zarr store to write.
    rows_per_file : {"auto", "one", "many"}
        Whether a file is one row of any shape, or its first axis counts rows. auto: a file with one axis is one row.
    label : {"folder"}, optional
        'folder' carries the name of each file's folder along as the column `label`.
    nonfinite : {"raise", "drop"}
        What to do about rows with NaN or infinity. drop reads the source twice and counts what it left out.
    overwrite : bool
        Replace a store that was made with other settings.
    fsync : bool
        Wait until a local disk has what was written, so that a finished command survives a power loss.
    storage_options : Mapping, optional
        Options of the store's file system, for fsspec.
    client : distributed.Client, optional
        Dask cluster to use; threads of this process when None.
    on_event : callable
        Listener for progress.

    Returns
    -------
    StoreResult

    Raises
    ------
    SourceNotFound, InvalidInput
        No directory or no files; a bad file or a non-finite row, named.
    SettingsChanged, OutputLocked, StorageFailed
        The store was made otherwise, is being written, or cannot be written. What was recorded is kept.
    """
    _require_choice("rows_per_file", rows_per_file, get_args(RowsPerFile))
    _require_choice("label", label, (None, "folder"))
    _require_choice("nonfinite", nonfinite, get_args(Nonfinite))
    opened = open_source(source, rows_per_file)
    listing = opened.list()
    if listing.note:
        on_event(Event("ingest", "note", message=listing.note))
    place = Location.of(store, storage_options, fsync)
    plan = _IngestPlan(opened.url, listing, place, label, nonfinite, client, on_event)
    with Output.held(place, "ingest", overwrite=overwrite, client=client, on_event=on_event) as output:
        return output.write(plan.job(output.existing))


def _require_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise InvalidInput(f"{name}={value!r} is none of {', '.join(map(repr, choices))}; nothing was written")


@dataclass(frozen=True)
class _IngestPlan:
    """Decides which rows go where, knowing what the store holds already."""

    url: str
    listing: Listing
    place: Location
    label: str | None
    nonfinite: Nonfinite
    client: "Client | None"
    on_event: OnEvent

    @property
    def schema(self) -> Schema:
        return self.listing.schema

    def job(self, store: RowStore | None) -> Job:
        """Describe the whole store after this run: the published rows, then those of new files."""
        grown = store if store is not None and store.published else None
        layout = self._layout(store)
        if grown is not None:  # told before anything is compared with a manifest made otherwise
            grown.require_settings("rows", self._settings())
        pieces, known = self._order(grown)
        dropped = self._dropped(pieces, known, grown)
        kept = replace(self.listing, pieces=pieces.without(dropped))
        rows = kept.pieces.total
        if rows == 0:
            raise InvalidInput(f"{self.url} holds {len(pieces):,} files but no usable rows. Nothing was written")
        published = grown.rows if grown is not None else 0
        first_shard = published // layout.rows_per_shard if rows > published else layout.shards(rows)
        counted = _counted(grown, first_shard, len(dropped))
        cut = _Cut(self.url, kept, self.label is not None, dropped, grown, counted)
        return Job(
            kind="rows",
            layout=layout,
            rows=rows,
            settings=self._settings(),
            task=cut.task,
            identity=cut.identity,
            lineage={"source": without_credentials(self.url)},
            task_bytes=16_000_000,
            first_shard=first_shard,
            threads=self._threads(),
            manifest={**pieces.arrays(), "dropped": dropped},
        )

    def _threads(self) -> int:
        """Return how many threads serve: reads, arithmetic and writes overlap, and object stores make writers wait."""
        if not self.place.is_local:
            return _REMOTE_THREADS
        # one file an item is bound by system calls, where a second thread only fights for the interpreter
        return 1 if self.schema.one_per_file else min(3, os.cpu_count() or 1)

    def _layout(self, store: RowStore | None) -> Layout:
        """Return the shard grid of a store that is there, else the best one."""
        layout = Layout.of(self._arrays(), shard_bytes=shard_bytes_at(self.place))
        return store.layout if store is not None and store.layout.arrays == layout.arrays else layout

    def _arrays(self) -> tuple[ArrayLayout, ...]:
        columns = ["id"] * self.schema.one_per_file + ["label"] * (self.label is not None)
        attributes: dict[str, Any] = {"item_shape": list(self.schema.item_shape)}
        if columns:
            attributes["coordinates"] = " ".join(columns)
        dtype = self.schema.dtype.newbyteorder("<").str
        main = ArrayLayout("x", dtype, ("sample", "feature"), (self.schema.n_features,), attributes)
        return (main, *(ArrayLayout(name, STRING, ("sample",)) for name in columns))

    def _settings(self) -> dict[str, Any]:
        return {**self.schema.to_json(), "label": self.label, "nonfinite": self.nonfinite}

    def _order(self, store: RowStore | None) -> tuple[Pieces, int]:
        """Return the pieces in stored order, those already published first, and the number of these."""
        listed = self.listing.pieces
        if store is None:
            return listed, 0
        manifest = store.manifest()
        manifest.pop("dropped")
        old = Pieces(**manifest)
        known = set(old.path.tolist())
        self._require_same_source(store, known)
        before, now = old.stamps(), listed.stamps()
        changed = [path for path, stamp in before.items() if now.get(path, stamp) != stamp]
        if changed:
            raise SettingsChanged(
                f"{len(changed):,} files that {store.location} was made from have changed since, {changed[0]} first. "
                "Nothing was changed; write to another store, or use --overwrite to make it anew"
            )
        new = listed[np.array([path not in known for path in listed.path], dtype=bool)]
        both = zip(old.arrays().values(), new.arrays().values(), strict=True)
        return Pieces(*(np.concatenate(columns) for columns in both)), len(old)

    def _require_same_source(self, store: RowStore, known: set[str]) -> None:
        """Refuse to append the files of another source, which could never be taken out again."""
        before, now = store.document["lineage"].get("source"), without_credentials(self.url)
        if before != now and known.isdisjoint(self.listing.pieces.path.tolist()):
            raise SettingsChanged(
                f"{store.location} was made from {before}, and {now} holds none of its files. Nothing was changed; "
                "name the same source, write to another store, or use --overwrite to make it anew"
            )

    def _dropped(self, pieces: Pieces, known: int, store: RowStore | None) -> RowNumbers:
        """Return the rows to leave out, counted over all pieces in stored order."""
        if self.nonfinite == "raise" or self.schema.dtype.kind != "f":
            return np.zeros(0, dtype=np.int64)
        before = store.manifest()["dropped"] if store is not None else np.zeros(0, dtype=np.int64)
        start, total = int(pieces.rows[:known].sum()), pieces.total
        step = max(1, 16_000_000 // self.schema.row_bytes)
        tasks = (
            _Scan(replace(self.listing, pieces=pieces.between(first, min(first + step, total))), first)
            for first in range(start, total, step)
        )
        found = list(map_regions(_nonfinite_rows, tasks, client=self.client))
        dropped = np.sort(np.concatenate([before, *found]))
        if len(dropped):
            message = f"{len(dropped):,} of {total:,} rows hold NaN or infinity and are left out"
            self.on_event(Event("ingest", "note", message=message))
        return dropped


@dataclass(frozen=True)
class _Scan:
    part: Listing
    first: int


def _nonfinite_rows(scan: _Scan) -> RowNumbers:
    part = scan.part
    block = np.empty((part.pieces.total, part.schema.n_features), part.schema.dtype)
    part.read(part.pieces, block)
    return scan.first + np.flatnonzero(~np.isfinite(block).all(axis=1))


def _counted(store: RowStore | None, shards: int, dropped: int) -> int:
    """Add up the dropped rows in the ledger records of the first shards of a store."""
    if store is None or not dropped:
        return 0
    return store.records()[:shards].dropped


@dataclass(frozen=True)
class _Cut:
    """Turns spans of the store into the tasks that make their shards.

    The rows of ``grown``, the published store, come first. ``kept`` lacks the ``dropped`` rows, which are counted over
    all pieces. ``counted``: how many of them the untouched shards have recorded already.
    """

    url: str
    kept: Listing
    labelled: bool
    dropped: RowNumbers
    grown: RowStore | None
    counted: int

    def task(self, span: Span) -> "_CopyShard":
        """Return what makes a shard; its first rows may be published already, and come from the store itself."""
        part = replace(self.kept, pieces=self.kept.pieces.between(span.new, span.stop))
        store = self.grown.location if self.grown is not None and span.new > span.start else None
        return _CopyShard(self.url, part, self.labelled, span, self._dropped(span), store)

    def identity(self, span: Span) -> bytes:
        """Return what tells the new rows of a span from others, and of which store the rows before them are."""
        carried = span.new - span.start
        before = f"{carried} {self.grown.fingerprint}".encode() if self.grown is not None and carried else b""
        return self.kept.pieces.identity(span.new, span.stop) + before

    def _dropped(self, span: Span) -> int:
        """Count the rows left out just before and between the rows of a span; the last span takes the rest."""
        if not len(self.dropped):
            return 0
        last = span.stop == self.kept.pieces.total
        lo = max(self.counted, int(np.searchsorted(self._position, span.start, side="left")))
        hi = int(np.searchsorted(self._position, span.stop, side="left"))
        return max(0, (len(self.dropped) if last else hi) - lo)

    @cached_property
    def _position(self) -> RowNumbers:
        """Stored rows before each dropped one."""
        return self.dropped - np.arange(len(self.dropped))


@dataclass(frozen=True)
class _CopyShard:
    """Read the rows of one shard straight into its block."""

    url: str
    part: Listing
    labelled: bool
    span: Span
    dropped: int
    carried_from: Location | None

    @property
    def carried(self) -> int:
        """Published rows at the start of the shard."""
        return self.span.new - self.span.start

    def __call__(self) -> Made:
        schema, pieces = self.part.schema, self.part.pieces
        block = reused_block((len(self.span), schema.n_features), schema.dtype)
        if len(pieces):
            self.part.read(pieces, block[self.carried :])
        blocks = {"x": block, **self._columns()}
        if self.carried_from is not None:
            self._carry(RowStore.open(self.carried_from), blocks)
        with _ARITHMETIC:
            moments = Moments.of(block[self.carried :])
        if not moments.is_finite:
            self._refuse_nonfinite(block)
        return Made(blocks, self.dropped, moments)

    def _columns(self) -> dict[str, Block]:
        pieces = self.part.pieces
        columns: dict[str, Block] = {}
        if self.part.schema.one_per_file:
            columns["id"] = pieces.path
        if self.labelled:
            folders = [path.rpartition("/")[0].rpartition("/")[2] for path in pieces.path]
            columns["label"] = np.repeat(np.array(folders, dtype=object), pieces.rows)
        return columns

    def _carry(self, store: RowStore, blocks: dict[str, Block]) -> None:
        """Put the rows that were published before in front of the new ones."""
        for name, block in blocks.items():
            old = store.read(name, self.span.start, self.span.start + self.carried)
            if name == "x":
                block[: self.carried] = old
            else:
                blocks[name] = np.concatenate([old.astype(object), block])

    def _refuse_nonfinite(self, block: Block) -> None:
        pieces = self.part.pieces
        bad = np.flatnonzero(~np.isfinite(block).all(axis=1))
        if not len(bad):
            raise InvalidInput(
                f"{self.url}/{pieces.path[0]} or one of the {len(pieces) - 1:,} files after it "
                f"holds values as large as {np.abs(block).max():.3g}, whose variance exceeds float64. Its shard was "
                "not written and rows recorded before are kept; scale the values and run the same command again"
            )
        row = int(bad[0]) - self.carried
        piece = int(np.searchsorted(pieces.ends, row, side="right"))
        in_file = row - int(pieces.rows[:piece].sum()) + int(pieces.first[piece])
        raise InvalidInput(
            f"{self.url}/{pieces.path[piece]}, row {in_file}, holds NaN or infinity. Its shard was not "
            "written and rows recorded before are kept; mend the file, or leave such rows out with --nonfinite drop "
            "--overwrite, which makes the store anew"
        )
