"""One driver at a time on real object stores: races, and the lease of a holder that was killed on another machine."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from cvae_dist.errors import OutputLocked
from cvae_dist.store import lease
from cvae_dist.store.lease import Lease
from cvae_dist.store.urls import Location
from tests.faults.drivers import Clock, state_of, wait_until
from tests.servers import Served, serve

# Holds the lease of an output, as a process of another machine would, until it is killed, or has lost it.
HOLDER = """
import sys, time
from cvae_dist.errors import OutputLocked
from cvae_dist.store import Location, holder, lease

lease._RENEWALS = 600
holder._machine = lambda: "another boot"
with lease.Lease.held(Location.of(sys.argv[1])) as held:
    print("held", flush=True)
    while True:
        time.sleep(0.01)
        try:
            held.require()
        except OutputLocked as error:
            print(error, flush=True)
            break
"""


@pytest.fixture(params=["weed", pytest.param("moto", marks=pytest.mark.heavy)])
def served(request: pytest.FixtureRequest) -> Served:
    return serve(request.param)


@pytest.fixture
def output(served: Served) -> Location:
    return Location.of(f"{served.url}/rows", served.options)


@pytest.fixture
def far_holder(served: Served) -> "Iterator[subprocess.Popen[str]]":
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, f"{served.url}/rows"],
        env={**os.environ, **served.environment},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_two_drivers_race(served: Served) -> None:
    for number in range(10):
        output = Location.of(f"{served.url}/{number}", served.options)
        start, refused, outcomes = threading.Barrier(2), threading.Event(), []

        def take(
            output: Location = output,
            start: threading.Barrier = start,
            refused: threading.Event = refused,
            outcomes: list[str] = outcomes,
        ) -> None:
            start.wait(60)
            try:
                with Lease.held(output) as held:
                    assert refused.wait(60)
                    held.check()
                    held.token.require()
                    outcomes.append("won")
            except OutputLocked:
                outcomes.append("refused")
                refused.set()

        threads = [threading.Thread(target=take) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["refused", "won"]
        with Lease.held(output) as held:
            held.check()


def test_living_holder_elsewhere_is_respected(
    output: Location, far_holder: "subprocess.Popen[str]", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_LOOKS", 600)
    with pytest.raises(OutputLocked, match=f"is being written by process {far_holder.pid}"), Lease.held(output):
        pytest.fail("a live lease was taken")
    assert far_holder.poll() is None


def test_killed_holder_elsewhere_is_followed(
    output: Location, far_holder: "subprocess.Popen[str]", clock: Clock
) -> None:
    far_holder.kill()
    far_holder.wait()
    told: list[str] = []
    with Lease.held(output, told.append) as held:
        assert 60 <= clock.waited < 70
        held.check()
    assert len(told) == 1
    assert f"was being written by process {far_holder.pid}" in told[0]


def test_stopped_holder_elsewhere_finds_out(
    output: Location, far_holder: "subprocess.Popen[str]", clock: Clock
) -> None:
    place = output.beside(".lease")
    token = json.loads(place.read())["token"]
    far_holder.send_signal(signal.SIGSTOP)
    wait_until(lambda: state_of(far_holder.pid) == "T")
    try:
        with Lease.held(output) as held:
            assert clock.waited >= 60
            far_holder.send_signal(signal.SIGCONT)
            assert far_holder.stdout is not None
            assert f"was taken over by process {os.getpid()}" in far_holder.stdout.readline()
            held.check()
            assert json.loads(place.read())["token"] != token
    finally:
        far_holder.send_signal(signal.SIGCONT)
