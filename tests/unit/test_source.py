"""What ingest asks of a source: anything that lists pieces and reads them will do."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from distributed import Client

from cvae_dist.cluster import resolve_client
from cvae_dist.errors import InvalidInput, SettingsChanged
from cvae_dist.events import Event
from cvae_dist.sources import BadFile, Column, Files, FileTable, Pieces, Schema, Source
from cvae_dist.store import RowStore
from cvae_dist.verbs.ingest import ingest
from cvae_dist.verbs.verify import verify


@dataclass(frozen=True)
class ArrayReader:
    """Reads arrays in memory; the smallest reader there is."""

    arrays: dict[str, np.ndarray]
    schema: Schema
    streams: bool = True

    def count(self, files: Files) -> tuple[np.ndarray, list[BadFile]]:
        return np.array([1 if self.schema.one_per_file else len(self.arrays[path]) for path in files.path]), []

    def remark(self, files: int, rows: int) -> str:
        return "arrays, as told"

    def read(self, pieces: Pieces, out: np.ndarray) -> dict[str, np.ndarray]:
        parts = zip(pieces.path, pieces.first, pieces.rows, strict=True)
        if self.schema.one_per_file:
            out[:] = np.stack([self.arrays[path].ravel() for path, _, _ in parts])
            return {"id": pieces.path}
        out[:] = np.concatenate([self.arrays[path][first : first + rows] for path, first, rows in parts])
        return {}


@dataclass(frozen=True)
class ArraySource:
    """Arrays in memory, by name."""

    arrays: dict[str, np.ndarray]
    one_per_file: bool = False
    url: str = "memory://arrays"

    def list(self) -> FileTable:
        sizes = np.array([array.nbytes for array in self.arrays.values()], dtype=np.int64)
        stamps = np.array([str(np.nansum(array)) for array in self.arrays.values()], dtype=object)
        return FileTable.of(Files(np.array(list(self.arrays), dtype=object), sizes, stamps))

    def reader(self, model: Files) -> ArrayReader:
        first = self.arrays[model.path[0]]
        shape = first.shape if self.one_per_file else first.shape[1:]
        columns = (Column("id", "string"),) if self.one_per_file else ()
        return ArrayReader(self.arrays, Schema(shape, first.dtype, self.one_per_file, columns))


def arrays(*lengths: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {f"part{i}/a": random.normal(size=(length, 3)).astype(np.float32) for i, length in enumerate(lengths)}


def test_it_is_one() -> None:
    assert isinstance(ArraySource({}), Source)
    assert not isinstance("tree", Source)


@pytest.fixture(scope="module", params=[None, 1], ids=["here", "cluster"])
def client(request: pytest.FixtureRequest) -> "Client | None":
    with resolve_client(workers=request.param) as resolved:
        yield resolved


def test_rows_grow_with_the_source(tmp_path: Path, client: "Client | None") -> None:
    parts, events = arrays(5, 0, 70_000, 3), list[Event]()
    held = dict(list(parts.items())[:3])
    result = ingest(ArraySource(held), tmp_path / "s", label="folder", client=client, on_event=events.append)
    assert (result.rows, result.rows_written) == (70_005, 70_005)
    assert "arrays, as told" in [event.message for event in events]
    assert ingest(ArraySource(held), tmp_path / "s", label="folder", client=client).nothing_to_do
    assert ingest(ArraySource(parts), tmp_path / "s", label="folder", client=client).rows == 70_008
    store = RowStore.open(str(tmp_path / "s"))
    np.testing.assert_array_equal(store.read("x"), np.concatenate(list(parts.values())))
    assert store.read("label")[[0, -1]].tolist() == ["part0", "part3"]
    assert store.document["lineage"]["source"] == "memory://arrays"
    assert verify(str(tmp_path / "s")).ok


def test_items_have_ids(tmp_path: Path) -> None:
    items = {f"{i}.img": np.full((2, 3), i, np.uint8) for i in range(7)}
    ingest(ArraySource(items, one_per_file=True), tmp_path / "s")
    store = RowStore.open(str(tmp_path / "s"))
    assert store.item_shape == (2, 3)
    assert store.read("id").tolist() == list(items)
    assert store.read("x")[:, 0].tolist() == list(range(7))


def test_what_is_wrong_is_named_by_the_source(tmp_path: Path) -> None:
    parts = arrays(4, 6)
    ingest(ArraySource(parts), tmp_path / "s")
    with pytest.raises(SettingsChanged, match="are not as they were: 1 changed: part1/a"):
        ingest(ArraySource({**parts, "part1/a": parts["part1/a"] + 100}), tmp_path / "s")
    parts["part1/a"][2, 1] = np.nan
    with pytest.raises(InvalidInput, match="memory://arrays/part1/a, row 2, holds NaN"):
        ingest(ArraySource(parts), tmp_path / "t")
    assert ingest(ArraySource(parts), tmp_path / "u", nonfinite="drop").dropped == 1
