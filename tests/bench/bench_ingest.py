"""Ingest against the operating system: ``cat`` of many small files, and a raw copy of large ones."""

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time

import numpy as np

from cvae_dist.verbs.ingest import ingest
from tests.bench.table import Row, alternate, median, seconds

_COPY_BYTES = 4_000_000


def rows() -> Iterator[Row]:
    """Measure ingest of one-vector files and of files of many rows."""
    with TemporaryDirectory() as folder:
        yield _one_vector_files(Path(folder))
    with TemporaryDirectory() as folder:
        yield _many_row_files(Path(folder))


def _one_vector_files(folder: Path, count: int = 100_000, features: int = 784) -> Row:
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

    ingested, read = (median(values) for values in alternate(3, ours, cat))
    note = f"{count:,} files of {row.nbytes} B: {count / ingested:,.0f} files per CPU second, cat {count / read:,.0f}"
    return Row("ingest one-vector files / cat, per CPU second", read / ingested, 1.0, note=note)


def _many_row_files(folder: Path, files: int = 50, count: int = 1_000_000, features: int = 8) -> Row:
    source = folder / "src"
    source.mkdir()
    block = np.random.default_rng(0).normal(size=(count, features)).astype(np.float16)
    for number in range(files):
        np.save(source / f"{number:03}.npy", block)

    def ours() -> float:
        shutil.rmtree(folder / "rows.zarr", ignore_errors=True)
        return seconds(lambda: ingest(source, folder / "rows.zarr"))

    def copy() -> float:
        shutil.rmtree(folder / "copy", ignore_errors=True)
        (folder / "copy").mkdir()
        return seconds(lambda: [_copy(path, folder / "copy" / path.name) for path in sorted(source.iterdir())])

    ingested, copied = (median(values) for values in alternate(5, ours, copy))
    size = block.nbytes * files / 1e9
    note = (
        f"{files} files of {count:,} x {features} float16: {size / ingested:.2f} GB/s with statistics and checksums, "
    )
    return Row(
        "ingest many-row files / raw copy",
        copied / ingested,
        0.5,
        0.9,
        f"{note}copy {size / copied:.2f} GB/s",
    )


def _copy(source: Path, target: Path) -> None:
    """Copy through a reused buffer, as fast as plain system calls go."""
    buffer = memoryview(bytearray(_COPY_BYTES))
    with open(source, "rb", buffering=0) as reader, open(target, "wb", buffering=0) as writer:
        while count := reader.readinto(buffer):
            os.write(writer.fileno(), buffer[:count])


def _children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
