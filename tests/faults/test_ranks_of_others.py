"""Ranks that others start: torchrun for real, and two processes with what srun puts into their environment."""

import sys
from pathlib import Path

import pytest

from cvae_dist.store import Location
from cvae_dist.training.checkpoint import Checkpoints
from tests.faults.commands import SLOWLY, saved_step, training
from tests.faults.drivers import wait_until
from tests.faults.test_ranks import SETTINGS, STEPS, alone, distance, store, weights
from tests.servers import free_port

pytestmark = pytest.mark.heavy
_ = alone, store  # fixtures
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def test_torchrun_makes_the_model_of_one_process(store: str, alone: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    with training(store, model, SETTINGS, launcher=TORCHRUN) as command:
        command.require_done()
    assert distance(weights(model), weights(alone)) <= 1e-4


def test_torchrun_starts_a_killed_rank_again(store: str, alone: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    with training(store, model, SETTINGS, launcher=[*TORCHRUN, "--max-restarts=2"], module=SLOWLY) as command:
        for step in (30, 60):
            wait_until(lambda step=step: saved_step(model) >= step)  # type: ignore[misc]
            command.ranks()[1].kill()
        said = command.require_done()
    assert "going on from step" in said
    assert distance(weights(model), weights(alone)) <= 1e-4


def test_ctrl_c_of_torchrun_leaves_a_checkpoint_and_no_process(store: str, alone: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    with training(store, model, SETTINGS, launcher=TORCHRUN, module=SLOWLY) as command:
        wait_until(lambda: saved_step(model) >= 30)
        command.press_ctrl_c()
        code, said = command.end()
    assert code != 0, said
    state = Checkpoints(Location.of(str(model)) / "checkpoints").load()
    assert state
    assert 30 <= state["trainer"]["step"] < STEPS, said
    with training(store, model, SETTINGS) as command:
        command.require_done()
    assert distance(weights(model), weights(alone)) <= 1e-4


def test_tasks_of_srun_make_the_model_of_one_process(store: str, alone: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    while (port := free_port()) < 20_000:  # those that are taken from the number of a job
        pass
    job = {
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "localhost",
        "SLURM_JOB_ID": str(port - 20_000),
    }  # fmt: skip
    tasks = [{**job, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    with (
        training(store, model, SETTINGS, environment=tasks[0]) as first,
        training(store, model, SETTINGS, environment=tasks[1]) as second,
    ):
        first.require_done()
        second.require_done()
    assert distance(weights(model), weights(alone)) <= 1e-4
