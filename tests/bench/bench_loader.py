"""How fast the loader is against memory, how little it slows a training, and how much memory it takes."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt

from cvae_dist.store import Location
from cvae_dist.store.layout import ArrayLayout, Layout
from cvae_dist.store.permutation import pick_rows
from cvae_dist.store.reader import RowReader, ShardedArray
from cvae_dist.training.loader import Loader
from cvae_dist.training.plan import plan_sampler
from cvae_dist.training.sampler import Share
from tests.bench.table import Row

Array = npt.NDArray[np.generic]

_BATCH = 1024
_FEATURES = 64
_ROWS = 2_000_000
_BUFFER_BYTES = 96_000_000  # the default; the array is 512 MB
_MB = 1e6


def rows() -> Iterator[Row]:
    """Measure everything; about a minute."""
    with tempfile.TemporaryDirectory() as folder:
        array = write_array(Path(folder) / "x", _ROWS, _FEATURES, "<f4")
        yield loader_against_memory(array)
        yield training_against_memory(array)
        yield from memory(Path(folder))


def write_array(path: Path, n_rows: int, n_features: int, dtype: str) -> ShardedArray:
    """Write random rows shard by shard, as ``ingest`` does."""
    layout = Layout.of((ArrayLayout("x", dtype, ("sample", "feature"), (n_features,)),))
    array = ShardedArray(
        Location.of(str(path)), dtype, (n_features,), n_rows, layout.rows_per_shard, layout.rows_per_chunk
    )
    random = np.random.default_rng(0)
    for shard in range(layout.shards(n_rows)):
        count = min(layout.rows_per_shard, n_rows - shard * layout.rows_per_shard)
        block = random.standard_normal((count, n_features), np.float32).astype(dtype)
        array.shard(shard).write(*layout.encode("x", block))
    return array


def open_loader(array: ShardedArray, buffer_bytes: int = _BUFFER_BYTES) -> Loader:
    """Open a loader that streams: the buffer is much smaller than the array."""
    reader = RowReader(array)
    excluded = pick_rows(reader.n_rows, 10_000, 0)
    kept = reader.n_rows - len(excluded)
    sampler = plan_sampler(kept, _BATCH, array.row_bytes, 0, buffer_bytes, reader.block_rows_hint, len(excluded))
    loader = Loader(reader, Share(sampler, excluded), buffer_bytes=buffer_bytes)
    assert not loader.resident
    assert sampler.variance_inflation <= 1.1
    return loader


def loader_against_memory(array: ShardedArray) -> Row:
    """Rows per second of the loader alone, as a part of a random gather from memory."""
    resident = np.random.default_rng(0).standard_normal((_ROWS, _FEATURES), np.float32)
    order = np.random.default_rng(0).permutation(_ROWS)
    out = np.empty((_BATCH, _FEATURES), np.float32)

    def gather() -> Iterator[Array]:
        for first in range(0, _ROWS - _BATCH, _BATCH):
            np.take(resident, order[first : first + _BATCH], axis=0, out=out, mode="clip")
            yield out

    with open_loader(array) as loader:
        batches = (batch.x for batch in loader.batches())
        ours, limit = [], []
        for _ in range(3):
            ours.append(_rate(batches, _ROWS // _BATCH, lambda x: None))
            limit.append(_rate(gather(), _ROWS // _BATCH - 1, lambda x: None))
    note = f"{median(ours) / 1e6:.1f} of {median(limit) / 1e6:.1f} M rows/s, 64 float32, batches of 1024"
    return Row("loader alone / gather in memory", median(ours) / median(limit), 0.2, note=note)


def training_against_memory(array: ShardedArray) -> Row:
    """Training rows per second fed by the loader, as a part of the same step fed contiguous slices."""
    step = make_step()
    resident = np.random.default_rng(0).standard_normal((_ROWS // 4, _FEATURES), np.float32)

    def slices() -> Iterator[Array]:
        while True:
            for first in range(0, len(resident) - _BATCH, _BATCH):
                yield resident[first : first + _BATCH]

    with open_loader(array) as loader:
        batches, contiguous = (batch.x for batch in loader.batches()), slices()
        _rate(batches, 50, step)
        _rate(contiguous, 50, step)
        pairs = [(_rate(batches, 150, step), _rate(contiguous, 150, step)) for _ in range(12)]
    ratio = median(ours / limit for ours, limit in pairs)
    rate = median(ours for ours, _ in pairs)
    note = f"{rate / 1e3:.0f} k rows/s, MLP VAE, batches of 1024, 1 thread"
    return Row("training fed by the loader / by memory", ratio, 0.9, 0.95, note)


def make_step() -> Callable[[Array], None]:
    """Return one training step of a plain MLP VAE 64-128-64-8."""
    import torch
    from torch import nn

    torch.set_num_threads(1)
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 16))
    decoder = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
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


def memory(folder: Path) -> Iterator[Row]:
    """Anonymous memory that the loader takes beyond its buffers, in MB, for a small and a large store."""
    for count in (100_000, 10_000_000):
        array = write_array(folder / f"memory{count}", count, 8, "<f2")
        program = [sys.executable, "-m", __name__, array.location.path, str(count)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        printed = subprocess.run(program, env=environment, check=True, capture_output=True).stdout
        measured = json.loads(printed)
        note = f"{count:.0e} rows of 8 float16, buffers {measured['buffers']:.1f} MB"
        yield Row("loader beyond its buffers, anonymous MB", measured["beyond"], 32.0, note=note, lower=True)


def measure_memory(path: str, count: int) -> dict[str, float]:
    """Read some epochs or 3000 batches; return the memory taken and that of the loader's buffers, in MB."""
    layout = Layout.of((ArrayLayout("x", "<f2", ("sample", "feature"), (8,)),))
    array = ShardedArray(Location.of(path), "<f2", (8,), count, layout.rows_per_shard, layout.rows_per_chunk)
    before, peak = _anonymous(), 0.0
    with open_loader(array, min(_BUFFER_BYTES, count * 16 // 2)) as loader:
        for number, batch in enumerate(loader.batches()):
            if number % 10 == 0:
                peak = max(peak, _anonymous())
            if batch.epoch > 1 or number == 3000:
                break
        buffers = loader.buffer_bytes / _MB
    return {"beyond": peak - before - buffers, "buffers": buffers}


def _anonymous() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024 / _MB


def _rate(batches: Iterator[Array], steps: int, step: Callable[[Array], None]) -> float:
    count, start = 0, time.perf_counter()
    for _ in range(steps):
        x = next(batches)
        step(x)
        count += len(x)
    return count / (time.perf_counter() - start)


if __name__ == "__main__":
    print(json.dumps(measure_memory(sys.argv[1], int(sys.argv[2]))))
