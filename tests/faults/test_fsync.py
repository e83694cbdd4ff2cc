"""What --fsync asks of the operating system, seen by strace: no machine is switched off here."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.drivers import write_items

_FSYNC = re.compile(r"(\d+)\s+fsync\(\d+<([^>]+)>(\)\s+= 0| <unfinished)")
_RESUMED = re.compile(r"(\d+)\s+<\.\.\. fsync resumed>\)\s+= 0")
_RENAME = re.compile(r'rename\("([^"]+)", "([^"]+)"\)\s+= 0')


def traced(folder: Path, *arguments: str) -> list[tuple[str, ...]]:
    """Run a command, and return its calls in order: ("fsync", path) and ("rename", from, to)."""
    log = folder / "log"
    command = ["strace", "-f", "-y", "-e", "trace=fsync,rename", "-o", str(log), sys.executable, "-m", "cvae_dist"]
    ended = subprocess.run([*command, *arguments], capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    if "ptrace" in ended.stderr and "not permitted" in ended.stderr:
        pytest.skip("this machine lets nobody trace processes")
    assert ended.returncode == 0, ended.stderr
    calls: list[tuple[str, ...]] = []
    unfinished: dict[str, str] = {}
    for line in log.read_text().splitlines():
        if found := _FSYNC.search(line):
            unfinished[found[1]] = found[2]
            if found[3] != " <unfinished":
                calls.append(("fsync", unfinished.pop(found[1])))
        elif found := _RESUMED.search(line):
            calls.append(("fsync", unfinished.pop(found[1])))
        elif found := _RENAME.search(line):
            calls.append(("rename", found[1], found[2]))
    return calls


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_every_object_is_on_the_disk_before_and_its_name_after_it_is_renamed(tmp_path: Path) -> None:
    write_items(tmp_path / "tree", 0, 10)
    store = tmp_path / "rows"
    calls = traced(tmp_path, "ingest", str(tmp_path / "tree"), str(store), "--fsync", "--quiet")
    renamed = [(number, call[1], call[2]) for number, call in enumerate(calls) if call[0] == "rename"]
    targets = {target for _, _, target in renamed}
    assert {str(store / name) for name in ("zarr.json", "x/zarr.json", "x/c.0.0")} <= targets
    for number, temporary, target in renamed:
        assert ("fsync", temporary) in calls[:number], f"{target} was renamed before its bytes were on the disk"
        assert ("fsync", str(Path(target).parent)) in calls[number:], f"the name of {target} was not put on the disk"
    new_folders = {str(path) for path in store.rglob("*") if path.is_dir()}
    synced = {call[1] for call in calls if call[0] == "fsync"}
    assert {str(Path(folder).parent) for folder in new_folders} <= synced, "names of new folders are on the disk, too"
    assert not [call for call in traced(tmp_path, "ingest", str(tmp_path / "tree"), f"{store}2") if call[0] == "fsync"]
