"""The lease object by itself; `faults/test_lease.py` has real drivers."""

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cvae_dist.errors import OutputLocked, StorageFailed
from cvae_dist.store import holder as holder_module
from cvae_dist.store import lease as lease_module
from cvae_dist.store.holder import Holder
from cvae_dist.store.lease import Lease
from cvae_dist.store.urls import Changed, Location
from tests.faults.drivers import Clock, wait_until


@pytest.fixture(params=["local", "memory"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    return Location.of(tmp_path / "s" if request.param == "local" else f"memory://{tmp_path}/s")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock by which leases are waited for, and grow old."""
    clock = Clock()
    monkeypatch.setattr(lease_module, "time", clock)
    return clock


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Renew leases, and look at those of others, every few milliseconds; they last as long as ever."""
    monkeypatch.setattr(lease_module, "_RENEWALS", 6000)
    monkeypatch.setattr(lease_module, "_LOOKS", 6000)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return what makes this machine another one, so that nothing is known of the processes of before."""
    return lambda: monkeypatch.setattr(holder_module, "_machine", lambda: "another boot")


def place_of(output: Location) -> Location:
    return output.beside(".lease")


def document_of(output: Location) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(place_of(output).read())
    return document


def change(output: Location, **changes: Any) -> dict[str, Any]:
    """Write a lease object as somebody else would; return it."""
    document = document_of(output) | changes
    place_of(output).write(json.dumps(document).encode())
    return document


def is_free(output: Location) -> bool:
    return not place_of(output).exists() or document_of(output)["state"] == "released"


def leave(output: Location, **changes: Any) -> dict[str, Any]:
    """Leave a lease as a driver does that was killed on another machine."""
    with Lease.held(output):
        document = document_of(output)
    place_of(output).write(json.dumps(document | {"machine": "far", "term": 20} | changes).encode())
    return document_of(output)


def test_held_and_released(output: Location) -> None:
    with Lease.held(output) as lease:
        document = document_of(output)
        assert document["process"][0] == os.getpid()
        assert (document["term"], document["state"]) == (60, "held")
        lease.check()
        assert document_of(output) == document | {"renewals": document["renewals"] + 1}
        refusal = f"process {os.getpid()} of .* Two drivers on one output are refused"
        with pytest.raises(OutputLocked, match=refusal), Lease.held(output):
            pytest.fail("two drivers hold one lease")
        lease.check()
        lease.require()
    assert is_free(output)
    with Lease.held(output):
        assert document_of(output)["token"] != document["token"]


def test_released_when_the_work_fails(output: Location) -> None:
    with pytest.raises(ZeroDivisionError), Lease.held(output):
        raise ZeroDivisionError
    assert is_free(output)


def test_where_a_delete_cannot_be_conditional_a_released_lease_stays(
    output: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Location, "remove", lambda *_: False)
    for _ in range(2):
        with Lease.held(output) as lease:
            lease.token.require()
        assert document_of(output)["state"] == "released"
        with pytest.raises(OutputLocked):
            lease.token.require()


def test_deleted_or_replaced_lease_is_noticed(output: Location) -> None:
    with Lease.held(output) as lease:
        place_of(output).delete()
        for _ in range(2):
            with pytest.raises(OutputLocked, match="was deleted"):
                lease.check()
        with pytest.raises(OutputLocked, match="was deleted"):
            lease.require()
        with pytest.raises(OutputLocked, match="no longer holds the lease"):
            lease.token.require()
    with Lease.held(output) as lease:
        taken = change(output, token="x", user="eve")
        with pytest.raises(OutputLocked, match="taken over by process .* of eve"):
            lease.check()
        with pytest.raises(OutputLocked, match="lost the lease to process .* of eve"):
            lease.token.require()
    assert document_of(output) == taken, "the lease of another is left alone"


def test_two_takers_of_one_abandoned_lease(output: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(output, process=[2**22 + 1, "1"], machine=Holder.me().machine)
    met, real = threading.Barrier(2), Lease._abandoned

    def slow(lease: Lease) -> str:
        version = real(lease)
        met.wait(60)  # both have found it abandoned before either takes it
        return version

    done = threading.Event()
    outcomes: list[str] = []

    def take() -> None:
        try:
            with Lease.held(output) as lease:
                outcomes.append("won")
                assert done.wait(60)
                lease.check()
        except OutputLocked:
            outcomes.append("refused")
            done.set()

    monkeypatch.setattr(Lease, "_abandoned", slow)
    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["refused", "won"]


@pytest.mark.usefixtures("busy")
def test_clocks_do_not_matter(output: Location, elsewhere: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time
    with Lease.held(output) as lease:
        elsewhere()
        monkeypatch.setattr(time, "time", lambda: real() + 61)
        with pytest.raises(OutputLocked, match="is being written by process"), Lease.held(output):
            pytest.fail("a live lease was taken")
        lease.check()


@pytest.mark.usefixtures("busy")
def test_processes_that_proc_hides_are_alive(output: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(pid: int) -> tuple[str, str]:
        raise FileNotFoundError(f"/proc/{pid}/stat")

    def forbidden(pid: int, number: int) -> None:
        raise PermissionError

    me = Holder.me()
    with Lease.held(output) as lease:
        monkeypatch.setattr(Holder, "me", lambda: me)
        monkeypatch.setattr(holder_module, "_state_and_start", hidden)
        monkeypatch.setattr(os, "kill", forbidden)
        with pytest.raises(OutputLocked), Lease.held(output):
            pytest.fail("the lease of another user was taken")
        lease.check()


def test_a_later_release_may_say_more(output: Location) -> None:
    with Lease.held(output) as lease:
        change(output, format=2)
        with pytest.raises(OutputLocked, match=f"process {os.getpid()}"), Lease.held(output):
            pytest.fail("a lease of another release was taken")
        lease.token.require()
        lease.check()


BROKEN = ["", "{", "[" * 10**5, "[]", "null", "{}", '{"token": "x"}', "\x00", '{"term": NaN}']


@pytest.mark.parametrize("text", [*BROKEN, "term"])
def test_unreadable_lease_is_taken_only_when_it_stands_still(output: Location, text: str, clock: Clock) -> None:
    data = json.dumps(leave(output, term=-1)).encode() if text == "term" else text.encode()
    place_of(output).write(data)
    with (
        pytest.raises(OutputLocked, match="somebody unknown"),
        Lease.held(output, on_wait=lambda _: place_of(output).write(data + b" ") and None),
    ):
        pytest.fail("it was renewed")
    clock.waited = 0
    with Lease.held(output):
        assert 60 <= clock.waited < 70


def test_still_lease_of_another_machine_is_taken_after_its_term(output: Location, clock: Clock) -> None:
    leave(output, user="ann", host="far")
    told: list[str] = []
    with Lease.held(output, told.append) as lease:
        assert 20 <= clock.waited < 24
        lease.check()
    (message,) = told
    assert "was being written by process" in message
    assert "of ann on far; waiting up to 20 s" in message


def test_a_driver_that_was_stopped_while_it_waited_still_looks_again(output: Location, clock: Clock) -> None:
    leave(output, term=600)

    def told(_: str) -> None:
        clock.sleep(3600)
        change(output, renewals=77)

    with pytest.raises(OutputLocked), Lease.held(output, told):
        pytest.fail("it was renewed")


def renew(output: Location) -> None:
    change(output, renewals=77)


def release(output: Location) -> None:
    change(output, state="released")


def delete(output: Location) -> None:
    place_of(output).delete()


def take(output: Location) -> None:
    change(output, token="another", user="bob")


@pytest.mark.parametrize(("event", "refused"), [(renew, True), (take, True), (release, False), (delete, False)])
def test_what_happens_while_waiting_counts(
    output: Location, event: Callable[[Location], None], refused: bool, clock: Clock
) -> None:
    leave(output)
    try:
        with Lease.held(output, lambda _: event(output)) as lease:
            lease.check()
    except OutputLocked:
        assert refused
        assert document_of(output)["state"] == "held"
    else:
        assert not refused
    assert clock.waited < 20


@pytest.mark.parametrize("method", ["create", "replace"])
def test_lost_acknowledgement(output: Location, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """The client repeats a write that had arrived, and the storage refuses the second one."""
    real = getattr(Location, method)

    def twice(place: Location, *arguments: Any) -> str:
        version: str = real(place, *arguments)
        if not place.name.endswith(".lease"):
            return version
        raise Changed("another version is there") if method == "replace" else FileExistsError

    if method == "replace":
        leave(output, state="released")
    once = iter([twice])
    monkeypatch.setattr(Location, method, lambda *arguments: next(once, real)(*arguments))
    with Lease.held(output) as lease:
        once = iter([twice])
        lease.check()
        lease.require()
    assert is_free(output)


def fail(*_: Any) -> Any:
    raise StorageFailed("no network")


def test_a_driver_whose_renewals_do_not_arrive_stops(
    output: Location, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Lease.held(output) as lease, monkeypatch.context() as patch:
        patch.setattr(Location, "replace", fail)
        with pytest.raises(StorageFailed):
            lease.check()
        lease.require()
        clock.sleep(61)
        for ask in (lease.require, lease.check):
            with pytest.raises(OutputLocked, match=r"could not be renewed for 6\d s.*This run changes nothing more"):
                ask()
        patch.undo()
        with pytest.raises(OutputLocked):
            lease.check()
    assert is_free(output), "it is still ours to give back"


@pytest.mark.usefixtures("busy")
def test_short_failures_do_not_matter(output: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = []

    def fail_and_count(*_: Any) -> Any:
        failures.append(True)
        fail()

    with Lease.held(output) as lease:
        with monkeypatch.context() as patch:
            patch.setattr(Location, "replace", fail_and_count)
            wait_until(lambda: len(failures) > 2)
        renewals = document_of(output)["renewals"]
        wait_until(lambda: document_of(output)["renewals"] > renewals + 3)
        lease.require()


def test_failing_release_is_no_failure_of_the_work(
    output: Location, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Lease.held(output):
        monkeypatch.setattr(Location, "remove", fail)
    assert "could not release its lease: no network" in caplog.text


def test_storage_that_ignores_conditions_is_refused(output: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Location, "require_conditional_writes", fail)
    with pytest.raises(StorageFailed), Lease.held(output):
        pytest.fail("two drivers could write one output")
    assert is_free(output)


def test_tasks_stop_when_their_driver_ends(output: Location) -> None:
    with Lease.held(output) as lease:
        token = pickle.loads(pickle.dumps(lease.token))
        assert token == lease.token
        token.require()
        lease.ending()
        with pytest.raises(OutputLocked, match="is ending, so its tasks write nothing more"):
            token.require()
        lease.check()
        assert document_of(output)["state"] == "ending"
        with pytest.raises(OutputLocked), Lease.held(output):
            pytest.fail("tasks may still run")
    with pytest.raises(OutputLocked):
        token.require()


def test_ending_is_told_to_nobody_once_the_lease_is_lost(output: Location) -> None:
    with Lease.held(output) as lease:
        taken = change(output, token="x")
        lease.ending()
        with pytest.raises(OutputLocked):
            lease.require()
    assert document_of(output) == taken


def test_token_shows_no_credentials() -> None:
    place = Location.of("memory://secret:password@bucket/rows")
    assert "password" not in repr(lease_module.LeaseToken(place, "abc"))


@pytest.fixture
def child() -> "Iterator[subprocess.Popen[bytes]]":
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_holder_knows_what_became_of_a_process(child: "subprocess.Popen[bytes]", elsewhere: Callable[[], None]) -> None:
    me = Holder.me()
    assert me.fate == "running"
    assert replace(me, process=(me.process[0], "1")).fate == "gone", "its pid was used again"
    assert replace(me, machine="").fate == "unknown"
    other = replace(me, process=(child.pid, holder_module._state_and_start(child.pid)[1]))
    child.send_signal(signal.SIGSTOP)
    wait_until(lambda: other.fate == "unknown")
    child.send_signal(signal.SIGCONT)
    wait_until(lambda: other.fate == "running")
    child.kill()
    wait_until(lambda: other.fate == "gone")  # not reaped yet
    child.wait()
    assert other.fate == "gone"
    elsewhere()
    assert other.fate == "unknown"
