"""Cursors in tables: rows are decoded once, whichever threads want them."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest

from cvae_dist.sources import cursor
from cvae_dist.sources.cursor import rows_at

ROWS, BATCH, GROUP = 1000, 10, 500


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first row of every batch that was decoded."""
    monkeypatch.setattr(cursor, "_cursors", [])
    return []


def read(decoded: list[int], first: int, stop: int, key: str = "table") -> list[int]:
    """Read rows of a table that can be entered at every 500th row, in which each row holds its number."""

    def open_at(start: int) -> Iterator[pa.RecordBatch]:
        for row in range(start, ROWS, BATCH):
            decoded.append(row)
            yield pa.record_batch({"row": np.arange(row, row + BATCH)})

    with rows_at(key, first, stop, lambda row: row // GROUP * GROUP, open_at) as batches:
        return [number for batch in batches for number in batch.column(0).to_pylist()]


def test_threads_decode_neighbouring_rows_once(decoded: list[int]) -> None:
    edges = range(0, GROUP, 7)
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda first: read(decoded, first, first + 7), edges))
    assert [number for part in parts for number in part] == list(range(edges[-1] + 7))
    assert decoded == list(range(0, edges[-1] + 7, BATCH))


def test_rows_that_were_passed_are_still_there_for_a_while(decoded: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(decoded, 63, 77) == list(range(63, 77))
    assert read(decoded, 5, 12) == list(range(5, 12))
    assert decoded == list(range(0, 80, BATCH))
    monkeypatch.setattr(cursor, "_BEHIND", 0)
    read(decoded, 77, 95)
    decoded.clear()
    assert read(decoded, 5, 12) == list(range(5, 12))  # a second cursor, and the first goes on
    assert read(decoded, 95, 101) == list(range(95, 101))
    assert decoded == [0, 10, 100]


def test_a_cursor_ends_where_a_new_one_can_begin(decoded: list[int]) -> None:
    assert read(decoded, 490, 500) == list(range(490, 500))
    assert not cursor._cursors
    assert read(decoded, 495, 505) == list(range(495, 505))
    assert read(decoded, 990, 1010) == list(range(990, 1000))


def test_a_cursor_that_failed_is_not_used_again(decoded: list[int]) -> None:
    def fail(start: int) -> Iterator[pa.RecordBatch]:
        yield pa.record_batch({"row": np.arange(BATCH)})
        raise OSError("broken")

    with pytest.raises(OSError, match="broken"), rows_at("table", 0, 20, lambda row: 0, fail) as batches:
        list(batches)
    assert read(decoded, 0, 20) == list(range(20))


def test_few_cursors_are_kept(decoded: list[int]) -> None:
    for number in range(20):
        read(decoded, 0, 5, key=str(number))
    assert [one.key for one in cursor._cursors] == [str(number) for number in range(12, 20)]
