"""Which cluster is used; `integration/test_cluster.py` starts real ones."""

import pytest

from cvae_dist.cluster import resolve_client
from cvae_dist.errors import InvalidInput, StorageFailed


def test_none_when_nothing_is_asked_for() -> None:
    with resolve_client() as client:
        assert client is None


@pytest.mark.parametrize(
    ("scheduler", "workers", "words"),
    [("tcp://a:1", 2, "name one of them"), (None, 0, "workers=0 starts no worker"), (None, -3, "workers=-3")],
)
def test_wrong_usage(scheduler: str | None, workers: int | None, words: str) -> None:
    with pytest.raises(InvalidInput, match=words), resolve_client(scheduler, workers):
        pass


@pytest.mark.parametrize("address", ["nonsense", "tcp://127.0.0.1:no", "localhost:8786"])
def test_address_that_cannot_be(address: str) -> None:
    with pytest.raises(InvalidInput, match="is no address of a Dask scheduler"), resolve_client(address):
        pass


def test_protocol_that_is_unknown() -> None:
    with pytest.raises(StorageFailed, match="no Dask scheduler answers at"), resolve_client("nonsense://x:1"):
        pass
