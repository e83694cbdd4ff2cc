"""Rows from an object store: many small objects against s3fs, large ones against embedding-reader."""

import io
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

import numpy as np

from cvae_dist.errors import InvalidInput
from cvae_dist.store import Location, RowStore
from cvae_dist.verbs.ingest import ingest
from tests.bench.table import Row, alternate, median, seconds
from tests.servers import Served, serve


def rows() -> Iterator[Row]:
    """Measure ingest from SeaweedFS, on the same machine, into a local store."""
    served = serve("weed")
    os.environ.update(served.environment)  # embedding-reader takes no options
    with TemporaryDirectory() as folder:
        yield from _small(served, Path(folder))
    with TemporaryDirectory() as folder:
        yield from _large(served, Path(folder))
        yield _odd(served, Path(folder))


def _small(served: Served, folder: Path, count: int = 20_000, more: int = 80_000) -> Iterator[Row]:
    import s3fs

    row = _npy(np.random.default_rng(0).normal(size=784).astype(np.float32))
    names = [f"small/{number // 1000:03}/{number:06}.npy" for number in range(count + more)]
    _put(served, {name: row for name in names[:count]})

    def ours() -> float:
        shutil.rmtree(folder / "rows.zarr", ignore_errors=True)
        return seconds(lambda: _ingest(served, "small", folder / "rows.zarr"))

    def theirs() -> float:
        # their default is a HEAD and a GET each, and the event loop of one thread
        files = s3fs.S3FileSystem(**served.options, skip_instance_cache=True)
        some = [f"{served.url.removeprefix('s3://')}/{name}" for name in names[: count // 10]]
        return seconds(lambda: files.cat(some)) * count / len(some)

    ingested, read = (median(times) for times in alternate(3, ours, theirs))
    note = f"{count:,} objects: {count / ingested:,.0f} objects/s, s3fs {count / read:,.0f} (a tenth of them)"
    yield Row("one-vector objects / s3fs cat, objects/s", read / ingested, 5.0, note=note)
    _put(served, {name: row for name in names[count:]})
    _ingest(served, "small", folder / "rows.zarr")
    again = seconds(lambda: _ingest(served, "small", folder / "rows.zarr"))
    yield Row(f"again, nothing new in {len(names):,} objects: s", again, 20.0, lower=True)


def _large(served: Served, folder: Path, files: int = 6, count: int = 100_000, features: int = 512) -> Iterator[Row]:
    block = np.random.default_rng(1).normal(size=(count, features)).astype(np.float16)
    _put(served, {f"large/{number}.npy": _npy(block) for number in range(files)})

    def ours() -> tuple[float, float]:
        shutil.rmtree(folder / "rows.zarr", ignore_errors=True)
        cpu = process_time()
        return seconds(lambda: _ingest(served, "large", folder / "rows.zarr")), process_time() - cpu

    def theirs() -> tuple[float, float]:
        cpu = process_time()
        return seconds(lambda: _read_embeddings(served, "large")), process_time() - cpu

    for _ in range(2):  # imports, and after a gigabyte the compiled sums: 5 CPU s for each process
        ours()
    try:
        _read_embeddings(served, "large", most=1)
    except ImportError as error:
        yield Row("large .npy objects / embedding-reader, MB/s", float("nan"), 2.5, note=f"not installed: {error}")
        return
    mine, other = alternate(3, ours, theirs)
    size = files * block.nbytes / 1e9
    (wall, cpu), (their_wall, their_cpu) = (
        [median(column) for column in zip(*runs, strict=True)] for runs in (mine, other)
    )
    note = (
        f"{size / wall * 1e3:,.0f} MB/s with statistics, checksums and a store; theirs {size / their_wall * 1e3:,.0f}"
    )
    yield Row("large .npy objects / embedding-reader, MB/s", their_wall / wall, 2.5, note=note)
    note = f"{cpu / size:.2f} CPU s/GB, theirs {their_cpu / size:.2f}"
    yield Row("large .npy objects / embedding-reader, CPU per GB", cpu / their_cpu, 0.25, note=note, lower=True)


def _odd(served: Served, folder: Path) -> Row:
    """Count the kinds of .npy files that are read as NumPy reads them, or refused by name."""
    values = np.arange(24, dtype=np.float32).reshape(6, 4)
    kinds = {
        "fortran": [np.asfortranarray(values)], "mixed": [values.astype(np.float16), values], "1-D": [values[:, 0]],
        "3-D": [values.reshape(6, 2, 2)], "int": [values.astype(np.int32)], "big-endian": [values.astype(">f4")],
    }  # fmt: skip
    right = []
    for name, arrays in kinds.items():
        _put(served, {f"odd/{name}/{number}.npy": _npy(array) for number, array in enumerate(arrays)})
        try:
            _ingest(served, f"odd/{name}", folder / name, rows_per_file="many")
            found = RowStore.open(str(folder / name)).read("x")
            right += [name] if np.array_equal(found, np.concatenate(arrays).reshape(len(found), -1)) else []
        except InvalidInput as refusal:
            right += [name] if name == "mixed" and "1.npy" in str(refusal) else []
    return Row("kinds of .npy that are right, of 6", len(right), 6, note=", ".join(right))


def _read_embeddings(served: Served, folder: str, most: int | None = None) -> None:
    from embedding_reader import EmbeddingReader

    reader = EmbeddingReader(f"{served.url}/{folder}", file_format="npy")
    for _ in reader(batch_size=65_536, start=0, end=most, show_progress=False):
        pass


def _ingest(served: Served, folder: str, store: Path, **options: Any) -> None:
    ingest(f"{served.url}/{folder}", store, source_storage_options=served.options, **options)


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _put(served: Served, objects: dict[str, bytes]) -> None:
    root = Location.of(served.url, served.options)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: (root / name).write(objects[name]), objects))
