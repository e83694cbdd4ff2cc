"""Stored objects that changed in an object store: `verify` names the shard, and nothing reads them as rows."""

from collections.abc import Callable

import pytest

from cvae_dist.errors import Corrupt
from cvae_dist.store import RowStore
from cvae_dist.store.reader import RowReader
from cvae_dist.store.urls import Location
from cvae_dist.verbs.ingest import ingest
from cvae_dist.verbs.verify import verify
from tests.faults.drivers import small_grid
from tests.faults.remote import Sources
from tests.servers import Served, serve

DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "flipped": (lambda data: data[:9] + bytes([data[9] ^ 4]) + data[10:], "changed"),
    "torn": (lambda data: data[: len(data) // 2], "truncated"),
    "empty": (lambda data: b"", "empty"),
}


@pytest.fixture(scope="module", params=["weed", "gcs"])
def stored(request: pytest.FixtureRequest, sources: Sources) -> tuple[Served, RowStore]:
    served = serve(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cvae_dist.store.Layout.of", small_grid())
        ingest(sources.first, f"{served.url}/rows", label="folder", storage_options=served.options)
    return served, RowStore.open(f"{served.url}/rows", served.options)


def problems(store: RowStore, served: Served) -> dict[tuple[str, int | None], str]:
    found = verify(store.url, storage_options=served.options).problems
    return {(problem.array, problem.shard): problem.reason for problem in found}


def require_unreadable(store: RowStore, name: str) -> None:
    """See that neither the rows nor a column can be read; the readers are new, and keep nothing from before."""
    with pytest.raises(Corrupt, match=name):
        store.read(name)
    if name == "x":
        with pytest.raises(Corrupt, match="x/c.1"):
            RowReader(store).read(4, 8)
        assert len(RowReader(store).read(8, 16)) == 8, "whole shards beside a damaged one are read"


@pytest.mark.parametrize("name", ["x", "id"])
def test_damaged_shard_is_named(stored: tuple[Served, RowStore], name: str) -> None:
    served, store = stored
    place = store.location / store.layout.array(name).key(1)
    whole = place.read()
    for damage, word in DAMAGES.values():
        place.write(damage(whole))
        assert word in problems(store, served)[name, 1]
        require_unreadable(store, name)
    place.delete()
    assert problems(store, served) == {(name, 1): f"missing ({len(whole):,} bytes expected)"}
    require_unreadable(store, name)
    place.write(whole)
    assert problems(store, served) == {}


def test_swapped_shards_are_named(stored: tuple[Served, RowStore]) -> None:
    served, store = stored
    places = [store.location / store.layout.array("x").key(shard) for shard in (1, 2)]
    first, second = (place.read() for place in places)
    exchange(places, second, first)
    assert problems(store, served) == {
        ("x", 1): "holds the bytes of shard 2", ("x", 2): "holds the bytes of shard 1"
    }  # fmt: skip
    exchange(places, first, second)
    assert problems(store, served) == {}


def exchange(places: list[Location], first: bytes, second: bytes) -> None:
    places[0].write(first)
    places[1].write(second)
