"""Trainings as real processes: killed with SIGKILL at any moment, or asked to stop, and started again."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from cvae_dist.config import TrainConfig
from cvae_dist.store import Location, Moments
from cvae_dist.store.reader import ArrayRows
from cvae_dist.training.fit import fit
from cvae_dist.training.prepare import TrainingData
from tests.faults.drivers import Clock, state_of, wait_until
from tests.servers import serve

# Imports once, then forks a process per line of "directory, step to die after, write to die in, pointer to die before,
# step to stop after for longer than its lease lasts, whether to wait for a signal when it runs, environment".
TRAININGS = """
import itertools, json, os, signal, sys, time
import numpy as np
from cvae_dist.config import TrainConfig
from cvae_dist.errors import OutputLocked
from cvae_dist.store import Location, Moments, lease
from cvae_dist.store.reader import ArrayRows
from cvae_dist.training.fit import fit
from cvae_dist.training.interruption import Interruption
from cvae_dist.training.prepare import TrainingData
from cvae_dist.training.saving import Saving
from cvae_dist.training.trainer import Trainer
from tests.faults.drivers import Clock

advance, replace, acquire, leases, savings = Trainer.advance, os.replace, lease.Lease._acquire, [], []
write, is_due, writes, pointers = Location.write, Saving.is_due, itertools.count(1), itertools.count(1)
request, asked_to_stop = Interruption._request, []

rows = np.random.default_rng(0).normal(size=(300, 20)).astype(np.float32)

def run(directory, num_steps=90):
    config = TrainConfig(num_steps=num_steps, test_every=20, checkpoint_every=10, tb_logging=False)
    return fit(TrainingData.in_memory(ArrayRows(rows), Moments.of(rows), (20,)), config, directory)

def train(directory, kill_at_step, kill_at_write, kill_at_pointer, stop_at_step, wait):
    lease.time = Clock()

    def acquire_and_keep(self):
        leases.append(self)
        acquire(self)

    def advance_and_die(self, *arguments):
        advance(self, *arguments)
        if self.step == 3:
            print("running", os.getpid(), flush=True)
            while wait and not asked_to_stop:
                time.sleep(0.001)
        if self.step == kill_at_step:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.step == stop_at_step:
            savings[0].wait()  # what is under way when a process is stopped is not promised to stay away
            with leases[0]._changing:  # while the file of the lease is locked nobody could take it over
                signal.raise_signal(signal.SIGSTOP)
            lease.time.sleep(2 * lease._TERM)

    def request_and_tell(self, *arguments):
        request(self, *arguments)
        asked_to_stop.append(True)

    def replace_or_die(source, target):
        ours = not target.endswith(".lease")  # which is written again as time passes
        if ours and next(writes) == kill_at_write:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    def write_or_die(self, *buffers):
        if self.name == "LATEST.json" and next(pointers) == kill_at_pointer:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, *buffers)

    def keep_and_ask(self, step):
        savings.append(self)
        return is_due(self, step)

    Location.write, Saving.is_due = write_or_die, keep_and_ask
    Trainer.advance, os.replace, lease.Lease._acquire = advance_and_die, replace_or_die, acquire_and_keep
    Interruption._request = request_and_tell
    try:
        return 5 if run(directory).figures.stopped_because == "interrupted" else 0
    except OutputLocked:
        return 6

run(None, 1)  # so that what torch imports late is imported once
for line in sys.stdin:
    directory, *numbers, environment = line.split()
    child = os.fork()
    if not child:
        os.environ.update(json.loads(environment))
        os._exit(train(directory, *map(int, numbers)))
    print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

STEPS = 90
STOPPED_CLEANLY = 5
LOST_ITS_LEASE = 6


class Trainings:
    """Starts training processes, one at a time."""

    def __init__(self, server: "subprocess.Popen[str]") -> None:
        self._server = server

    def start(
        self,
        directory: Path | str,
        kill_at_step: int = 0,
        kill_at_write: int = 0,
        kill_at_pointer: int = 0,
        stop_at_step: int = 0,
        wait: bool = False,
        environment: Mapping[str, str] = {},  # noqa: B006 - not changed
    ) -> None:
        assert self._server.stdin is not None
        numbers = f"{kill_at_step} {kill_at_write} {kill_at_pointer} {stop_at_step} {wait:d}"
        self._server.stdin.write(f"{directory} {numbers} {json.dumps(environment, separators=(',', ':'))}\n")
        self._server.stdin.flush()

    def _wait_for(self, word: str) -> int:
        assert self._server.stdout is not None
        for line in self._server.stdout:
            if line.startswith(word):
                return int(line.split()[1])
        raise AssertionError("the processes could not be started")

    def pid(self) -> int:
        return self._wait_for("running")

    def exit_code(self) -> int:
        return self._wait_for("ended")


@pytest.fixture(scope="module")
def trainings() -> Iterator[Trainings]:
    server = subprocess.Popen(
        [sys.executable, "-c", TRAININGS],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with server:
        yield Trainings(server)


@pytest.fixture(scope="module")
def undisturbed(trainings: Trainings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed")
    trainings.start(directory)
    assert trainings.exit_code() == 0
    assert [record["step"] for record in history_of(directory)] == [20, 40, 60, 80, 90]
    return directory


def history_of(directory: Path) -> list[dict[str, float]]:
    """Return the records but for what the clock decides."""
    records = [json.loads(line) for line in (directory / "history.jsonl").read_text().splitlines()]
    return [
        {name: one[name] for name in one if name not in ("time", "rows_per_second", "waiting_share")} for one in records
    ]


def assert_same_result(directory: Path, undisturbed: Path) -> None:
    weights = "model.safetensors"
    assert (directory / weights).read_bytes() == (undisturbed / weights).read_bytes()
    assert history_of(directory) == history_of(undisturbed)
    names = [{path.relative_to(top) for path in top.rglob("*")} for top in (directory, undisturbed)]
    assert names[0] == names[1], "a killed training left something behind"


def test_killed_after_random_steps_the_result_is_the_same(
    trainings: Trainings, undisturbed: Path, tmp_path: Path
) -> None:
    for attempt in range(3):
        steps = sorted(random.Random(time.time_ns()).sample(range(1, STEPS), 3))
        directory = tmp_path / str(attempt)
        for step in steps:
            trainings.start(directory, kill_at_step=step)
            assert trainings.exit_code() == -signal.SIGKILL, steps
        trainings.start(directory)
        assert trainings.exit_code() == 0
        assert_same_result(directory, undisturbed)


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.heavy)])
def test_killed_in_the_middle_of_writes_the_result_is_the_same(
    trainings: Trainings, undisturbed: Path, tmp_path: Path, step: int
) -> None:
    killed = 0
    end = 1 + 2 * 8 + 5 + 2  # of one run: history, then checkpoint, pointer and history, weights, config
    for write in range(1, 100, step):
        directory = tmp_path / str(write)
        trainings.start(directory, kill_at_write=write)
        if trainings.exit_code() == 0:
            break
        killed += 1
        assert (directory / "config.json").exists() == (write > end)
        trainings.start(directory)
        assert trainings.exit_code() == 0
        if write > end:  # of the pointer, which says that the checkpoints are done with: there is a model
            shutil.rmtree(directory / "checkpoints")
        assert_same_result(directory, undisturbed)
    assert killed == len(range(1, 1 + end + 1, step))


@pytest.mark.parametrize("pointer", ["kept", "lost"])
def test_killed_between_file_and_pointer_in_an_object_store(
    trainings: Trainings, undisturbed: Path, pointer: str
) -> None:
    served = serve("weed")
    model = Location.of(f"{served.url}/model", served.options)
    trainings.start(str(model), kill_at_pointer=3, environment=served.environment)
    assert trainings.exit_code() == -signal.SIGKILL
    names = sorted(entry.name for entry in (model / "checkpoints").list())
    assert [name[:10] for name in names] == ["LATEST.jso", "step000010", "step000020", "step000030"]
    if pointer == "lost":
        (model / "checkpoints" / "LATEST.json").delete()
    trainings.start(str(model), environment=served.environment)
    assert trainings.exit_code() == 0
    assert (model / "model.safetensors").read() == (undisturbed / "model.safetensors").read_bytes()
    assert sorted(entry.name for entry in model.list()) == ["config.json", "history.jsonl", "model.safetensors"]


def test_killed_from_outside_while_running_it_goes_on(trainings: Trainings, undisturbed: Path, tmp_path: Path) -> None:
    trainings.start(tmp_path)
    os.kill(trainings.pid(), signal.SIGKILL)
    if trainings.exit_code() == -signal.SIGKILL:
        trainings.start(tmp_path)
        assert trainings.exit_code() == 0
    assert_same_result(tmp_path, undisturbed)


def test_asked_to_stop_it_saves_and_goes_on_to_the_same_result(
    trainings: Trainings, undisturbed: Path, tmp_path: Path
) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        directory = tmp_path / number.name
        trainings.start(directory, wait=True)
        os.kill(trainings.pid(), number)
        assert trainings.exit_code() == STOPPED_CLEANLY
        assert 3 <= saved_step(directory) < STEPS
        trainings.start(directory)
        assert trainings.exit_code() == 0
        assert_same_result(directory, undisturbed)


@pytest.mark.parametrize("step", [25, 30, STEPS])
def test_stopped_for_longer_than_its_lease_it_changes_nothing_more(
    trainings: Trainings, tmp_path: Path, step: int, clock: Clock
) -> None:
    """It was about to go on, to save a checkpoint, or to end, when another training took the directory over."""
    trainings.start(tmp_path / "model", stop_at_step=step)
    pid = trainings.pid()
    wait_until(lambda: state_of(pid) == "T")
    try:
        rows = np.random.default_rng(1).normal(size=(100, 5)).astype(np.float32)
        data = TrainingData.in_memory(ArrayRows(rows), Moments.of(rows), (5,))
        config = TrainConfig(num_steps=3, tb_logging=False)
        assert fit(data, config, str(tmp_path / "model"), overwrite=True).figures.stopped_because == "finished"
        assert clock.waited >= 60
        before = files_below(tmp_path)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert trainings.exit_code() == LOST_ITS_LEASE
    assert files_below(tmp_path) == before


def files_below(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def saved_step(directory: Path) -> int:
    pointer = json.loads((directory / "checkpoints" / "LATEST.json").read_text())
    return int(pointer["checkpoints"][0]["file"].removeprefix("step").split("-")[0])
