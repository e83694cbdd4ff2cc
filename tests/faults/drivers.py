"""Drivers that run, and are killed, as processes of their own, and what a test needs to compare stores.

A server process imports the package once and forks a child for every command, so that a kill costs
milliseconds. Run as a script it is that server; given to Dask as a preload it makes workers slow, or lets them wait.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

ROWS_PER_SHARD = 4
SHARDS_PER_PACK = 2
_CHANGES = ("os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir")
_OVER_SAMPLE = ("x", "id", "label", "z")
_SLOW = "TEST_SLOW_SHARDS"


class Drivers:
    """The server, seen from a test."""

    def __init__(self, imports: Sequence[str] = ()) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, __file__, *imports],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def start(self, verb: str, *arguments: object, **options: object) -> "Driver":
        """Start ``verb(*arguments, **options)``; options beginning with an underscore are for the driver.

        Among these are ``_delay``, the seconds that every shard takes longer, and ``_hold``, (count, path): having
        begun so many shards, the driver, or each of its workers, waits until there is such a file.
        """
        return Driver(self, int(self._ask({"verb": verb, "arguments": arguments, "options": options})))

    def run(self, verb: str, *arguments: object, **options: object) -> "Ended":
        """Run a verb to its end, whatever that is."""
        return self.start(verb, *arguments, **options).wait()

    def close(self) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(30)
        self._server.stdout.close()

    def _ask(self, command: object) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps(command, default=str), file=self._server.stdin, flush=True)
        return json.loads(self._server.stdout.readline())


class Driver:
    """A running driver."""

    def __init__(self, drivers: Drivers, pid: int) -> None:
        self.pid = pid
        self._drivers = drivers

    @property
    def has_ended(self) -> bool:
        return state_of(self.pid) == "Z"

    def kill(self) -> "Ended":
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def until(self, condition: Callable[[], Any]) -> None:
        """Wait for something this driver does; fail with its error when it ends before."""

        def met() -> bool:
            ended = self.has_ended
            if not condition() and ended:
                end = self.wait().require_done()
                raise AssertionError(f"the driver was done before it happened: {end.result}")
            return bool(condition())

        wait_until(met)

    def wait(self) -> "Ended":
        return Ended(**self._drivers._ask({"wait": self.pid}))


class Ended:
    """How a driver ended.

    ``result`` is what the verb returned, ``error`` the class and text of what it raised, ``changes`` the
    number of changes to the file system it made, ``waited`` the seconds by which it moved its clock on while it
    watched the lease of another, and ``signal`` what killed it.
    """

    def __init__(
        self,
        signal: int = 0,
        result: Any = None,
        error: Sequence[str] = (),
        trace: str = "",
        changes: int = 0,
        waited: float = 0,
    ) -> None:
        self.signal, self.result, self.error = signal, result, tuple(error)
        self.trace, self.changes, self.waited = trace, changes, waited

    def require_done(self) -> "Ended":
        assert not self.signal, f"killed by signal {self.signal}"
        assert not self.error, f"{self.error}\n{self.trace}"
        return self


# ------------------------------------------------------------------------------- inside the driver


def small_grid(rows: int = ROWS_PER_SHARD) -> Any:
    """Return a ``Layout.of`` that makes shards of ``rows`` rows in two chunks."""
    from cvae_dist.store import Layout

    def of(cls: type[Layout], arrays: Any, rows_per_shard: int | None = None, **_: Any) -> Layout:
        size = rows_per_shard or rows
        return cls(size, size // 2 if size % 2 == 0 else size, arrays)

    return classmethod(of)


class Clock:
    """A clock for leases: waiting moves it on and takes no time, so that a term may be as long as everywhere."""

    def __init__(self) -> None:
        self.waited = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.waited

    def sleep(self, seconds: float) -> None:
        self.waited += seconds


def _slow_shards(_delay: float = 0, _hold: tuple[float, str] = (float("inf"), "")) -> None:
    from cvae_dist.cluster import write

    real, begun = write._write_shard, itertools.count()

    def slow(*arguments: Any) -> Any:
        time.sleep(_delay)
        if next(begun) >= _hold[0]:
            wait_until(Path(_hold[1]).exists)
        return real(*arguments)

    write._write_shard = slow


def _count_changes(below: str, die_at: int | None) -> list[int]:
    """Count changes of the file system below a path, and kill this process just before one of them."""
    count = [0]

    def hook(event: str, values: tuple[Any, ...]) -> None:
        if event not in _CHANGES or (event == "os.remove" and str(values[0]).endswith(".partial")):
            return
        if any(isinstance(value, str) and value.startswith(below) for value in values) or event == "os.remove":
            if count[0] == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            count[0] += 1

    sys.addaudithook(hook)
    return count


def _run(command: Mapping[str, Any]) -> dict[str, Any]:
    options = {name: value for name, value in command["options"].items() if not name.startswith("_")}
    private = {name: value for name, value in command["options"].items() if name.startswith("_")}
    from cvae_dist.store import Layout, lease

    clock = lease.time = Clock()
    Layout.of = small_grid(private.get("_rows", ROWS_PER_SHARD))
    Layout.shards_per_pack = SHARDS_PER_PACK
    if "_run_bytes" in private:
        from cvae_dist.cluster import shuffle

        shuffle._RUN_BYTES = private["_run_bytes"]
    if slow := {name: private[name] for name in ("_delay", "_hold") if name in private}:
        os.environ[_SLOW] = json.dumps(slow)
        os.environ["DASK_DISTRIBUTED__WORKER__PRELOAD"] = json.dumps([__file__])
        _slow_shards(**slow)
    if "_file_bytes" in private:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (private["_file_bytes"], resource.RLIM_INFINITY))
    if "_user" in private:
        _import_everything()  # the checkout may lie where the other user cannot read
        os.setuid(private["_user"])
    count = _count_changes(private.get("_below", "/"), private.get("_die_at"))
    try:
        from cvae_dist.cluster import resolve_client

        with resolve_client(private.get("_scheduler"), private.get("_workers")) as client:
            result = _verb(command["verb"])(*command["arguments"], **options, client=client)
    except BaseException as error:
        names = [base.__name__ for base in type(error).__mro__]
        return {"error": [names[0], str(error), *names[1:]], "trace": traceback.format_exc()}
    fields = {name: getattr(result, name) for name in ("rows", "rows_written", "dropped")}
    return {"result": fields, "changes": count[0], "waited": clock.waited}


def _verb(name: str) -> Callable[..., Any]:
    import cvae_dist

    verb: Callable[..., Any] = getattr(cvae_dist, name)
    return verb


def _serve(imports: Sequence[str]) -> None:
    import importlib

    for name in ("cvae_dist.verbs.ingest", "cvae_dist.cluster.client", *imports):
        importlib.import_module(name)
    answers: dict[int, int] = {}
    for line in sys.stdin:
        command = json.loads(line)
        if "wait" in command:
            print(json.dumps(_reap(command["wait"], answers)), flush=True)
            continue
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            _child(command, writer)
        os.close(writer)
        answers[pid] = reader
        print(json.dumps(pid), flush=True)


def _child(command: Mapping[str, Any], writer: int) -> None:
    try:
        devnull = os.open(os.devnull, os.O_RDWR)
        os.dup2(devnull, 0)
        os.dup2(2, 1)
        os.write(writer, json.dumps(_run(command)).encode())
    finally:
        os._exit(0)


def _reap(pid: int, answers: dict[int, int]) -> dict[str, Any]:
    with os.fdopen(answers.pop(pid), "rb") as file:
        data = file.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return {"signal": os.WTERMSIG(status)}
    answer: dict[str, Any] = json.loads(data or b'{"error": ["Died", "no answer"]}')
    return answer


def dask_setup(worker: object) -> None:
    """Called by a Dask worker that preloads this file."""
    _slow_shards(**json.loads(os.environ[_SLOW]))


# -------------------------------------------------------------------------------------- in the test


def write_items(root: Path, start: int, stop: int, features: int = 3, folders: int = 3) -> None:
    """Write items ``start:stop`` as one file each; every value is a function of its place."""
    for number in range(start, stop):
        folder = root / f"class {number % folders}"
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"item {number:04d}.npy", item(number, features))


def item(number: int, features: int = 3) -> "np.ndarray[Any, np.dtype[np.float32]]":
    return np.arange(features, dtype=np.float32) + 10 * number + 1


def snapshot(store: Path) -> dict[str, bytes | dict[str, Any]]:
    """Return every object of a store; of the group's metadata all but times and paths."""
    objects: dict[str, Any] = {
        str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()
    }
    if "zarr.json" in objects:
        group = json.loads(objects["zarr.json"])
        group["attributes"].pop("history")
        for place in ("source", "store", "model"):
            group["attributes"]["cvae_dist"]["lineage"].pop(place, None)
        objects["zarr.json"] = group
    return objects


def require_same(store: Path, expected: Mapping[str, Any]) -> None:
    found = snapshot(store)
    assert sorted(set(found) ^ set(expected)) == [], sorted(set(found) ^ set(expected))
    assert [name for name in found if found[name] != expected[name]] == []


def recorded(store: Path) -> list[int]:
    """Return the shards that are published, or recorded with a pack of the journal: no run makes these again."""
    try:
        ours = json.loads((store / "zarr.json").read_text())["attributes"]["cvae_dist"]
    except FileNotFoundError:
        return []
    published = -(-ours["rows"] // ours["layout"]["rows_per_shard"])
    packs = {int(path.name) for path in (store / "journal").glob("[0-9]*")}
    written = {int(path.name.split(".")[1]) for path in (store / ours["layout"]["arrays"][0]["name"]).glob("c.*")}
    return sorted({*range(published), *(shard for shard in written if shard // SHARDS_PER_PACK in packs)})


def stamps(store: Path, shards: Sequence[int]) -> dict[str, tuple[int, int]]:
    """Return inode and modification time of every object of some shards."""
    patterns = [f"{prefix}/c.{shard}{end}" for shard in shards for prefix in _OVER_SAMPLE for end in ("", ".*")]
    paths = [path for pattern in patterns for path in store.glob(pattern)]
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def _import_everything() -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tree").mkdir()
        np.save(Path(folder) / "tree" / "row.npy", np.ones(2))
        _verb("ingest")(f"{folder}/tree", f"{folder}/store")


def state_of(pid: int) -> str:
    """Return the state of a process, such as "T" while it is stopped and "Z" when it has ended."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0]


def wait_until(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)


@contextmanager
def running(driver: Driver) -> Iterator[Driver]:
    """Kill a driver if the test fails before it ended."""
    try:
        yield driver
    except BaseException:
        with suppress(ProcessLookupError):
            os.kill(driver.pid, signal.SIGKILL)
        raise


if __name__ == "__main__":
    _serve(sys.argv[1:])
