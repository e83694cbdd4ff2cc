"""Which rank a process is, and what becomes of ranks that do not meet."""

import os
import signal
import socket
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from cvae_dist.errors import InvalidInput, RankLost
from cvae_dist.training import world
from cvae_dist.training.interruption import Interruption
from cvae_dist.training.world import Membership, World, as_bytes, from_bytes, interface_to

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500", "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip
SRUN = {
    "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08],other", "SLURM_JOB_ID": "1234567",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (TORCHRUN, Membership(3, 4, 1, 2, "10.0.0.1", 29500, True)),
        ({**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "2"}, Membership(3, 4, 1, 2, "10.0.0.1", 29500, True, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, Membership(1, 2, 0, 1, "a", 1)),
        ({"WORLD_SIZE": "1"}, Membership(0, 1, 0, 1, "", 0)),
        (SRUN, Membership(5, 8, 1, 4, "gpu07", 20_000 + 1234567 % 20_000)),
        ({**SRUN, "MASTER_ADDR": "here", "MASTER_PORT": "5"}, Membership(5, 8, 1, 4, "here", 5)),
        ({**SRUN, "SLURM_STEP_NODELIST": "one,two"}, Membership(5, 8, 1, 4, "one", 34_567)),
        # a script of sbatch is no rank, though its job has several tasks
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),
    ],
)
def test_the_environment_says_which_rank_this_is(environment: dict[str, str], expected: Membership | None) -> None:
    assert Membership.of(environment) == expected


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "not MASTER_ADDR, MASTER_PORT"),
        ({**TORCHRUN, "RANK": "x"}, "invalid literal"),
    ],
)
def test_half_an_environment_is_refused(environment: dict[str, str], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        Membership.of(environment)


def test_the_interface_is_the_one_that_reaches_the_host() -> None:
    assert interface_to("127.0.0.1") == "lo"
    assert interface_to("no such host.invalid") == ""


@pytest.fixture
def port() -> Iterator[int]:
    """A port that is taken."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def test_a_port_that_is_taken_is_told(port: int) -> None:
    with pytest.raises(RankLost, match=rf"rank 0 of 2 could not listen at 127.0.0.1:{port}.*MASTER_PORT"):
        World(Membership(0, 2, 0, 1, "127.0.0.1", port))


def test_ranks_that_do_not_come_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "_ARRIVAL", 0.6)
    alone = World(Membership(0, 2, 0, 1, "127.0.0.1", _free_port()))
    with pytest.raises(RankLost, match=r"only 1 of 2 ranks came within 1 s"):
        alone.join()
    with pytest.raises(RankLost, match=r"rank 1 of 2 met nobody at"):
        World(Membership(1, 2, 0, 1, "127.0.0.1", _free_port()))


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_ranks_that_torchrun_starts_again_hear_nothing_of_those_before() -> None:
    # that of torchrun's agent, which stays
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]

    def ranks(attempt: int) -> list[World]:
        return [World(Membership(rank, 2, rank, 2, "127.0.0.1", store.port, True, attempt)) for rank in range(2)]

    leader, follower = ranks(0)
    leader.tell({"rows": "of the first attempt"})
    assert follower.hear() == {"rows": "of the first attempt"}
    leader, follower = ranks(1)
    leader.tell({"rows": "of the second"})
    assert follower.hear() == {"rows": "of the second"}


def test_alone_nothing_is_added_up() -> None:
    one = World()
    values = torch.tensor([1.0, 2.0])
    one.sum(values)
    assert values.tolist() == [1.0, 2.0]
    assert one.broadcast(b"plan") == b"plan"
    with one.informed():
        one.tell({"rows": "x"})
    assert one.is_alone
    assert one.leads


def test_a_state_travels_as_bytes() -> None:
    state = {"weights": torch.arange(3), "step": 3, "loss": float("inf"), "names": ["a"]}
    found = from_bytes(as_bytes(state))
    assert found.pop("weights").tolist() == [0, 1, 2]
    assert found == {"step": 3, "loss": float("inf"), "names": ["a"]}


def test_a_rank_that_was_told_to_end_is_not_ended_again() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        with Interruption(sigterm=True, lasting=True):
            pass
        os.kill(os.getpid(), signal.SIGTERM)  # would end this process
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
