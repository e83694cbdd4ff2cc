"""The arrays that describe one publication: what is written is read, by plain Zarr too, anything else is refused."""

from pathlib import Path

import numpy as np
import pytest
import zarr

from cvae_dist.errors import Corrupt
from cvae_dist.store import STRING, Location
from cvae_dist.store.layout import encode_chunk
from cvae_dist.store.publication import Publication, Stored, mapped

VALUES = {
    "mean": np.arange(5.0),
    "big endian": np.arange(3, dtype=">i8"),
    "path": np.array(["a", "", "ü/日本"], object),
    "record": np.arange(35, dtype=np.uint64).reshape(5, 7),
    "dropped": np.zeros(0, np.int64),
    "moments": np.arange(24.0).reshape(3, 4, 2),
}


@pytest.fixture
def publication(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Publication:
    monkeypatch.setattr("cvae_dist.store.publication._CHUNK_BYTES", 140)  # several chunks, the last one partial
    publication = Publication(Location.of(tmp_path), "0123", {})
    for name, values in VALUES.items():
        dims = ("piece", "field", "feature")[: values.ndim]
        publication.write(name, values, dims, long_name="what")
    return publication


@pytest.mark.parametrize("name", VALUES)
def test_any_part_is_read(publication: Publication, name: str) -> None:
    values = VALUES[name]
    for start in range(len(values)):
        for stop in range(start, len(values) + 1):
            part = publication.read(name, start, stop)
            assert part.tolist() == values[start:stop].tolist()
            assert part.shape == values[start:stop].shape
    assert publication.read(name).tolist() == values.tolist()
    again = Publication(publication.store, "0123", publication.arrays)
    assert again.read(name).tolist() == values.tolist()


@pytest.mark.parametrize("name", VALUES)
def test_plain_zarr_reads_it(publication: Publication, tmp_path: Path, name: str) -> None:
    members = publication.finish()
    array = zarr.open_array(str(tmp_path / "publications/0123" / name), mode="r")
    assert array[...].tolist() == VALUES[name].tolist()
    assert dict(array.attrs) == {"long_name": "what"}
    assert members.keys() == {
        "publications", "publications/0123", *(f"publications/0123/{each}" for each in VALUES)
    }  # fmt: skip
    assert members[f"publications/0123/{name}"]["dimension_names"][0] == "piece"


@pytest.mark.parametrize("name", ["mean", "path", "record", "moments"])
def test_any_changed_byte_is_corrupt(publication: Publication, tmp_path: Path, name: str) -> None:
    path = min((tmp_path / "publications/0123" / name).glob("c.*"))
    data = path.read_bytes()
    changed = [data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :] for place in range(len(data))]
    for content in (*changed, b"", data[:3], data[:-1], data + b"\0", bytes(len(data))):
        path.write_bytes(content)
        with pytest.raises(Corrupt, match=rf"publications/0123/{name}/c.0.* cannot be trusted"):
            publication.read(name)
    path.unlink()
    with pytest.raises(Corrupt, match=rf"publications/0123/{name}/c.0.* is missing"):
        publication.read(name)


def test_a_whole_chunk_of_other_size_is_corrupt(publication: Publication, tmp_path: Path) -> None:
    for name in ("mean", "path"):
        stored = publication.arrays[name]
        path = tmp_path / "publications/0123" / name / "c.0"
        for rows in (stored.chunk - 1, stored.chunk + 1):
            path.write_bytes(b"".join(map(bytes, encode_chunk(VALUES[name][:1], rows))))
            with pytest.raises(Corrupt, match="cannot be trusted"):
                publication.read(name)


def test_what_the_document_says_of_an_array() -> None:
    stored = Stored.of("<f8", (1000, 4, 3_000_000))
    assert (stored.chunk, stored.chunks) == (1, 1000)
    assert Stored.of(STRING, (0,)).chunks == 0
    assert Stored.from_json({"dtype": "<f8", "shape": [1000, 4, 3_000_000], "chunk": 1}) == stored
    forged = [{"dtype": "object"}, {"dtype": "<c8"}, {"dtype": "|O"}, {"shape": [-1, 2]}, {"chunk": 0}, {"chunk": -5}]
    for change in forged:
        with pytest.raises(ValueError, match="an array of the publication is"):
            Stored.from_json({"dtype": "<f8", "shape": [3, 2], "chunk": 1, **change})


def test_mapped_keeps_the_order_and_raises() -> None:
    assert list(mapped(lambda number: number * number, range(100))) == [number * number for number in range(100)]
    assert list(mapped(str, [])) == []
    with pytest.raises(ZeroDivisionError):
        list(mapped(lambda number: 1 // number, [3, 2, 1, 0]))
