"""Rows that hold NaN or infinity are found by tasks that are sent no paths."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cvae_dist.cluster import nonfinite
from cvae_dist.cluster.nonfinite import without_nonfinite
from cvae_dist.sources import Batch
from cvae_dist.store import Location
from cvae_dist.store.manifest import Entries
from tests.sources import scan


def test_tasks_name_intervals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.arange(60, dtype=np.float32).reshape(20, 3)
    rows[[0, 4, 5, 11, 19], [0, 1, 2, 0, 1]] = np.nan, np.inf, -np.inf, np.nan, np.nan
    (tmp_path / "tree").mkdir()
    for number, part in enumerate(np.split(rows, [5, 5, 12])):
        np.save(tmp_path / "tree" / f"part {number}.npy", part)
    reader, files = scan(tmp_path / "tree")
    nothing = np.full((3, len(files)), "", object)
    batch = Batch([Entries(files.path, files.size, files.version, files.first - 1, files.rows, *nothing)])
    sent: list[bytes] = []
    real = nonfinite._nonfinite_rows

    def look(task: Any) -> Any:
        sent.append(pickle.dumps((task.batch, task.interval)))
        return real(pickle.loads(pickle.dumps(task)))

    monkeypatch.setattr(nonfinite, "_nonfinite_rows", look)
    monkeypatch.setattr(nonfinite, "_SCAN_BYTES", 7 * 12)
    found = without_nonfinite(reader, batch, Location.of(tmp_path / "s.scan"), None)
    (left,) = found
    assert left.dropped.tolist() == ["0,4", "", "0,6", "7"]
    assert (left.rows.tolist(), found.rows, found.dropped) == ([3, 0, 5, 7], 15, 5)
    assert len(sent) == 3
    assert not any(b"part" in task for task in sent)
    assert not (tmp_path / "s.scan").exists()
