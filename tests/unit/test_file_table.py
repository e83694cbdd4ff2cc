"""Tables of files: in order, in bounded memory, each path once."""

import errno
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cvae_dist.errors import InvalidInput, StorageFailed
from cvae_dist.sources import spool
from cvae_dist.sources.file_table import Collected, FileTable, suffix
from cvae_dist.sources.files import Files
from cvae_dist.sources.spool import Sorter, Spool
from cvae_dist.store.columns import Columns, Integers, Texts, regrouped

PATHS = st.lists(st.text("aä/.-日\U0001f600", min_size=1, max_size=5), unique=True, max_size=60)


@dataclass(frozen=True)
class Keyed(Columns):
    key: Integers
    name: Texts


def files(*paths: str) -> Files:
    sizes = np.arange(len(paths)) * 3
    return Files(np.array(paths, object), sizes, np.array([f"v{path}" for path in paths], object))


def listed(table: FileTable) -> list[tuple[str, int, str]]:
    batches = ([values.tolist() for values in batch.columns().values()] for batch in table.batches())
    return [row for columns in batches for row in zip(*columns, strict=True)]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "_BATCH", 3)
    monkeypatch.setattr(spool, "_RUN", 7)
    monkeypatch.setattr(spool, "_FEW", 6)


@pytest.mark.usefixtures("tiny")
@given(PATHS, st.integers(1, 20))
def test_paths_come_sorted_whatever_their_order(paths: list[str], size: int) -> None:
    found = Collected()
    for first in range(0, len(paths), size):
        found.take(files(*paths[first : first + size]))
    table = found.finish()
    assert len(table) == len(paths)
    for _ in range(2):
        rows = listed(table)
        assert [path for path, _, _ in rows] == sorted(paths, key=str.encode)
        assert all(version == f"v{path}" for path, _, version in rows)
    kept = table.only(lambda path: "a" in path)
    assert [path for path, _, _ in listed(kept)] == [path for path in sorted(paths) if "a" in path]


@pytest.mark.usefixtures("tiny")
@given(st.lists(st.integers(-3, 3), max_size=80), st.integers(1, 30))
def test_any_table_is_sorted_by_any_column(keys: list[int], size: int) -> None:
    sorter = Sorter(Keyed, "key")
    rows = Keyed(np.array(keys, np.int64), np.array(list(map(str, keys)), object))
    for first in range(0, len(keys), size):
        sorter.append(rows[first : first + size])
    batches = list(sorter.finish())
    assert [key for batch in batches for key in batch.key] == sorted(keys)
    assert [name for batch in batches for name in batch.name] == list(map(str, sorted(keys)))


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("between", [0, 1, 6, 7, 30])
def test_a_path_that_is_there_twice_is_refused(between: int) -> None:
    found = Collected()
    for path in ["b", *(f"c{number:02d}" for number in range(between)), "b"]:
        found.take(files(path))
    with pytest.raises(InvalidInput, match="the path b is there twice"):
        found.finish()
    with pytest.raises(InvalidInput, match="the path a is there twice"):
        FileTable.of(files("a", "b", "a"))


@pytest.mark.usefixtures("tiny")
def test_what_comes_in_order_is_written_once() -> None:
    found = Sorter(Files, "path")
    for number in range(40):
        found.append(files(f"{number:02d}"))
    assert found.finish() is found._spool


def test_batches_are_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cvae_dist.sources.file_table._BATCH", 4)
    table = FileTable.of(files(*(f"{number:02d}" for number in range(10))))
    assert [len(batch) for batch in table.batches()] == [4, 4, 2]
    assert list(FileTable.of(files()).batches()) == []


@given(st.lists(st.integers(0, 9), max_size=20), st.integers(1, 8))
def test_regrouped_keeps_rows_and_their_order(sizes: list[int], size: int) -> None:
    ends = np.cumsum([0, *sizes])
    batches = [Keyed(np.arange(a, b), np.arange(a, b).astype(object)) for a, b in zip(ends, ends[1:], strict=False)]
    found = list(regrouped(batches, size))
    assert [key for batch in found for key in batch.key] == list(range(sum(sizes)))
    assert all(len(batch) == size for batch in found[:-1])
    assert all(0 < len(batch) <= size for batch in found)


def test_kinds_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    table = FileTable.of(files("b.NPY", "a.npy", "c/readme", "d.tar.gz", "e/.npy", "x.y/z"))
    assert table.kinds == {".npy": (3, "b.NPY"), "": (2, "c/readme"), ".gz": (1, "d.tar.gz")}
    assert table.only(lambda path: False).kinds == table.kinds
    names = ["a.", ".a", "a/.b.c", "a.b/c", ""]
    assert [suffix(path) for path in names] == [".", ".a", ".c", "", ""]
    monkeypatch.setattr("cvae_dist.sources.file_table._MOST_KINDS", 2)
    table = FileTable.of(files("a.1", "a.2", "a.3", "a.4", "b.1"))
    assert table.kinds == {".1": (2, "a.1"), ".2": (1, "a.2"), "": (2, "a.3")}


@pytest.mark.usefixtures("tiny")
def test_several_read_at_a_time() -> None:
    rows = Spool(Files)
    for number in range(200):
        rows.append(files(f"{number:03d}"))
    found: list[list[str]] = []
    threads = [
        threading.Thread(target=lambda: found.append([path for batch in rows for path in batch.path])) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[f"{number:03d}" for number in range(200)]] * 4


@pytest.mark.usefixtures("tiny")
def test_no_room_for_a_temporary_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageFailed, match="No space left on device.*TMPDIR"):
        FileTable.of(files(*"abcdefgh"))


@pytest.mark.usefixtures("tiny")
def test_the_temporary_file_has_no_name_and_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    table = FileTable.of(files(*"abcdefgh"))
    assert (len(listed(table)), os.listdir(tmp_path)) == (8, [])
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del table
    assert len(os.listdir("/proc/self/fd")) == before
