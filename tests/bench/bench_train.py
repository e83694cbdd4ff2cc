"""What several ranks gain and cost: speed of two, seconds of a restart, and quality with ranks and large batches."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from sklearn.neighbors import KNeighborsClassifier

import cvae_dist
from cvae_dist.events import Event
from cvae_dist.model.directory import load_model
from tests.bench.model.data import mnist
from tests.bench.table import Row, alternate, median

_FEATURES, _ROWS = 768, 100_000
_WIDE = {"dim_latent": 16, "cells_encoder": (512, 256), "precision": "float32"}
_ROWS_TRAINED = 300_000
_KILLED_AFTER = 200  # steps
_CLOSE = 0.005


def rows() -> Iterator[Row]:
    """Measure everything; about half an hour, most of it for the large batches."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "src").mkdir()
        np.save(f"{folder}/src/rows.npy", np.random.default_rng(0).normal(size=(_ROWS, _FEATURES)).astype(np.float32))
        cvae_dist.ingest(f"{folder}/src", f"{folder}/rows.zarr")
        for batch_size in (1024, 4096):
            yield _two_ranks(folder, batch_size)
        yield _restart(folder)
    yield from _quality()


def _two_ranks(folder: str, batch_size: int) -> Row:
    """Compare two ranks, each on a core, with one on one of these."""
    one, two = sorted(os.sched_getaffinity(0))[:2]
    runs = (
        lambda: _rate(folder, "local:2", batch_size, {one, two}),
        lambda: _rate(folder, "auto", batch_size, {one}),
    )
    both, alone = map(median, alternate(3, *runs))
    note = f"{both:,.0f} and {alone:,.0f} rows/s, {_FEATURES} features"
    return Row(
        f"2 ranks on 2 cores / 1 rank on 1 core, rows/s, batches of {batch_size:,}", both / alone, 1.7, note=note
    )


def _rate(folder: str, launcher: str, batch_size: int, cores: set[int]) -> float:
    """Return the rows per second of a training on some cores, in a process of its own, once it is under way."""
    command = [sys.executable, "-m", "tests.bench.bench_train", folder, launcher, str(batch_size)]
    limit = functools.partial(os.sched_setaffinity, 0, cores)  # first: torch counts the cores when it is imported
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, preexec_fn=limit).stdout)


def _train(folder: str, launcher: str, batch_size: str) -> None:
    steps = _ROWS_TRAINED // int(batch_size)
    cvae_dist.train(
        f"{folder}/rows.zarr", f"{folder}/model", overwrite=True, launcher=launcher,
        num_steps=steps, test_every=steps // 6, checkpoint_every=steps, batch_size=int(batch_size),
        tb_logging=False, **_WIDE,
    )  # fmt: skip
    history = [json.loads(line) for line in Path(folder, "model", "history.jsonl").read_text().splitlines()]
    print(median(record["rows_per_second"] for record in history[1:]))


def _restart(folder: str) -> Row:
    """Kill one of two ranks, and wait for the next step after those that were done."""
    killed = done = 0.0
    last = 0

    def watch(event: Event) -> None:
        nonlocal killed, done, last
        if event.kind != "progress":
            return
        if not killed and event.done >= _KILLED_AFTER:
            os.kill(_rank_pids()[1], signal.SIGKILL)
            killed, last = time.monotonic(), event.done
        elif killed and not done and event.done > last:
            done = time.monotonic()

    cvae_dist.train(
        f"{folder}/rows.zarr", f"{folder}/killed", launcher="local:2", num_steps=1200, batch_size=1024,
        on_event=watch, **_WIDE,
    )  # fmt: skip
    return Row("restart after a killed rank until the next step is told, s", done - killed, 15, lower=True)


def _rank_pids() -> list[int]:
    """Return the processes of this one's ranks, in the order in which they were started."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [pid for pid in map(int, children) if "launch.rank" in Path(f"/proc/{pid}/cmdline").read_text()]


def _quality() -> Iterator[Row]:
    """Compare the defaults on MNIST with those of two ranks, and with batches of 4,096 rows."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "src").mkdir()
        np.save(f"{folder}/src/images.npy", mnist().train)
        cvae_dist.ingest(f"{folder}/src", f"{folder}/rows.zarr")
        one = _accuracy(folder, "one")
        for name, settings in (("2 ranks", {"launcher": "local:2"}), ("batches of 4,096", {"batch_size": 4096})):
            reached = _accuracy(folder, name.replace(" ", "-"), **settings)
            note = f"{reached:.4f}, one rank with batches of 256 {one:.4f}"
            yield Row(f"MNIST, 16-D: 5-NN lost by {name}", one - reached, _CLOSE, lower=True, note=note)


def _accuracy(folder: str, name: str, **settings: object) -> float:
    """Return the share of MNIST's test images whose five nearest training images tell their digit."""
    data = mnist()
    cvae_dist.train(f"{folder}/rows.zarr", f"{folder}/{name}", dim_latent=16, **settings)
    vae = load_model(f"{folder}/{name}")
    train, test = (vae.embed_rows(images) for images in (data.train, data.test))
    return float(KNeighborsClassifier(5).fit(train, data.train_labels).score(test, data.test_labels))


if __name__ == "__main__":
    _train(*sys.argv[1:])
