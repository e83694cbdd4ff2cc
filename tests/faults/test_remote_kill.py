"""Drivers and workers killed with SIGKILL at any time, on every kind of storage: the next run leaves no trace of it."""

import random
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.drivers import running, wait_until
from tests.faults.remote import STORAGES, RemoteDrivers, Sources, content, place, require_content, written
from tests.servers import NAMES, Served, private_weed, serve

COMMANDS = ("ingest", "append", "overwrite", "embed")
BEFORE = {"ingest": (), "append": ("ingest",), "overwrite": ("ingest",), "embed": ("overwrite",)}
DELAY = 0.004  # seconds for each shard
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


@pytest.fixture(scope="module")
def uploaded(sources: Sources) -> Sources:
    """The same trees in an object store."""
    return sources.uploaded(serve("weed"))


@pytest.fixture(scope="module")
def expected_of_uploaded(remote_drivers: RemoteDrivers, uploaded: Sources) -> Expected:
    """What the commands leave that read from there: the manifest has other versions."""
    served, found = serve("weed"), {}
    for name in ("ingest", "append", "overwrite"):
        command = uploaded.command(name, served)
        remote_drivers.do(command, served)
        found[name] = content(command.output, served)
    return found


@pytest.fixture
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    with place(request.param) as served:
        yield served


def kill_and_repeat(
    remote_drivers: RemoteDrivers, sources: Sources, served: Served, name: str, expected: Expected, seconds: float
) -> tuple[bool, float]:
    """Kill a command after some time, repeat it, and compare the store.

    Returns whether it was killed, and how long the repetition took.
    """
    command = sources.command(name, served)
    with running(remote_drivers.begin(command, served, _delay=DELAY)) as driver:
        time.sleep(seconds)
    killed, began = driver.kill().signal == signal.SIGKILL, time.monotonic()
    remote_drivers.do(command, served)
    took = time.monotonic() - began
    require_content(command.output, served, expected[name])
    return killed, took


@pytest.mark.parametrize(
    ("served", "names"),
    [
        ("local", ("append", "embed")),
        ("weed", ("ingest", "append")),
        pytest.param("shm", ("ingest", "overwrite"), marks=pytest.mark.heavy),
        pytest.param("moto", ("overwrite",), marks=pytest.mark.heavy),
        pytest.param("azurite", ("append",), marks=pytest.mark.heavy),
        pytest.param("gcs", ("ingest", "embed"), marks=pytest.mark.heavy),
    ],
    indirect=["served"],
)
def test_killed_at_random_times(
    remote_drivers: RemoteDrivers, sources: Sources, expected: Expected, served: Served, names: Sequence[str]
) -> None:
    for seed, name in enumerate(names):
        for before in BEFORE[name]:
            remote_drivers.do(sources.command(before, served), served)
        kill_and_repeat(remote_drivers, sources, served, name, expected, random.Random(seed).uniform(0.05, 0.3))


@pytest.mark.heavy
@pytest.mark.parametrize("served", STORAGES, indirect=True)
def test_killed_often(remote_drivers: RemoteDrivers, sources: Sources, expected: Expected, served: Served) -> None:
    kills, longest = 0, dict.fromkeys(COMMANDS, 0.3)  # seconds, measured from the second seed on
    for seed in range(5):
        part = served._replace(url=f"{served.url}/{seed}")
        for name in COMMANDS:
            seconds = random.Random(f"{seed} {name}").uniform(0, longest[name])
            killed, longest[name] = kill_and_repeat(remote_drivers, sources, part, name, expected, seconds)
            kills += killed
    assert kills >= 10


@pytest.mark.parametrize("served", ["local", pytest.param("weed", marks=pytest.mark.heavy)], indirect=True)
@pytest.mark.parametrize("name", ["append", "overwrite"])
def test_killed_right_after_publication(
    remote_drivers: RemoteDrivers, sources: Sources, expected: Expected, served: Served, name: str
) -> None:
    """What older publications and the journal leave is cleared by the next run, which has nothing else to do."""
    remote_drivers.do(sources.command("ingest", served), served)
    command = sources.command(name, served)
    assert remote_drivers.begin(command, served, _die="after the last write").wait().signal == signal.SIGKILL
    if name == "overwrite":
        command.options["overwrite"] = False
    assert remote_drivers.do(command, served)["rows_written"] == 0
    require_content(command.output, served, expected[name])


@pytest.mark.heavy
@pytest.mark.parametrize("served", NAMES, indirect=True)
def test_one_of_two_workers_killed(
    remote_drivers: RemoteDrivers, sources: Sources, expected: Expected, served: Served, tmp_path: Path
) -> None:
    command = sources.command("overwrite", served)
    with running(remote_drivers.begin(command, served, _workers=2, _hold=(3, tmp_path / "go"))) as driver:
        driver.until(lambda: written(command.output, served) > 1)
        everyone = psutil.Process(driver.pid).children(recursive=True)
        workers = [child for child in everyone if "spawn_main" in " ".join(child.cmdline())]
        assert len(workers) == 2
        workers[0].kill()
        assert written(command.output, served) < 13
        (tmp_path / "go").touch()
        everyone += psutil.Process(driver.pid).children(recursive=True)
        driver.wait().require_done()
    require_content(command.output, served, expected["overwrite"])
    wait_until(lambda: not any(process.is_running() for process in everyone))


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(3))
def test_server_killed_and_started_again(
    remote_drivers: RemoteDrivers, sources: Sources, expected: Expected, seed: int
) -> None:
    served, server, restart = private_weed()
    command = sources.command("ingest", served)
    with running(remote_drivers.begin(command, served, _delay=0.1)) as driver:
        driver.until(lambda: written(command.output, served) > seed)
        server.process.kill()
        server.process.wait()
        again = restart()
        ended = driver.wait()
    assert not ended.error or served.url in ended.error[1]
    remote_drivers.do(command, served)
    require_content(command.output, served, expected["ingest"])
    again.process.kill()
    again.process.wait()


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(8))
def test_killed_while_it_reads_from_an_object_store(
    remote_drivers: RemoteDrivers, uploaded: Sources, expected_of_uploaded: Expected, seed: int
) -> None:
    served = serve("weed")
    for name in ("ingest", "append"):
        seconds = random.Random(f"{seed} {name}").uniform(0.05, 0.5)
        kill_and_repeat(remote_drivers, uploaded, served, name, expected_of_uploaded, seconds)


@pytest.mark.heavy
@pytest.mark.parametrize("store", ["local", "weed"])
def test_a_worker_killed_while_it_reads_from_an_object_store(
    remote_drivers: RemoteDrivers, uploaded: Sources, expected_of_uploaded: Expected, store: str, tmp_path: Path
) -> None:
    with place(store) as served:
        command = uploaded.command("overwrite", served)
        source = serve("weed")._replace(url=served.url)  # the drivers need its environment
        with running(remote_drivers.begin(command, source, _workers=2, _hold=(3, tmp_path / "go"))) as driver:
            driver.until(lambda: written(command.output, served) > 1)
            everyone = psutil.Process(driver.pid).children(recursive=True)
            workers = [child for child in everyone if "spawn_main" in " ".join(child.cmdline())]
            workers[0].kill()
            (tmp_path / "go").touch()
            driver.wait().require_done()
        require_content(command.output, served, expected_of_uploaded["overwrite"])


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("store", ["local", "the same server"])
def test_the_server_of_the_source_killed_and_started_again(
    remote_drivers: RemoteDrivers, sources: Sources, expected_of_uploaded: Expected, store: str, seed: int
) -> None:
    private, server, restart = private_weed()
    uploaded = sources.uploaded(private._replace(url=f"{private.url}/trees"))
    with place("local") as local:
        served = local if store == "local" else private
        command = uploaded.command("ingest", served)
        at = private._replace(url=served.url)
        with running(remote_drivers.begin(command, at, _delay=0.1)) as driver:
            driver.until(lambda: written(command.output, served) > seed)
            server.process.kill()
            server.process.wait()
            again = restart()
            ended = driver.wait()
        assert not ended.error or "s3://" in ended.error[1]
        remote_drivers.do(command, at)
        require_content(command.output, served, expected_of_uploaded["ingest"])
    again.process.kill()
    again.process.wait()
