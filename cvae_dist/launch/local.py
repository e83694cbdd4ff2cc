"""Ranks on this machine."""

import os
import queue
from contextlib import ExitStack
from datetime import timedelta

from cvae_dist.launch.process import Message, RankProcess
from cvae_dist.launch.rank import Task

_HOST = "127.0.0.1"


class LocalRanks:
    """So many ranks of one generation, started here. They meet at a store that this process hosts."""

    def __init__(self, task: Task, size: int) -> None:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        self.size = size
        self.messages: queue.SimpleQueue[tuple[int, Message]] = queue.SimpleQueue()
        self._store = TCPStore(_HOST, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
        with ExitStack() as stack:
            self._ranks: list[RankProcess] = []
            stack.callback(self.close)
            for rank in range(size):
                self._ranks.append(RankProcess(task, rank, self._environment(rank), self._put))
            stack.pop_all()

    @property
    def pids(self) -> list[int]:
        """Numbers of the processes."""
        return [rank.pid for rank in self._ranks]

    def stop(self) -> None:
        """Ask all to write a checkpoint, together, and end."""
        for rank in self._ranks:
            rank.stop()

    def close(self) -> None:
        """End those that are still there, at once."""
        for rank in self._ranks:
            rank.kill()

    def _put(self, rank: int, message: Message) -> None:
        self.messages.put((rank, message))

    def _environment(self, rank: int) -> dict[str, str]:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.size, "LOCAL_WORLD_SIZE": self.size}
        threads = max(1, len(os.sched_getaffinity(0)) // self.size)
        return {
            **{name: str(value) for name, value in names.items()},
            "MASTER_ADDR": _HOST,
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        }
