"""One server of drivers for all tests of a module that kills them."""

from collections.abc import Iterator

import pytest

from cvae_dist.store import Layout, lease
from tests.faults.drivers import SHARDS_PER_PACK, Clock, Drivers, small_grid
from tests.faults.remote import RemoteDrivers, Sources


@pytest.fixture(scope="session")
def drivers() -> Iterator[Drivers]:
    server = Drivers()
    yield server
    server.close()


@pytest.fixture(scope="module", autouse=True)
def _small_packs() -> Iterator[None]:
    """Packs as small here as in the drivers, so that a few shards are several of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Layout, "shards_per_pack", SHARDS_PER_PACK)
        yield


@pytest.fixture
def tiny_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of four rows in this process, for one test."""
    monkeypatch.setattr(Layout, "of", small_grid())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock by which this process waits for leases."""
    clock = Clock()
    monkeypatch.setattr(lease, "time", clock)
    return clock


@pytest.fixture(scope="session")
def remote_drivers() -> Iterator[RemoteDrivers]:
    server = RemoteDrivers()
    yield server
    server.close()


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return Sources.made(tmp_path_factory.mktemp("sources"))
