"""Ranks on the workers of a Dask cluster, which come and go."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed import Client, LocalCluster

from cvae_dist.errors import InvalidInput, RankLost
from cvae_dist.events import Event, OnEvent
from cvae_dist.launch import workers
from cvae_dist.verbs.train import train
from tests.faults.test_ranks import SETTINGS, STEPS, alone, distance, require_one_bar, store, weights

_ = alone, store  # fixtures


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
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
    """Return the ranks that run on this machine, of any cluster."""
    found = []
    for process in psutil.process_iter():
        try:
            if "cvae_dist.launch.rank" in process.cmdline():
                found.append(process)
        except psutil.Error:
            continue
    return found


def run(store: str, model: Path, client: Client, on_event: OnEvent, **settings: Any) -> Any:
    result = train(store, model, launcher="dask", client=client, on_event=on_event, **{**SETTINGS, **settings})
    assert not [process for process in ranks() if str(model) in " ".join(process.cmdline())]
    return result


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
        run(store, tmp_path / f"model {number}", client, lambda event: notes.append(event.message))

    threads = [threading.Thread(target=train_one, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
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
