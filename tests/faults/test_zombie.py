"""Drivers that sleep past their lease, or die, while what they began goes on: the next one's store stays whole."""

import itertools
import os
import signal

import pytest

from cvae_dist.errors import OutputLocked
from cvae_dist.store import RowStore, lease
from cvae_dist.store.layout import shard_number
from cvae_dist.store.urls import Location
from cvae_dist.verbs.verify import verify
from tests.faults.drivers import running, state_of
from tests.faults.remote import RemoteDrivers, Sources, content, place, require_content, written
from tests.servers import Served

pytestmark = pytest.mark.usefixtures("tiny_shards")


MOMENTS = ("among its shards", "after a look at the lease", "before publication", "before the last write")
DEFAULT = {("weed", MOMENTS[1], "append"), ("weed", MOMENTS[2], "ingest")}
CASES = [
    pytest.param(*case, marks=[] if case in DEFAULT else pytest.mark.heavy)
    for case in itertools.product(("local", "weed"), MOMENTS, ("ingest", "append"))
]


@pytest.mark.parametrize(("storage_name", "moment", "name"), CASES)
def test_frozen_driver_that_was_followed_changes_nothing(
    remote_drivers: RemoteDrivers, sources: Sources, storage_name: str, moment: str, name: str
) -> None:
    with place(storage_name) as served:
        freeze_and_follow(remote_drivers, sources, served, moment, name)


def freeze_and_follow(remote_drivers: RemoteDrivers, sources: Sources, served: Served, moment: str, name: str) -> None:
    other = sources.command("overwrite", served)
    if name == "append":
        remote_drivers.do(sources.command("ingest", served), served)
    before = written(other.output, served)
    with running(remote_drivers.begin(sources.command(name, served), served, _freeze=moment)) as frozen:
        frozen.until(lambda: state_of(frozen.pid) == "T")
        assert moment != MOMENTS[0] or written(other.output, served) > before
        follower = remote_drivers.begin(other, served, _machine="another").wait().require_done()
        assert follower.result["rows_written"] > 0
        assert follower.waited >= lease._TERM, "the lease was not watched"
        published = content(other.output, served)
        os.kill(frozen.pid, signal.SIGCONT)
        assert frozen.wait().error[0] == "OutputLocked"
    if moment in MOMENTS[:2]:
        forget_shards_beyond(other.output, served)
    require_content(other.output, served, published)
    assert verify(other.output, storage_options=served.options).ok


def forget_shards_beyond(url: str, served: Served) -> None:
    """Delete shards that the store does not have. A write can make one where none was; nothing reads it."""
    store = RowStore.open(url, served.options)
    for array in store.layout.arrays:
        place = store.location / array.name
        for entry in place.list():
            number = shard_number(entry.name)
            if number is not None and number >= store.layout.shards(store.rows):
                (place / entry.name).delete()


def test_a_write_is_refused_over_what_came_after_the_look_at_the_lease(storage: Served) -> None:
    """The object was there before; another driver replaces it between this one's look and its write."""
    place = Location.of(f"{storage.url}/object", storage.options)
    looks = []

    def look() -> None:
        if looks:
            raise OutputLocked("another has the lease")
        looks.append(place.write(b"of the other"))

    place.write(b"old")
    with pytest.raises(OutputLocked):
        place.write_guarded(b"of a ", b"zombie", guard=look)
    assert place.read() == b"of the other"
    place.write_guarded(b"of the ", b"other", guard=look)
    assert place.write_guarded(b"later", guard=lambda: None) == next(
        entry.version for entry in Location.of(storage.url, storage.options).list()
    )
