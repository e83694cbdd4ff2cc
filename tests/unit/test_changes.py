"""Listing beside manifest: every file is new, changed, deleted or unchanged, and the next manifest has each once."""

from collections.abc import Iterable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cvae_dist.sources.changes import compare, merged
from cvae_dist.sources.file_table import FileTable
from cvae_dist.sources.files import Files
from cvae_dist.store import Entries
from cvae_dist.store.columns import Columns

PATHS = st.text("ab/.-é", min_size=1, max_size=3)
LISTED = st.dictionaries(PATHS, st.tuples(st.integers(0, 2), st.sampled_from(["", "v", "w"])), max_size=30)
KNOWN = st.dictionaries(
    PATHS, st.tuples(st.integers(0, 2), st.sampled_from(["", "v", "w"]), st.sampled_from(["", "bad"])), max_size=30
)


def files(listed: dict[str, tuple[int, str]]) -> Files:
    sizes, versions = zip(*listed.values(), strict=True) if listed else ((), ())
    return Files(np.array(list(listed), object), np.array(sizes, np.int64), np.array(versions, object))


def entries(known: dict[str, tuple[int, str, str]], start: int = 0) -> Entries:
    count, ordered = len(known), sorted(known)
    size, version, status = zip(*(known[path] for path in ordered), strict=True) if known else ((), (), ())
    numbers, texts = np.arange(start, start + count), np.full(count, "", object)
    return Entries(
        np.array(ordered, object), np.array(size, np.int64), np.array(version, object), numbers, numbers, texts,
        np.array(status, object), texts,
    )  # fmt: skip


def cut(rows: Entries, size: int) -> list[Entries]:
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def rows(batches: Iterable[Columns]) -> Iterator[tuple[object, ...]]:
    for batch in batches:
        yield from zip(*(values.tolist() for values in batch.columns().values()), strict=True)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cvae_dist.sources.file_table._BATCH", 4)


@pytest.mark.usefixtures("tiny")
@given(LISTED, KNOWN, st.integers(1, 7))
def test_every_file_is_compared(
    listed: dict[str, tuple[int, str]], known: dict[str, tuple[int, str, str]], size: int
) -> None:
    changes = compare(FileTable.of(files(listed)), cut(entries(known), size))
    stored = {path: found[:2] for path, found in known.items() if not found[2]}
    new = {path: found for path, found in listed.items() if path not in stored}
    both = {path: (stored[path], listed[path]) for path in sorted(stored) if path in listed}
    changed = {
        path: (old, now) for path, (old, now) in both.items()
        if old[0] != now[0] or (old[1] and now[1] and old[1] != now[1])
    }  # fmt: skip
    assert list(rows(changes.new.batches())) == [(path, *new[path]) for path in sorted(new)]
    assert [row for part in changes.changed for row in rows([part.files])] == [
        (path, *now) for path, (_, now) in changed.items()
    ]
    assert [row[:3] for part in changes.changed for row in rows([part.known])] == [
        (path, *old) for path, (old, _) in changed.items()
    ]
    assert [row[0] for row in rows(changes.deleted)] == sorted(stored.keys() - listed.keys())
    assert changes.unchanged == len(both) - len(changed)
    assert (len(changes.new), len(changes.changed)) == (len(new), len(changed))


@given(KNOWN, KNOWN, st.integers(1, 7), st.integers(1, 7))
def test_the_next_manifest_has_every_file_once(
    known: dict[str, tuple[int, str, str]], new: dict[str, tuple[int, str, str]], size: int, other: int
) -> None:
    before, now = entries(known), entries(new, start=100)
    expected = {row[0]: row for row in rows([before]) if row[6] == ""} | {row[0]: row for row in rows([now])}
    batches = list(merged(cut(before, size), cut(now, other)))
    assert list(rows(batches)) == [expected[path] for path in sorted(expected)]
