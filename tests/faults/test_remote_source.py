"""Rows that are replaced, or that become more, while they are embedded."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cvae_dist.store import RowStore
from cvae_dist.store.urls import Location
from tests.faults.drivers import Driver, running
from tests.faults.remote import RemoteDrivers, Sources, content, place, require_content, require_nothing_left
from tests.servers import Served


@pytest.fixture
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    with place(request.param) as served:
        yield served


def until_some_latents_are_there(driver: Driver, latents: str, served: Served) -> None:
    place = Location.of(f"{latents}/z", served.options)
    driver.until(lambda: any(entry.name.startswith("c.") for entry in place.list()))


@pytest.mark.parametrize("served", ["local", pytest.param("weed", marks=pytest.mark.heavy)], indirect=True)
def test_a_source_that_is_overwritten_publishes_nothing(
    remote_drivers: RemoteDrivers, sources: Sources, served: Served, tmp_path: Path
) -> None:
    ingest, overwrite, embed = (sources.command(name, served) for name in ("ingest", "overwrite", "embed"))
    remote_drivers.do(ingest, served)
    with running(remote_drivers.begin(embed, served, _hold=(2, tmp_path / "go"))) as driver:
        until_some_latents_are_there(driver, embed.output, served)
        remote_drivers.do(overwrite, served)
        (tmp_path / "go").touch()
        error, text, *_ = driver.wait().error
    assert error == "Corrupt"
    assert ingest.output in text
    found = RowStore.find(embed.output, served.options)
    assert found is not None
    assert not found.published
    require_nothing_left(embed.output, served)
    assert remote_drivers.do(embed, served)["rows_written"] > 0
    fresh = embed._replace(arguments=(*embed.arguments[:2], f"{served.url}/fresh/latents"))
    remote_drivers.do(fresh, served)
    require_content(embed.output, served, content(fresh.arguments[2], served))


@pytest.mark.parametrize("served", ["local", pytest.param("weed", marks=pytest.mark.heavy)], indirect=True)
def test_a_source_that_grows_disturbs_nothing(
    remote_drivers: RemoteDrivers, sources: Sources, served: Served, tmp_path: Path
) -> None:
    ingest, append, embed = (sources.command(name, served) for name in ("ingest", "append", "embed"))
    rows = remote_drivers.do(ingest, served)["rows"]
    fresh = embed._replace(arguments=(*embed.arguments[:2], f"{served.url}/fresh/latents"))
    remote_drivers.do(fresh, served)
    with running(remote_drivers.begin(embed, served, _hold=(2, tmp_path / "go"))) as driver:
        until_some_latents_are_there(driver, embed.output, served)
        assert remote_drivers.do(append, served)["rows"] > rows
        (tmp_path / "go").touch()
        assert driver.wait().require_done().result["rows"] == rows
    require_content(embed.output, served, content(fresh.arguments[2], served))
