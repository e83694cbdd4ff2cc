"""Drivers and workers killed with SIGKILL at any time, on every kind of storage: the next run leaves no trace of it."""

import random
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.faults.drivers import running
from tests.faults.remote import STORAGES, RemoteDrivers, Sources, content, place, require_content
from tests.servers import Served

COMMANDS = ("ingest", "append", "overwrite", "embed")
BEFORE = {"ingest": (), "append": ("ingest",), "overwrite": ("ingest",), "embed": ("overwrite",)}
DELAY = 0.004  # seconds for each shard
LONGEST = 0.6  # seconds until a kill; most commands take less, with everything they do at their beginning and end

Expected = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def expected(remote_drivers: RemoteDrivers, sources: Sources) -> Iterator[Expected]:
    """What every command leaves on a disk where nobody disturbs it."""
    found = {}
    with place("local") as served:
        for name in COMMANDS:
            command = sources.command(name, served)
            remote_drivers.do(command, served)
            found[name] = content(command.output, served)
        yield found


@pytest.fixture
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    with place(request.param) as served:
        yield served


def kill_and_repeat(
    remote_drivers: RemoteDrivers, sources: Sources, served: Served, name: str, expected: Expected, seconds: float
) -> bool:
    """Kill a command after some time, repeat it, compare the store, and return whether it was killed."""
    command = sources.command(name, served)
    with running(remote_drivers.begin(command, served, _delay=DELAY)) as driver:
        time.sleep(seconds)
    killed = driver.kill().signal == signal.SIGKILL
    remote_drivers.do(command, served)
    require_content(command.output, served, expected[name])
    return killed


@pytest.mark.parametrize(
    ("served", "names"),
    [
        ("local", ("append", "embed")),
        ("shm", ("ingest", "overwrite")),
        ("weed", ("ingest", "append")),
        ("moto", ("overwrite",)),
        ("azurite", ("append",)),
        ("gcs", ("ingest", "embed")),
    ],
    indirect=["served"],
)
def test_killed_at_random_times(
    remote_drivers: RemoteDrivers, sources: Sources, expected: Expected, served: Served, names: Sequence[str]
) -> None:
    for seed, name in enumerate(names):
        for before in BEFORE[name]:
            remote_drivers.do(sources.command(before, served), served)
        kill_and_repeat(
            remote_drivers, sources, served, name, expected, random.Random(seed).uniform(0.05, LONGEST / 2)
        )


@pytest.mark.heavy
@pytest.mark.parametrize("served", STORAGES, indirect=True)
def test_killed_often(remote_drivers: RemoteDrivers, sources: Sources, expected: Expected, served: Served) -> None:
    killed = 0
    for seed in range(5):
        part = served._replace(url=f"{served.url}/{seed}")
        for name in COMMANDS:
            seconds = random.Random(f"{seed} {name}").uniform(0, LONGEST)
            killed += kill_and_repeat(remote_drivers, sources, part, name, expected, seconds)
    assert killed >= 10
