"""Batches of files, cut into intervals, against a model that lists every row."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvae_dist.sources import Batch, Pieces, batch
from cvae_dist.store import Location
from cvae_dist.store.manifest import Entries, as_spans, read_spans

Row = tuple[str, int]


@pytest.fixture(autouse=True)
def small_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "_FILES", 3)


@st.composite
def entries(draw: st.DrawFn) -> tuple[Entries, list[Row]]:
    held = np.array(draw(st.lists(st.integers(0, 5), min_size=1, max_size=9)), dtype=np.int64)
    out = [sorted(draw(st.sets(st.integers(0, count - 1)))) if count else [] for count in held.tolist()]
    names = np.array([f"f{number}" for number in range(len(held))], dtype=object)
    rows = held - np.array([len(one) for one in out], dtype=np.int64)
    texts = np.array([as_spans(np.array(one, dtype=np.int64)) for one in out], dtype=object)
    blank = np.full(len(held), "", dtype=object)
    model = [
        (name, row)
        for name, count, left in zip(names, held.tolist(), out, strict=True)
        for row in range(count)
        if row not in left
    ]
    return Entries(names, held * 7, names + "v", np.cumsum(rows) - rows, rows, texts, blank, blank), model


def listed(pieces: Pieces) -> list[Row]:
    runs = zip(pieces.path, pieces.first.tolist(), pieces.rows.tolist(), strict=True)
    return [(path, first + row) for path, first, rows in runs for row in range(rows)]


@settings(max_examples=200, deadline=None)
@given(entries(), st.data())
def test_intervals(
    tmp_path_factory: pytest.TempPathFactory, drawn: tuple[Entries, list[Row]], data: st.DataObject
) -> None:
    files, model = drawn
    whole = Batch([files])
    assert (whole.files, whole.rows) == (len(files), len(model))
    inner = data.draw(st.sets(st.integers(0, len(model))))
    edges = np.array(sorted({0, len(model), *inner}), dtype=np.int64)
    cut = whole.cut(edges)
    assert len(cut) == len(edges) - 1
    staged = whole.stage(Location.of(tmp_path_factory.getbasetemp() / "staged"))
    for interval, start, stop in zip(cut, edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        pieces = staged.pieces(interval)
        assert listed(pieces) == model[start:stop]
        assert (pieces.rows > 0).all()
        assert pieces.version.tolist() == [path + "v" for path in pieces.path]
    left = sum(stop - start for text in files.dropped for start, stop in read_spans(text))
    assert whole.dropped == left


@settings(max_examples=100, deadline=None)
@given(entries(), st.data())
def test_identities_tell_rows_apart(drawn: tuple[Entries, list[Row]], data: st.DataObject) -> None:
    files, model = drawn
    edges = np.array(sorted({0, len(model)}), dtype=np.int64)
    seen = {interval.identity for interval in Batch([files]).cut(edges)}
    if not model:
        return
    number = data.draw(st.sampled_from([n for n, rows in enumerate(files.rows.tolist()) if rows]))
    for column, other in (("size", 99), ("version", "other"), ("path", "zz")):
        changed = {name: values.copy() for name, values in files.columns().items()}
        changed[column][number] = other
        (interval,) = Batch([Entries(**changed)]).cut(edges)
        assert interval.identity not in seen
