"""A store that is damaged under a running training: the shard is named, and with it back the same command goes on."""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from sklearn.datasets import load_digits

from cvae_dist.errors import Corrupt
from cvae_dist.events import Event
from cvae_dist.store import Location, RowStore, reader
from cvae_dist.training.checkpoint import Checkpoints
from cvae_dist.verbs.ingest import ingest
from cvae_dist.verbs.train import train
from tests.faults.drivers import small_grid
from tests.servers import serve

STEPS, DAMAGED_AT = 60, 10
SHARD, PLACE = 3, 100  # where the damage is
SETTINGS: dict[str, Any] = {
    "num_steps": STEPS, "dim_latent": 3, "cells_encoder": (16,), "batch_size": 50, "test_every": 10,
    "checkpoint_every": 10, "tb_logging": False, "precision": "float32", "multi_start": False,
}  # fmt: skip


class Rows(NamedTuple):
    """A store of several shards, and the room that a training has to keep them in: less than they take."""

    place: Location
    options: dict[str, str]
    buffer_bytes: int

    @property
    def shard(self) -> Location:
        store = RowStore.open(str(self.place / "rows"), self.options)
        return self.place / "rows" / store.layout.array("x").key(SHARD)

    def train(self, name: str, on_event: Callable[[Event], None] = lambda event: None) -> bytes:
        """Train, and return the weights."""
        url = f"{self.place}/{name}"
        settings = {**SETTINGS, "buffer_bytes": self.buffer_bytes}
        done = train(f"{self.place}/rows", url, storage_options=self.options, on_event=on_event, **settings)
        assert (done.steps, done.stopped_because) == (STEPS, "finished")
        return (self.place / name / "model.safetensors").read()

    def flip(self) -> None:
        """Change one bit, on a disk in place."""
        data = bytearray(self.shard.read())
        data[PLACE] ^= 4
        if self.place.is_local:
            with open(self.shard.path, "r+b") as file:
                file.write(data)
        else:
            self.shard.write(data)

    def lose(self) -> None:
        self.shard.delete()


@pytest.fixture(
    scope="module", params=["plain", "compressed", "weed", pytest.param("weed, compressed", marks=pytest.mark.heavy)]
)
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    folder = tmp_path_factory.mktemp("damaged")
    compressed = "compressed" in request.param
    digits = load_digits().data[:1203].reshape(-1, 8, 8)
    np.save(folder / "digits.npy", digits.astype(np.uint8 if compressed else np.float32))
    served = serve("weed") if "weed" in request.param else None
    place = Location.of(served.url, served.options) if served else Location.of(str(folder))
    options = served.options if served else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cvae_dist.store.Layout.of", small_grid(64))
        ingest(folder / "digits.npy", f"{place}/rows", storage_options=options)
    assert RowStore.open(f"{place}/rows", options).layout.array("x").compressed == compressed
    return Rows(place, options, 60_000 if compressed else 200_000)


@pytest.fixture(scope="module", autouse=True)
def _as_if_larger() -> Iterator[None]:
    """Keep no decoded chunks, of which a store of several gigabytes could keep next to none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "_DECODED_BYTES", 0)
        yield


@pytest.fixture(scope="module")
def undisturbed(rows: Rows) -> bytes:
    return rows.train("undisturbed")


@pytest.mark.parametrize("damage", [Rows.flip, Rows.lose])
def test_a_damaged_shard_is_named_and_nothing_is_lost(
    rows: Rows, undisturbed: bytes, damage: Callable[[Rows], None]
) -> None:
    name, whole, shard = damage.__name__, rows.shard.read(), rows.shard

    def listen(event: Event) -> None:
        if event.kind == "test" and event.done == DAMAGED_AT:
            damage(rows)

    with pytest.raises(Corrupt, match=rf"{re.escape(str(shard))}: .*cvae-dist verify"):
        rows.train(name, listen)
    state = Checkpoints(rows.place / name / "checkpoints").load()
    assert state
    assert DAMAGED_AT <= state["trainer"]["step"] < STEPS
    shard.write(whole)
    assert rows.train(name) == undisturbed
