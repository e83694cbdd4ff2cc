"""``cvae-dist train`` as others start it: by torchrun, or as one rank of several on machines of their own."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil
import yaml

AT_ONCE, SLOWLY = "cvae_dist", "tests.faults.slowly"


class Command:
    """A running command, and all processes that come of it."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )  # fmt: skip

    def ranks(self) -> dict[int, psutil.Process]:
        """Return the processes that torchrun started, by their rank."""
        children = psutil.Process(self._process.pid).children()
        return {int(child.environ()["RANK"]): child for child in children if "RANK" in child.environ()}

    def press_ctrl_c(self) -> None:
        os.killpg(self._process.pid, signal.SIGINT)

    def end(self) -> tuple[int, str]:
        """Return its exit code, and what it and its children said."""
        said = self._process.communicate(timeout=120)[0]
        return self._process.returncode, said

    def require_done(self) -> str:
        code, said = self.end()
        assert code == 0, said
        return said

    def kill(self) -> None:
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self._process.pid).children(recursive=True):
                child.kill()
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def training(
    store: str, model: Path, settings: Mapping[str, object], *, launcher: Sequence[str] = (sys.executable,),
    module: str = AT_ONCE, options: Sequence[str] = (), environment: Mapping[str, str] = {},  # noqa: B006 - not changed
) -> Iterator[Command]:  # fmt: skip
    """Train a store under a launcher, and see that no process of it is left in the end."""
    config = model.with_name("config.yaml")
    plain = {name: [*value] if isinstance(value, tuple) else value for name, value in settings.items()}
    config.write_text(yaml.safe_dump(plain))
    arguments = [*launcher, "-m", module, "train", store, str(model), f"--config={config}", *options]
    command = Command(arguments, environment)
    try:
        yield command
        command.end()
        assert not processes_of(model)
    finally:
        command.kill()


def processes_of(model: Path) -> list[list[str]]:
    """Return the command lines of all processes that train a model."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            found.append(process.cmdline())
    return [words for words in found if str(model) in words]


def saved_step(model: Path) -> int:
    """Return the step of the last checkpoint; 0 where there is none."""
    return max((int(path.name[4:10]) for path in (model / "checkpoints").glob("step*.pt")), default=0)
