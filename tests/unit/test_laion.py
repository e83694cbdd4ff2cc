"""LAION's pairs: vectors in ``.npy`` files, what they are in Parquet files of the same order."""

import io
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cvae_dist.errors import InvalidInput
from cvae_dist.sources.files import BadFile, File
from cvae_dist.sources.laion import LaionReader, laion_reader, number_of, pairs
from cvae_dist.sources.listing import find_files
from cvae_dist.sources.options import TableOptions
from cvae_dist.sources.source import Column, Schema
from cvae_dist.store.urls import Location
from tests.servers import serve
from tests.tables import read


def pair(root: Location, number: int, rows: int, described: int | None = None) -> None:
    """Write a pair."""
    paths = {"npy": f"img_emb/img_emb_{number:04}.npy", "parquet": f"metadata/metadata_{number:04}.parquet"}
    vectors = np.full((rows, 4), number, np.float16)
    vectors[:, 0] = np.arange(rows)
    names = [f"{number}/{row}" for row in range(rows if described is None else described)]
    frame = pd.DataFrame({"image_path": names, "caption": "é", "width": np.arange(len(names))})
    for path, content in zip(paths.values(), (_npy(vectors), frame.to_parquet()), strict=True):
        if root.is_local:
            (Path(root.path) / path).parent.mkdir(exist_ok=True)
        (root / path).write(content)


def listed(root: Location) -> dict[str, File]:
    """Return the pairs by the path of the ``.npy`` file."""
    folder, found = find_files(root, {".npy", ".parquet"})
    return {file.path: file for files in pairs(str(root), found).batches() for file in files.of(folder)}


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def reader(root: Location, **options: object) -> LaionReader:
    return laion_reader(root, next(iter(listed(root).values())), TableOptions(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["local", "memory", "weed"])
def test_pairs(where: str, tmp_path: Path) -> None:
    served = serve("weed") if where == "weed" else None
    root = Location.of(tmp_path if where == "local" else "memory://laion")
    root = Location.of(served.url, served.options) if served else root
    pair(root, 0, 30)
    pair(root, 12, 40)
    found = reader(root, id="image_path", carry=("width",))
    assert found.schema == Schema((4,), np.dtype(np.float16), False, (Column("id", "string"), Column("width", "<i8")))
    rows, carried = read(found, listed(root)["img_emb/img_emb_0012.npy"], 5)
    assert rows[:, 0].tolist() == list(range(5, 40))
    assert rows[:, 1].tolist() == [12] * 35
    assert carried["id"].tolist() == [f"12/{row}" for row in range(5, 40)]
    assert carried["width"].tolist() == list(range(5, 40))
    assert pickle.loads(pickle.dumps(found)) == found


def test_a_task_is_sent_no_other_pairs(tmp_path: Path) -> None:
    root = Location.of(tmp_path)
    pair(root, 0, 3)
    alone = len(pickle.dumps(reader(root)))
    for number in range(1, 20):
        pair(root, number, 3)
    assert len(pickle.dumps(reader(root))) == alone


def test_nothing_carried(tmp_path: Path) -> None:
    root = Location.of(tmp_path)
    pair(root, 0, 3)
    rows, carried = read(reader(root), listed(root)["img_emb/img_emb_0000.npy"])
    assert (len(rows), carried) == (3, {})


def test_pairs_that_do_not_match(tmp_path: Path) -> None:
    root = Location.of(tmp_path)
    pair(root, 0, 3)
    pair(root, 1, 4, described=5)
    found = reader(root)
    with pytest.raises(BadFile, match=r"has 4 rows, metadata/metadata_0001.parquet describes 5") as caught:
        found.count_file(listed(root)["img_emb/img_emb_0001.npy"])
    assert caught.value.code == "pair"


@pytest.mark.parametrize(("name", "said"), [("2.npy", "metadata_2.parquet"), ("a.npy", r"metadata_\*.parquet")])
def test_vectors_that_nothing_describes(tmp_path: Path, name: str, said: str) -> None:
    root = Location.of(tmp_path)
    pair(root, 0, 3)
    pd.DataFrame({"caption": ["é"]}).to_parquet(tmp_path / "metadata/b.parquet")
    np.save(tmp_path / name, np.zeros((3, 4), np.float16))
    with pytest.raises(BadFile, match=f"has no {said}") as caught:
        reader(root).count_file(listed(root)[name])
    assert (caught.value.code, caught.value.path) == ("pair", name)


@pytest.mark.parametrize("version", ["", "1", "1\n2", "1\nx\n2\nmetadata/metadata_0000.parquet"])
def test_versions_that_are_none_of_a_pair(tmp_path: Path, version: str) -> None:
    root = Location.of(tmp_path)
    pair(root, 0, 3)
    found = reader(root)
    with pytest.raises(BadFile):
        found.count_file(replace(listed(root)["img_emb/img_emb_0000.npy"], version=version))


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_other_versions(tmp_path: Path, kind: str) -> None:
    root = Location.of(tmp_path)
    pair(root, 0, 3)
    found, before = reader(root, carry=("width",)), listed(root)["img_emb/img_emb_0000.npy"]
    (changed,) = tmp_path.rglob(f"*.{kind}")
    os.utime(changed, ns=(1, 1))
    assert listed(root)[before.path].version != before.version
    with pytest.raises(BadFile, match="was changed after it was listed") as caught:
        read(found, before)
    assert (caught.value.code, caught.value.path) == ("changed", before.path)


def test_what_is_wrong_with_the_metadata_is_said_of_the_pair(tmp_path: Path) -> None:
    root = Location.of(tmp_path)
    pair(root, 0, 3)
    pair(root, 1, 3)
    (tmp_path / "metadata/metadata_0001.parquet").write_bytes(b"PAR1")
    with pytest.raises(BadFile, match=r"is described by metadata/metadata_0001.parquet, which has a footer") as caught:
        reader(root).count_file(listed(root)["img_emb/img_emb_0001.npy"])
    assert (caught.value.code, caught.value.path) == ("truncated", "img_emb/img_emb_0001.npy")


def test_columns_of_metadata(tmp_path: Path) -> None:
    root = Location.of(tmp_path)
    pair(root, 0, 3)
    with pytest.raises(InvalidInput, match="leave out --columns"):
        reader(root, columns=("width",))
    with pytest.raises(BadFile, match="has no column 'captions'; did you mean 'caption'?"):
        reader(root, carry=("captions",))


def test_numbers() -> None:
    paths = ["img_emb/img_emb_0012.npy", "0012.npy", "metadata_7.parquet", "a/1/x.npy", "x"]
    assert [number_of(path) for path in paths] == ["0012", "0012", "7", None, None]
