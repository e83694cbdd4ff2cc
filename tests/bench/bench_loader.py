"""How fast the loader is against memory and its peers, how little it slows a training, and what memory it takes."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from cvae_dist.config import TrainConfig
from cvae_dist.model.tiling import keep_freed_memory
from cvae_dist.store import Location
from cvae_dist.store.layout import ArrayLayout, Layout
from cvae_dist.store.permutation import hold_out
from cvae_dist.store.reader import RowReader, ShardedArray
from cvae_dist.training.loader import Loader
from cvae_dist.training.plan import plan_sampler
from cvae_dist.training.sampler import Share
from tests.bench.table import Row

Array = npt.NDArray[np.generic]
Clock = Callable[[], float]

_BUFFER_BYTES: int = TrainConfig.model_fields["buffer_bytes"].default
_MB = 1e6
_ROWS = {1: 100_000_000, 64: 2_000_000, 768: 300_000}  # of a store that is larger than the buffer, by its features


def rows() -> Iterator[Row]:
    """Measure everything; about ten minutes."""
    with tempfile.TemporaryDirectory() as folder:
        for features, batches in ((64, (256, 1024)), (768, (256, 1024)), (1, (4096,))):
            array = write_array(Path(folder) / f"x{features}", _ROWS[features], features, "<f4")
            for batch_size in batches:
                yield from against_memory(array, batch_size)
                if features > 1:
                    yield against_slices(array, batch_size)
            if features == 64:
                yield from against_peers(array)
                yield against_the_disk(array)
                yield beyond_memory(array)
    yield against_local()
    with tempfile.TemporaryDirectory() as folder:
        yield from memory(Path(folder))


def write_array(
    path: Path | Location, n_rows: int, n_features: int, dtype: str, shard_bytes: int = 16_000_000
) -> ShardedArray:
    """Write random rows shard by shard, as ``ingest`` does."""
    layout = Layout.of((ArrayLayout("x", dtype, ("sample", "feature"), (n_features,)),), shard_bytes=shard_bytes)
    place = path if isinstance(path, Location) else Location.of(str(path))
    array = ShardedArray(place, dtype, (n_features,), n_rows, layout.rows_per_shard, layout.rows_per_chunk)
    random = np.random.default_rng(0)
    for shard in range(layout.shards(n_rows)):
        count = min(layout.rows_per_shard, n_rows - shard * layout.rows_per_shard)
        block = random.standard_normal((count, n_features), np.float32).astype(dtype)
        array.shard(shard).write(*layout.encode("x", block))
    return array


def open_loader(array: ShardedArray, batch_size: int, buffer_bytes: int = _BUFFER_BYTES) -> tuple[Loader, float]:
    """Open a loader whose store is larger than its buffer; also return its variance inflation."""
    reader = RowReader(array)
    _, excluded = hold_out(reader.n_rows, 0.1, 10_000, 0)
    kept = reader.n_rows - len(excluded)
    hint = reader.block_rows_hint
    sampler = plan_sampler(kept, batch_size, array.row_bytes, 0, buffer_bytes, hint, len(excluded))
    loader = Loader(reader, Share(sampler, excluded), buffer_bytes=buffer_bytes)
    assert not loader.resident
    return loader, sampler.variance_inflation


def against_memory(array: ShardedArray, batch_size: int) -> Iterator[Row]:
    """Rows per second of the loader alone, as a part of ``index_select`` of a random permutation in memory."""
    import torch

    torch.set_num_threads(1)
    keep_freed_memory()  # as every training does
    resident = torch.randn(array.rows, array.n_features)
    order = torch.randperm(array.rows)
    out = torch.empty(batch_size, array.n_features)

    def gather() -> Iterator[Array]:
        for first in range(0, array.rows - batch_size, batch_size):
            yield torch.index_select(resident, 0, order[first : first + batch_size], out=out).numpy()

    steps = min(array.rows // batch_size, 5000) - 1
    ratios: dict[Clock, list[float]] = {time.perf_counter: [], time.process_time: []}
    loader, inflation = open_loader(array, batch_size)
    with loader:
        batches = (batch.x.numpy() for batch in loader.batches())
        _rates(batches, array.rows // batch_size, lambda x: None)  # the first epoch brings the rows into memory
        for _ in range(5):
            ours = _rates(batches, steps, lambda x: None)
            limit = _rates(gather(), steps, lambda x: None)
            for ratio, own, other in zip(ratios.values(), ours, limit, strict=True):
                ratio.append(own / other)
    wall, cpu = (median(values) for values in ratios.values())
    name = f"shuffled batches of {batch_size} x {array.n_features} float32 / index_select in memory"
    note = f"CPU ratio {cpu:.2f}, variance inflation {inflation:.3f}"
    yield Row(name, wall, 0.25 if array.n_features == 1 else 0.7, note=note)
    yield Row("... their variance inflation", inflation, 1.1, lower=True)


def against_slices(array: ShardedArray, batch_size: int) -> Row:
    """Training rows per second fed by the loader, as a part of the same step fed contiguous slices."""
    widths = (64, 128, 64) if array.n_features == 64 else (768, 512, 256)
    step = make_step(widths)
    resident = np.random.default_rng(0).standard_normal((array.rows // 4, array.n_features), np.float32)

    def slices() -> Iterator[Array]:
        while True:
            for first in range(0, len(resident) - batch_size, batch_size):
                yield resident[first : first + batch_size]

    steps = max(10, 30_000 // (batch_size * array.n_features // 64))
    loader, _ = open_loader(array, batch_size)
    with loader:
        batches, contiguous = (batch.x.numpy() for batch in loader.batches()), slices()
        _rates(batches, 5, step)
        _rates(contiguous, 5, step)
        pairs = [(_rates(batches, steps, step)[0], _rates(contiguous, steps, step)[0]) for _ in range(12)]
    ratio = median(ours / limit for ours, limit in pairs)
    rate = median(ours for ours, _ in pairs)
    name = f"training {'-'.join(map(str, widths))}, batches of {batch_size}, fed by the loader / by slices"
    return Row(name, ratio, 0.95, note=f"{rate / 1e3:.0f} k rows/s, 1 thread")


def make_step(widths: tuple[int, ...]) -> Callable[[Array], None]:
    """Return one training step of a plain MLP VAE with these widths and 8 latent dimensions."""
    import torch
    from torch import nn

    torch.set_num_threads(1)
    torch.manual_seed(0)

    def layers(*sizes: int) -> nn.Sequential:
        modules = [(nn.Linear(one, other), nn.ReLU()) for one, other in zip(sizes, sizes[1:], strict=False)]
        return nn.Sequential(*[module for pair in modules for module in pair][:-1])

    encoder, decoder = layers(*widths, 16), layers(8, *reversed(widths))
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 1e-3)

    def step(rows: Array) -> None:
        x = torch.from_numpy(rows)
        mean, logvar = encoder(x).chunk(2, dim=1)
        z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        loss = ((decoder(z) - x) ** 2).sum() + 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum()
        optimizer.zero_grad()
        (loss / len(x)).backward()
        optimizer.step()

    return step


def against_peers(
    array: ShardedArray, batch_size: int = 1024, features: int = 64, count: int = 400_000
) -> Iterator[Row]:
    """Rows per second of the loader over those of three other ways to shuffle the same rows."""
    import xarray as xr
    import zarr
    from torch.utils.data import DataLoader, Dataset

    random, batch_size = np.random.default_rng(0), 1024
    with tempfile.TemporaryDirectory() as folder:
        data = random.standard_normal((count, features), np.float32)
        np.save(f"{folder}/rows.npy", data)
        memmap = np.load(f"{folder}/rows.npy", mmap_mode="r")
        group = zarr.open_group(f"{folder}/rows.zarr", mode="w")
        stored = group.create_array("x", shape=data.shape, chunks=(1024, features), dtype="f4", compressors=None,
                                    dimension_names=("sample", "feature"))  # fmt: skip
        stored[:] = data

        class Items(Dataset[Any]):
            def __len__(self) -> int:
                return count

            def __getitem__(self, number: int) -> Any:
                return memmap[number]

        def slices() -> Iterator[Array]:
            while True:  # annbatch: 32 runs of 512 rows by one call of the pipeline, shuffled in memory
                starts = np.sort(random.choice(count // 512, 32, replace=False)) * 512
                block = stored.oindex[(starts[:, np.newaxis] + np.arange(512)).ravel()]
                order = random.permutation(len(block))
                for first in range(0, len(block), batch_size):
                    yield block[order[first : first + batch_size]]

        def windows() -> Iterator[Array]:
            opened = xr.open_zarr(f"{folder}/rows.zarr", consolidated=False)["x"]
            while True:  # xbatcher: batches of neighbours, in random order
                for first in random.permutation(count // batch_size) * batch_size:
                    yield opened.isel(sample=slice(first, first + batch_size)).values

        loader, _ = open_loader(array, batch_size)
        with loader:
            batches = (batch.x.numpy() for batch in loader.batches())
            _rates(batches, array.rows // batch_size, lambda x: None)
            ours = median(_rates(batches, 1000, lambda x: None)[0] for _ in range(5))
        items = iter(DataLoader(Items(), batch_size, shuffle=True))
        for name, peer, steps, bar in (
            ("DataLoader per item over memmap", items, 40, 20.0),
            ("one call of zarr for 32 slices, as annbatch", slices(), 48, 2.5),
            ("xarray windows of Zarr, as xbatcher", windows(), 100, 15.0),
        ):
            other = _rates(peer, steps, lambda x: None)[0]
            yield Row(f"loader / {name}", ours / other, bar, note=f"{ours / 1e6:.1f} and {other / 1e6:.3f} M rows/s")


def against_the_disk(array: ShardedArray, batch_size: int = 256) -> Row:
    """An epoch from a cold cache, as a part of a sequential read of the same files."""
    ratios = [_cold_epoch(array, batch_size) / _cold_read(array) for _ in range(5)]
    note = "of each other: " + " ".join(f"{ratio:.2f}" for ratio in ratios)
    return Row("cold epoch / cold sequential read, bytes/s", median(ratios), 0.8, note=note)


def beyond_memory(array: ShardedArray) -> Row:
    """The same where the process may have a third of the memory that the store takes (a cgroup; root only)."""
    name = "epoch of a store three times the memory / sequential read"
    group = Path("/sys/fs/cgroup/memory/cvae-dist-bench")
    try:
        group.mkdir(exist_ok=True)
        (group / "memory.limit_in_bytes").write_text(str(2 * array.rows * array.row_bytes // 3 + 300_000_000))
    except OSError as error:
        return Row(name, float("nan"), None, note=f"no cgroup of our own here: {error}")
    program = [sys.executable, "-m", __name__, "beyond", array.location.path, str(array.rows), str(group)]
    ratio = float(subprocess.run(program, check=True, capture_output=True).stdout)
    return Row(name, ratio, 0.6, note="a limit of two thirds of the store and 300 MB for Python")


def against_local(count: int = 1_500_000, batch_size: int = 256) -> Row:
    """Training rows per second from SeaweedFS, as a part of those from the disk."""
    from tests.servers import serve

    served = serve("weed")
    remote = Location.of(served.url, served.options) / "loader"
    step = make_step((64, 256, 128))
    with tempfile.TemporaryDirectory() as folder:
        arrays = write_array(remote, count, 64, "<f4", 64_000_000), write_array(Path(folder) / "x", count, 64, "<f4")
        loaders, inflations = zip(*(open_loader(array, batch_size) for array in arrays), strict=True)
        feeds = [(batch.x.numpy() for batch in loader.batches()) for loader in loaders]
        for feed in feeds:
            _rates(feed, 10, step)
        pairs = [[_rates(feed, 500, step)[0] for feed in feeds] for _ in range(6)]
        for loader in loaders:
            loader.close()
    remote.delete()
    note = f"{pairs[0][0] / 1e3:.0f} k rows/s, 64 features, MLP VAE 256-128, variance inflation {inflations[0]:.3f}"
    return Row("training from SeaweedFS / from the disk", median(ours / other for ours, other in pairs), 0.9, note=note)


def memory(folder: Path) -> Iterator[Row]:
    """Anonymous memory that the loader takes beyond its buffers, in MB, for a small and a large store."""
    for count in (100_000, 100_000_000):
        array = write_array(folder / f"memory{count}", count, 8, "<f2")
        program = [sys.executable, "-m", __name__, "memory", array.location.path, str(count)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        printed = subprocess.run(program, env=environment, check=True, capture_output=True).stdout
        measured = json.loads(printed)
        note = f"{count:.0e} rows of 8 float16, buffers {measured['buffers']:.1f} MB"
        yield Row("loader beyond its buffers, anonymous MB", measured["beyond"], 32.0, note=note, lower=True)


def measure_memory(path: str, count: int) -> dict[str, float]:
    """Read some epochs or 3000 batches; return the memory taken and that of the loader's buffers, in MB."""
    array = _described(path, count, 8, "<f2")
    before, peak = _anonymous(), 0.0
    loader, _ = open_loader(array, 1024, min(_BUFFER_BYTES, count * 16 // 2))
    with loader:
        for number, batch in enumerate(loader.batches()):
            if number % 10 == 0:
                peak = max(peak, _anonymous())
            if batch.epoch > 1 or number == 3000:
                break
        buffers = loader.buffer_bytes / _MB
    return {"beyond": peak - before - buffers, "buffers": buffers}


def measure_beyond(path: str, count: int, group: str) -> float:
    """Return the ratio of an epoch and a sequential read, under the limit of a cgroup."""
    (Path(group) / "cgroup.procs").write_text(str(os.getpid()))
    array = _described(path, count, 64, "<f4")
    return median(_cold_epoch(array, 256) / _cold_read(array) for _ in range(3))


def _described(path: str, count: int, features: int, dtype: str) -> ShardedArray:
    layout = Layout.of((ArrayLayout("x", dtype, ("sample", "feature"), (features,)),))
    return ShardedArray(Location.of(path), dtype, (features,), count, layout.rows_per_shard, layout.rows_per_chunk)


def _cold_epoch(array: ShardedArray, batch_size: int) -> float:
    """Return bytes per second of the first epoch of a process."""
    _forget(array)
    began = time.perf_counter()
    loader, _ = open_loader(array, batch_size)
    with loader:
        for batch in loader.batches():
            if batch.epoch:
                break
    return array.rows * array.row_bytes / (time.perf_counter() - began)


def _cold_read(array: ShardedArray) -> float:
    """Return bytes per second of reading all shards in order, into one buffer."""
    _forget(array)
    buffer, total, began = bytearray(4_000_000), 0, time.perf_counter()
    for path in _files(array):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total / (time.perf_counter() - began)


def _forget(array: ShardedArray) -> None:
    """Put the files of an array out of the system's cache; nothing may have them mapped."""
    for path in _files(array):
        with path.open("rb") as file:
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _files(array: ShardedArray) -> list[Path]:
    shards = -(-array.rows // array.rows_per_shard)
    return [Path(array.shard(number).path) for number in range(shards)]


def _anonymous() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024 / _MB


def _rates(batches: Iterator[Any], steps: int, step: Callable[[Array], None]) -> tuple[float, float]:
    """Return rows per second of the clock and of the processor."""
    count, wall, cpu = 0, time.perf_counter(), time.process_time()
    for _ in range(steps):
        x = next(batches)
        step(x)
        count += len(x)
    return count / (time.perf_counter() - wall), count / (time.process_time() - cpu)


if __name__ == "__main__":
    if sys.argv[1] == "memory":
        print(json.dumps(measure_memory(sys.argv[2], int(sys.argv[3]))))
    else:
        print(measure_beyond(sys.argv[2], int(sys.argv[3]), sys.argv[4]))
