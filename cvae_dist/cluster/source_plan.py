"""How the files of a source become a store of rows: its settings, its arrays, and what makes its shards."""

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cvae_dist.cluster.shuffle import ShuffledMap
from cvae_dist.cluster.source_map import SourceMap
from cvae_dist.errors import InvalidInput, SettingsChanged
from cvae_dist.sources import BadFiles, Batch, Changes, Column, Places, Reader, Schema
from cvae_dist.store import STRING, ArrayLayout, Layout, Location, RowStore
from cvae_dist.store.layout import is_name, is_worth_compressing, rows_to_try, shard_bytes_at
from cvae_dist.store.ledger import JOURNAL
from cvae_dist.store.manifest import Batches, dropped_count, forged
from cvae_dist.store.permutation import STORED_ORDER, derive_key
from cvae_dist.store.publication import METADATA, PUBLICATIONS

_REMOTE_THREADS = 4
# Names of arrays and dimensions of stores, and of what lies beside them.
_TAKEN = (
    "x", "z", "score", "negative_elbo", "reconstruction_error", "sample", "feature", "latent", JOURNAL, PUBLICATIONS,
    METADATA,
)  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """What a user said of the rows of a store.

    Attributes
    ----------
    files : Mapping
        Of how files are to be read, by name.
    label : str or None
        What becomes the column ``label``: "folder", the name of each file's folder.
    nonfinite : str
        What becomes of rows with NaN or infinity: "raise" or "drop".
    shuffle : int or None
        Seed of the order in which they are stored.
    """

    files: Mapping[str, Any]
    label: str | None
    nonfinite: str
    shuffle: int | None

    def settings(self, schema: Schema) -> dict[str, Any]:
        """Return the settings of the store, which a later run has to have, too."""
        settings = {**schema.to_json(), "label": self.label, "nonfinite": self.nonfinite}
        settings |= {f"{name}_asked": self.files[name] for name in ("array", "columns", "id") if name in self.files}
        return settings if self.shuffle is None else {**settings, "shuffle": self.shuffle}


@dataclass(frozen=True)
class SourcePlan:
    """The plan of a store whose rows come from files.

    Attributes
    ----------
    asked : Asked
    url : str
        The source, for messages.
    place : Location
        The store.
    reader : Reader
    store : RowStore or None
        What is there already, published or only begun.
    """

    asked: Asked
    url: str
    place: Location
    reader: Reader
    store: RowStore | None

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the store."""
        return self.asked.settings(self.reader.schema)

    @property
    def grown(self) -> RowStore | None:
        """The published store, whose rows come first."""
        return self.store if self.store is not None and self.store.published else None

    @property
    def published(self) -> int:
        """How many rows are published."""
        return self.grown.rows if self.grown is not None else 0

    @property
    def deals(self) -> bool:
        """Whether files of many rows are shuffled."""
        return self.asked.shuffle is not None and not self.reader.schema.one_per_file

    def layout(self, fresh: Batch) -> Layout:
        """Return the shard grid of a store that is there, else the best one for the ``fresh`` rows."""
        there = self.store.layout if self.store is not None else None
        raw = there.arrays[0].raw if there is not None else _is_better_raw(self.reader, fresh)
        layout = Layout.of(self._arrays(raw), shard_bytes=shard_bytes_at(self.place))
        return there if there is not None and there.arrays == layout.arrays else layout

    @property
    def threads(self) -> int:
        """How many threads serve: reads, arithmetic and writes overlap, and object stores make writers wait."""
        if not self.place.is_local or "://" in self.url:
            return _REMOTE_THREADS
        # one file an item is bound by system calls, where a second thread only fights for the interpreter
        return 1 if self.reader.schema.one_per_file else min(3, os.cpu_count() or 1)

    def places(self, known: Batches, changes: Changes, fresh: Batch) -> Places:
        """Return where the rows of all files go.

        Raises
        ------
        SettingsChanged
            Rows would be replaced that were shuffled with others.
        InvalidInput, Corrupt
            There are none; the manifest of the store gives a row to two files.
        """
        if self.deals:
            self._require_no_changes(changes)
        scattered = self.asked.shuffle is not None and not self.deals
        key = derive_key(self.asked.shuffle or 0, self.published, STORED_ORDER) if scattered else None
        try:
            places = Places(known, changes, fresh, self.published, key)
        except ValueError as error:
            raise forged(self.place, str(error)) from None
        if places.rows == 0:
            what = f"{fresh.files:,} files" if fresh.files else "no files"
            raise InvalidInput(f"{self.url} holds {what} but no usable rows. Nothing was written")
        return places

    def shards(self, layout: Layout, places: Places, fresh: Batch) -> SourceMap | ShuffledMap:
        """Return what makes the shards from the first one on that may have other rows than before."""
        start = self.published
        changed = self.grown is None or places.first < start or places.rows > start
        first = places.first // layout.rows_per_shard if changed else layout.shards(places.rows)
        batch, start = (fresh, start) if self.deals else places.behind(first * layout.rows_per_shard)
        files = SourceMap(
            self.reader, batch, start, self.url, self.place / JOURNAL, self.asked.label is not None, self.grown,
            layout, places.rows, first,
        )  # fmt: skip
        return ShuffledMap(files, self.asked.shuffle or 0, self.settings) if self.deals else files

    def dropped(self, changes: Changes, fresh: Batch) -> int:
        """Return how many rows of all files are left out."""
        before = int(self.grown.document["dropped"]) if self.grown is not None else 0
        gone = (text for part in itertools.chain(changes.changed, changes.deleted) for text in part.dropped)
        return before - sum(map(dropped_count, gone)) + fresh.dropped

    def _require_no_changes(self, changes: Changes) -> None:
        count = len(changes.changed) + len(changes.deleted)
        if count:
            raise SettingsChanged(
                f"{count:,} files that {self.place} was made from have changed or been deleted since, and as it was "
                "shuffled, their rows lie among all others. Nothing was changed; write to another store, or use "
                "--overwrite to make it anew"
            )

    def _arrays(self, raw: bool) -> tuple[ArrayLayout, ...]:
        schema = self.reader.schema
        columns = (*schema.columns, *([Column("label", STRING)] if self.asked.label is not None else []))
        if self.deals and all(column.name != "id" for column in columns):
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
    if not count or not fresh.rows:
        return False
    pieces = fresh.first(count)
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
