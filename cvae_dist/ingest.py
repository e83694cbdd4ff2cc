"""The verb ``ingest``: rows from a source into a Zarr store with statistics."""

import hashlib
import os
import threading
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from cvae_dist.cluster import Job, Made, Span, StoreResult, map_regions, reused_block, write_rows
from cvae_dist.errors import InvalidInput, SettingsChanged
from cvae_dist.events import Event, OnEvent, ignore
from cvae_dist.sources import NpyTree, Pieces
from cvae_dist.sources.npy import RowsPerFile
from cvae_dist.store import STRING, ArrayLayout, Layout, Location, Moments, RowStore
from cvae_dist.store.lineage import without_credentials
from cvae_dist.store.urls import StorageOptions

if TYPE_CHECKING:
    from distributed import Client

Nonfinite = Literal["raise", "drop"]
Integers = npt.NDArray[np.int64]

# Two threads of short NumPy calls only fight for the interpreter: one computes while the others read and write.
_ARITHMETIC = threading.Lock()


def ingest(
    source: str | os.PathLike[str],
    store: str | os.PathLike[str],
    *,
    rows_per_file: RowsPerFile = "auto",
    label: Literal["folder"] | None = None,
    nonfinite: Nonfinite = "raise",
    overwrite: bool = False,
    storage_options: StorageOptions | None = None,
    client: "Client | None" = None,
    on_event: OnEvent = ignore,
) -> StoreResult:
    """Write the rows of a tree of ``.npy`` files into a store; new files of a known tree are appended.

    Parameters
    ----------
    source : path
        Directory of ``.npy`` files of one shape and dtype (float16/32/64 or integers), nested as you like.
    store : path or URL
        The Zarr group to write: ``x (sample, feature)`` in the dtype of the files.
    rows_per_file : {"auto", "one", "many"}
        ``one``: each file is one item of any shape. ``many``: the first axis of each file counts items.
        ``auto``: a file with one axis is one vector, any other holds many.
    label : {"folder"}, optional
        Carry the name of each file's folder as the column ``label``.
    nonfinite : {"raise", "drop"}
        What to do with rows that hold NaN or infinity. ``drop`` reads the source twice and counts what it left out.
    overwrite : bool
        Replace a store that was made otherwise.
    storage_options : Mapping, optional
        Passed to fsspec for ``store``.
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
    tree, pieces = NpyTree.scan(Location.of(source), rows_per_file)
    if rows_per_file == "auto" and not tree.one_per_file and len(pieces) > 1:
        _tell_how_read(tree, pieces, on_event)
    plan = _Plan(tree, pieces, label, nonfinite, client, on_event)
    output = Location.of(store, storage_options)
    return write_rows(output, plan.job, stage="ingest", overwrite=overwrite, client=client, on_event=on_event)


def _tell_how_read(tree: NpyTree, pieces: Pieces, on_event: OnEvent) -> None:
    """Say what the shapes were taken to mean: a tree of images looks like a tree of matrices."""
    if (pieces.rows == pieces.rows[0]).all():
        message = (
            f"each of {len(pieces):,} files of shape {tree.header.shape} is read as {int(pieces.rows[0]):,} rows; "
            "if each is one item, say --rows-per-file one"
        )
        on_event(Event("ingest", "note", message=message))


def _require_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise InvalidInput(f"{name}={value!r} is none of {', '.join(map(repr, choices))}; nothing was written")


@dataclass(frozen=True)
class _Plan:
    """Decides which rows go where, knowing what the store holds already."""

    tree: NpyTree
    pieces: Pieces
    label: str | None
    nonfinite: Nonfinite
    client: "Client | None"
    on_event: OnEvent

    def job(self, store: RowStore | None) -> Job:
        """Describe the whole store after this run: the published rows, then those of new files."""
        grown = store if store is not None and store.published else None
        layout = self._layout(store)
        if grown is not None:  # told before anything is compared with a manifest made otherwise
            grown.require_settings("rows", self._settings())
        pieces, known = self._order(grown)
        dropped = self._dropped(pieces, known, grown)
        kept = pieces.without(dropped)
        rows = kept.total
        if rows == 0:
            raise InvalidInput(f"{self.tree.root} holds {len(pieces):,} files but no usable rows. Nothing was written")
        published = grown.rows if grown is not None else 0
        first_shard = published // layout.rows_per_shard if rows > published else layout.shards(rows)
        where = _Rows(self.tree, kept, dropped, published, grown, _counted(grown, first_shard, len(dropped)))
        return Job(
            kind="rows",
            layout=layout,
            rows=rows,
            settings=self._settings(),
            lineage={"source": without_credentials(str(self.tree.root))},
            make=_MakeShard(self.tree, self.label is not None, None if grown is None else grown.location),
            inputs=where.inputs,
            identity=where.identity,
            task_bytes=16_000_000,
            first_shard=first_shard,
            # one file an item is bound by system calls, where a second thread only fights for the interpreter;
            # else one thread computes while one reads and one writes
            threads=1 if self.tree.one_per_file else min(3, os.cpu_count() or 1),
            manifest={**pieces.arrays(), "dropped": dropped},
        )

    def _layout(self, store: RowStore | None) -> Layout:
        """Return the shard grid of a store that is there, else the best one."""
        layout = Layout.of(self._arrays())
        return store.layout if store is not None and store.layout.arrays == layout.arrays else layout

    def _arrays(self) -> tuple[ArrayLayout, ...]:
        columns = ["id"] * self.tree.one_per_file + ["label"] * (self.label is not None)
        attributes: dict[str, Any] = {"item_shape": list(self.tree.item_shape)}
        if columns:
            attributes["coordinates"] = " ".join(columns)
        dtype = self.tree.dtype.newbyteorder("<").str
        main = ArrayLayout("x", dtype, ("sample", "feature"), (self.tree.n_features,), attributes)
        return (main, *(ArrayLayout(name, STRING, ("sample",)) for name in columns))

    def _settings(self) -> dict[str, Any]:
        return {
            "item_shape": list(self.tree.item_shape),
            "dtype": self.tree.dtype.name,
            "one_per_file": self.tree.one_per_file,
            "label": self.label,
            "nonfinite": self.nonfinite,
        }

    def _order(self, store: RowStore | None) -> tuple[Pieces, int]:
        """Return the pieces in stored order, those already published first, and the number of these."""
        if store is None:
            return self.pieces, 0
        manifest = store.manifest()
        manifest.pop("dropped")
        old = Pieces(**manifest)
        known = set(old.path.tolist())
        self._require_same_source(store, known)
        there, listed = old.stamps(), self.pieces.stamps()
        changed = [path for path, stamp in there.items() if listed.get(path, stamp) != stamp]
        if changed:
            raise SettingsChanged(
                f"{len(changed):,} files that {store.location} was made from have changed since, {changed[0]} first. "
                "Nothing was changed; write to another store, or use --overwrite to make it anew"
            )
        new = self.pieces[np.array([path not in known for path in self.pieces.path], dtype=bool)]
        both = zip(old.arrays().values(), new.arrays().values(), strict=True)
        return Pieces(*(np.concatenate(columns) for columns in both)), len(old)

    def _require_same_source(self, store: RowStore, known: set[str]) -> None:
        """Refuse to append the files of another tree, which could never be taken out again."""
        before, now = store.document["lineage"].get("source"), without_credentials(str(self.tree.root))
        if before != now and known.isdisjoint(self.pieces.path.tolist()):
            raise SettingsChanged(
                f"{store.location} was made from {before}, and {now} holds none of its files. Nothing was changed; "
                "name the same source, write to another store, or use --overwrite to make it anew"
            )

    def _dropped(self, pieces: Pieces, known: int, store: RowStore | None) -> Integers:
        """Return the rows to leave out, counted over all pieces in stored order."""
        if self.nonfinite == "raise" or self.tree.dtype.kind != "f":
            return np.zeros(0, dtype=np.int64)
        before = store.manifest()["dropped"] if store is not None else np.zeros(0, dtype=np.int64)
        start, total = int(pieces.rows[:known].sum()), pieces.total
        step = max(1, 16_000_000 // (self.tree.n_features * self.tree.dtype.itemsize))
        tasks = (
            _Scan(self.tree, pieces.between(first, min(first + step, total)), first)
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
    tree: NpyTree
    pieces: Pieces
    first: int


def _nonfinite_rows(scan: _Scan) -> Integers:
    block = np.empty((int(scan.pieces.rows.sum()), scan.tree.n_features), scan.tree.dtype)
    scan.tree.read(scan.pieces, block)
    rows: Integers = scan.first + np.flatnonzero(~np.isfinite(block).all(axis=1))
    return rows


@dataclass(frozen=True)
class _Rows:
    """Maps a span of stored rows to what it is read from."""

    tree: NpyTree
    pieces: Pieces
    dropped: Integers
    published: int
    store: RowStore | None
    counted: int  # dropped rows that stand in the ledger rows of shards which stay as they are

    def inputs(self, span: Span) -> "_Inputs":
        """Return the pieces of a span; rows published before come from the store itself."""
        carried = max(0, min(self.published, span.stop) - span.start)
        pieces = self.pieces.between(span.start + carried, span.stop)
        return _Inputs(carried, pieces, self._dropped(span))

    def identity(self, span: Span) -> str:
        """Digest the names, sizes and times of the files behind a span, and the rows taken from them."""
        inputs = self.inputs(span)
        digest = hashlib.blake2b("\0".join(inputs.pieces.path.tolist()).encode(), digest_size=16)
        for name, values in inputs.pieces.arrays().items():
            if name != "path":
                digest.update(values.tobytes())
        carried = self.store.fingerprint if inputs.carried and self.store is not None else ""
        return f"{digest.hexdigest()} {inputs.carried} {carried}"

    def _dropped(self, span: Span) -> int:
        """Count the rows left out just before and between the rows of a span; the last span takes the rest."""
        last = span.stop == self.pieces.total
        lo = max(self.counted, int(np.searchsorted(self._position, span.start, side="left")))
        hi = int(np.searchsorted(self._position, span.stop, side="left"))
        return max(0, (len(self.dropped) if last else hi) - lo)

    @cached_property
    def _position(self) -> Integers:
        """Stored rows before each dropped one."""
        return self.dropped - np.arange(len(self.dropped))


def _counted(store: RowStore | None, shards: int, dropped: int) -> int:
    """Add up the dropped rows in the ledger rows of the first shards of a store."""
    if store is None or not dropped:
        return 0
    records = (store.ledger.read(shard) for shard in range(store.layout.shards(store.rows))[:shards])
    return sum(record.dropped for record in records if record is not None)


@dataclass(frozen=True)
class _Inputs:
    carried: int
    pieces: Pieces
    dropped: int


@dataclass(frozen=True)
class _MakeShard:
    """Read the rows of one shard straight into its block."""

    tree: NpyTree
    labelled: bool
    carried_from: Location | None

    def __call__(self, span: Span, inputs: _Inputs) -> Made:
        block = reused_block((len(span), self.tree.n_features), self.tree.dtype)
        if len(inputs.pieces):
            self.tree.read(inputs.pieces, block[inputs.carried :])
        blocks = {"x": block, **self._columns(inputs.pieces)}
        if inputs.carried:
            self._carry(span, inputs.carried, blocks)
        with _ARITHMETIC:
            moments = Moments.of(block)
        if not moments.is_finite:
            self._refuse_nonfinite(block, inputs)
        return Made(blocks, inputs.dropped, moments)

    def _columns(self, pieces: Pieces) -> dict[str, npt.NDArray[Any]]:
        columns: dict[str, npt.NDArray[Any]] = {}
        if self.tree.one_per_file:
            columns["id"] = pieces.path
        if self.labelled:
            folders = [path.rpartition("/")[0].rpartition("/")[2] for path in pieces.path]
            columns["label"] = np.repeat(np.array(folders, dtype=object), pieces.rows)
        return columns

    def _carry(self, span: Span, carried: int, blocks: dict[str, npt.NDArray[Any]]) -> None:
        """Put the rows that were published before in front of the new ones."""
        assert self.carried_from is not None
        store = RowStore.open(self.carried_from)
        for name, block in blocks.items():
            old = store.read(name, span.start, span.start + carried)
            if name == "x":
                block[:carried] = old
            else:
                blocks[name] = np.concatenate([old.astype(object), block])

    def _refuse_nonfinite(self, block: npt.NDArray[Any], inputs: _Inputs) -> None:
        bad = np.flatnonzero(~np.isfinite(block).all(axis=1))
        if not len(bad):
            raise InvalidInput(
                f"{self.tree.root}/{inputs.pieces.path[0]} or one of the {len(inputs.pieces) - 1:,} files after it "
                f"holds values as large as {np.abs(block).max():.3g}, whose variance exceeds float64. Its shard was "
                "not written and rows recorded before are kept; scale the values and run the same command again"
            )
        row = int(bad[0]) - inputs.carried
        piece = int(np.searchsorted(np.cumsum(inputs.pieces.rows), row, side="right"))
        in_file = row - int(inputs.pieces.rows[:piece].sum()) + int(inputs.pieces.first[piece])
        raise InvalidInput(
            f"{self.tree.root}/{inputs.pieces.path[piece]}, row {in_file}, holds NaN or infinity. Its shard was not "
            "written and rows recorded before are kept; mend the file, or leave such rows out with --nonfinite drop"
        )
