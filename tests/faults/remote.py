"""Drivers on every kind of storage: where they write, what they are told to do, and what must lie there afterwards.

Run as a module it is a server of drivers, as ``drivers.py``, whose children may also be told to pretend that they run
on another machine, or to freeze at a certain moment.
"""

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.faults import drivers
from tests.faults.drivers import Driver, Drivers, write_items
from tests.servers import NAMES, Served, serve

STORAGES = ("local", "shm", *NAMES)
FIRST, ALL, OTHER = 41, 66, 50  # rows of the trees: a first part, all of it, another one
_IMPORTS = ("cvae_dist.verbs.embed", "cvae_dist.cluster.model_map", "obstore.store", "botocore.session", "gcsfs")
_ROOT = Path(__file__).parents[2]
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - a tmpfs, not a file there


class RemoteDrivers(Drivers):
    """A server of drivers that write to ``served`` places."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=_ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def begin(self, command: "Command", served: Served, **private: object) -> Driver:
        """Start a command on a place."""
        return self.start(command.verb, *command.arguments, **command.options, _at=served.environment, **private)

    def do(self, command: "Command", served: Served, **private: object) -> dict[str, Any]:
        """Run a command to its end, which must be good, and return its result."""
        result: dict[str, Any] = self.begin(command, served, **private).wait().require_done().result
        return result


class Command(NamedTuple):
    """A verb, and what it is given."""

    verb: str
    arguments: tuple[str, ...]
    options: dict[str, Any]
    output: str


class Sources(NamedTuple):
    """Trees of which the second holds the files of the first, and a model that fits them."""

    first: Path | str
    every: Path | str
    other: Path | str
    model: Path

    @classmethod
    def made(cls, root: Path) -> "Sources":
        from cvae_dist.config import ModelConfig
        from cvae_dist.model.directory import save_model
        from cvae_dist.model.vae import VAE
        from cvae_dist.store import Moments

        first, every, other, model = (root / name for name in cls._fields)
        write_items(every, 0, ALL)
        for path in every.rglob("*.npy"):
            if int(path.stem[-4:]) < FIRST:
                link = first / path.relative_to(every)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.hardlink_to(path)
        write_items(other, 1000, 1000 + OTHER)
        rows = np.stack([drivers.item(number) for number in range(1000, 1000 + OTHER)])
        config = ModelConfig(cells_encoder=(8,), likelihood="gaussian", feature_normalization=True)
        save_model(str(model), VAE.of(config, Moments.of(rows), "<f4"), {})
        return cls(first, every, other, model)

    def uploaded(self, served: Served) -> "Sources":
        """Copy the trees to a place."""
        from cvae_dist.store.publication import mapped
        from cvae_dist.store.urls import Location

        names, root = ("first", "every", "other"), Location.of(served.url, served.options)
        paths = [(name, path) for name in names for path in Path(getattr(self, name)).rglob("*.npy")]
        list(mapped(lambda one: (root / one[0] / "/".join(one[1].parts[-2:])).write(one[1].read_bytes()), paths))
        return self._replace(**{name: f"{served.url}/{name}" for name in names})

    def command(self, name: str, served: Served) -> Command:
        """Return a command, by what it does at a place."""
        rows, latents = f"{served.url}/rows", f"{served.url}/latents"
        if name == "embed":
            return Command("embed", (rows, str(self.model), latents), {}, latents)
        tree = {"ingest": self.first, "append": self.every, "overwrite": self.other}[name]
        return Command("ingest", (str(tree), rows), {"label": "folder", "overwrite": name == "overwrite"}, rows)


@contextlib.contextmanager
def place(storage: str) -> Iterator[Served]:
    """Serve a place that nobody else uses."""
    if storage in NAMES:
        yield serve(storage)
        return
    if storage == "shm" and not os.access(_SHARED_MEMORY, os.W_OK):
        import pytest

        pytest.skip("there is no /dev/shm")
    folder = tempfile.mkdtemp(prefix="drivers-", dir=_SHARED_MEMORY if storage == "shm" else None)
    try:
        yield Served(folder, {}, {})
    finally:
        shutil.rmtree(folder)


def content(url: str, served: Served) -> dict[str, Any]:
    """Return every object of a store, but for times, paths and the driver's token in the group's metadata."""
    from cvae_dist.store.publication import mapped
    from cvae_dist.store.urls import Location

    location = Location.of(url, served.options)
    names = [entry.name for entry in location.list()]
    data = mapped(lambda name: (location / name).read(), names)
    objects: dict[str, Any] = dict(zip(names, data, strict=True))
    if "zarr.json" in objects:
        objects["zarr.json"] = _timeless(json.loads(objects["zarr.json"]))
    return objects


def _timeless(group: dict[str, Any]) -> dict[str, Any]:
    attributes = group["attributes"]
    attributes["history"] = [line.partition(" ")[2] for line in attributes["history"].splitlines()]
    for name in ("source", "store", "model"):
        attributes["cvae_dist"]["lineage"].pop(name, None)
    attributes["cvae_dist"].pop("driver", None)
    return group


def written(url: str, served: Served) -> int:
    """Count the shards of the first array of a store of rows."""
    from cvae_dist.store.urls import Location

    return sum(entry.name.startswith("c.") for entry in Location.of(f"{url}/x", served.options).list())


def require_content(url: str, served: Served, expected: Mapping[str, Any]) -> None:
    """Compare a store with another, object by object, and see that its driver left nothing beside it."""
    found = content(url, served)
    assert sorted(found) == sorted(expected)
    assert [name for name in found if found[name] != expected[name]] == []
    require_nothing_left(url, served)


def require_nothing_left(url: str, served: Served) -> None:
    """See that the lease is gone, or says that it is released, and that no temporary file is there."""
    from cvae_dist.store.urls import Location

    lease = Location.of(f"{url}.lease", served.options)
    with contextlib.suppress(FileNotFoundError):
        assert json.loads(lease.read())["state"] == "released"
        assert not lease.is_local
    if lease.is_local:
        assert not [path for path in Path(served.url).rglob(".*") if path.is_file()]


# ------------------------------------------------------------------------------- inside the driver


def _run(real: Callable[[Mapping[str, Any]], dict[str, Any]], command: Mapping[str, Any]) -> dict[str, Any]:
    from cvae_dist.store import holder

    options = command["options"]
    os.environ.update(options.get("_at", {}))
    if "_machine" in options:
        holder._machine = lambda: str(options["_machine"])
    for stop, option in ((_freeze, "_freeze"), (_die, "_die")):
        if option in options:
            _MOMENTS[options[option]](_once(stop))
    return real(command)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _freeze() -> None:
    """Do nothing more until another process lets this one go on: by its clock that is longer than a lease lasts."""
    from cvae_dist.store import lease

    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
    lease.time.sleep(2 * lease._TERM)


def _once(function: Callable[[], None]) -> Callable[[], None]:
    left = [function]

    def run() -> None:
        with contextlib.suppress(IndexError):
            left.pop()()

    return run


def _before_publication(stop: Callable[[], None]) -> None:
    """Stop after the last check, before anything of the publication is written."""
    from cvae_dist.store import RowStore

    real = RowStore.publish

    def publish(*arguments: Any) -> RowStore:
        stop()
        return real(*arguments)

    RowStore.publish = publish  # type: ignore[method-assign]


def _at_the_last_write(stop_before: Callable[[], None], stop_after: Callable[[], None]) -> None:
    """Stop around the write that shows the rows."""
    from cvae_dist.store import RowStore

    real = RowStore._replaced

    def replaced(store: RowStore, members: Any = None) -> RowStore:
        if not store.published or store.interrupted:
            return real(store, members)
        stop_before()
        store = real(store, members)
        stop_after()
        return store

    RowStore._replaced = replaced  # type: ignore[method-assign]


def _after_a_look(stop: Callable[[], None]) -> None:
    """Stop where a task has seen that its driver holds the lease, and has not written yet."""
    from cvae_dist.store import LeaseToken

    real = LeaseToken.require

    def require(token: LeaseToken) -> None:
        real(token)
        stop()

    LeaseToken.require = require  # type: ignore[method-assign]


def _among_its_shards(stop: Callable[[], None]) -> None:
    """Stop when two shards are written, as the first may replace the partial one of an append."""
    from cvae_dist.cluster import write

    real, written = write._write_shard, itertools.count(1)

    def write_and_stop(*arguments: Any) -> Any:
        shard = real(*arguments)
        if next(written) == 2:
            stop()
        return shard

    write._write_shard = write_and_stop


_MOMENTS: Mapping[str, Callable[[Callable[[], None]], None]] = {
    "among its shards": _among_its_shards,
    "after a look at the lease": _after_a_look,
    "before publication": _before_publication,
    "before the last write": lambda stop: _at_the_last_write(stop, lambda: None),
    "after the last write": lambda stop: _at_the_last_write(lambda: None, stop),
}


def _serve(imports: Sequence[str]) -> None:
    real = drivers._run
    drivers._run = lambda command: _run(real, command)
    drivers._serve(imports)


if __name__ == "__main__":
    _serve(_IMPORTS)
