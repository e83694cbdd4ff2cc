"""``python -m tests.faults.slowly ...``: the command line, whose trainings take 20 ms more a step."""

import sys
import time
from typing import Any

from cvae_dist.cli import main
from cvae_dist.training.trainer import Trainer

SECONDS = 0.02


def slow_down() -> None:
    advance = Trainer.advance

    def advance_slowly(self: Trainer, *arguments: Any) -> None:
        time.sleep(SECONDS)
        advance(self, *arguments)

    Trainer.advance = advance_slowly  # type: ignore[method-assign]


if __name__ == "__main__":
    slow_down()
    sys.exit(main())
