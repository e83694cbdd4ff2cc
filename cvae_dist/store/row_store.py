"""A Zarr group of rows: opening one, creating one, and publishing what was written."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import zarr

from cvae_dist.errors import Corrupt, InvalidInput, SettingsChanged, SourceNotFound
from cvae_dist.store.foreign import describe
from cvae_dist.store.layout import STRING, ArrayLayout, Block, Layout, group_metadata, shard_key, write_small_array
from cvae_dist.store.ledger import Ledger, Record
from cvae_dist.store.lineage import digest_json, history_line, versions
from cvae_dist.store.moments import Moments
from cvae_dist.store.urls import Location, StorageOptions

_KEY = "cvae_dist"  # the attribute of the group that holds everything of ours
_MARKER = "zarr.json"
_PIECES_PER_CHUNK = 4096
_MAKERS = {"rows": "cvae-dist ingest SOURCE STORE", "latents": "cvae-dist embed STORE MODEL LATENTS"}  # by kind


@dataclass(frozen=True)
class RowStore:
    """A published (or begun) store.

    Attributes
    ----------
    location : Location
        The Zarr group.
    document : Mapping
        The group attribute ``cvae_dist``: kind, layout, rows, settings, lineage, fingerprint.
    history : str
        CF history of the group, one line per publication.
    """

    location: Location
    document: Mapping[str, Any]
    history: str = ""

    @classmethod
    def find(cls, url: "str | Location", storage_options: StorageOptions | None = None) -> Self | None:
        """Return the store at ``url``, published or only begun, or None when nothing is there.

        Raises
        ------
        InvalidInput
            Something else is there.
        """
        location = Location.of(url, storage_options)
        try:
            attributes = json.loads((location / _MARKER).read())["attributes"]
            return cls(location, attributes[_KEY], attributes.get("history", ""))
        except (FileNotFoundError, NotADirectoryError, KeyError, TypeError, ValueError):
            if location.is_blank():
                return None
        raise InvalidInput(
            f"{location} is not a store made by cvae-dist, so it is neither read nor replaced: it {describe(location)}"
        )

    @classmethod
    def open(cls, url: "str | Location", storage_options: StorageOptions | None = None) -> Self:
        """Open a published store.

        Raises
        ------
        SourceNotFound
            Nothing is there, or it was begun and never published.
        InvalidInput
            Something else is there.
        """
        store = cls.find(url, storage_options)
        if store is None:
            raise SourceNotFound(
                f"there is no store at {Location.of(url, storage_options)}; make it first, or mend the path"
            )
        if not store.published:
            raise SourceNotFound(
                f"{store.location} was begun but never finished, so it has no rows yet. "
                "Run the command that writes it again; it goes on where it stopped"
            )
        return store

    @classmethod
    def create(cls, location: Location, kind: str, layout: Layout, settings: Mapping[str, Any]) -> Self:
        """Begin a store: arrays without rows, which any reader opens as an empty data set."""
        document = {
            "kind": kind, "published": False, "rows": 0, "dropped": 0, "layout": layout.to_json(),
            "settings": dict(settings), "fingerprint": digest_json({}), "lineage": {},
        }  # fmt: skip
        store = cls(location, document)
        store._write_metadata(begin=True)
        return store

    def retract(self) -> None:
        """Delete all rows, so that the store can be made anew.

        Readers see an empty store from the first write on. An interruption leaves a begun store, which the next run
        recognises as ours.
        """
        document = {**self.document, "published": False, "rows": 0}
        type(self)(self.location, document, self.history)._write_metadata(begin=True)
        self.location.clear(keep=_MARKER)

    def require_settings(self, kind: str, settings: Mapping[str, Any]) -> None:
        """Refuse to go on with a store that was made otherwise, naming every difference."""
        old = {"kind": self.kind, **self.document["settings"]}
        new = {"kind": kind, **settings}
        changed = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
        if changed:
            differences = ", ".join(f"{name}: {old.get(name)!r} there, {new.get(name)!r} asked for" for name in changed)
            raise SettingsChanged(
                f"{self.location} was made with other settings ({differences}). Nothing was changed; "
                "use the same settings, another output, or --overwrite to make it anew"
            )

    def require_kind(self, kind: str) -> None:
        """Refuse a store of another kind, which could have rows of the same width by chance."""
        if self.kind != kind:
            raise InvalidInput(
                f"{self.location} holds {self.kind}, but {kind} are needed; give a store that `{_MAKERS[kind]}` wrote"
            )

    @property
    def url(self) -> str:
        """Path or URL of the group."""
        return str(self.location)

    @property
    def kind(self) -> str:
        """What the rows are: ``rows``, ``latents`` or ``scores``."""
        return str(self.document["kind"])

    @property
    def published(self) -> bool:
        """Whether the store was finished at least once."""
        return bool(self.document["published"])

    @property
    def rows(self) -> int:
        """Number of published rows."""
        return int(self.document["rows"])

    @cached_property
    def layout(self) -> Layout:
        """Arrays and shard grid."""
        return Layout.from_json(self.document["layout"])

    @property
    def main(self) -> str:
        """Name of the array the statistics describe: ``x``, ``latent``, ..."""
        return self.layout.arrays[0].name

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the carried columns: ``id``, ``label``, ..."""
        return tuple(array.name for array in self.layout.arrays if array.dtype == STRING)

    @property
    def n_features(self) -> int:
        """Width of the main array."""
        return int(np.prod(self.layout.arrays[0].shape))

    @property
    def item_shape(self) -> tuple[int, ...]:
        """Shape of one item before it was flattened to a row."""
        return tuple(self.layout.arrays[0].attributes.get("item_shape", self.layout.arrays[0].shape))

    @property
    def statistics_names(self) -> tuple[str, ...]:
        """Names of the arrays of mean, standard deviation, minimum and maximum.

        A store that was published before they had a group of their own has them beside the rows.
        """
        return tuple(f"{self.document.get('statistics', '')}{name}" for name in ("mean", "std", "min", "max"))

    @property
    def ledger(self) -> Ledger:
        """The record of every shard."""
        return Ledger(self.location, self.layout)

    @property
    def has_records(self) -> bool:
        """Whether any shard was finished."""
        return (self.location / "ledger/record/c").exists()

    @property
    def fingerprint(self) -> str:
        """Hex digest of the published rows, from the ledger."""
        return str(self.document["fingerprint"])

    def array(self, name: str) -> "zarr.Array[Any]":
        """Open one array read-only through Zarr, which checks every CRC32C it reads."""
        location = self.location / name
        options = getattr(location.filesystem, "storage_options", None)
        return zarr.open_array(str(location), mode="r", storage_options=None if location.is_local else options)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Block:
        """Return rows ``start:stop`` of an array, every byte checked against its CRC32C.

        Raises
        ------
        Corrupt
            A shard is missing, torn or changed.
        """
        stop = self.rows if stop is None else stop
        try:
            array = self.array(name)
            self._require_objects(array, name, start, stop)
            return np.asarray(array[start:stop])
        except (FileNotFoundError, ValueError, RuntimeError) as error:
            raise Corrupt(
                f"{self.location}/{name}, {start} to {stop}: {error}. They cannot be trusted; "
                f"`cvae-dist verify {self.location}` names the shards. Put them back from a copy, or make the store "
                "anew with --overwrite"
            ) from error

    def _require_objects(self, array: "zarr.Array[Any]", name: str, start: int, stop: int) -> None:
        """Refuse missing and empty objects: Zarr would read them as zeros and empty strings."""
        size = (array.shards or array.chunks)[0]
        for chunk in range(start // size, -(-stop // size)):
            key = f"{name}/{shard_key(chunk, array.ndim)}"
            if not (self.location / key).size():
                raise FileNotFoundError(f"shard {chunk} is missing or empty ({self.location}/{key})")

    def statistics(self) -> Moments:
        """Return the moments of the main array over all published rows; ``Corrupt`` when they cannot be read."""
        mean, std, minimum, maximum = (self.read(name, 0, self.n_features) for name in self.statistics_names)
        return Moments(self.rows, mean, std * std * self.rows, minimum, maximum)

    def manifest(self) -> dict[str, Block]:
        """Return the published source manifest: arrays over ``piece``, empty when the store has none."""
        pieces: Mapping[str, int] = self.document.get("pieces", {})
        return {name: self.read(f"manifest/{name}", 0, count) for name, count in pieces.items()}

    def publish(
        self,
        rows: int,
        records: Sequence[Record],
        lineage: Mapping[str, Any],
        command: str,
        manifest: Mapping[str, Block],
    ) -> Self:
        """Make the first ``rows`` rows visible, every shard of which must have been written.

        The ledger, the statistics and the shapes of the arrays come first; one last write of the group shows readers
        all the new rows at once. After an interruption the next publication finishes it.
        """
        moments = self.ledger.total_moments(records)
        self.ledger.publish(len(records))
        dim = self.layout.arrays[0].dims[-1:] if self.layout.arrays[0].shape else ("statistic",)
        (self.location / "statistics" / _MARKER).write(group_metadata())
        statistics = {"mean": moments.mean, "std": moments.std, "min": moments.minimum, "max": moments.maximum}
        for name, values in statistics.items():
            told = f"{name} of {self.main} over sample"
            write_small_array(self.location, f"statistics/{name}", values, dim, long_name=told)
        document = {
            **self.document, "published": True, "rows": rows, "dropped": sum(record.dropped for record in records),
            "statistics": "statistics/",
            "fingerprint": digest_json({"records": [record.to_array().tolist() for record in records]}),
            "lineage": {**lineage, "versions": versions()},
            "pieces": {name: len(values) for name, values in manifest.items()},
        }  # fmt: skip
        pieces = self._write_manifest(manifest) if manifest else []
        history = "\n".join(filter(None, [self.history, history_line(command)]))
        store = type(self)(self.location, document, history)
        groups = ["statistics", *store.statistics_names, "ledger", "ledger/record", "ledger/moments"]
        store._write_metadata([*groups, *pieces])
        return store

    def _write_manifest(self, manifest: Mapping[str, Block]) -> list[str]:
        """Write the manifest. Its chunks have a fixed size, so an interrupted rewrite leaves the old rows readable."""
        dtypes = {name: STRING if values.dtype.kind in "OT" else values.dtype.str for name, values in manifest.items()}
        arrays = tuple(ArrayLayout(f"manifest/{name}", dtype, ("piece",)) for name, dtype in dtypes.items())
        layout = Layout(_PIECES_PER_CHUNK, _PIECES_PER_CHUNK, arrays)
        for array, values in zip(arrays, manifest.values(), strict=True):
            for chunk in range(layout.shards(len(values))):
                block = values[chunk * _PIECES_PER_CHUNK : (chunk + 1) * _PIECES_PER_CHUNK]
                (self.location / array.key(chunk)).write(*layout.encode(array.name, block))
            (self.location / array.name / _MARKER).write(layout.metadata(array.name, len(values)))
        (self.location / "manifest" / _MARKER).write(group_metadata())
        return ["manifest", *(array.name for array in arrays)]

    def _write_metadata(self, others: Sequence[str] = (), begin: bool = False) -> None:
        """Write the metadata of every array, and last that of the group, which makes the rows visible.

        A store that begins is written in the opposite order: a driver killed in between then leaves a group that the
        next run recognises as ours.
        """
        arrays = {array.name: self.layout.metadata(array.name, self.rows) for array in self.layout.arrays}
        members = {name: json.loads(data) for name, data in arrays.items()}
        members |= {name: json.loads((self.location / name / _MARKER).read()) for name in others}
        documents = [(self.location / name / _MARKER, data) for name, data in arrays.items()]
        documents.append((self.location / _MARKER, self._group_document(members)))
        for place, data in reversed(documents) if begin else documents:
            place.write(data)

    def _group_document(self, members: Mapping[str, Any]) -> bytes:
        group = json.loads(group_metadata())
        group["attributes"] = {"Conventions": "CF-1.11", "history": self.history, _KEY: dict(self.document)}
        group["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": members}
        return json.dumps(group).encode()
