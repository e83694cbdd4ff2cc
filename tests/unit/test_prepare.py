from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cvae_dist.config import TrainConfig
from cvae_dist.errors import SettingsChanged
from cvae_dist.store import RowStore
from cvae_dist.training.precision import Decision
from cvae_dist.training.prepare import Beginning, Training, TrainingData
from cvae_dist.training.sampler import Sampler
from cvae_dist.verbs.ingest import ingest

SORTED = Sampler(10_000, 1024, 0, block_rows=100, window_rows=5000)


def test_a_checkpoint_keeps_its_order_and_another_is_refused() -> None:
    state: dict[str, Any] = Beginning(SORTED, "", Decision("float32")).state()
    assert Beginning.of(state).sampler == SORTED
    del state["order"]
    state["sampler"] = {**asdict(SORTED), "lanes": 48}
    with pytest.raises(SettingsChanged, match=r"order 1, and this version has order 2: .* --overwrite"):
        Beginning.of(state)


@pytest.mark.parametrize("shuffle", [None, 0])
def test_batches_that_vary_too_much_are_told_with_the_remedy_that_ends_it(tmp_path: Path, shuffle: int | None) -> None:
    np.save(tmp_path / "rows.npy", np.arange(400, dtype="f4").reshape(100, 4))
    ingest(str(tmp_path / "rows.npy"), str(tmp_path / "store"), shuffle=shuffle)
    training = Training.of(TrainingData.of(RowStore.open(str(tmp_path / "store"))), TrainConfig())
    assert training.note(replace(SORTED, batch_size=16)) == ""
    note = training.note(SORTED)
    if shuffle is None:
        assert "100 rows are read together, of 5,000 that are shuffled" in note
        assert "cvae-dist ingest SOURCE OTHER_STORE --shuffle 0" in note
    else:
        assert note == ""
