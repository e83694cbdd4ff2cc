"""Tasks on a cluster that outlive their driver: what another driver writes and publishes meanwhile stays whole."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed import Client

from cvae_dist.store import Location
from cvae_dist.verbs.verify import verify
from tests.faults import slow_worker
from tests.faults.drivers import Driver, running, wait_until
from tests.faults.remote import RemoteDrivers, Sources, content, place, require_content, require_nothing_left, written
from tests.servers import serve

pytestmark = pytest.mark.heavy  # a cluster starts
WORKERS = 2
MOMENTS = ("after its rows", "after its look")


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that makes tasks slow."""
    return tmp_path_factory.mktemp("slow") / "slow"


@pytest.fixture(scope="module")
def scheduler(slow: Path) -> Iterator[str]:
    """The address of a cluster that somebody else started."""
    import dask
    from distributed import LocalCluster

    options = {"threads_per_worker": 1, "dashboard_address": "127.0.0.1:0", "silence_logs": 50}
    environment = {**serve("weed").environment, slow_worker.FILE: str(slow), "OMP_NUM_THREADS": "1"}
    with (
        pytest.MonkeyPatch.context() as patch,
        dask.config.set({"distributed.worker.preload": [slow_worker.__file__]}),
    ):
        for name, value in environment.items():
            patch.setenv(name, value)
        with LocalCluster(n_workers=WORKERS, **options) as cluster:
            yield cluster.scheduler_address


def fall_asleep(driver: Driver, slow: Path) -> None:
    """Wait until a task of a driver sleeps on each worker; later ones will not."""
    driver.until(lambda: len(list(slow.parent.glob("asleep *"))) == WORKERS)
    slow.unlink()


def wake_up(scheduler: str, slow: Path) -> None:
    """Wake the tasks, and wait until they have ended."""
    slow.with_name(slow_worker.ALARM).touch()
    wait_until_idle(scheduler)


def wait_until_idle(scheduler: str) -> None:
    with Client(scheduler, set_as_default=False) as client:
        wait_until(lambda: not any(client.run(lambda dask_worker: list(dask_worker.active_threads)).values()))


@pytest.fixture(params=MOMENTS)
def moment(request: pytest.FixtureRequest, slow: Path) -> Iterator[str]:
    slow.write_text(request.param)
    yield request.param
    for path in slow.parent.iterdir():
        path.unlink()


@pytest.mark.parametrize("storage", ["weed", "local"])
def test_tasks_of_a_killed_driver_change_nothing(
    remote_drivers: RemoteDrivers, sources: Sources, scheduler: str, slow: Path, moment: str, storage: str
) -> None:
    if (storage, moment) == ("local", "after its look"):
        pytest.skip("nothing but a lock could make a rename depend on another file")
    with place(storage) as served:
        with running(remote_drivers.begin(sources.command("ingest", served), served, _scheduler=scheduler)) as driver:
            fall_asleep(driver, slow)
        assert driver.kill().signal == signal.SIGKILL
        command = sources.command("overwrite", served)
        remote_drivers.do(command, served)
        published = content(command.output, served)
        wake_up(scheduler, slow)
        require_content(command.output, served, published)
        assert verify(command.output, storage_options=served.options).ok


def test_no_shard_appears_after_a_driver_was_interrupted(
    remote_drivers: RemoteDrivers, sources: Sources, scheduler: str, slow: Path, moment: str
) -> None:
    with place("weed") as served:
        command = sources.command("ingest", served)
        with running(remote_drivers.begin(command, served, _scheduler=scheduler)) as driver:
            fall_asleep(driver, slow)
            os.kill(driver.pid, signal.SIGINT)
            lease = Location.of(f"{command.output}.lease", served.options)
            driver.until(lambda: json.loads(lease.read())["state"] == "ending")
            wake_up(scheduler, slow)
            assert driver.wait().error[0] == "KeyboardInterrupt"
        require_nothing_left(command.output, served)
        there = written(command.output, served)
        wait_until_idle(scheduler)
        assert written(command.output, served) == there <= 2
        remote_drivers.do(command, served, _scheduler=scheduler)
        assert verify(command.output, storage_options=served.options).ok
