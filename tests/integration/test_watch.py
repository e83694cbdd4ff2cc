"""What "Watch a training" in the README shows: every line of it, on digits."""

import re
import shlex
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cvae_dist.cli import main
from cvae_dist.training import history as described
from cvae_dist.verbs.ingest import ingest

README = (Path(__file__).parents[2] / "README.md").read_text()
SECTION = README.partition("## Watch a training\n")[2].partition("\n## ")[0]
LINES = [line.partition("  #")[0].strip() for line in re.findall(r"^    \S.*$", SECTION, flags=re.MULTILINE)]
COMMANDS = [line for line in LINES if "cvae-dist" in line or line.startswith("tensorboard")]


def test_the_readme_shows_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tree").mkdir()
    np.save("tree/digits.npy", load_digits().data[:300].astype(np.uint8))
    ingest("tree", "rows.zarr")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    draw, board, train = COMMANDS
    variable, *words = shlex.split(train)
    assert variable.startswith("MLFLOW_TRACKING_URI=http")
    assert main([*words[1:], "--num-steps", "60", "--test-every", "20"]) == 0
    assert main(shlex.split(draw)[1:]) == 0
    assert Path("loss.png").exists()

    names: dict[str, Any] = {}
    exec("\n".join(line for line in LINES if line not in COMMANDS), names)  # noqa: S102
    history = names["history"]
    assert list(history.index) == [20, 40, 60]
    assert set(history.to_xarray().data_vars) == set(history.columns)
    drawn = set(history.columns) - {"epoch", "time"}
    assert set(EventAccumulator(board.split()[-1]).Reload().Tags()["scalars"]) == drawn
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert (set(run.data.metrics), run.info.status) == (drawn, "FINISHED")
    every = set(re.findall(r"``(\w+)``", described.__doc__ or ""))
    assert {"step", *history.columns} == every, "the list of the keys is complete"
