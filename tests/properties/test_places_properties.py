"""Places of files in a store whose files change, against the rows that have to be there."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cvae_dist.sources import Batch, Places, to_read
from cvae_dist.sources.changes import compare
from cvae_dist.sources.file_table import FileTable
from cvae_dist.sources.files import Files
from cvae_dist.store.manifest import NOWHERE, Entries

Tree = dict[str, tuple[int, int]]  # path: rows and version
NAMES = [f"{number:02d}" for number in range(30)]


def files(tree: Tree) -> Files:
    ordered = sorted(tree)
    versions = np.array(["{} {}".format(*tree[path]) for path in ordered], object)
    return Files(np.array(ordered, object), np.ones(len(tree), np.int64), versions)


def counted(table: FileTable, tree: Tree) -> Batch:
    def entries() -> "list[Entries]":
        return [
            Entries(
                part.path, part.size, part.version, np.full(len(part), NOWHERE),
                np.array([tree[path][0] for path in part.path], np.int64), *np.full((3, len(part)), "", object),
            )
            for part in table.batches()
        ]  # fmt: skip

    return Batch(entries())


def step(known: list[Entries], published: int, tree: Tree) -> tuple[Places, list[Entries]]:
    changes = compare(FileTable.of(files(tree)), known)
    places = Places(lambda: known, changes, counted(to_read(changes), tree), published)
    return places, list(places.files())


def laid_out(known: list[Entries], rows: int) -> list[tuple[str, str, int] | None]:
    """Return file, version and number in the file of every row of a store."""
    found: list[tuple[str, str, int] | None] = [None] * rows
    for part in known:
        for path, version, start, count in zip(part.path, part.version, part.start, part.rows, strict=True):
            assert 0 <= start <= rows - count
            for row in range(count):
                assert found[start + row] is None, "two files have the same row"
                found[start + row] = path, version, row
    return found


ROWS = st.one_of(st.just(1), st.integers(0, 5))
TREES = st.dictionaries(st.sampled_from(NAMES), st.tuples(ROWS, st.integers(0, 1)))


@settings(max_examples=100, deadline=None)
@given(st.lists(TREES, min_size=2, max_size=4))
def test_every_row_has_one_place(trees: list[Tree]) -> None:
    known: list[Entries] = []
    before: list[tuple[str, str, int] | None] = []
    for tree in trees:
        places, known = step(known, len(before), tree)
        rows = sum(count for count, _ in tree.values())
        assert places.rows == rows
        now = laid_out(known, rows)
        assert None not in now
        assert now[: places.first] == before[: places.first]
        assert now[places.last : len(before)] == before[places.last : rows]
        for first in {0, places.first, rows // 2, rows}:
            batch, start = places.behind(first)
            listed = [
                (path, version, row)
                for part in batch
                for path, version, count in zip(part.path, part.version, part.rows, strict=True)
                for row in range(count)
            ]
            assert listed[first - start :] == now[first:] or first == rows
        before = now


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.data())
def test_one_row_for_each_that_went_moves(count: int, data: st.DataObject) -> None:
    """Of files with one row each."""
    tree = {path: (1, 0) for path in NAMES[:count]}
    _, known = step([], 0, tree)
    before = laid_out(known, count)
    gone = data.draw(st.sets(st.sampled_from(NAMES[:count])))
    new = data.draw(st.integers(0, 3))
    tree = {path: what for path, what in tree.items() if path not in gone} | {f"n{n}": (1, 0) for n in range(new)}
    places, known = step(known, count, tree)
    now = laid_out(known, len(tree))
    assert places.moved_up == 0
    assert sum(one != other for one, other in zip(before, now, strict=False)) <= len(gone)
