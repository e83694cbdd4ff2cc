"""The driver of a large ingest without its data: ``python -m tests.bench.planned FOLDER [FEATURES DTYPE SHARDS]``.

Its workers' part is replaced: they claim to have written shards, whose files are empty. All the rest is the product's.
Prints CPU seconds of the plan, of sending tasks and taking records until the run is interrupted before it publishes,
and of the next run, which resumes and publishes; peak memory in MB; objects beside the shards; seconds to open the
store by xarray, with and without Dask; bytes of the ledger over those of the rows.
"""

import contextlib
import gc
import os
import resource
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import cvae_dist
from cvae_dist.cluster import write
from cvae_dist.events import Event
from cvae_dist.sources import BadFile, Files, FileTable, Pieces, Schema
from cvae_dist.store import ArrayLayout, Digest, Layout, Location, Moments, Records, RowStore, Sample
from cvae_dist.store.files import LocalFiles
from cvae_dist.store.storage import Entry
from cvae_dist.verbs import ingest as verb
from tests.bench.table import seconds

_ROWS_PER_FILE = 1_000_000


class Planned:
    """A source of files that are not there."""

    url = "planned"

    def __init__(self, rows: int, features: int, dtype: str) -> None:
        self._rows, self._features, self._dtype = rows, features, dtype

    def list(self) -> FileTable:
        """Return files whose size is the number of their rows."""
        sizes = np.full(-(-self._rows // _ROWS_PER_FILE), _ROWS_PER_FILE, np.int64)
        sizes[-1] = self._rows - int(sizes[:-1].sum())
        paths = np.array([f"{number // 100:03}/{number:06}.npy" for number in range(len(sizes))], dtype=object)
        return FileTable.of(Files(paths, sizes, np.full(len(sizes), "1", dtype=object)))

    def reader(self, model: Files) -> "Unread":
        return Unread(Schema((self._features,), np.dtype(self._dtype)))


@dataclass(frozen=True)
class Unread:
    """Counts rows, and reads none but the first ones, which tell whether to compress."""

    schema: Schema
    streams: bool = True

    def count(self, files: Files) -> tuple[Any, list[BadFile]]:
        return files.size.copy(), []

    def remark(self, files: int, rows: int) -> str:
        return ""

    def read(self, pieces: Pieces, out: Any) -> dict[str, Any]:
        out[...] = 0
        return {}


class _Interrupted(Exception):
    pass


def main(folder: str, features: int = 768, dtype: str = "<f4", shards: int = 200_000) -> None:
    place = Path(folder) / "rows.zarr"
    row_bytes = features * np.dtype(dtype).itemsize
    layout = Layout.of((ArrayLayout("x", dtype, ("sample", "feature"), (features,)),))
    source = Planned(shards * layout.rows_per_shard, features, dtype)
    noise = np.random.default_rng(0).normal(size=(4, features))

    def write_shard(region: Any, shard: Any, versions: dict[str, str]) -> tuple[Records, Moments, Sample]:
        rows, key = len(shard.span), region.layout.arrays[0].key(shard.span.shard)
        versions[key] = f"{shard.span.shard}"
        record = Records.one(shard.fingerprint, rows, [Digest(row_bytes * rows, shard.span.shard)])
        moments = Moments(rows, noise[0] + shard.span.shard, noise[1] ** 2, noise[2], noise[3])
        return record, moments, Sample.none(layout)

    def look(self: LocalFiles, path: str, prefix: str, names: Any) -> dict[str, Entry]:
        size = row_bytes * layout.rows_per_shard
        return {name: Entry(name, size, name.split(".")[1]) for name in names if _is_there(f"{path}/{name}")}

    write._write_shard = write_shard  # type: ignore[assignment]
    LocalFiles.look = look  # type: ignore[method-assign]
    real = verb._Run._plan

    def interrupted(*arguments: Any) -> Any:
        job, counts = real(*arguments)
        return replace(job, confirm=_interrupt), counts

    began = time.process_time()
    planned = []

    def mark(event: Event) -> None:
        if event.kind == "start":
            planned.append(time.process_time() - began)

    verb._Run._plan = interrupted  # type: ignore[method-assign]
    with contextlib.suppress(_Interrupted):
        cvae_dist.ingest(source, place, on_event=mark)
    sent, again = time.process_time() - began - planned[0], time.process_time()
    verb._Run._plan = real  # type: ignore[method-assign]
    gc.collect()
    cvae_dist.ingest(source, place)
    resumed = time.process_time() - again
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    import xarray as xr  # not in the memory of the driver

    store = RowStore.open(str(place))
    beside = [entry for entry in Location.of(str(place)).list() if not entry.name.startswith("x/c.")]
    opened = (seconds(lambda chunks=chunks: xr.open_zarr(str(place), chunks=chunks).close()) for chunks in ({}, None))
    ledger = sum(entry.size for entry in beside)
    print(planned[0], sent, resumed, peak, len(beside), *opened, ledger / (store.rows * row_bytes))


def _is_there(path: str) -> bool:
    """Ask the file system for a file that is not there: it costs what a stat costs."""
    with contextlib.suppress(FileNotFoundError):
        os.stat(path)
    return True


def _interrupt() -> None:
    raise _Interrupted


if __name__ == "__main__":
    main(sys.argv[1], *(cast(value) for cast, value in zip((int, str, int), sys.argv[2:], strict=False)))
