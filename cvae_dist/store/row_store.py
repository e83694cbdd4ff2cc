"""A Zarr group of rows: opening one, creating one, and publishing what was written."""

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np

from cvae_dist.errors import Corrupt, InvalidInput, OutputLocked, SettingsChanged, SourceNotFound
from cvae_dist.store.columns import Integers
from cvae_dist.store.drift import Drift, read_drift, require_drift, write_drift
from cvae_dist.store.foreign import describe
from cvae_dist.store.layout import STRING, Block, Layout, decode_chunk, group_metadata, shard_number
from cvae_dist.store.ledger import STAGED, Journal, Records, record_fields, record_width
from cvae_dist.store.lineage import digest_bytes, digest_json, history_line, versions
from cvae_dist.store.manifest import Batches, Manifest, as_spans, digest_of, manifest_of, read_spans, write_manifest
from cvae_dist.store.moments import STATISTICS, Moments
from cvae_dist.store.publication import METADATA, PUBLICATIONS, Publication, Stored, mapped
from cvae_dist.store.reader import RowReader
from cvae_dist.store.sample import Sample, read_sample, require_sample, write_sample
from cvae_dist.store.urls import Changed, Location, StorageOptions

_KEY = "cvae_dist"  # the attribute of the group that holds everything of ours
_VERSION = 6  # of the format: what lies where in the group
_SHOWN = ("mean", "std", "min", "max")  # statistics of every feature, as a publication holds them
_REMEMBERED = 100  # fingerprints of older publications
_MAKERS = {"rows": "cvae-dist ingest SOURCE STORE", "latents": "cvae-dist embed STORE MODEL LATENTS"}  # by kind


@dataclass(frozen=True)
class RowStore:
    """A published (or begun) store.

    Attributes
    ----------
    location : Location
        The Zarr group.
    document : Mapping
        The group attribute ``cvae_dist``: kind, layout, rows, settings, lineage, fingerprint; the arrays of the
        publication; and, while rows are being written, the ``driver`` that does. ``grown_from`` has the fingerprints of
        older publications whose rows are all there still, ``rewritten_from`` those of older ones. ``moving`` names the
        shards that a publication is about to put in the place of others.
    history : str
        CF history of the group, one line per publication.
    version : str
        That of the group's metadata when it was read or written; it is only replaced where it is still this one.
    """

    location: Location
    document: Mapping[str, Any]
    history: str = ""
    version: str = ""

    @classmethod
    def find(cls, url: "str | Location", storage_options: StorageOptions | None = None) -> Self | None:
        """Return the store at ``url``, published or only begun, or None when nothing is there.

        Raises
        ------
        InvalidInput
            Something else is there, a store in the format of another release, or one that is damaged or forged.
        """
        location = Location.of(url, storage_options)
        try:
            data, version = (location / METADATA).read_versioned()
            attributes = json.loads(data)["attributes"]
            document, history = attributes[_KEY], attributes.get("history", "")
            form = document.get("version", 1)
        except (FileNotFoundError, NotADirectoryError, KeyError, TypeError, ValueError, AttributeError, RecursionError):
            if location.is_blank():
                return None
            raise InvalidInput(
                f"{location} is not a store made by cvae-dist, so it is neither read nor replaced: "
                f"it {describe(location)}"
            ) from None
        if form != _VERSION:
            raise InvalidInput(
                f"{location} is a store in format {form}, but this release of cvae-dist reads and writes format "
                f"{_VERSION}. Nothing was changed; make it anew at another location, from what it was made of"
            )
        store = cls(location, document, str(history), version)
        store._require_sane()
        return store

    @classmethod
    def claims(cls, location: Location) -> bool:
        """Whether what lies at a location says that it is a store made by cvae-dist."""
        return cls.publication_at(location) is not None

    @staticmethod
    def publication_at(location: Location) -> str | None:
        """Return the name of what a store has published, by one request.

        It is empty where nothing was, and None where nothing says that it is a store made by cvae-dist.
        """
        try:
            return str(json.loads((location / METADATA).read())["attributes"][_KEY].get("publication", ""))
        except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError):
            return None

    @classmethod
    def open(cls, url: "str | Location", storage_options: StorageOptions | None = None) -> Self:
        """Open a published store.

        Raises
        ------
        SourceNotFound
            Nothing is there, or it was begun and never published.
        InvalidInput
            Something else is there.
        OutputLocked
            A driver is putting new rows in the place of published ones, or was killed while it did.
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
        if store.moving is not None:
            raise OutputLocked(
                f"rows of {store.location} are being replaced just now, so old and new ones could be mixed. Nothing "
                "was read; try again in a moment. If that does not help, a driver was killed meanwhile: run the "
                "command that writes the store again, which finishes it"
            )
        return store

    @classmethod
    def create(
        cls, location: Location, kind: str, layout: Layout, settings: Mapping[str, Any], driver: str = ""
    ) -> Self:
        """Begin a store: arrays without rows, which any reader opens as an empty data set.

        ``driver`` is the token of the lease it is made under.
        """
        document = {
            "version": _VERSION, "kind": kind, "published": False, "rows": 0, "dropped": 0, "layout": layout.to_json(),
            "settings": dict(settings), "fingerprint": digest_json({}), "lineage": {}, "driver": driver,
        }  # fmt: skip
        return cls(location, document)._begun()

    def retract(self, layout: Layout, kind: str, settings: Mapping[str, Any], driver: str) -> Self:
        """Delete all rows, and begin the store anew.

        Readers see an empty store from the first write on. An interruption leaves a begun store, which the next run
        recognises as ours.
        """
        document = {**self.document, "published": False, "rows": 0, "driver": driver}
        empty = type(self)(self.location, document, self.history, self.version)._replaced()
        self.location.clear(keep=METADATA)
        anew = {"kind": kind, "layout": layout.to_json(), "settings": dict(settings), "dropped": 0, "lineage": {}}
        none = {"publication": "", "arrays": {}, "previous": "", "grown_from": [], "rewritten_from": []}
        document = {**document, **anew, **none, "fingerprint": digest_json({})}
        return type(self)(self.location, document, "", empty.version)._begun()

    def claimed(self, driver: str) -> Self:
        """Let the driver with this token write; what an earlier driver still wants to publish is refused then.

        Raises
        ------
        OutputLocked
            Another driver changed the store since it was read.
        """
        return type(self)(self.location, {**self.document, "driver": driver}, self.history, self.version)._replaced()

    def require_unchanged(self) -> None:
        """Refuse to trust what was read, when the rows were replaced meanwhile. Growth changes no row.

        Raises
        ------
        Corrupt
            They were.
        """
        now = type(self).find(self.location)
        if now is None or not now.published or not now.holds_rows_of(self.fingerprint):
            raise Corrupt(
                f"the rows of {self.location} were replaced while they were read. Nothing was published; run the same "
                "command again"
            )

    def holds_rows_of(self, fingerprint: str) -> bool:
        """Whether all rows of an older publication of this store are among the published ones, where they were."""
        return fingerprint == self.fingerprint or fingerprint in self.document.get("grown_from", ())

    def follows(self, fingerprint: str) -> bool:
        """Whether there was such a publication of this store, some of whose rows may have been replaced since."""
        return self.holds_rows_of(fingerprint) or fingerprint in self.document.get("rewritten_from", ())

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
    def interrupted(self) -> bool:
        """Whether a driver began to write, and has not published."""
        return bool(self.document.get("driver"))

    @property
    def moving(self) -> Integers | None:
        """Shards that are being put in the place of published ones, ascending; None when nobody does."""
        if "moving" not in self.document:
            return None
        runs = [np.arange(first, stop) for first, stop in read_spans(self.document["moving"]).tolist()]
        return np.concatenate([np.zeros(0, np.int64), *runs])

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
        """Name of the array the statistics describe: ``x``, ``z``, ..."""
        return self.layout.arrays[0].name

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the carried columns: ``id``, ``label``, ...; CF conventions call them coordinates."""
        return tuple(str(self.layout.arrays[0].attributes.get("coordinates", "")).split())

    @property
    def n_features(self) -> int:
        """Width of the main array."""
        return self.layout.n_features

    @property
    def item_shape(self) -> tuple[int, ...]:
        """Shape of one item before it was flattened to a row."""
        return tuple(self.layout.arrays[0].attributes.get("item_shape", self.layout.arrays[0].shape))

    @property
    def journal(self) -> Journal:
        """The packs of shards that are written and not published."""
        return Journal(self.location, self.layout)

    @property
    def fingerprint(self) -> str:
        """Hex digest of the published rows, from the ledger."""
        return str(self.document["fingerprint"])

    @property
    def publication(self) -> Publication:
        """Where the ledger, the statistics and the manifest of the published rows are."""
        arrays = {name: Stored.from_json(stored) for name, stored in self.document.get("arrays", {}).items()}
        return Publication(self.location, str(self.document.get("publication", "")), arrays)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Block:
        """Return rows ``start:stop`` of an array, every byte checked against its CRC32C.

        Raises
        ------
        Corrupt
            A shard is missing, torn or changed.
        """
        stop = self.rows if stop is None else stop
        array = self.layout.array(name)
        if array.dtype != STRING:
            return RowReader(self, name).read(start, stop).reshape(max(0, stop - start), *array.shape)
        size = self.layout.rows_per_shard
        shards = range(start // size, -(-stop // size))
        block = np.concatenate([np.zeros(0, object), *mapped(lambda shard: self._read_strings(name, shard), shards)])
        return block[start - start // size * size : stop - start // size * size]

    def _read_strings(self, name: str, shard: int) -> Block:
        place = self.location / self.layout.array(name).key(shard)
        try:
            return decode_chunk(place.read(), STRING, (self.layout.rows_per_shard,))
        except FileNotFoundError:
            what = "is missing"
        except (ValueError, RuntimeError) as error:
            what = f"cannot be trusted: {error}"
        raise Corrupt(
            f"shard {shard} of {name} {what} ({place}). `cvae-dist verify {self.location}` names every bad shard. "
            "Put them back from a copy, or make the store anew with --overwrite"
        )

    def records(self) -> Records:
        """Return the records of all published shards; ``Corrupt`` when they are not those of the publication."""
        return self._records

    @cached_property
    def _records(self) -> Records:  # kept: once the store has grown twice, they are nowhere else
        if not self.published:
            return Records.none(self.layout)
        records = Records(self.publication.read("record"))
        if _fingerprint(records) != self.fingerprint:
            raise Corrupt(
                f"the ledger of {self.location} is not that of its publication, so nobody knows what its published "
                "rows are. Nothing was changed; restore it from a copy, or use --overwrite to make the store anew"
            )
        return records

    def statistics(self) -> Moments:
        """Return the moments of the main array over all published rows; ``Corrupt`` when they cannot be read."""
        mean, std, minimum, maximum = (self.publication.read(name) for name in _SHOWN)
        return Moments(self.rows, mean, std * std * self.rows, minimum, maximum)

    def pack_moments(self) -> Iterator[Moments]:
        """Yield the moments of the published rows of every pack, in order."""
        if not self.published:
            return
        stored = self.publication.arrays.get("moments")
        if stored is None:  # one pack is the whole store
            yield self.statistics()
            return
        size = self.layout.shards_per_pack * self.layout.rows_per_shard
        for first in range(0, stored.shape[0], stored.chunk):
            tables = self.publication.read("moments", first, min(first + stored.chunk, stored.shape[0]))
            for number, table in enumerate(tables, first):
                yield Moments(min(size, self.rows - number * size), *table)

    def sample(self) -> Sample:
        """Return the sample of the published rows; that of no rows where none is kept."""
        return read_sample(self.publication, self.layout)

    def drift(self) -> Drift | None:
        """Return how the rows of the last append differ from those before; None where nothing was appended."""
        return read_drift(self.publication)

    def manifest(self) -> Manifest | None:
        """Return the files that the published rows came from; None where the store was made of none."""
        return manifest_of(self.publication, self.rows)

    def publish(
        self,
        rows: int,
        records: Records,
        moments: Iterable[Moments],
        lineage: Mapping[str, Any],
        command: str,
        manifest: Batches | None = None,
        dropped: int = 0,
        sample: Sample | None = None,
        drift: Drift | None = None,
        moving: Integers | None = None,
    ) -> Self:
        """Make the first ``rows`` rows visible, every shard of which must have been written.

        ``records`` are those of all shards, and ``moments`` those of every pack, in order. ``manifest`` is called
        twice: for the name of the publication, and for what is written. ``dropped`` rows of the source were left out.
        ``sample`` is that of all rows, and ``drift`` that of the last append, where they are known.
        All that describes the rows comes first, in a subgroup of its own. One last conditional write of the group
        shows readers all the new rows at once. After an interruption the next publication finishes it.

        Where published rows are replaced or taken away, ``moving`` names the shards that are staged, ascending, and
        :meth:`moved` has to follow.

        Raises
        ------
        OutputLocked
            Another driver has taken the store over.
        InvalidInput
            The rows have no statistics: values are so large that float64 cannot hold their variance.
        """
        fingerprint = _fingerprint(records)
        name = _name(fingerprint, rows, digest_of(manifest()) if manifest else "")
        publication = Publication(self.location, name, {})
        total = self._write_moments(publication, len(records), moments)
        self._require_finite(total)
        dim = self.layout.arrays[0].dims[-1:] if self.layout.arrays[0].shape else ("statistic",)
        for name, values in zip(_SHOWN, (total.mean, total.std, total.minimum, total.maximum), strict=True):
            publication.write(name, values, dim, long_name=f"{name} of {self.main} over sample")
        publication.write("record", records.table, ("shard", "field"), fields=record_fields(self.layout))
        if manifest:
            write_manifest(publication, manifest())
        if sample is not None:
            write_sample(publication, sample, self.layout)
        if drift is not None:
            write_drift(publication, drift)
        document = {
            **self.document, "published": True, "rows": rows, "dropped": dropped, "fingerprint": fingerprint,
            "lineage": {**lineage, "versions": versions()}, "publication": publication.path.rpartition("/")[2],
            "arrays": {name: asdict(stored) for name, stored in publication.arrays.items()},
            "previous": self.document.get("publication", ""), **self._older(fingerprint, moving is not None),
        }  # fmt: skip
        history = "\n".join(filter(None, [self.history, history_line(command)]))
        if moving is None:
            return type(self)(self.location, document, history, self.version)._finished(publication.finish())
        document["moving"] = as_spans(moving)
        return type(self)(self.location, document, history, self.version)._replaced(publication.finish())

    def _older(self, fingerprint: str, rewritten: bool) -> dict[str, list[str]]:
        """Return what a publication with this fingerprint says of those before it."""
        grown, replaced = (list(self.document.get(name, ())) for name in ("grown_from", "rewritten_from"))
        if self.published and fingerprint != self.fingerprint:
            grown.append(self.fingerprint)
        if rewritten:
            grown, replaced = [], replaced + grown
        return {"grown_from": grown[-_REMEMBERED:], "rewritten_from": replaced[-_REMEMBERED:]}

    def moved(self, guard: Callable[[], None]) -> Self:
        """Put the staged shards of a publication in their places, and delete those that are not its own any more.

        It may have been interrupted before. ``guard`` raises where this driver may not write any more.
        """
        assert self.moving is not None

        def move(shard: int) -> None:
            guard()
            for key in (array.key(shard) for array in self.layout.arrays):
                with suppress(FileNotFoundError):  # an earlier run moved it
                    (self.location / STAGED / key).move(self.location / key)

        for _ in mapped(move, self.moving.tolist()):
            pass
        guard()
        self.delete_beyond(self.layout.shards(self.rows))
        return self._finished(self._published_members())

    def delete_beyond(self, shards: int) -> None:
        """Delete the objects of all shards but the first ones."""
        for array in self.layout.arrays:
            place = self.location / array.name
            for entry in place.list():
                number = shard_number(entry.name)
                if number is not None and number >= shards:
                    (place / entry.name).delete()

    def withdrawn(self) -> Self:
        """Take back what an interrupted driver left; the published rows are as they were."""
        return self._finished(self._published_members())

    def settle(self) -> None:
        """Finish what a driver still had to do that was killed right after it had published."""
        if self.journal.numbers():
            self.location.sweep_partial()
            self._with_arrays()._forget()

    def _write_moments(self, publication: Publication, shards: int, moments: Iterable[Moments]) -> Moments:
        """Write the moments of every pack, and return those of all, merged in order. A single pack is the total."""
        packs = -(-shards // self.layout.shards_per_pack)
        total, rest = Moments.empty(self.n_features), iter(moments)
        stored = Stored.of("<f8", (packs, len(STATISTICS), self.n_features))

        def blocks() -> Iterator[Block]:
            nonlocal total
            while some := list(itertools.islice(rest, stored.chunk)):
                for pack in some:
                    total = total.merge(pack)
                yield np.stack([[getattr(pack, name) for name in STATISTICS] for pack in some])

        if packs == 1:
            return next(rest)
        publication.write_blocks("moments", stored, blocks(), ("pack", "moment", "feature"), moments=STATISTICS)
        return total

    def _require_finite(self, total: Moments) -> None:
        """Refuse to publish statistics that overflowed; those of every shard by itself may be finite."""
        if not total.is_finite:
            feature = int(np.flatnonzero(~np.isfinite(total.mean + total.m2))[0])
            names = self.layout.arrays[0].attributes.get("features") or range(self.n_features)
            raise InvalidInput(
                f"the values of feature {names[feature]} of {self.location} go from {total.minimum[feature]:.3g} to "
                f"{total.maximum[feature]:.3g}, and the variance of all {total.count:,} rows exceeds float64. Nothing "
                "was published, and what was written is kept. Take the new rows away and run the same command again, "
                "to leave the store as it was; or scale the values, and make it anew with --overwrite"
            )

    def _begun(self) -> Self:
        """Write the group, and then the arrays, none of which has rows."""
        return self._replaced()._with_arrays()

    def _finished(self, members: Mapping[str, Any]) -> Self:
        """Write the group without its driver, which makes the rows visible, and then what only follows it.

        Nothing is changed before that one conditional write: this driver may have been frozen, and followed.
        """
        document = {name: value for name, value in self.document.items() if name not in ("driver", "moving")}
        store = type(self)(self.location, document, self.history, self.version)._replaced(members)._with_arrays()
        store._forget()
        return store

    def _with_arrays(self) -> Self:
        for name, data in self._array_metadata().items():
            (self.location / name / METADATA).write(data)
        return self

    def _array_metadata(self) -> dict[str, bytes]:
        return {array.name: self.layout.metadata(array.name, self.rows) for array in self.layout.arrays}

    def _replaced(self, members: Mapping[str, Any] | None = None) -> Self:
        """Write the group's metadata, where it is still the one that was read, and return the store with its version.

        ``members`` is the metadata of the publication's arrays by path, for those who read consolidated metadata.
        """
        if members is None:
            members = self._published_members() if self.published else {}
        arrays = {name: json.loads(data) for name, data in self._array_metadata().items()}
        group = json.loads(group_metadata())
        group["attributes"] = {"Conventions": "CF-1.11", "history": self.history, _KEY: dict(self.document)}
        group["consolidated_metadata"] = {
            "kind": "inline", "must_understand": False, "metadata": {**arrays, **members}
        }  # fmt: skip
        place, data = self.location / METADATA, json.dumps(group).encode()
        try:
            version = place.replace(data, self.version) if self.version else place.create(data)
        except (Changed, FileExistsError) as error:
            raise OutputLocked(
                f"{self.location} was changed by another driver since this one looked at it. Nothing was published by "
                "this run; run the same command again once the other driver has ended"
            ) from error
        return type(self)(self.location, self.document, self.history, version)

    def _published_members(self) -> Mapping[str, Any]:
        """Return the consolidated metadata of the publication that is there."""
        group = json.loads((self.location / METADATA).read())
        members: Mapping[str, Any] = group["consolidated_metadata"]["metadata"]
        return {path: member for path, member in members.items() if path.startswith(PUBLICATIONS)}

    def _forget(self) -> None:
        """Delete what older publications left, but for the one before, which readers may use; and last the journal."""
        keep = {self.document["publication"], self.document.get("previous")}
        place = self.location / PUBLICATIONS
        for name in {entry.name.partition("/")[0] for entry in place.list()} - keep - {METADATA}:
            (place / name).delete()
        self.journal.delete()

    def _require_sane(self) -> None:
        """Refuse a description that no driver wrote, before anything is done with it."""
        try:
            sizes = (self.document["rows"], self.document["dropped"])
            if any(not isinstance(size, int) or size < 0 for size in sizes):
                raise ValueError(f"it has {sizes[0]!r} rows and dropped {sizes[1]!r}")
            name = self.document.get("publication", "")
            if not re.fullmatch(r"[0-9a-f]*", name) or (self.published and not name):
                raise ValueError(f"its publication is named {name!r}")
            older = [*self.document.get("grown_from", ()), *self.document.get("rewritten_from", ())]
            if not all(isinstance(fingerprint, str) for fingerprint in older):
                raise ValueError("its older fingerprints are no text")
            _ = self.document["settings"].items(), self.document["lineage"].items(), self.fingerprint, self.kind
            if not {*self.columns} <= {array.name for array in self.layout.arrays}:
                raise ValueError(f"its columns are {self.columns}")
            arrays = self.publication.arrays
            shards = self.layout.shards(self.rows)
            if (read_spans(self.document.get("moving", "")) > shards).any():
                raise ValueError(f"it moves shards {self.document['moving'][:80]} of {shards}")
            if self.published and arrays["record"].shape != (shards, record_width(self.layout)):
                raise ValueError(f"its ledger has shape {arrays['record'].shape}, for {shards} shards")
            if self.published and any(arrays[shown].shape != (self.n_features,) for shown in _SHOWN):
                raise ValueError(f"its statistics are not those of {self.n_features} features")
            manifest_of(self.publication, self.rows)
            require_sample(arrays, self.layout)
            require_drift(arrays, self.n_features)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InvalidInput(
                f"{self.location} says that it is a store made by cvae-dist, but its description is damaged or forged "
                f"({type(error).__name__}: {error}). Nothing of it was read or changed; get it from a copy, or mend "
                "the path"
            ) from error


def _fingerprint(records: Records) -> str:
    return digest_bytes(records.table.astype("<u8").tobytes())


def _name(fingerprint: str, rows: int, manifest: str) -> str:
    """Return the name of a publication, which no other one has: 64 bits of what it holds, as hex."""
    return digest_bytes(f"{fingerprint} {rows} {manifest}".encode())[:16]
