"""The reference (CompressionVAE, TensorFlow), run in an environment and a process of its own."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

_BEST_BATCH = 4096  # rows; with its default of 64 it often embeds fewer a second
_PYTHON_VERSION = "3.11"  # the newest that its TensorFlow runs on
_ENVIRONMENT = Path(__file__).parents[3] / ".venv-reference"
_PYTHON = _ENVIRONMENT / "bin" / "python"
_READY = _ENVIRONMENT / ".ready"
_REQUIREMENTS = Path(__file__).with_name("reference_requirements.txt")
_WORKER = Path(__file__).with_name("reference_worker.py")

Floats = NDArray[np.float32]


class NotAvailable(Exception):
    """The reference's environment cannot be set up here."""


class Took(NamedTuple):
    """What one call of the reference took, in seconds; ``cpu`` of all its threads."""

    wall: float
    cpu: float


class Reference:
    """The reference, to be used as a context; arrays go to it and come back as files.

    Attributes
    ----------
    took : Took
        Of the latest call, without what the files cost.
    """

    took: Took

    def __init__(self, cpus: Iterable[int]) -> None:
        self._cpus = sorted(cpus)

    def __enter__(self) -> Self:
        python = _interpreter()
        self._temporary = TemporaryDirectory()
        self._folder = Path(self._temporary.name)
        self._numbers = itertools.count()
        with (self._folder / "log").open("w") as log:
            self._process = subprocess.Popen(
                [python, _WORKER, *map(str, self._cpus)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=self._folder,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._temporary.cleanup()

    def hand_over(self, array: NDArray[np.generic]) -> Path:
        """Write an array where the reference can read it, once for many calls."""
        place = self._folder / f"{next(self._numbers)}.npy"
        np.save(place, array)
        return place

    def train(self, x: NDArray[np.generic], num_steps: int | None = None, **settings: object) -> None:
        """Build and train a model; ``settings`` are its constructor's, and what is not given is its default."""
        arguments = {} if num_steps is None else {"num_steps": num_steps}
        self._ask("train", rows=self.hand_over(x), settings=settings, **arguments)

    def embed(self, x: NDArray[np.generic] | Path, batch_size: int = _BEST_BATCH) -> Floats:
        return self._map("embed", x, batch_size=batch_size)

    def decode(self, z: Floats | Path) -> Floats:
        return self._map("decode", z)

    def _map(self, do: str, rows: NDArray[np.generic] | Path, **arguments: object) -> Floats:
        place = rows if isinstance(rows, Path) else self.hand_over(rows)
        into = self._folder / "result.npy"
        self._ask(do, rows=place, into=into, **arguments)
        return np.load(into)

    def _ask(self, do: str, **arguments: object) -> None:
        print(json.dumps({"do": do, **arguments}, default=str), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            log = (self._folder / "log").read_text().splitlines()
            raise RuntimeError("the reference died: " + "\n".join(log[-20:]))
        self.took = Took(**json.loads(answer))


def _interpreter() -> Path:
    """Return the interpreter of the reference's environment, which is set up first where it is not: 1.6 GB, minutes."""
    requirements = _REQUIREMENTS.read_text()
    if not _READY.exists() or _READY.read_text() != requirements:
        _set_up()
        _READY.write_text(requirements)
    return _PYTHON


def _set_up() -> None:
    name = f"python{_PYTHON_VERSION}"
    python = sys.executable if sys.version.startswith(_PYTHON_VERSION + ".") else shutil.which(name)
    if python is None:
        raise NotAvailable(f"the reference needs {name}, and there is none")
    _run(python, "-m", "venv", "--clear", _ENVIRONMENT)
    _run(_PYTHON, "-m", "pip", "install", "--quiet", "--no-deps", "--requirement", _REQUIREMENTS)


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise NotAvailable(f"the reference cannot be installed: {' '.join(lines[-1:])}")
