"""LAION's pairs: vectors in ``.npy`` files, what they are in Parquet files of the same order."""

import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cvae_dist.errors import InvalidInput
from cvae_dist.sources.files import BadFile, File
from cvae_dist.sources.laion import LaionReader, laion_reader, number_of, pair_version
from cvae_dist.sources.options import TableOptions
from cvae_dist.sources.source import Column, FileReader, Schema
from cvae_dist.store.layout import Block
from cvae_dist.store.urls import Location
from tests.servers import serve
from tests.tables import found as find
from tests.tables import read


@dataclass(frozen=True)
class Vectors(FileReader):
    """Reads ``.npy`` files whole."""

    root: Location
    schema: Schema

    def count_file(self, file: File) -> int:
        return len(self._load(file))

    def read_file(self, file: File, first: int, out: Block) -> Mapping[str, Block]:
        out[:] = self._load(file)[first : first + len(out)]
        return {}

    def _load(self, file: File) -> Block:
        return np.frombuffer(file.read(128), np.float16).reshape(-1, 4)


def pair(root: Location, number: int, rows: int, described: int | None = None) -> dict[str, File]:
    """Write a pair, list it, and return it: the ``.npy`` file under its path, the other under its number."""
    paths = {"npy": f"img_emb/img_emb_{number:04}.npy", "parquet": f"metadata/metadata_{number:04}.parquet"}
    vectors = np.full((rows, 4), number, np.float16)
    vectors[:, 0] = np.arange(rows)
    names = [f"{number}/{row}" for row in range(rows if described is None else described)]
    frame = pd.DataFrame({"image_path": names, "caption": "é", "width": np.arange(len(names))})
    for path, content in zip(paths.values(), (_npy(vectors), frame.to_parquet()), strict=True):
        if root.is_local:
            (Path(root.path) / path).parent.mkdir(exist_ok=True)
        (root / path).write(content)
    npy, parquet = (find(root, path) for path in paths.values())
    return {f"{number:04}": parquet, npy.path: replace(npy, version=pair_version(npy.version, parquet.version))}


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    assert stream.tell() == 128 + array.nbytes
    return stream.getvalue()


def reader(root: Location, listed: dict[str, File], **options: object) -> LaionReader:
    metadata = {number: file for number, file in listed.items() if number.isdecimal()}
    model = next(file for path, file in listed.items() if path.endswith(".npy"))
    rows = Vectors(root, Schema((4,), np.dtype(np.float16)))
    return laion_reader(root, model, TableOptions(**options), rows, metadata)  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["local", "memory", "weed"])
def test_pairs(where: str, tmp_path: Path) -> None:
    served = serve("weed") if where == "weed" else None
    root = Location.of(tmp_path if where == "local" else "memory://laion")
    root = Location.of(served.url, served.options) if served else root
    listed = pair(root, 0, 30) | pair(root, 12, 40)
    found = reader(root, listed, id="image_path", carry=("width",))
    assert found.schema == Schema((4,), np.dtype(np.float16), False, (Column("id", "string"), Column("width", "<i8")))
    rows, carried = read(found, listed["img_emb/img_emb_0012.npy"], 5)
    assert rows[:, 0].tolist() == list(range(5, 40))
    assert rows[:, 1].tolist() == [12] * 35
    assert carried["id"].tolist() == [f"12/{row}" for row in range(5, 40)]
    assert carried["width"].tolist() == list(range(5, 40))
    assert pickle.loads(pickle.dumps(found)) == found


def test_nothing_carried(tmp_path: Path) -> None:
    root = Location.of(tmp_path)
    listed = pair(root, 0, 3)
    found = reader(root, listed)
    rows, carried = read(found, listed["img_emb/img_emb_0000.npy"])
    assert (len(rows), carried) == (3, {})


def test_pairs_that_do_not_match(tmp_path: Path) -> None:
    root = Location.of(tmp_path)
    listed = pair(root, 0, 3) | pair(root, 1, 4, described=5)
    found = reader(root, listed)
    with pytest.raises(BadFile, match=r"has 4 rows, metadata/metadata_0001.parquet describes 5") as caught:
        found.count_file(listed["img_emb/img_emb_0001.npy"])
    assert caught.value.code == "pair"
    (alone,) = [file for path, file in pair(root, 2, 3).items() if path.endswith(".npy")]
    for file, said in [(alone, "metadata_0002.parquet"), (replace(alone, path="a.npy"), r"metadata_\*.parquet")]:
        with pytest.raises(BadFile, match=f"has no {said}") as caught:
            found.count_file(file)
        assert caught.value.code == "pair"


def test_other_versions(tmp_path: Path) -> None:
    root = Location.of(tmp_path)
    listed = pair(root, 0, 3)
    found = reader(root, listed)
    again = pair(root, 0, 3)["img_emb/img_emb_0000.npy"]
    with pytest.raises(BadFile, match="another version of metadata/metadata_0000.parquet") as caught:
        found.count_file(again)
    assert caught.value.code == "changed"


def test_columns_of_metadata(tmp_path: Path) -> None:
    root = Location.of(tmp_path)
    listed = pair(root, 0, 3)
    with pytest.raises(InvalidInput, match="leave out --columns"):
        reader(root, listed, columns=("width",))
    with pytest.raises(BadFile, match="has no column 'captions'; did you mean 'caption'?"):
        reader(root, listed, carry=("captions",))


def test_numbers() -> None:
    paths = ["img_emb/img_emb_0012.npy", "0012.npy", "metadata_7.parquet", "a/1/x.npy", "x"]
    assert [number_of(path) for path in paths] == ["0012", "0012", "7", None, None]
