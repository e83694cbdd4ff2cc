"""However rows are spread over files, and in however many goes they come, the store is the same."""

import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cvae_dist.store import Layout, RowStore
from cvae_dist.verbs.ingest import ingest
from cvae_dist.verbs.verify import verify

GRID = classmethod(lambda cls, arrays, rows=None: cls(4, 2, arrays))


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    bad=st.sets(st.integers(0, 53), max_size=6),
    data=st.data(),
)
def test_files_of_many_rows_in_several_goes(sizes: list[int], bad: set[int], data: st.DataObject) -> None:
    rows = np.arange(sum(sizes) * 2, dtype=np.float32).reshape(-1, 2)
    rows[[row for row in bad if row < len(rows)]] = np.nan
    kept = rows[np.isfinite(rows).all(axis=1)]
    files = dict(zip([f"{n}.npy" for n in range(len(sizes))], np.split(rows, np.cumsum(sizes)[:-1]), strict=True))
    goes = data.draw(st.integers(1, len(sizes)))
    folder = Path(tempfile.mkdtemp())
    try:
        with mock.patch.object(Layout, "of", GRID):
            for go in range(goes):
                for name in list(files)[go * len(files) // goes : (go + 1) * len(files) // goes]:
                    os.makedirs(folder / "tree", exist_ok=True)
                    np.save(folder / "tree" / name, files[name])
                so_far = sum(np.isfinite(np.load(path)).all(axis=1).sum() for path in (folder / "tree").iterdir())
                if so_far:
                    assert ingest(folder / "tree", folder / "store", nonfinite="drop").rows == so_far
        if len(kept):
            store = RowStore.open(str(folder / "store"))
            np.testing.assert_array_equal(store.read("x"), kept)
            records = [store.ledger.read(shard) for shard in range(store.layout.shards(len(kept)))]
            assert [record.rows for record in records if record] == [
                min(4, len(kept) - start) for start in range(0, len(kept), 4)
            ]
            assert store.document["dropped"] <= len(rows) - len(kept)
            assert sum(record.dropped for record in records if record) == store.document["dropped"]
            np.testing.assert_allclose(store.statistics().mean, kept.astype(float).mean(0), rtol=1e-12)
            assert verify(str(folder / "store")).ok
    finally:
        shutil.rmtree(folder)
