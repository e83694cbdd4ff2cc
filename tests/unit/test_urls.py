"""Locations: three writes that are whole or not at all, locally and in an object store."""

import errno
import os
from pathlib import Path

import pytest

from cvae_dist.errors import StorageFailed
from cvae_dist.store.urls import Location


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    location = Location.of(tmp_path / "root" if request.param == "local" else f"memory://{tmp_path}")
    return location


def test_write_read_create_delete(root: Location) -> None:
    place = root / "a" / "b"
    with pytest.raises(FileNotFoundError):
        place.read()
    assert (place.exists(), place.size()) == (False, 0)
    place.write(b"one", memoryview(b"two"), bytearray(b""))
    assert (place.read(), place.exists(), place.size(), root.exists()) == (b"onetwo", True, 6, True)
    place.write(b"")
    assert (place.read(), place.exists(), place.size()) == (b"", True, 0)
    with pytest.raises(FileExistsError):
        place.create(b"mine")
    assert place.read() == b""
    place.delete()
    place.delete()
    place.create(b"mine")
    assert place.read() == b"mine"
    (root / "c").write(b"c")
    root.clear(keep="c")
    assert not place.exists()
    assert (root / "c").read() == b"c"
    root.delete()
    assert not root.exists()
    assert root.is_blank()


def test_names(root: Location, tmp_path: Path) -> None:
    assert (root / "a").name == "a"
    assert str(root / "a").endswith("/a")
    assert (root / "a").beside(".lease").name == "a.lease"
    assert Location.of(root) is root
    assert Location.of(str(tmp_path) + "/") == Location.of(tmp_path)
    assert Location.of("~/x").path == os.path.expanduser("~/x")
    assert str(Location.of("memory://a/b")).startswith("memory://")


def test_many_buffers_and_partial_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffers = [bytes([number % 256]) * (number % 7) for number in range(5000)]
    real = os.writev

    def short(descriptor: int, parts: list[memoryview]) -> int:
        return real(descriptor, [parts[0][: max(1, len(parts[0]) // 2)]])

    monkeypatch.setattr(os, "writev", short)
    Location.of(tmp_path / "x").write(*buffers)
    assert (tmp_path / "x").read_bytes() == b"".join(buffers)


def test_failed_write_leaves_the_old_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Location.of(tmp_path / "x")
    place.write(b"old")

    def full(descriptor: int, parts: list[memoryview]) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "writev", full)
    with pytest.raises(StorageFailed, match="no room left to write .*free some room") as caught:
        place.write(b"new")
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert place.read() == b"old"


def test_sweep_removes_only_what_killed_writers_left(tmp_path: Path) -> None:
    place = Location.of(tmp_path)
    (tmp_path / "c").mkdir()
    for name in (".x.1.partial", "c/.0.2.partial", "c/0", "x"):
        (tmp_path / name).write_text(name)
    place.sweep_partial()
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == ["c", "c/0", "x"]


def test_blank(tmp_path: Path) -> None:
    place = Location.of(tmp_path / "x")
    assert place.is_blank()
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / ".zarr.json.1.partial").write_text("half")
    assert place.is_blank()
    (tmp_path / "x" / "y").write_text("")
    assert not place.is_blank()
    assert not (place / "y").is_blank()


def test_create_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: str) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    place = Location.of(str(tmp_path / "lease"))
    place.create(b"mine")
    with pytest.raises(FileExistsError):
        place.create(b"yours")
    assert place.read() == b"mine"
    assert [path.name for path in tmp_path.iterdir()] == ["lease"]
