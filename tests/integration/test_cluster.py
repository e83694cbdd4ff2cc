"""Real Dask clusters: one started here, and one that is running already."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from distributed import Client

from cvae_dist.cluster import map_regions, resolve_client
from cvae_dist.errors import InvalidInput, StorageFailed
from cvae_dist.store import Layout
from cvae_dist.verbs.ingest import ingest
from tests.faults.drivers import SHARDS_PER_PACK, small_grid, snapshot, wait_until, write_items


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with resolve_client(workers=2) as started:
        assert started is not None
        yield started


def square(number: int) -> int:
    return number * number


def refuse(number: int) -> int:
    raise InvalidInput(f"number {number} is bad")


def fail(number: int) -> int:
    raise StorageFailed(28, f"no room for {number}")


def crash(number: int) -> int:
    import os

    os._exit(1)


def test_every_task_once_in_a_bounded_window(client: Client) -> None:
    taken = 0

    def tasks() -> Iterator[int]:
        nonlocal taken
        for number in range(60):
            taken += 1
            yield number

    results = map_regions(square, tasks(), client=client)
    found = [next(results)]
    assert taken <= 1 + 3 * 2 + 3 * 2
    found += results
    assert sorted(found) == [n * n for n in range(60)]
    wait_until(lambda: not client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)))


def test_a_cluster_that_shrinks(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter([12, 12, 12])
    monkeypatch.setattr("cvae_dist.cluster.regions._Window.size", lambda self: next(sizes, 2))
    assert sorted(map_regions(square, range(40), client=client)) == [n * n for n in range(40)]


def test_equal_tasks_are_not_merged(client: Client) -> None:
    assert list(map_regions(square, [3] * 9, client=client)) == [9] * 9


@pytest.mark.parametrize(
    ("function", "error", "words"),
    [(refuse, InvalidInput, "number . is bad"), (fail, OSError, "no room for")],
)
def test_errors_of_tasks_arrive_as_they_are(client: Client, function: object, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        list(map_regions(function, range(50), client=client))
    wait_until(lambda: not client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)))
    assert list(map_regions(square, [2], client=client)) == [4], "the cluster is as good as before"


@pytest.mark.parametrize("kind", ["one", "many"])
def test_bytes_are_those_of_a_run_without_a_cluster(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(Layout, "of", small_grid())
    monkeypatch.setattr(Layout, "shards_per_pack", SHARDS_PER_PACK)
    if kind == "one":
        write_items(tmp_path / "tree", 0, 90)
    else:
        (tmp_path / "tree").mkdir()
        rows = np.random.default_rng(0).normal(size=(90, 5)).astype(np.float16)
        rows[17, 2] = np.nan
        np.save(tmp_path / "tree" / "a.npy", rows[:40])
        np.save(tmp_path / "tree" / "b.npy", rows[40:])
    options = {"label": "folder", "nonfinite": "drop"}
    here = ingest(tmp_path / "tree", tmp_path / "here", **options)
    there = ingest(tmp_path / "tree", tmp_path / "there", **options, client=client)
    assert (here.rows, here.dropped) == (there.rows, there.dropped)
    assert snapshot(tmp_path / "here") == snapshot(tmp_path / "there")
    assert not list(tmp_path.glob("*.scan"))


def test_bad_file_is_named_by_a_cluster_too(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Layout, "of", small_grid())
    monkeypatch.setattr(Layout, "shards_per_pack", SHARDS_PER_PACK)
    write_items(tmp_path / "tree", 0, 30, folders=1)
    np.save(tmp_path / "tree" / "class 0" / "item 0021.npy", np.zeros(3, np.int32))
    with pytest.raises(InvalidInput, match=r"item 0021\.npy has dtype int32"):
        ingest(tmp_path / "tree", tmp_path / "store", client=client)


def test_workers_that_are_too_small(tmp_path: Path) -> None:
    from distributed import LocalCluster

    (tmp_path / "tree").mkdir()
    np.save(tmp_path / "tree" / "a.npy", np.zeros((10, 4), np.float32))
    options = {
        "processes": False,
        "dashboard_address": "127.0.0.1:0",
        "memory_limit": "200MB",
        "threads_per_worker": 2,
    }
    with (
        LocalCluster(n_workers=1, **options) as cluster,
        Client(cluster) as small,
        pytest.raises(InvalidInput, match=r"may use 200 MB, but its 2 threads need .* Nothing was written"),
    ):
        ingest(tmp_path / "tree", tmp_path / "store", client=small)
    assert not (tmp_path / "store").exists()


@pytest.fixture
def scheduler_process(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A scheduler with one worker, as somebody else started them; a task that kills its worker is not sent again."""
    code = (
        "from distributed import LocalCluster\n"
        "if __name__ == '__main__':\n"
        "    cluster = LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address='127.0.0.1:0')\n"
        "    print(cluster.scheduler_address, flush=True)\n"
        "    input()\n"
    )
    (tmp_path / "cluster.py").write_text(code)
    command = [sys.executable, str(tmp_path / "cluster.py")]
    environment = {**os.environ, "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0"}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


@pytest.fixture
def scheduler(scheduler_process: "subprocess.Popen[str]") -> str:
    assert scheduler_process.stdout is not None
    return scheduler_process.stdout.readline().strip()


def test_a_running_scheduler_is_used_and_left_running(scheduler: str) -> None:
    for _ in range(2):
        with resolve_client(scheduler=scheduler) as client:
            assert client is not None
            assert list(map_regions(square, range(5), client=client)) != []
    with (
        resolve_client(scheduler=scheduler) as client,
        pytest.raises(StorageFailed, match="a task ended with its worker too often"),
    ):
        list(map_regions(crash, [1], client=client))


def sleep(seconds: float) -> float:
    import time

    time.sleep(seconds)
    return seconds


def test_a_lost_scheduler_is_one_clear_message(scheduler_process: "subprocess.Popen[str]", scheduler: str) -> None:
    with resolve_client(scheduler=scheduler) as client:
        results = map_regions(sleep, [0.1] * 100, client=client)
        next(results)
        scheduler_process.kill()
        with pytest.raises(StorageFailed, match="the Dask scheduler was lost"):
            list(results)


def test_cluster_of_its_own_is_gone_afterwards() -> None:
    import psutil

    before = set(psutil.Process().children(recursive=True))
    with resolve_client(workers=1) as client:
        assert client is not None
        assert sum(client.nthreads().values()) == 1
        new = set(psutil.Process().children(recursive=True)) - before
        workers = [process for process in new if "spawn_main" in " ".join(process.cmdline())]
        assert len(workers) == 1
    wait_until(lambda: not workers[0].is_running())
