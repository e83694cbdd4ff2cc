"""However rows are spread over files, and in however many goes they come, the store is the same."""

import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvae_dist.store import Layout, RowStore
from cvae_dist.verbs.ingest import ingest
from cvae_dist.verbs.verify import verify

GRID = classmethod(lambda cls, arrays, rows=None, **_: cls(4, 2, arrays))


@pytest.mark.parametrize("shards_per_pack", [2, pytest.param(100, marks=pytest.mark.heavy)])
@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    bad=st.sets(st.integers(0, 53), max_size=6),
    data=st.data(),
)
def test_files_of_many_rows_in_several_goes(
    shards_per_pack: int, sizes: list[int], bad: set[int], data: st.DataObject
) -> None:
    rows = np.arange(sum(sizes) * 2, dtype=np.float32).reshape(-1, 2)
    rows[[row for row in bad if row < len(rows)]] = np.nan
    kept = rows[np.isfinite(rows).all(axis=1)]
    files = dict(zip([f"{n}.npy" for n in range(len(sizes))], np.split(rows, np.cumsum(sizes)[:-1]), strict=True))
    goes = data.draw(st.integers(1, len(sizes)))
    folder = Path(tempfile.mkdtemp())
    try:
        with mock.patch.object(Layout, "of", GRID), mock.patch.object(Layout, "shards_per_pack", shards_per_pack):
            for go in range(goes):
                for name in list(files)[go * len(files) // goes : (go + 1) * len(files) // goes]:
                    os.makedirs(folder / "tree", exist_ok=True)
                    np.save(folder / "tree" / name, files[name])
                so_far = sum(np.isfinite(np.load(path)).all(axis=1).sum() for path in (folder / "tree").iterdir())
                if so_far:
                    assert ingest(folder / "tree", folder / "store", nonfinite="drop").rows == so_far
            if len(kept):
                require_rows(folder / "store", kept, len(rows) - len(kept))
    finally:
        shutil.rmtree(folder)


def require_rows(folder: Path, kept: np.ndarray, dropped: int) -> None:
    store = RowStore.open(str(folder))
    np.testing.assert_array_equal(store.read("x"), kept)
    records = store.records()
    assert records.table[:, 1].tolist() == [min(4, len(kept) - start) for start in range(0, len(kept), 4)]
    assert store.document["dropped"] <= dropped
    np.testing.assert_allclose(store.statistics().mean, kept.astype(float).mean(0), rtol=1e-12)
    np.testing.assert_allclose(store.statistics().std, kept.astype(float).std(0), rtol=1e-12)
    assert verify(str(folder)).ok
