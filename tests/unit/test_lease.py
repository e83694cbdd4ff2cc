"""The lease object by itself; `faults/test_lease.py` has real drivers."""

import json
import os
import time
from pathlib import Path

import pytest

from cvae_dist.errors import OutputLocked
from cvae_dist.store.lease import Holder, Lease
from cvae_dist.store.urls import Location


@pytest.fixture(params=["local", "memory"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    return Location.of(tmp_path / "s" if request.param == "local" else f"memory://{tmp_path}/s")


def test_held_and_released(output: Location) -> None:
    place = output.beside(".lease")
    with Lease.held(output) as lease:
        document = json.loads(place.read())
        assert document["process"][0] == os.getpid()
        assert 50 < document["expires"] - time.time() <= 60
        lease.check()
        refusal = f"process {os.getpid()} of .* Two drivers on one output are refused"
        with pytest.raises(OutputLocked, match=refusal), Lease.held(output):
            pytest.fail("two drivers hold one lease")
        lease.check()
    assert not place.exists()
    with Lease.held(output):
        assert place.exists()


def test_released_when_the_work_fails(output: Location) -> None:
    with pytest.raises(ZeroDivisionError), Lease.held(output):
        raise ZeroDivisionError
    assert not output.beside(".lease").exists()


def test_deleted_or_replaced_lease_is_noticed(output: Location) -> None:
    place = output.beside(".lease")
    with Lease.held(output) as lease:
        place.delete()
        with pytest.raises(OutputLocked, match="nobody: it was deleted"):
            lease.check()
    with Lease.held(output) as lease:
        place.write(json.dumps({**json.loads(place.read()), "token": "x", "user": "eve"}).encode())
        with pytest.raises(OutputLocked, match="taken over by process .* of eve"):
            lease.check()
    assert place.exists(), "the lease of another is left alone"


def test_a_faster_driver_is_not_robbed(output: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two drivers find the same expired lease; the slower one must not delete what the faster one made of it."""
    place = output.beside(".lease")
    with Lease.held(output):
        expired = {**json.loads(place.read()), "expires": 0.0}
    place.write(json.dumps(expired).encode())
    real = Holder.is_gone.fget
    assert real is not None
    faster = {**expired, "token": "faster", "machine": "other", "expires": time.time() + 60}

    def slow(holder: Holder) -> bool:
        gone = real(holder)
        if gone:
            place.write(json.dumps(faster).encode())
        return gone

    monkeypatch.setattr(Holder, "is_gone", property(slow))
    with pytest.raises(OutputLocked), Lease.held(output):
        pass
    assert json.loads(place.read()) == faster


def test_holder_knows_its_own_process() -> None:
    me = Holder.me()
    assert me.is_gone, "its lease was never granted"
    alive = Holder(me.token, me.host, me.machine, me.user, me.process, time.time() + 60)
    assert not alive.is_gone
    later = Holder(me.token, me.host, me.machine, me.user, (me.process[0], "1"), time.time() + 60)
    assert later.is_gone
