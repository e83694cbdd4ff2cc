"""Locations: three writes that are whole or not at all, locally and in an object store."""

import errno
import fcntl
import os
import pickle
import traceback
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request

import pytest

from cvae_dist.errors import CvaeDistError, StorageFailed
from cvae_dist.store import files, objects, remote
from cvae_dist.store.urls import Buffer, Location


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


def test_a_lock_that_is_held_is_waited_for_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_LOCK_SECONDS", 0.05)
    place, lock = Location.of(tmp_path / "x"), tmp_path / ".x.lock"
    with open(lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StorageFailed, match=r"\.x\.lock has been held .* so .*x was not changed; stop the process"):
            place.create(b"mine")
        Location.of(tmp_path).sweep_partial()
        Location.of(tmp_path).clear(keep="nothing")
        assert lock.exists()
        assert list(Location.of(tmp_path).list()) == []
        assert Location.of(tmp_path).is_blank()
    Location.of(tmp_path).sweep_partial()
    assert not lock.exists()
    lock.touch()
    place.create(b"a lock that a killed process left is taken")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_lock_that_was_removed_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its holder removes it; who opened it before must not take the file without a name for the lock."""
    real = fcntl.flock
    meddlers = [lambda lock: lock.unlink(), lambda lock: (lock.unlink(), lock.touch())]

    def flock(descriptor: int, how: int) -> None:
        if meddlers:
            meddlers.pop()(tmp_path / ".x.lock")
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    Location.of(tmp_path / "x").create(b"mine")
    assert not meddlers
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(StorageFailed, match="has no file locks .* Nothing was changed; mount it with locks"):
        Location.of(tmp_path / "x").create(b"mine")
    assert not (tmp_path / "x").exists()


def test_fsync_comes_before_the_rename_and_reaches_new_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real_sync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")).partition(".partial")[1] or "folder")
        real_sync(descriptor)

    def replace(source: str, target: str) -> None:
        calls.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    place = Location.of(Location.of(tmp_path / "new"), fsync=True) / "x"
    place.write(b"content")
    assert calls == ["folder", ".partial", "rename", "folder"]
    assert place == Location.of(tmp_path / "new", fsync=True) / "x"
    calls.clear()
    Location.of(tmp_path / "y").write(b"content")
    assert calls == ["rename"]


def test_list_follows_no_links_to_folders(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x").write_bytes(b"1")
    (tmp_path / "linked").symlink_to(tmp_path / "d" / "x")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    assert [(entry.name, entry.size) for entry in Location.of(tmp_path).list()] == [("d/x", 1), ("linked", 1)]


def test_a_bucket_of_aws_is_asked_for_its_region(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    headers = Message()
    answers: list[OSError] = [URLError("no network"), HTTPError("", 301, "elsewhere", headers, None)]

    def urlopen(request: Request, timeout: float) -> None:
        assert request.full_url == "https://s3.amazonaws.com/a-bucket"
        raise answers.pop(0)

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    headers["x-amz-bucket-region"] = "eu-central-1"
    for region in ("us-west-2", "eu-central-1"):
        client = objects._s3_client(objects.ObjectStore("s3", "a-bucket", {"key": "k", "secret": "s"}))
        assert client.config["region"] == region
    named = objects.ObjectStore("s3", "a-bucket", {"key": "k", "secret": "s", "client_kwargs": {"region_name": "r"}})
    assert objects._s3_client(named).config["region"] == "r"


def test_options_that_only_s3fs_knows_go_to_it() -> None:
    assert isinstance(Location.of("s3://b/x", {"anon": True}).storage, objects.ObjectStore)
    for options in ({"requester_pays": True}, {"client_kwargs": {"config": None}}):
        assert isinstance(Location.of("s3://b/x", options).storage, remote.S3Files)


def test_one_client_serves_all_copies_of_a_location() -> None:
    options = {"key": "k", "secret": "s", "client_kwargs": {"region_name": "us-east-1"}}
    copies = [pickle.loads(pickle.dumps(Location.of("s3://b/x", dict(options)))).storage for _ in range(3)]
    assert len({id(objects._client(storage)) for storage in copies}) == 1
    assert objects._client(Location.of("s3://b/x", {**options, "key": "other"}).storage) is not objects._client(
        copies[0]
    )


SECRET = "hunter2-and-more"


@pytest.mark.parametrize(
    ("url", "options"),
    [
        *((f"{protocol}://alice:{SECRET}@127.0.0.1:1/x", {}) for protocol in ("https", "ftp", "webdav", "sftp", "smb")),
        *((f"{protocol}://alice:{SECRET}@bucket/x", {}) for protocol in ("s3", "gs", "az")),
        (f"http://127.0.0.1:1/x.zarr?X-Amz-Signature={SECRET}", {}),
        ("s3://bucket/x", {"key": "a-key", "secret": SECRET, "endpoint_url": "http://127.0.0.1:1", "anon": "nonsense"}),
        ("s3://bucket/x", {"key": "a-key", "secret": SECRET, "nonsense": SECRET}),
        ("az://container/x", {"account_name": "a", "account_key": SECRET}),
        (
            "az://container/x",
            {"connection_string": f"AccountName=a;AccountKey={SECRET};BlobEndpoint=http://127.0.0.1:1"},
        ),
        ("az://container/x", {"account_name": "a", "nonsense": SECRET}),
        ("gs://bucket/x", {"token": SECRET}),
    ],
)
def test_no_text_tells_a_secret(url: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "_RETRIES", {"max_retries": 0})
    texts = []
    try:
        place = Location.of(url, options)
        texts += [str(place), repr(place), repr(place / "x"), repr(place.storage)]
        place.write(b"")
    except CvaeDistError as error:
        texts += traceback.format_exception(error)
        texts += [str(vars(error)), str(error.args)]
    else:
        pytest.fail("nothing is there")
    assert not [text for text in texts if SECRET in text]


def test_buffers_that_are_made_as_they_are_written_may_share_memory(root: Location) -> None:
    place, memory = root / "a", bytearray(3)

    def made() -> Iterator[list[Buffer]]:
        for number in range(4):
            memory[:] = bytes([number] * 3)
            yield [memory, b"-"]

    place.write_made(made(), lambda: None)
    assert place.read() == b"\0\0\0-\1\1\1-\2\2\2-\3\3\3-"
    assert objects.ObjectStore("s3", "bucket", {}).joined(made()) == place.read()
    assert objects.ObjectStore("s3", "bucket", {}).joined(iter([[bytes(700_000)]] * 5)) == bytes(3_500_000)


def test_what_the_maker_of_buffers_raises_leaves_the_old_object(root: Location) -> None:
    place = root / "a"
    place.write(b"old")

    def made() -> Iterator[list[Buffer]]:
        yield [b"new"]
        raise StorageFailed("the source is gone")

    with pytest.raises(StorageFailed, match="the source is gone"):
        place.write_made(made(), lambda: None)
    assert place.read() == b"old"
    assert [entry.name for entry in root.list()] == ["a"]
