"""Ranks on the workers of a Dask cluster, which come and go."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed import Client, LocalCluster

from cvae_dist.errors import InvalidInput, RankFailed, RankLost
from cvae_dist.events import Event, OnEvent, ignore
from cvae_dist.launch import workers
from cvae_dist.launch.gang import train_together
from cvae_dist.launch.rank import Task
from cvae_dist.launch.workers import Cluster
from cvae_dist.verbs.train import train
from tests.faults.test_ranks import SETTINGS, STEPS, alone, distance, require_one_bar, store, task, weights

_ = alone, store  # fixtures


_OURS = "TEST_OF_RANKS"  # in the environment of our workers, and so of their ranks


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(_OURS, str(os.getpid()))
        with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as running:
            yield running


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[Client]:
    cluster.scale(2)
    with Client(cluster, set_as_default=False) as connected:
        connected.wait_for_workers(2, timeout=60)
        yield connected


def at_step(step: int, act: Callable[[], None]) -> OnEvent:
    """Return a listener that does something once, when so many steps are done."""
    left = [act]

    def listen(event: Event) -> None:
        if event.kind == "test" and event.done >= step and left:
            left.pop()()

    return listen


def ranks() -> list[psutil.Process]:
    """Return the ranks of our cluster that run."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            ours = process.environ().get(_OURS) == str(os.getpid())
            if ours and "cvae_dist.launch.rank" in process.cmdline():
                found.append(process)
    return found


def run(store: str, model: Path, client: Client, on_event: OnEvent, **settings: Any) -> Any:
    result = train(store, model, launcher="dask", client=client, on_event=on_event, **{**SETTINGS, **settings})
    assert not ranks()
    return result


def run_task(task: Task, client: Client, on_event: OnEvent = ignore, max_restarts: int = 5) -> dict[str, Any]:
    there = Cluster(client, on_event)
    try:
        with there.alone():
            return train_together(lambda _: there.start(task), on_event, max_restarts)
    finally:
        assert not ranks()


def workers_of(client: Client) -> list[int]:
    return list(client.run(os.getpid).values())


@pytest.mark.heavy
def test_a_killed_worker_is_made_up_for(store: str, alone: Path, client: Client, tmp_path: Path) -> None:
    events: list[Event] = []
    kill = at_step(40, lambda: os.kill(workers_of(client)[1], signal.SIGKILL))

    def listen(event: Event) -> None:
        events.append(event)
        kill(event)

    result = run(store, tmp_path / "model", client, listen)
    assert (result.steps, result.stopped_because) == (STEPS, "finished")
    assert any("start again from the last checkpoint" in event.message for event in events)
    require_one_bar(events, restarts=1)
    assert distance(weights(tmp_path / "model"), weights(alone)) <= 1e-4


@pytest.mark.heavy
def test_a_killed_rank_is_made_up_for(store: str, alone: Path, client: Client, tmp_path: Path) -> None:
    notes = []

    def kill_one() -> None:
        next(rank for rank in ranks() if rank.environ()["RANK"] == "1").kill()

    kill = at_step(40, kill_one)

    def listen(event: Event) -> None:
        notes.append(event.message)
        kill(event)

    assert run(store, tmp_path / "model", client, listen).steps == STEPS
    assert any("rank 1 of 2 was killed (SIGKILL); all ranks start again" in note for note in notes)
    assert distance(weights(tmp_path / "model"), weights(alone)) <= 1e-4


@pytest.mark.heavy
def test_a_rank_that_raises_is_shown(store: str, client: Client, tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match=r"(?s)rank 1 of 2 failed.*ZeroDivisionError: of the rank itself"):
        run_task(task(store, tmp_path / "model", "raises"), client)


@pytest.mark.heavy
def test_a_rank_that_hangs_is_given_up_after_the_timeout(
    store: str, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cvae_dist.launch.gang._GRACE", 3.0)
    client.run(setattr, workers, "_GRACE", 2.0)
    try:
        with pytest.raises(RankLost, match=r"rank 1 of 2 did not answer|did not answer for .* s \(timeout=5\)"):
            run_task(task(store, tmp_path / "model", "hangs", timeout=5), client, max_restarts=0)
    finally:
        client.run(setattr, workers, "_GRACE", workers._GRACE)
    assert run(store, tmp_path / "model", client, ignore).steps == STEPS, "the same command goes on"


@pytest.mark.heavy
def test_a_cluster_that_shrinks_goes_on(
    store: str, alone: Path, cluster: LocalCluster, client: Client, tmp_path: Path
) -> None:
    result = run(store, tmp_path / "model", client, at_step(40, lambda: cluster.scale(1)), num_steps=2000)
    assert result.stopped_because == "finished"
    assert result.steps == 2000


@pytest.mark.heavy
def test_an_interrupt_reaches_the_ranks(store: str, alone: Path, client: Client, tmp_path: Path) -> None:
    interrupt = at_step(40, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert run(store, tmp_path / "model", client, interrupt, num_steps=100_000).stopped_because == "interrupted"
    assert list((tmp_path / "model" / "checkpoints").glob("*.pt"))


@pytest.mark.heavy
def test_two_trainings_take_turns(store: str, client: Client, tmp_path: Path) -> None:
    notes: list[str] = []

    def train_one(number: int) -> None:
        model = tmp_path / f"model {number}"
        train(store, model, launcher="dask", client=client, on_event=lambda e: notes.append(e.message), **SETTINGS)

    threads = [threading.Thread(target=train_one, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not ranks()
    assert all((tmp_path / f"model {number}" / "model.safetensors").exists() for number in range(2))
    assert any("another training has this cluster" in note for note in notes)


_DRIVER = """
import sys
from distributed import Client
from cvae_dist import train
from tests.faults.test_ranks import SETTINGS
client = Client(sys.argv[1], set_as_default=False)
train(sys.argv[2], sys.argv[3], launcher="dask", client=client, **{**SETTINGS, "num_steps": 1_000_000})
"""


@pytest.mark.heavy
def test_a_driver_that_is_killed_leaves_no_rank(
    store: str, cluster: LocalCluster, client: Client, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    driver = subprocess.Popen([sys.executable, "-c", _DRIVER, cluster.scheduler_address, store, str(model)])
    try:
        wait_until(lambda: list((model / "checkpoints").glob("*.pt")))
    finally:
        driver.kill()
        driver.wait()
    wait_until(lambda: not ranks())
    result = train(store, model, **{**SETTINGS, "num_steps": 1_000_000, "on_event": at_step(1, _interrupt)})
    assert result.stopped_because == "interrupted"
    assert result.steps > 30, "it went on from the checkpoint"


def _interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def wait_until(condition: Callable[[], object], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_cluster_without_workers_is_told(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_FIRST_WORKER", 0.3)
    with (
        LocalCluster(n_workers=0, dashboard_address="127.0.0.1:0") as empty,
        Client(empty, set_as_default=False) as client,
        pytest.raises(RankLost, match="has no worker, and none came"),
    ):
        train(store, tmp_path / "model", launcher="dask", client=client, **SETTINGS)


def test_the_launcher_needs_a_cluster(store: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="--scheduler"):
        train(store, tmp_path / "model", launcher="dask", **SETTINGS)
