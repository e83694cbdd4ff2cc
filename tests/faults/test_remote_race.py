"""Two drivers started together on one output: one writes it, the other is refused or finds it done."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cvae_dist.store import RowStore
from tests.faults.drivers import item, wait_until, write_items
from tests.faults.remote import STORAGES, Command, RemoteDrivers, place, require_nothing_left
from tests.servers import Served

ROWS = 5


@pytest.fixture
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    with place(request.param) as served:
        yield served


@pytest.mark.parametrize(
    ("served", "races"),
    [("weed", 5), *(pytest.param(name, 50, marks=pytest.mark.heavy) for name in STORAGES)],
    indirect=["served"],
)
def test_one_of_two_wins_and_nothing_is_lost(
    remote_drivers: RemoteDrivers, served: Served, races: int, tmp_path: Path
) -> None:
    write_items(tmp_path / "tree", 0, ROWS, folders=1)
    go = tmp_path / "go"
    for number in range(races):
        command = Command("ingest", (str(tmp_path / "tree"), f"{served.url}/{number}"), {}, f"{served.url}/{number}")
        started = [remote_drivers.begin(command, served, _delay=0.002, _hold=(0, go)) for _ in range(2)]
        if number == 0:  # in which they are sure to meet
            wait_until(lambda started=started: any(driver.has_ended for driver in started))
            go.touch()
        ended = [driver.wait() for driver in started]
        written = sorted(end.result["rows_written"] for end in ended if not end.error)
        assert written == [ROWS] if number == 0 else written in ([ROWS], [0, ROWS]), [end.error for end in ended]
        assert {end.error[0] for end in ended if end.error} <= {"OutputLocked"}
        store = RowStore.open(command.output, served.options)
        np.testing.assert_array_equal(store.read("x"), [item(row) for row in range(ROWS)])
        assert [name[-8:-4] for name in store.read("id")] == [f"{row:04d}" for row in range(ROWS)]
        require_nothing_left(command.output, served)
