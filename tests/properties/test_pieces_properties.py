"""Cutting pieces against a model that lists every row."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cvae_dist.sources import Pieces

Row = tuple[str, int]


@st.composite
def pieces(draw: st.DrawFn) -> Pieces:
    rows = np.array(draw(st.lists(st.integers(0, 5), min_size=1, max_size=8)), dtype=np.int64)
    first = np.array([draw(st.integers(0, 3)) for _ in rows], dtype=np.int64)
    names = np.array([f"f{number}" for number in range(len(rows))], dtype=object)
    return Pieces(names, first, rows, rows * 7, first * 3)


def listed(cut: Pieces) -> list[Row]:
    spans = zip(cut.path, cut.first.tolist(), cut.rows.tolist(), strict=True)
    return [(path, first + row) for path, first, rows in spans for row in range(rows)]


@settings(max_examples=200, deadline=None)
@given(pieces(), st.data())
def test_between(whole: Pieces, data: st.DataObject) -> None:
    model = listed(whole)
    start = data.draw(st.integers(0, len(model)))
    stop = data.draw(st.integers(start, len(model)))
    cut = whole.between(start, stop)
    assert listed(cut) == model[start:stop]
    assert (cut.rows > 0).all()
    assert cut.total == stop - start
    owner = {path: number for number, path in enumerate(whole.path)}
    assert cut.size.tolist() == [whole.size[owner[path]] for path in cut.path]
    assert cut.modified.tolist() == [whole.modified[owner[path]] for path in cut.path]


@settings(max_examples=200, deadline=None)
@given(pieces(), st.data())
def test_without(whole: Pieces, data: st.DataObject) -> None:
    model = listed(whole)
    dropped = sorted(data.draw(st.sets(st.integers(0, len(model) - 1)))) if model else []
    rest = whole.without(np.array(dropped, dtype=np.int64))
    assert listed(rest) == [row for number, row in enumerate(model) if number not in set(dropped)]
    assert (rest.rows > 0).all()
    if rest.total:
        middle = rest.total // 2
        assert listed(rest.between(0, middle)) + listed(rest.between(middle, rest.total)) == listed(rest)
