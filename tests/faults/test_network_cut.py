"""Two ranks on machines of their own, and the cable between them: network namespaces and a pair of veth, root only."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cvae_dist.store import Location
from cvae_dist.training.checkpoint import Checkpoints
from tests.faults.commands import SLOWLY, Command, saved_step, training
from tests.faults.drivers import wait_until
from tests.faults.test_ranks import SETTINGS, STEPS, alone, distance, store, weights

pytestmark = pytest.mark.heavy
_ = alone, store  # fixtures


class Machines:
    """Two namespaces, each with one end of a cable. They share the disk and nothing else."""

    def __init__(self) -> None:
        self.names = [f"cvae-dist-{os.getpid()}-{side}" for side in range(2)]
        self.addresses = ["10.77.0.1", "10.77.0.2"]

    def make(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        one, other = self.names
        ip("link", "add", "cable", "netns", one, "type", "veth", "peer", "name", "cable", "netns", other)
        for name, address in zip(self.names, self.addresses, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for link in ("lo", "cable"):
                ip("-n", name, "link", "set", link, "up")

    def cut(self) -> None:
        """Let nothing through any more; neither side is told that the other is gone."""
        ip("-n", self.names[1], "link", "set", "cable", "down")

    def mend(self) -> None:
        ip("-n", self.names[1], "link", "set", "cable", "up")

    def remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    @contextlib.contextmanager
    def training(self, store: str, model: Path, timeout: int) -> Iterator[list[Command]]:
        """Train with a rank on each machine."""
        with contextlib.ExitStack() as stack:
            yield [
                stack.enter_context(
                    training(
                        store, model, SETTINGS, launcher=["ip", "netns", "exec", name, sys.executable], module=SLOWLY,
                        options=["--launcher=env", f"--timeout={timeout}"],
                        environment={"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0",
                                     "MASTER_ADDR": self.addresses[0], "MASTER_PORT": "29500"},
                    )
                )
                for rank, name in enumerate(self.names)
            ]  # fmt: skip


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def machines() -> Iterator[Machines]:
    if os.geteuid() != 0:
        pytest.skip("only root makes network namespaces")
    if shutil.which("ip") is None:
        pytest.skip("ip is not installed; apt-get install iproute2")
    made = Machines()
    try:
        try:
            made.make()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces can be made here: {error.stderr.decode().strip()}")
        yield made
    finally:
        made.remove()


def test_a_short_cut_is_survived(store: str, alone: Path, tmp_path: Path, machines: Machines) -> None:
    model = tmp_path / "model"
    with machines.training(store, model, timeout=30) as ranks:
        wait_until(lambda: saved_step(model) >= 30)
        machines.cut()
        time.sleep(4)
        machines.mend()
        for rank in ranks:
            said = rank.require_done()
            assert "going on from" not in said
    lines = (model / "history.jsonl").read_text().splitlines()
    times = [0.0, *(json.loads(line)["time"] for line in lines)]
    assert max(later - earlier for earlier, later in zip(times, times[1:], strict=False)) > 3.9
    assert distance(weights(model), weights(alone)) <= 1e-4


def test_a_long_cut_is_noticed_at_the_timeout(store: str, alone: Path, tmp_path: Path, machines: Machines) -> None:
    model = tmp_path / "model"
    with machines.training(store, model, timeout=8) as ranks:
        wait_until(lambda: saved_step(model) >= 30)
        machines.cut()
        began = time.monotonic()
        for rank in ranks:
            code, said = rank.end()
            assert code == 1, said
            assert "another rank did not answer for 8 s (timeout=8)" in said
            assert "the same command goes on" in said
        assert 7 < time.monotonic() - began < 20
    state = Checkpoints(Location.of(str(model)) / "checkpoints").load()
    assert state
    assert 30 <= state["trainer"]["step"] < STEPS
    machines.mend()
    with machines.training(store, model, timeout=8) as ranks:
        for rank in ranks:
            rank.require_done()
    assert distance(weights(model), weights(alone)) <= 1e-4
