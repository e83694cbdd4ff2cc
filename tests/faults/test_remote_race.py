"""Two drivers started together on one output: one writes it, the other is refused or finds it done."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cvae_dist.store import RowStore
from tests.faults.drivers import item, write_items
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
    refused = 0
    for number in range(races):
        command = Command("ingest", (str(tmp_path / "tree"), f"{served.url}/{number}"), {}, f"{served.url}/{number}")
        ended = [driver.wait() for driver in [remote_drivers.begin(command, served, _delay=0.002) for _ in range(2)]]
        written = sorted(end.result["rows_written"] for end in ended if not end.error)
        assert written in ([ROWS], [0, ROWS]), [end.error for end in ended]
        assert {end.error[0] for end in ended if end.error} <= {"OutputLocked"}
        refused += len(written) == 1
        store = RowStore.open(command.output, served.options)
        np.testing.assert_array_equal(store.read("x"), [item(row) for row in range(ROWS)])
        assert [name[-8:-4] for name in store.read("id")] == [f"{row:04d}" for row in range(ROWS)]
        require_nothing_left(command.output, served)
    assert refused, "no two drivers ever met"
