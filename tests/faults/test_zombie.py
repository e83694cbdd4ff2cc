"""Drivers that sleep longer than their lease, or die, while what they began goes on: the next one's store stays whole."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cvae_dist.verbs.verify import verify
from tests.faults.drivers import Driver, running, wait_until
from tests.faults.remote import RemoteDrivers, Sources, content, place, require_content
from tests.servers import Served

pytestmark = pytest.mark.usefixtures("tiny_shards")


@pytest.fixture(params=["local", "weed"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    with place(request.param) as served:
        yield served


def wait_until_frozen(driver: Driver) -> None:
    wait_until(lambda: Path(f"/proc/{driver.pid}/stat").read_text().rsplit(") ", 1)[1].startswith("T"))


@pytest.mark.parametrize("moment", ["among its shards", "before publication", "before the last write"])
@pytest.mark.parametrize("name", ["ingest", "append"])
def test_frozen_driver_that_was_followed_changes_nothing(
    remote_drivers: RemoteDrivers, sources: Sources, served: Served, moment: str, name: str
) -> None:
    if name == "append":
        remote_drivers.do(sources.command("ingest", served), served)
    options = {"_delay": 0.03} if moment == "among its shards" else {"_freeze": moment}
    with running(remote_drivers.begin(sources.command(name, served), served, _term=0.5, **options)) as frozen:
        if moment == "among its shards":
            time.sleep(0.25)
            os.kill(frozen.pid, signal.SIGSTOP)
        wait_until_frozen(frozen)
        began = time.monotonic()
        other = sources.command("overwrite", served)
        assert remote_drivers.do(other, served, _machine="another")["rows_written"] > 0
        assert time.monotonic() - began >= 0.5, "the lease was not watched"
        before = content(other.output, served)
        os.kill(frozen.pid, signal.SIGCONT)
        assert frozen.wait().error[0] == "OutputLocked"
    require_content(other.output, served, before)
    assert verify(other.output, storage_options=served.options).ok
