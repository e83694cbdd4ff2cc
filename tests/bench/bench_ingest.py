"""Ingest against the operating system: ``cat`` of many small files, and a raw copy of large ones."""

import importlib.util
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time

import numpy as np

from cvae_dist.store.layout import Block
from cvae_dist.verbs.ingest import ingest
from tests.bench.table import Row, alternate, median, seconds

_COPY_BYTES = 4_000_000


def rows() -> Iterator[Row]:
    """Measure ingest of one-vector files and of files of many rows."""
    with TemporaryDirectory() as folder:
        yield from _one_vector_files(Path(folder))
    with_numba = importlib.util.find_spec("numba") is not None
    random = np.random.default_rng(0)
    sparse = random.integers(0, 256, (100_000, 784), np.uint8) * (random.random((100_000, 784)) < 0.2)
    for name, block, files, bar in (
        ("1M x 8 float16", random.normal(size=(1_000_000, 8)).astype(np.float16), 50, 0.9 if with_numba else 0.7),
        ("float32 x 64", random.normal(size=(100_000, 64)).astype(np.float32), 30, 0.85),
        ("float32 x 768", random.normal(size=(10_000, 768)).astype(np.float32), 25, 0.85),
        ("uint8 x 784, noise", random.integers(0, 256, (100_000, 784), np.uint8), 10, 0.85),
        ("uint8 x 784, four of five are 0", sparse.astype(np.uint8), 10, None),
    ):
        with TemporaryDirectory() as folder:
            yield _many_row_files(Path(folder), name, block, files, bar)


def _one_vector_files(folder: Path, count: int = 100_000, features: int = 784) -> Iterator[Row]:
    row = np.random.default_rng(0).normal(size=features).astype(np.float32)
    for number in range(count):
        if number % 1000 == 0:
            (folder / f"src/{number // 1000:03}").mkdir(parents=True)
        np.save(folder / f"src/{number // 1000:03}/{number:06}.npy", row)

    def ours() -> float:
        shutil.rmtree(folder / "rows.zarr", ignore_errors=True)
        return seconds(lambda: ingest(folder / "src", folder / "rows.zarr"), process_time)

    def cat() -> float:
        command = f"find {folder / 'src'} -name '*.npy' -print0 | xargs -0 cat > /dev/null"
        before = _children()
        subprocess.run(command, shell=True, check=True)
        return _children() - before

    def load() -> float:
        out = np.empty((count, features), np.float32)

        def loop() -> None:
            for number, path in enumerate(sorted((folder / "src").rglob("*.npy"))):
                out[number] = np.load(path)

        return seconds(loop, process_time)

    ingested, read, loaded = (median(values) for values in alternate(3, ours, cat, load))
    note = f"{count:,} files of {row.nbytes} B: {count / ingested:,.0f} files per CPU second"
    yield Row("one-vector files / cat, per CPU second", read / ingested, 1.0, note=f"{note}, cat {count / read:,.0f}")
    note = f"np.load {count / loaded:,.0f} files per CPU second"
    yield Row("one-vector files / np.load in a loop, per CPU second", loaded / ingested, 7.0, note=note)
    again = seconds(lambda: ingest(folder / "src", folder / "rows.zarr"))
    yield Row(f"again, nothing new in {count:,} files: s", again, 5.0, lower=True)


def _many_row_files(folder: Path, name: str, block: Block, files: int, bar: float | None) -> Row:
    source = folder / "src"
    source.mkdir()
    for number in range(files):
        np.save(source / f"{number:03}.npy", block)

    def ours() -> tuple[float, float]:
        shutil.rmtree(folder / "rows.zarr", ignore_errors=True)
        cpu = process_time()
        return seconds(lambda: ingest(source, folder / "rows.zarr")), process_time() - cpu

    def copy() -> float:
        shutil.rmtree(folder / "copy", ignore_errors=True)
        (folder / "copy").mkdir()
        return seconds(lambda: [_copy(path, folder / "copy" / path.name) for path in sorted(source.iterdir())])

    for _ in range(2):
        ours()  # code is compiled after a gigabyte
    ingested, copied = alternate(5, ours, copy)
    wall, cpu, limit = median(time for time, _ in ingested), median(time for _, time in ingested), median(copied)
    size = block.nbytes * files / 1e9
    note = f"{size:.2f} GB, {size / wall:.2f} GB/s, {cpu / size:.2f} CPU s/GB; copy {size / limit:.2f} GB/s"
    return Row(f"block files, {name} / raw copy", limit / wall, bar, note=note)


def _copy(source: Path, target: Path) -> None:
    """Copy through a reused buffer, as fast as plain system calls go."""
    buffer = memoryview(bytearray(_COPY_BYTES))
    with open(source, "rb", buffering=0) as reader, open(target, "wb", buffering=0) as writer:
        while count := reader.readinto(buffer):
            os.write(writer.fileno(), buffer[:count])


def _children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
