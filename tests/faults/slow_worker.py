"""Given to Dask's workers as a preload: their tasks are slow while a file says so.

The file is named by an environment variable. It says where a task sleeps: when it has made its rows, or when it has
seen that its driver holds the lease and is about to write. The task leaves a file beside it when it falls asleep, and
sleeps until there is another one.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILE = "TEST_SLOW_TASKS"
ALARM = "alarm"


def dask_setup(worker: object) -> None:
    """Called by a worker."""
    from cvae_dist.cluster import source_map
    from cvae_dist.store import LeaseToken

    LeaseToken.require = _slow("after its look", LeaseToken.require)  # type: ignore[method-assign]
    module: Any = source_map
    module._CopyShard._check = _slow("after its rows", module._CopyShard._check)


def _slow(moment: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def slow(*arguments: Any) -> Any:
        asked = Path(os.environ[FILE])
        sleeps = asked.exists() and asked.read_text() == moment
        result = real(*arguments)
        if sleeps:
            asked.with_name(f"asleep {os.getpid()}").touch()
            while not asked.with_name(ALARM).exists():
                time.sleep(0.002)
        return result

    return slow
