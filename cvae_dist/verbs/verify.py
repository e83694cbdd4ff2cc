"""The verb ``verify``: whether every byte is as it was written."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cvae_dist.errors import Corrupt
from cvae_dist.events import Event, OnEvent, ignore
from cvae_dist.model.files import PRIORS, WEIGHTS, is_model, prior_files, read_description
from cvae_dist.store import Digest, Layout, Location, Moments, Records, RowStore
from cvae_dist.store.lineage import digest_bytes
from cvae_dist.store.manifest import read_spans
from cvae_dist.store.publication import mapped
from cvae_dist.store.urls import StorageOptions


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


def verify(
    url: str | os.PathLike[str], *, storage_options: StorageOptions | None = None, on_event: OnEvent = ignore
) -> VerifyResult:
    """Read a store or a model again and compare every digest. Nothing is changed.

    Of a store these are the digests of its ledger, of a model those of its weights and priors. On the command line, a
    shard that is missing, torn or changed gives exit code 1.

    Parameters
    ----------
    url : path or URL
        Zarr store, or directory of a trained model, to check.
    storage_options : Mapping, optional
        Options of the file system, for fsspec.
    on_event : callable
        Listener for progress.

    Returns
    -------
    VerifyResult

    Raises
    ------
    SourceNotFound
        There is neither a finished store nor a model.
    InvalidInput
        Something else is there.
    Corrupt
        The description of the model is damaged, so there is no digest to compare with. The rows of the store were
        replaced meanwhile.
    OutputLocked
        Rows of the store are being replaced.
    """
    location = Location.of(url, storage_options)
    if is_model(location):
        return _verify_model(location)
    store = RowStore.open(location)
    problems: list[Problem] = []
    on_event(Event("verify", "start", 0, store.rows))
    try:
        records = store.records()
    except Corrupt as error:
        return VerifyResult(store.url, store.rows, 0, (Problem("record", None, str(error)),))
    owners = _owners(store, records)
    shards = range(len(records))
    for shard, found in enumerate(mapped(lambda shard: list(_shard_problems(store, shard, records, owners)), shards)):
        problems += found
        done = min((shard + 1) * store.layout.rows_per_shard, store.rows)
        on_event(Event("verify", "progress", done, store.rows))
    problems += _whole_problems(store, records)
    if problems:
        store.require_unchanged()
    on_event(Event("verify", "done", store.rows, store.rows))
    objects = len(shards) * len(store.layout.arrays) + sum(one.chunks for one in store.publication.arrays.values())
    return VerifyResult(store.url, store.rows, objects, tuple(problems))


def _owners(store: RowStore, records: Records) -> dict[tuple[str, Digest], int]:
    """Map array and digest of every object to its shard: so shards that changed places are recognised."""
    return {
        (array.name, records.digest(shard, place)): shard
        for shard in range(len(records))
        for place, array in enumerate(store.layout.arrays)
    }


def _shard_problems(
    store: RowStore, shard: int, records: Records, owners: Mapping[tuple[str, Digest], int]
) -> Iterator[Problem]:
    for place, array in enumerate(store.layout.arrays):
        expected = records.digest(shard, place)
        try:
            data = (store.location / array.key(shard)).read()
        except FileNotFoundError:
            yield Problem(array.name, shard, f"missing ({expected.size:,} bytes expected)")
            continue
        reason = _difference(store.layout, array.name, data, expected, owners)
        if reason and store.interrupted and shard == len(records) - 1 and store.rows % store.layout.rows_per_shard:
            reason += _UNFINISHED
        if reason:
            yield Problem(array.name, shard, reason)


_UNFINISHED = (
    " (a command that lets the store grow was interrupted: the published rows are untouched then; "
    "run it again, and it finishes or takes back what it began)"
)


def _difference(
    layout: Layout, name: str, data: bytes, expected: Digest, owners: Mapping[tuple[str, Digest], int]
) -> str:
    """Return what is wrong with the bytes of a shard, or an empty string."""
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


def _whole_problems(store: RowStore, records: Records) -> Iterator[Problem]:
    """Compare what readers see of the whole store with the ledger: shapes, statistics and the manifest."""
    yield from _metadata_problems(store)
    for name in store.publication.arrays:
        try:
            for _ in store.publication.blocks(name):
                pass
        except Corrupt as error:
            yield Problem(name, None, str(error))
            return  # all that follows rests on it
    if records.rows != store.rows:
        yield Problem("record", None, f"its shards have {records.rows:,} rows, the store {store.rows:,}")
    yield from _manifest_problems(store)
    yield from _statistics_problems(store)


def _manifest_problems(store: RowStore) -> Iterator[Problem]:
    """Compare the rows of all files with those of the store, and the rows that were left out."""
    manifest = store.manifest()
    if manifest is None:
        return
    rows = dropped = 0
    try:
        for entries in manifest.batches():
            rows += int(entries.rows.sum())
            dropped += sum(int(np.diff(read_spans(text)).sum()) for text in entries.dropped if text)
    except ValueError as error:
        yield Problem("manifest", None, str(error))
        return
    if rows != store.rows:
        yield Problem("manifest", None, f"its files do not make the {store.rows:,} rows of the store")
    if dropped != store.document["dropped"]:
        yield Problem("manifest", None, f"it leaves out {dropped:,} rows, the store {store.document['dropped']:,}")


def _metadata_problems(store: RowStore) -> Iterator[Problem]:
    """Compare the metadata of every array with the copy of it in the group's (consolidated)."""
    group = json.loads((store.location / "zarr.json").read())
    members: Mapping[str, Any] = group["consolidated_metadata"]["metadata"]
    for name, expected in members.items():
        try:
            found = json.loads((store.location / name / "zarr.json").read())
        except (FileNotFoundError, ValueError, RecursionError) as error:
            yield Problem(name, None, f"its metadata is missing or damaged ({error})")
            continue
        if found != expected:
            yield Problem(name, None, "its metadata differs from the copy in the group's")
    for array in store.layout.arrays:
        shape = members[array.name]["shape"]
        if shape != [store.rows, *array.shape]:
            yield Problem(array.name, None, f"its metadata says shape {shape}, the store has {store.rows} rows")


def _statistics_problems(store: RowStore) -> Iterator[Problem]:
    """Compare the statistics with the moments of the packs."""
    found, total = store.statistics(), Moments.empty(store.n_features)
    for moments in store.pack_moments():
        total = total.merge(moments)
    for name in ("mean", "std", "minimum", "maximum"):
        if not np.allclose(getattr(found, name), getattr(total, name), rtol=1e-12, atol=0, equal_nan=True):
            yield Problem(name, None, "differs from the ledger's")


def _verify_model(location: Location) -> VerifyResult:
    problems = list(_digest_problems(location / WEIGHTS, WEIGHTS, read_description(location)["digest"]))
    described = [entry.name for entry in (location / PRIORS).list() if entry.name.endswith(".json")]
    for name in described:
        problems += _prior_problems(location, name.removesuffix(".json"))
    return VerifyResult(str(location), 0, 1 + len(described), tuple(problems))


def _prior_problems(location: Location, name: str) -> Iterator[Problem]:
    description, arrays = prior_files(location, name)
    try:
        expected = json.loads(description.read())["digest"]
    except (ValueError, KeyError, TypeError):
        yield Problem(f"{PRIORS}/{description.name}", None, "changed: it names no digest")
    else:
        yield from _digest_problems(arrays, f"{PRIORS}/{arrays.name}", expected)


def _digest_problems(file: Location, name: str, expected: str) -> Iterator[Problem]:
    try:
        found = digest_bytes(file.read())
    except FileNotFoundError:
        yield Problem(name, None, "missing")
    else:
        if found != expected:
            yield Problem(name, None, f"changed: digest {found}, {expected} was written")
