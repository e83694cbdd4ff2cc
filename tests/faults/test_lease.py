"""One driver at a time, seen from a second one, from the holder's grave, and from a driver that slept."""

import getpass
import json
import os
import signal
import socket
import threading
from pathlib import Path

import pytest

from cvae_dist.errors import OutputLocked
from cvae_dist.events import Event
from cvae_dist.store import RowStore
from cvae_dist.store import lease as lease_module
from cvae_dist.store.lease import Lease
from cvae_dist.store.urls import Location
from cvae_dist.verbs.ingest import ingest
from tests.faults.drivers import (
    Clock,
    Driver,
    Drivers,
    recorded,
    running,
    snapshot,
    state_of,
    wait_until,
    write_items,
)

pytestmark = pytest.mark.usefixtures("tiny_shards")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    write_items(tmp_path / "tree", 0, 60)
    return tmp_path / "tree"


@pytest.fixture
def go(tmp_path: Path) -> Path:
    """The file that held drivers wait for."""
    return tmp_path / "go"


def test_second_driver_is_refused_and_told_who_is_first(drivers: Drivers, tree: Path, tmp_path: Path, go: Path) -> None:
    store = tmp_path / "store"
    with running(drivers.start("ingest", tree, store, _hold=(4, go))) as first:
        first.until(lambda: recorded(store))
        for overwrite in (False, True):
            with pytest.raises(OutputLocked) as caught:
                ingest(tree, store, overwrite=overwrite)
            for word in (str(first.pid), socket.gethostname(), getpass.getuser(), str(store)):
                assert word in str(caught.value)
        go.touch()
        assert first.wait().require_done().result["rows"] == 60
    assert not list(tmp_path.glob("*.lease*"))
    assert ingest(tree, store).nothing_to_do


def test_holder_killed_on_this_host_is_followed_at_once(
    drivers: Drivers, tree: Path, tmp_path: Path, go: Path, clock: Clock
) -> None:
    store = tmp_path / "store"
    with running(drivers.start("ingest", tree, store, _hold=(4, go))) as first:
        first.until(lambda: recorded(store))
    assert first.kill().signal == signal.SIGKILL
    assert (tmp_path / "store.lease").exists()
    assert ingest(tree, store).rows == 60
    assert clock.waited == 0


def test_killed_but_not_reaped_holder_is_followed(
    drivers: Drivers, tree: Path, tmp_path: Path, go: Path, clock: Clock
) -> None:
    store = tmp_path / "store"
    with running(drivers.start("ingest", tree, store, _hold=(4, go))) as first:
        first.until(lambda: recorded(store))
    os.kill(first.pid, signal.SIGKILL)
    wait_until(lambda: first.has_ended)
    assert ingest(tree, store).rows == 60
    assert clock.waited == 0
    assert first.wait().signal == signal.SIGKILL


def stop(driver: Driver, store: Path) -> None:
    """Stop a driver, but not while it has locked the file of its lease, which nobody could take over then."""
    while True:
        os.kill(driver.pid, signal.SIGSTOP)
        wait_until(lambda: state_of(driver.pid) == "T")
        if not store.with_name(f".{store.name}.lease.lock").exists():
            return
        os.kill(driver.pid, signal.SIGCONT)


def test_stopped_holder_is_followed_after_its_term(
    drivers: Drivers, tree: Path, tmp_path: Path, go: Path, clock: Clock
) -> None:
    store = tmp_path / "store"
    with running(drivers.start("ingest", tree, store, _hold=(4, go))) as first:
        first.until(lambda: recorded(store))
        stop(first, store)
        assert ingest(tree, store).rows == 60
        assert lease_module._TERM <= clock.waited < 1.2 * lease_module._TERM
        before = snapshot(store)
        os.kill(first.pid, signal.SIGCONT)
        go.touch()
        error, text, *_ = first.wait().error
    assert error == "OutputLocked"
    assert "This run changes nothing more; run the same command again" in text
    assert snapshot(store) == before
    assert not (tmp_path / "store.lease").exists()


def test_stopped_holder_that_goes_on_is_respected(
    drivers: Drivers, tree: Path, tmp_path: Path, go: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "_LOOKS", 600)
    store = tmp_path / "store"
    with running(drivers.start("ingest", tree, store, _hold=(4, go))) as first:
        first.until(lambda: recorded(store))
        stop(first, store)
        with (
            pytest.raises(OutputLocked, match=str(first.pid)),
            Lease.held(Location.of(store), lambda _: os.kill(first.pid, signal.SIGCONT)),
        ):
            pytest.fail("a live lease was taken")
        go.touch()
        assert first.wait().require_done().result["rows"] == 60


def leave_lease(path: Path, **changes: object) -> dict[str, object]:
    """Leave the lease of a driver that was killed on another machine."""
    with Lease.held(Location.of(path)):
        document = json.loads(Path(f"{path}.lease").read_text())
    left = {**document, "host": "far", "user": "ann", "machine": "another boot", "process": [77, "123"], **changes}
    Path(f"{path}.lease").write_text(json.dumps(left))
    return left


def test_living_lease_of_another_machine_is_respected(tree: Path, tmp_path: Path, clock: Clock) -> None:
    store = tmp_path / "store"
    left = leave_lease(store)

    def renew(event: Event) -> None:
        if "waiting up to 60 s" in event.message:
            (tmp_path / "store.lease").write_text(json.dumps({**left, "renewals": 1}))

    with pytest.raises(OutputLocked, match="is being written by process 77 of ann on far"):
        ingest(tree, store, on_event=renew)
    assert 0 < clock.waited < lease_module._TERM
    assert not store.exists()


def test_still_lease_of_another_machine_is_taken_over(tree: Path, tmp_path: Path, clock: Clock) -> None:
    leave_lease(tmp_path / "store", term=20)
    assert ingest(tree, tmp_path / "store").rows == 60
    assert 20 <= clock.waited < 24
    assert not (tmp_path / "store.lease").exists()


def test_pid_of_another_machine_is_not_looked_for_on_this_one(tmp_path: Path, clock: Clock) -> None:
    leave_lease(tmp_path / "store", host=socket.gethostname(), process=[2**22 + 1, "1"], term=20)
    with Lease.held(Location.of(tmp_path / "store")):
        assert 20 <= clock.waited < 24


def test_reused_pid_is_not_taken_for_the_holder(tree: Path, tmp_path: Path) -> None:
    with Lease.held(Location.of(tmp_path / "store")):
        document = json.loads((tmp_path / "store.lease").read_text())
    (tmp_path / "store.lease").write_text(json.dumps({**document, "process": [os.getpid(), "1"]}))
    assert ingest(tree, tmp_path / "store").rows == 60


@pytest.mark.parametrize("text", ["", "{", '{"token": "x"}'])
def test_torn_lease_is_taken_over(tree: Path, tmp_path: Path, text: str, clock: Clock) -> None:
    (tmp_path / "store.lease").write_text(text)
    assert ingest(tree, tmp_path / "store").rows == 60
    assert clock.waited >= lease_module._TERM


def test_lease_is_renewed_and_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "_RENEWALS", 600)
    path = tmp_path / "store.lease"
    with Lease.held(Location.of(tmp_path / "store")) as lease:
        wait_until(lambda: json.loads(path.read_text())["renewals"] >= 3)
        lease.check()
        lease.require()
    assert not path.exists()
    assert not [thread for thread in threading.enumerate() if thread.name == "lease"]


def test_driver_whose_lease_was_taken_does_not_publish(drivers: Drivers, tree: Path, tmp_path: Path, go: Path) -> None:
    store = tmp_path / "store"
    with running(drivers.start("ingest", tree, store, _hold=(4, go))) as first:
        first.until(lambda: recorded(store))
        document = json.loads((tmp_path / "store.lease").read_text())
        taken = {**document, "token": "other", "user": "bob"}
        (tmp_path / "store.lease").write_text(json.dumps(taken))
        go.touch()
        ended = first.wait()
    assert ended.error[0] == "OutputLocked"
    assert "bob" in ended.error[1]
    assert not json.loads((store / "zarr.json").read_text())["attributes"]["cvae_dist"]["published"]
    assert json.loads((tmp_path / "store.lease").read_text()) == taken, "the lease of the other was touched"


@pytest.mark.parametrize("races", [10, pytest.param(50, marks=pytest.mark.heavy)])
def test_only_one_of_two_wins_every_race(drivers: Drivers, tmp_path: Path, go: Path, races: int) -> None:
    tree = tmp_path / "tree"
    write_items(tree, 0, 4, folders=1)
    for number in range(races):
        store = tmp_path / f"store {number}"
        started = [drivers.start("ingest", tree, store, _hold=(0, go)) for _ in range(2)]
        if number == 0:  # in which they are sure to meet
            wait_until(lambda started=started: any(driver.has_ended for driver in started))
            go.touch()
        ended = [driver.wait() for driver in started]
        written = [end.result["rows_written"] for end in ended if not end.error]
        assert sorted(written) == [4] if number == 0 else sorted(written) in ([4], [0, 4])
        assert {end.error[0] for end in ended if end.error} <= {"OutputLocked"}
        assert RowStore.open(store).rows == 4


def test_only_one_of_many_wins(drivers: Drivers, tree: Path, tmp_path: Path, go: Path) -> None:
    started = [drivers.start("ingest", tree, tmp_path / "store", _hold=(0, go)) for _ in range(6)]
    wait_until(lambda: sum(driver.has_ended for driver in started) == 5)
    go.touch()
    ended = [driver.wait() for driver in started]
    assert sum(not end.error for end in ended) == 1
    assert {end.error[0] for end in ended if end.error} == {"OutputLocked"}
