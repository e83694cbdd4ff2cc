"""Rows of tables against pyarrow itself."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from cvae_dist.sources.options import TableOptions
from cvae_dist.sources.parquet import parquet_reader
from cvae_dist.verbs.ingest import ingest
from tests.bench.table import Row, alternate, median, seconds
from tests.tables import listed

_SHARD_ROWS = 5208  # 16 MB of 768 float32


def rows() -> Iterator[Row]:
    """Measure how fast a table becomes a NumPy block, and a store."""
    with TemporaryDirectory() as folder:
        yield from _lists(Path(folder))


def _lists(place: Path, files: int = 8, count: int = 41_000, features: int = 768) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.dataset
    import pyarrow.parquet as pq

    folder = place / "tables"
    folder.mkdir()
    block = np.empty((_SHARD_ROWS, features), np.float32)
    for number in range(files):
        values = np.random.default_rng(number).normal(size=count * features).astype(np.float32)
        table = pa.table({"embedding": pa.FixedSizeListArray.from_arrays(values, features)})
        pq.write_table(table, folder / f"{number}.parquet")

    def ours() -> None:
        found = [listed(path) for path in sorted(folder.iterdir())]
        reader = parquet_reader(found[0].root, found[0], TableOptions())
        for file in found:
            total = reader.count_file(file)
            for first in range(0, total, _SHARD_ROWS):
                reader.read_file(file, first, block[: total - first])

    def theirs() -> None:
        for batch in pyarrow.dataset.dataset(folder).to_batches():
            values = batch.column(0).flatten().to_numpy().reshape(-1, features)
            for first in range(0, len(values), _SHARD_ROWS):
                part = values[first : first + _SHARD_ROWS]
                block[: len(part)] = part

    def whole() -> None:
        shutil.rmtree(place / "rows.zarr", ignore_errors=True)
        ingest(folder, place / "rows.zarr")

    runs = (lambda run=run: seconds(run) for run in (ours, theirs, whole))
    read, reference, ingested = (median(times) for times in alternate(5, *runs))
    size = files * count * features * 4 / 1e6
    note = f"{files} files of {count:,} x {features} float32: {size / read:,.0f} MB/s, pyarrow {size / reference:,.0f}"
    yield Row("read Parquet fixed-size lists / pyarrow.dataset to NumPy, MB/s", reference / read, None, note=note)
    note = f"with statistics and checksums: {size / ingested:,.0f} MB/s"
    yield Row("ingest Parquet fixed-size lists / pyarrow.dataset to NumPy, MB/s", reference / ingested, 0.8, note=note)
