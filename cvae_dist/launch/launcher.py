"""``--launcher``: where the ranks of a training run."""

import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cvae_dist.errors import InvalidInput
from cvae_dist.events import OnEvent
from cvae_dist.launch.gang import train_together
from cvae_dist.launch.local import LocalRanks
from cvae_dist.launch.rank import Task
from cvae_dist.launch.workers import Cluster
from cvae_dist.training.world import Membership

if TYPE_CHECKING:
    from distributed import Client


def membership(launcher: str) -> Membership | None:
    """Return which rank this process is, where it is one already.

    Raises
    ------
    InvalidInput
        ``launcher`` is "env", and the environment names no ranks.
    """
    if launcher not in ("auto", "env"):
        return None
    found = Membership.of(os.environ)
    if found is None and launcher == "env":
        raise InvalidInput(
            "launcher='env' finds no ranks in the environment (WORLD_SIZE and RANK). Start this command by torchrun, "
            "srun or a PyTorchJob, or leave the launcher out to train in this process"
        )
    return found


def launch(
    launcher: str, task: Task, on_event: OnEvent, max_restarts: int, client: "Client | None"
) -> dict[str, Any] | None:
    """Train by ranks in processes of their own, and return the result of rank 0; None where this process trains.

    Raises
    ------
    InvalidInput
        There is no such launcher.
    """
    word, _, count = launcher.partition(":")
    began = time.monotonic()
    if word in ("auto", "env") and not count:
        return None
    if word == "dask" and not count:
        cluster = Cluster(client, on_event)
        with cluster.alone():
            return train_together(lambda anew: cluster.start(_of(task, anew, began)), on_event, max_restarts)
    if word == "local" and count.isdecimal() and int(count) >= 1:
        size = int(count)
        return train_together(lambda anew: LocalRanks(_of(task, anew, began), size), on_event, max_restarts)
    raise InvalidInput(
        f"launcher={launcher!r} is unknown; known: auto (this process, or the rank that the environment names), "
        "local:N (N processes of this machine), env (a rank started by torchrun, srun or a PyTorchJob), dask (one "
        "rank on each worker)"
    )


def _of(task: Task, anew: bool, began: float) -> Task:
    """Return what ranks that start now are to do, in what is left of the time since ``began``."""
    config = task.config
    if config.max_time is not None:
        passed = (time.monotonic() - began) / 60
        config = config.model_copy(update={"max_time": max(0.0, config.max_time - passed)})
    return replace(task, overwrite=task.overwrite and anew, config=config)
