"""The store on an object store, and at 200,000 shards: requests, seconds, bytes beside the rows."""

import contextlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

import cvae_dist
from cvae_dist.config import ModelConfig
from cvae_dist.events import Event
from cvae_dist.model.directory import save_model
from cvae_dist.model.vae import VAE
from cvae_dist.store import Layout, Location, Moments
from tests.bench.counting import CountingProxy
from tests.bench.table import Row, alternate, median, seconds
from tests.servers import Served, serve, server

_REMOTE_PACK = 16  # shards of 64 MB in a pack of 1 GB: tiny shards in packs of that size have no fewer requests
_LOCAL_PACK = 63


def rows() -> Iterator[Row]:
    """Measure everything."""
    yield from _requests(2_000)
    yield from _many_tiny_shards(20_000)
    yield from _planned_without_data()
    yield from _ledger_bytes()
    yield from _upload()
    yield from _embed()


class _Bucket:
    """A place in SeaweedFS behind a proxy that counts."""

    def __init__(self) -> None:
        self._served: Served = serve("weed")
        self.url = self._served.url
        self._proxy = CountingProxy(str(self._served.options["endpoint_url"]))
        self.options = {**self._served.options, "endpoint_url": self._proxy.endpoint}

    def count(self, run: Callable[[], object]) -> int:
        """Return the requests that ``run`` sends."""
        self._proxy.take()
        run()
        return sum(self._proxy.take().values())

    @property
    def uncounted(self) -> dict[str, Any]:
        return self._served.options


class _Cost(NamedTuple):
    """What a run took. The server shares the cores with its client, which no store elsewhere does."""

    seconds: float
    cpu: float
    server_cpu: float

    @classmethod
    def of(cls, run: Callable[[], object]) -> "_Cost":
        before, server_before = time.process_time(), _server_cpu()
        took = seconds(run)
        return cls(took, time.process_time() - before, _server_cpu() - server_before)

    @classmethod
    def median(cls, costs: Sequence["_Cost"]) -> "_Cost":
        return cls(*map(median, zip(*costs, strict=True)))

    def __str__(self) -> str:
        return f"{self.cpu:.1f} CPU s + {self.server_cpu:.1f} of the server"


def _server_cpu() -> float:
    """Return the CPU seconds of SeaweedFS so far (Linux, proc_pid_stat(5))."""
    figures = Path(f"/proc/{server('weed').process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(figures[11]) + int(figures[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def _grid(size: int, shards_per_pack: int) -> Iterator[None]:
    real = Layout.of.__func__  # type: ignore[attr-defined]

    def of(cls: type[Layout], arrays: Any, rows_per_shard: int | None = None, **options: Any) -> Layout:
        layout: Layout = real(cls, arrays, rows_per_shard or size, **options)
        return layout

    with (
        mock.patch.object(Layout, "of", classmethod(of)),
        mock.patch.object(Layout, "shards_per_pack", shards_per_pack),
    ):
        yield


def _source(folder: Path, count: int, features: int) -> Path:
    folder.mkdir(parents=True)
    np.save(folder / "rows.npy", np.random.default_rng(0).normal(size=(count, features)).astype(np.float32))
    return folder


def _requests(shards: int) -> Iterator[Row]:
    bucket = _Bucket()
    with TemporaryDirectory() as folder, _grid(4, _REMOTE_PACK):
        source, store = _source(Path(folder) / "src", 4 * shards, 8), f"{bucket.url}/rows"
        ingest = lambda: cvae_dist.ingest(source, store, storage_options=bucket.options)  # noqa: E731
        verify = lambda: cvae_dist.verify(store, storage_options=bucket.options)  # noqa: E731
        for name, run, bar in (("ingest", ingest, 2.3), ("no-op re-run", ingest, 0.01), ("verify", verify, 1.1)):
            yield Row(
                f"requests per shard on S3: {name}, {shards:,} shards", bucket.count(run) / shards, bar, lower=True
            )


def _many_tiny_shards(shards: int) -> Iterator[Row]:
    bucket = _Bucket()
    with TemporaryDirectory() as folder, _grid(4, _REMOTE_PACK):
        source, store = _source(Path(folder) / "src", 4 * shards, 8), f"{bucket.url}/rows"
        model = str(Path(folder) / "model")
        save_model(
            model, VAE.of(ModelConfig(cells_encoder=(8,), likelihood="gaussian"), Moments.of(np.eye(8)), "<f4"), {}
        )
        marks = _Marks()
        cvae_dist.ingest(source, store, storage_options=bucket.uncounted, on_event=marks)
        name = f"seconds on S3, {shards:,} tiny shards: "
        yield Row(name + "plan + publish", marks.planned + marks.published, 30, lower=True)
        again = seconds(lambda: cvae_dist.ingest(source, store, storage_options=bucket.uncounted))
        yield Row(name + "no-op re-run", again, 10, lower=True)
        marks = _Marks(stop=True)
        with contextlib.suppress(_Stopped):
            cvae_dist.embed(store, model, f"{bucket.url}/z", storage_options=bucket.uncounted, on_event=marks)
        yield Row(name + "embed's plan", marks.planned, 15, lower=True)
        told = seconds(lambda: cvae_dist.info(store, storage_options=bucket.uncounted))
        yield Row(name + "info", told, 2, lower=True)


class _Stopped(Exception):
    pass


class _Marks:
    """Listens to a verb: how long it planned, and how long it published. May stop it once it has planned."""

    def __init__(self, stop: bool = False) -> None:
        self._began = self._last = time.perf_counter()
        self._stop = stop
        self.planned = self.published = 0.0

    def __call__(self, event: Event) -> None:
        now = time.perf_counter()
        if event.kind == "start":
            self.planned = now - self._began
            if self._stop:
                raise _Stopped
        if event.kind == "done":
            self.published = now - self._last
        self._last = now


def _planned_without_data() -> Iterator[Row]:
    """Measure the driver of 200,000 shards, 3.2 TB, in a process of its own; the shards' files are empty."""
    plan, sent, resume, peak, objects, dask, opened, _ = _planned()
    note = f"plan {plan:.1f}, resume and publish {resume:.1f}; besides {sent:.1f} to send tasks and take their records"
    name = "200,000 shards x 768 float32, local, without data: "
    yield Row(name + "CPU s", plan + resume, 20, note=note, lower=True)
    yield Row(name + "peak MB", peak, 300, lower=True)
    yield Row(name + "objects beside shards", objects, 500, lower=True)
    note = f"xr.open_zarr(chunks=None); {dask:.1f} s where Dask lists the 3.2 million chunks"
    yield Row(name + "seconds to open", opened, 1, lower=True, note=note)


def _planned(*arguments: object) -> list[float]:
    """Run the driver of an ingest without data in a process of its own, and return what it prints."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.bench.planned", folder, *map(str, arguments)]
        made = subprocess.run(command, check=True, capture_output=True, text=True)
    return [float(figure) for figure in made.stdout.split()]


def _ledger_bytes() -> Iterator[Row]:
    for name, features, dtype, shards in (
        ("224x224x3 uint8", 150_528, "|u1", 200),
        ("16 MB float32", 4_000_000, "<f4", 500),
    ):
        figures = _planned(features, dtype, shards)
        yield Row(f"ledger bytes / data, rows of {name}", figures[-1], 0.05, lower=True)


def _upload(count: int = 200_000, features: int = 768) -> Iterator[Row]:
    """Compare ingest with an upload of the same objects by the same client, as many at a time."""
    import obstore

    from cvae_dist.store import objects

    bucket = _Bucket()
    with TemporaryDirectory() as folder:
        source = _source(Path(folder) / "src", count, features)
        data = np.load(source / "rows.npy", mmap_mode="r")
        per_shard = 64_000_000 // data[0].nbytes
        parts = [data[first : first + per_shard] for first in range(0, count, per_shard)]
        storage = Location.of(bucket.url, bucket.uncounted).storage
        client = objects._client(storage)

        runs = itertools.count()  # no run replaces what an earlier one wrote

        def plain() -> _Cost:
            run = next(runs)

            def put(number: int) -> None:
                obstore.put(client, f"plain{run}/{number}", parts[number].tobytes(), use_multipart=False)

            with ThreadPoolExecutor(6) as pool:
                return _Cost.of(lambda: list(pool.map(put, range(len(parts)))))

        def ours() -> _Cost:
            store = f"{bucket.url}/rows{next(runs)}"
            return _Cost.of(lambda: cvae_dist.ingest(source, store, storage_options=bucket.uncounted))

        plain()  # the first one begins with an empty server
        ingested, copied = map(_Cost.median, alternate(5, ours, plain))
    speeds = [data.nbytes / 1e6 / cost.seconds for cost in (ingested, copied)]
    note = f"{speeds[0]:,.0f} MB/s ({ingested}), plain upload {speeds[1]:,.0f} MB/s ({copied})"
    ratio = copied.seconds / ingested.seconds
    yield Row("ingest of local float32 to S3 / plain parallel upload, MB/s", ratio, 0.8, note=note)


def _embed(count: int = 600_000, features: int = 768) -> Iterator[Row]:
    bucket = _Bucket()
    with TemporaryDirectory() as folder:
        few = _source(Path(folder) / "few", 20_000, features)
        model = f"{folder}/model"
        cvae_dist.ingest(few, f"{folder}/few.zarr")
        cvae_dist.train(f"{folder}/few.zarr", model, num_steps=1)  # of the default size
        source = _source(Path(folder) / "src", count, features)
        cvae_dist.ingest(source, f"{folder}/rows")
        cvae_dist.ingest(source, f"{bucket.url}/rows", storage_options=bucket.uncounted)

        runs = itertools.count()

        def local() -> _Cost:
            return _Cost.of(lambda: cvae_dist.embed(f"{folder}/rows", model, f"{folder}/z{next(runs)}"))

        def remote() -> _Cost:
            rows, latents = f"{bucket.url}/rows", f"{bucket.url}/z{next(runs)}"
            return _Cost.of(lambda: cvae_dist.embed(rows, model, latents, storage_options=bucket.uncounted))

        def beside() -> _Cost:
            """Embed on the disk while the same client fetches the same bytes, and throws them away."""
            with ThreadPoolExecutor(3) as pool:
                run = [
                    pool.submit(_fetch, Location.of(f"{bucket.url}/rows/x", bucket.uncounted), half) for half in (0, 1)
                ]
                return _Cost.of(lambda: [local(), *(one.result() for one in run)])

        near, far, limit = map(_Cost.median, alternate(5, local, remote, beside))
    note = f"{count / far.seconds:,.0f} rows/s ({far}), local {count / near.seconds:,.0f} ({near.cpu:.1f} CPU s)"
    name = "embed S3 -> S3 of 768 float32 / local -> local"
    yield Row(name, near.seconds / far.seconds, 0.8, note=note)
    note = "the server shares the cores with its client"
    yield Row(
        "... local beside a bare download of the rows / local alone", near.seconds / limit.seconds, None, note=note
    )


def _fetch(place: Location, half: int) -> None:
    """Fetch every second object below a place by the client itself, 16 MB at a time."""
    import obstore

    from cvae_dist.store import objects

    client = objects._client(place.storage)
    for entry in list(place.list())[half::2]:
        for start in range(0, entry.size, 16_000_000):
            end = min(start + 16_000_000, entry.size)
            obstore.get_range(client, f"{place.path}/{entry.name}", start=start, end=end)
