"""The verbs ``verify`` and ``info``: is every byte as it was written, and what is it."""

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from cvae_dist.errors import Corrupt, InvalidInput, SourceNotFound
from cvae_dist.events import Event, OnEvent, ignore
from cvae_dist.store import Digest, Layout, Location, Record, RowStore
from cvae_dist.store.lineage import digest_bytes, digest_json
from cvae_dist.store.urls import StorageOptions

_THREADS = 4


@dataclass(frozen=True)
class Problem:
    """One object that is not what the ledger says.

    Attributes
    ----------
    array : str
        Name of the array.
    shard : int or None
        Number of the shard; None when it concerns the whole array.
    reason : str
        What is wrong with it.
    """

    array: str
    shard: int | None
    reason: str

    def __str__(self) -> str:
        where = self.array if self.shard is None else f"{self.array} shard {self.shard}"
        return f"{where}: {self.reason}"


@dataclass(frozen=True)
class VerifyResult:
    """What ``verify`` found.

    Attributes
    ----------
    url : str
        The store.
    rows, objects : int
        Rows and stored objects that were looked at.
    problems : tuple of Problem
        Empty when all is well.
    """

    url: str
    rows: int
    objects: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether every byte is as it was written."""
        return not self.problems


def verify(url: str, *, storage_options: StorageOptions | None = None, on_event: OnEvent = ignore) -> VerifyResult:
    """Read every object of a store again and compare it with the ledger; of a model, its weights and priors.

    Parameters
    ----------
    url : path or URL
        A store, or the directory of a model.
    storage_options : Mapping, optional
        Passed to fsspec.
    on_event : callable
        Listener for progress.

    Returns
    -------
    VerifyResult

    Raises
    ------
    SourceNotFound, InvalidInput
        There is no finished store and no model.
    """
    location = Location.of(url, storage_options)
    if _is_model(location):
        return _verify_model(location)
    store = RowStore.open(location)
    shards = store.layout.shards(store.rows)
    records = [store.ledger.read(shard) for shard in range(shards)]
    owners = _owners(store, records)
    problems: list[Problem] = []
    on_event(Event("verify", "start", 0, store.rows))
    with ThreadPoolExecutor(_THREADS) as pool:
        results = pool.map(lambda shard: list(_shard_problems(store, shard, records[shard], owners)), range(shards))
        for shard, found in enumerate(results):
            problems += found
            done = min((shard + 1) * store.layout.rows_per_shard, store.rows)
            on_event(Event("verify", "progress", done, store.rows))
    problems += _whole_problems(store, records)
    on_event(Event("verify", "done", store.rows, store.rows))
    return VerifyResult(store.url, store.rows, shards * (len(store.layout.arrays) + 2), tuple(problems))


def _owners(store: RowStore, records: list[Record | None]) -> dict[tuple[str, Digest], int]:
    """Map the digest of every object to its shard, to recognise shards that changed places."""
    return {
        (array.name, digest): shard
        for shard, record in enumerate(records)
        if record is not None
        for array, digest in zip(store.layout.arrays, record.digests[:-1], strict=True)
    }


def _shard_problems(
    store: RowStore, shard: int, record: Record | None, owners: Mapping[tuple[str, Digest], int]
) -> Iterator[Problem]:
    if record is None:
        yield Problem("ledger/record", shard, "missing or damaged, so the shard cannot be checked")
        return
    for array, expected in zip(store.layout.arrays, record.digests[:-1], strict=True):
        try:
            data = (store.location / array.key(shard)).read()
        except FileNotFoundError:
            yield Problem(array.name, shard, f"missing ({expected.size:,} bytes expected)")
            continue
        reason = _difference(store.layout, array.name, data, expected, owners)
        if reason:
            yield Problem(array.name, shard, reason)
    try:
        store.ledger.read_moments(shard, record)
    except Corrupt as error:
        yield Problem("ledger/moments", shard, str(error))


def _difference(
    layout: Layout, name: str, data: bytes, expected: Digest, owners: Mapping[tuple[str, Digest], int]
) -> str:
    """Return what is wrong with the bytes of a shard; nothing when they are those that were recorded."""
    try:
        found = Digest.of_shard(layout.split(name, data))
        damage = "whole, but not what was written"
    except ValueError as error:
        found, damage = Digest(len(data), 0), f"changed: {error}"
    else:
        if found == expected:
            return ""
        if (name, found) in owners:
            return f"holds the bytes of shard {owners[name, found]}"
    if not data:
        return f"empty ({expected.size:,} bytes expected)"
    if found.size != expected.size:
        how = "truncated" if found.size < expected.size else "too long"
        return f"{how}: {found.size:,} of {expected.size:,} bytes"
    return damage


def _whole_problems(store: RowStore, records: list[Record | None]) -> Iterator[Problem]:
    """Compare what readers see of the whole store with the ledger: shapes, statistics and the manifest."""
    yield from _metadata_problems(store)
    yield from _manifest_problems(store)
    whole = [record for record in records if record is not None]
    if len(whole) < len(records):
        return  # named with its shard already, and all that follows rests on it
    if digest_json({"records": [record.to_array().tolist() for record in whole]}) != store.fingerprint:
        yield Problem("ledger/record", None, _NOT_PUBLISHED)
        return
    yield from _statistics_problems(store, whole)


_NOT_PUBLISHED = (
    "is not that of the publication: a shard was exchanged together with its record, or a command that lets the "
    "store grow was interrupted (the published rows are untouched then; run it again)"
)


def _metadata_problems(store: RowStore) -> Iterator[Problem]:
    """Compare the metadata of every array with the copy of it in the group's (consolidated)."""
    group = json.loads((store.location / "zarr.json").read())
    members: Mapping[str, Any] = group["consolidated_metadata"]["metadata"]
    for name, expected in members.items():
        try:
            found = json.loads((store.location / name / "zarr.json").read())
        except (FileNotFoundError, ValueError) as error:
            yield Problem(name, None, f"its metadata is missing or damaged ({error})")
            continue
        if found != expected:
            yield Problem(name, None, "its metadata differs from the copy in the group's")
    for array in store.layout.arrays:
        shape = members[array.name]["shape"]
        if shape != [store.rows, *array.shape]:
            yield Problem(array.name, None, f"its metadata says shape {shape}, the store has {store.rows} rows")


def _manifest_problems(store: RowStore) -> Iterator[Problem]:
    try:
        manifest = store.manifest()
    except Corrupt as error:
        yield Problem("manifest", None, str(error))
        return
    if manifest and int(manifest["rows"].sum()) - len(manifest["dropped"]) != store.rows:
        yield Problem("manifest", None, f"its pieces do not make the {store.rows:,} rows of the store")


def _statistics_problems(store: RowStore, records: list[Record]) -> Iterator[Problem]:
    try:
        total = store.ledger.total_moments(records)
    except Corrupt:
        return  # named with its shard already
    expected = {"mean": total.mean, "std": total.std, "min": total.minimum, "max": total.maximum}
    for name, values in expected.items():
        try:
            found = store.read(name, 0, len(values))
        except Corrupt as error:
            yield Problem(name, None, str(error))
            continue
        if not np.array_equal(found, values, equal_nan=True):
            yield Problem(name, None, "differs from the ledger's")


def info(url: str, *, storage_options: StorageOptions | None = None) -> dict[str, Any]:
    """Describe a store or a model directory in a few printable entries.

    Raises
    ------
    SourceNotFound, InvalidInput
        Nothing is there, or something else.
    """
    location = Location.of(url, storage_options)
    if _is_model(location):
        return {"model": str(location), **_read_config(location / "config.json")}
    store = RowStore.find(location)
    if store is None:
        raise SourceNotFound(f"there is neither a store nor a model at {location}; mend the path")
    return _store_info(store)


def _is_model(location: Location) -> bool:
    return (location / "config.json").exists() and not (location / "zarr.json").exists()


def _read_config(config: Location) -> dict[str, Any]:
    try:
        document = json.loads(config.read())
    except ValueError as error:
        raise InvalidInput(f"{config} is not JSON ({error}); the model directory is damaged or foreign") from error
    if not isinstance(document, dict) or "digest" not in document:
        raise InvalidInput(f"{config} was not written by cvae-dist; give a store or the directory of a model")
    return {"settings" if name == "model" else name: value for name, value in document.items()}


def _verify_model(location: Location) -> VerifyResult:
    expected = _read_config(location / "config.json")["digest"]
    problems = []
    try:
        found = digest_bytes((location / "model.safetensors").read())
        if found != expected:
            problems.append(Problem("model.safetensors", None, f"changed: digest {found}, {expected} was written"))
    except FileNotFoundError:
        problems.append(Problem("model.safetensors", None, "missing"))
    priors = [file for file in location.filesystem.find(f"{location.path}/priors") if file.endswith(".json")]
    for file in priors:
        problems += _prior_problems(location / "priors", file.rpartition("/")[2].removesuffix(".json"))
    return VerifyResult(str(location), 0, 1 + len(priors), tuple(problems))


def _prior_problems(place: Location, name: str) -> Iterator[Problem]:
    try:
        expected = json.loads((place / f"{name}.json").read())["digest"]
        found = digest_bytes((place / f"{name}.safetensors").read())
    except FileNotFoundError:
        yield Problem(f"priors/{name}.safetensors", None, "missing")
    except (ValueError, KeyError, TypeError):
        yield Problem(f"priors/{name}.json", None, "changed: it names no digest")
    else:
        if found != expected:
            yield Problem(f"priors/{name}.safetensors", None, f"changed: digest {found}, {expected} was written")


def _store_info(store: RowStore) -> dict[str, Any]:
    layout = store.layout
    entries: dict[str, Any] = {
        "store": store.url,
        "kind": store.kind,
        "rows": store.rows if store.published else "none yet: begun, not finished",
        "arrays": {
            a.name: f"{a.dtype} ({', '.join(a.dims)})" + (f" x {a.shape[0]:,}" if a.shape else "")
            for a in layout.arrays
        },
        "item_shape": store.item_shape,
        "shards": layout.shards(store.rows),
        "rows_per_shard": layout.rows_per_shard,
        "rows_per_chunk": layout.rows_per_chunk,
        "bytes": sum(array.row_bytes for array in layout.arrays if array.dtype != "string") * store.rows,
        "dropped": store.document["dropped"],
        "settings": store.document["settings"],
        "lineage": store.document["lineage"],
        "fingerprint": store.fingerprint,
        "history": dict(enumerate(store.history.splitlines(), 1)),
    }
    if store.published:
        moments = store.statistics()
        entries["mean"] = f"{moments.mean.min():.6g} to {moments.mean.max():.6g} over features"
        entries["std"] = f"{moments.std.min():.6g} to {moments.std.max():.6g} over features"
        entries["range"] = f"{moments.minimum.min():.6g} to {moments.maximum.max():.6g}"
    return entries
