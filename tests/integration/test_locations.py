"""The contract of a location, on every storage: local disk, memory and real servers through each of their clients."""

import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest

from cvae_dist.errors import StorageFailed
from cvae_dist.store import objects, urls
from cvae_dist.store.storage import scatter
from cvae_dist.store.urls import Changed, Entry, Location
from tests.proxy import Proxy, proxied
from tests.servers import Served, serve

SERVED = ["weed", "weed s3fs", "moto", pytest.param("moto s3fs", marks=pytest.mark.heavy), "azurite", "gcs"]
ODD = ["a b", "a%20b", "a+b=&c", "é", "x#y", "x?y", "[z]*", "~", "p/q", "p.r", "p/q/r"]


def place(name: str, folder: Path) -> Location:
    if name == "local":
        return Location.of(folder / "root")
    if name == "memory":
        return Location.of(f"memory://{folder}")
    server, _, client = name.partition(" ")
    served = serve(server)
    return Location.of(served.url, {**served.options, **({"config_kwargs": {}} if client else {})})


@pytest.fixture(params=["local", "memory", *SERVED])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    return place(request.param, tmp_path)


@pytest.fixture(params=SERVED)
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    return place(request.param, tmp_path)


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with proxied(serve("moto").options["endpoint_url"]) as running, pytest.MonkeyPatch.context() as patch:
        patch.setitem(objects._RETRIES, "backoff", {"init_backoff": timedelta(seconds=0.02)})
        yield running


@pytest.fixture(params=["obstore", "s3fs"])
def behind(request: pytest.FixtureRequest, proxy: Proxy) -> Location:
    served = serve("moto")
    client = {"config_kwargs": {}} if request.param == "s3fs" else {}
    location = Location.of(served.url, {**served.options, "endpoint_url": proxy.endpoint, **client})
    location.write(b"the client is connected")
    location.delete()
    assert proxy.methods
    return location


def test_an_object_is_moved_over_another(root: Location) -> None:
    source, target = root / "journal" / "a b", root / "x" / "c" / "1"
    with pytest.raises(FileNotFoundError):
        source.move(target)
    for data in (b"one", b"two"):
        source.write(data)
        source.move(target)
        assert (source.exists(), target.read()) == (False, data)
    with pytest.raises(FileNotFoundError):
        source.move(target)
    assert target.read() == b"two"


def test_an_object_is_written_read_and_gone(root: Location) -> None:
    name = root / "a" / "b"
    with pytest.raises(FileNotFoundError):
        name.read()
    with pytest.raises(FileNotFoundError):
        name.read_versioned()
    assert (name.exists(), name.is_file(), name.size(), root.is_blank()) == (False, False, 0, True)
    first = name.write(b"one", memoryview(b"two"), bytearray(b""))
    assert (name.read(), name.exists(), name.is_file(), name.size()) == (b"onetwo", True, True, 6)
    assert (root.exists(), root.is_file(), root.is_blank()) == (True, False, False)
    assert name.write(b"other") != first
    assert name.read_versioned()[0] == b"other"
    name.write(b"")
    assert (name.read(), name.exists(), name.size()) == (b"", True, 0)
    assert root.holds("b")
    assert not root.holds("c")
    name.delete()
    name.delete()
    assert not name.exists()
    assert not (root / "a").exists() or root.is_local


def test_create_and_replace_only_where_they_may(root: Location) -> None:
    name = root / "a"
    first = name.create(b"first")
    with pytest.raises(FileExistsError, match="is there already"):
        name.create(b"other")
    assert name.read_versioned() == (b"first", first)
    second = name.replace(b"second", first)
    assert second != first
    for gone in (first, root.storage.wrong_version(first)):
        with pytest.raises(Changed, match="changed or deleted by another"):
            name.replace(b"other", gone)
    assert name.read_versioned() == (b"second", second)
    name.delete()
    with pytest.raises(Changed):
        name.replace(b"other", second)
    assert not name.exists()
    name.require_conditional_writes(name.create(b"again"))


def test_remove_of_one_version(root: Location) -> None:
    name = root / "a"
    first = name.create(b"first")
    second = name.replace(b"second", first)
    assert not name.remove(first)
    assert name.read() == b"second"
    assert name.remove(second) != name.exists()
    assert not (root / "none").remove(second)


def test_one_of_two_racing_writers_wins(root: Location) -> None:
    versions: dict[str, str | None] = {}

    def race(write: Callable[[bytes], str]) -> bytes:
        start, winners = threading.Barrier(2), []

        def run(data: bytes) -> None:
            start.wait()
            try:
                versions["last"] = write(data)
                winners.append(data)
            except FileExistsError:
                pass

        threads = [threading.Thread(target=run, args=(data,)) for data in (b"mine", b"yours!")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (winner,) = winners
        return winner

    for number in range(20):
        name = root / str(number)
        assert race(name.create) == name.read()
        version = name.read_versioned()[1]
        assert race(lambda data, at=name, old=version: at.replace(data + b"2", old)) + b"2" == name.read()


def test_a_write_whose_answer_was_lost_has_succeeded(served: Location) -> None:
    name = served / "a"
    first = name.create(b"first")
    assert name.create(b"first") == first
    second = name.replace(b"second", first)
    assert name.replace(b"second", first) == second


def test_ranges(root: Location) -> None:
    name, other, empty = root / "a", root / "b", root / "c"
    name.write(b"0123456789")
    other.write(b"abc")
    empty.write(b"")
    assert (name.read_range(2, 5), name.read_range(8, 20), name.read_range(3, 3)) == (b"234", b"89", b"")
    assert (name.read_tail(3), name.read_tail(30)) == (b"789", b"0123456789")
    assert (empty.read_tail(3), empty.read_range(0, 4), name.read_range(10, 12)) == (b"", b"", b"")
    many = [(name, 0, 2), (other, -1, None), (name, 5, 6), (empty, -4, None)]
    assert Location.read_many(many) == [b"01", b"c", b"5", b""]
    assert Location.read_many([]) == []
    memory = bytearray(b"_" * 9)
    view = memoryview(memory)
    parts = [(name, 1, [view[:3], view[3:4]]), (other, 2, [view[4:8]]), (name, 10, [view[8:]])]
    sizes, versions = zip(*Location.fill_many(parts), strict=True)
    assert (sizes, bytes(memory)) == ((4, 1, 0), b"1234c____")
    named = isinstance(root.storage, objects.ObjectStore)
    assert versions[:2] == ((name.read_versioned()[1], other.read_versioned()[1]) if named else ("", ""))
    assert Location.fill_many([]) == []
    missing = root / "missing"
    for read in (lambda: missing.read_range(0, 4), lambda: missing.read_tail(4)):
        with pytest.raises(FileNotFoundError):
            read()
    for read in (
        lambda: Location.read_many([*many, (missing, 0, 1)]),
        lambda: Location.fill_many([*parts, (missing, 0, [view])]),
    ):
        with pytest.raises(FileNotFoundError) as caught:
            read()
        assert caught.value.filename == str(missing)


@pytest.mark.parametrize("cuts", [(), (1,), (2, 2, 5), (1, 2, 3, 4, 5, 6, 7, 8)])
@pytest.mark.parametrize("room", [(8,), (3, 5, 4), (0, 1, 0, 2, 7)])
def test_a_stream_fills_memory_however_it_is_cut(cuts: tuple[int, ...], room: tuple[int, ...]) -> None:
    data, buffers = b"01234567", [memoryview(bytearray(size)) for size in room]
    parts = [data[start:stop] for start, stop in zip((0, *cuts), (*cuts, len(data)), strict=True)]
    assert scatter(parts, buffers) == len(data)
    assert b"".join(buffers)[: len(data)] == data


def test_odd_names_are_listed_read_and_deleted_alone(root: Location) -> None:
    flat = not str(root).startswith(("/", "memory://"))  # where a name may also be a prefix
    names = [name for name in ODD if flat or name != "p/q"]
    versions = {name: (root / name).write(name.encode()) for name in names}
    root.beside("-other").write(b"not below it")
    versions["zz"] = (root / "zz").write(b"zz")
    found = list(root.list())
    assert [entry.name for entry in found] == sorted(versions)
    for entry in found:
        assert (root / entry.name).read() == entry.name.encode()
        assert entry == Entry(entry.name, len(entry.name.encode()), versions[entry.name])
    assert [entry.name for entry in (root / "p").list()] == [name[2:] for name in sorted(names) if name[:2] == "p/"]
    assert list((root / "none").list()) == []
    (root / "[z]*").delete()
    assert {entry.name for entry in root.list()} == {*names, "zz"} - {"[z]*"}
    root.clear(keep="zz")
    assert [entry.name for entry in root.list()] == ["zz"]
    (root / "none").clear(keep="zz")
    root.delete()
    assert root.is_blank()
    assert root.beside("-other").read() == b"not below it"


def test_a_location_travels(root: Location) -> None:
    (root / "a").write(b"content")
    copy = pickle.loads(pickle.dumps(root))
    assert (copy, hash(copy), str(copy)) == (root, hash(root), str(root))
    assert (copy / "a").read() == b"content"
    assert root.lies_in(copy)
    assert "secret" not in f"{root!r} {root} {root.storage!r} {(root / 'x')!r}"


def test_the_environment_opens_the_same_place(storage: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    (Location.of(storage.url, storage.options) / "a").write(b"content")
    for name, value in storage.environment.items():
        monkeypatch.setenv(name, value)
    objects._client.cache_clear()
    assert (Location.of(storage.url) / "a").read() == b"content"
    objects._client.cache_clear()


def test_a_profile_of_shared_files_opens_the_same_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve("weed")  # which checks signatures
    (Location.of(served.url, served.options) / "a").write(b"content")
    keys = f"aws_access_key_id={served.options['key']}\naws_secret_access_key={served.options['secret']}"
    (tmp_path / "credentials").write_text(f"[ours]\n{keys}\n")
    (tmp_path / "config").write_text(f"[profile ours]\nendpoint_url={served.options['endpoint_url']}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    assert (Location.of(served.url, {"profile": "ours"}) / "a").read() == b"content"


@pytest.mark.parametrize("name", ["moto", "moto s3fs", "azurite", "gcs"])  # SeaweedFS makes the bucket
def test_a_bucket_that_is_not_there_is_no_missing_object(name: str, tmp_path: Path) -> None:
    server, _, client = name.partition(" ")
    served = serve(server)
    url = served.url.replace("bucket", "nobucket")
    location = Location.of(url, {**served.options, **({"config_kwargs": {}} if client else {})})
    with pytest.raises(StorageFailed, match=f"{url}/a does not answer as it should"):
        (location / "a").create(b"")


def test_a_whole_bucket_is_a_place(served: Location) -> None:
    url = str(served).rpartition("/")[0]
    bucket = Location.of(url, getattr(served.storage, "options", None) or served.storage.filesystem.storage_options)
    assert str(bucket / "x") == f"{url}/x"
    (bucket / served.name).write(b"content")
    assert served.read() == b"content"
    assert (bucket.exists(), bucket.is_file(), bucket.is_blank()) == (True, False, False)
    assert served.name in [entry.name for entry in bucket.list()]
    assert served.lies_in(bucket)


@pytest.mark.parametrize("name", ["weed", "moto", "azurite"])
def test_only_a_huge_object_goes_in_parts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "_LARGEST_PUT", 10)
    monkeypatch.setattr(objects, "_PART", 5 * 2**20)
    huge, data = place(name, tmp_path) / "huge", bytes(range(256)) * 40_000
    version = huge.write(data)
    assert huge.read_versioned() == (data, version)


def test_pages_of_a_long_list(tmp_path: Path) -> None:
    root = place("weed", tmp_path)
    names = [f"{number:04d}" for number in range(1_005)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: (root / name).write(b""), names))
    assert [entry.name for entry in root.list()] == names
    with proxied(serve("weed").options["endpoint_url"]) as proxy:
        behind = Location.of(str(root), {**serve("weed").options, "endpoint_url": proxy.endpoint})
        assert behind.exists()
        assert behind.holds("0000")
        assert len(list(behind.list())) == len(names)
        assert proxy.methods == ["HEAD", "GET", "GET", "GET", "GET"]
        behind.delete()
        assert proxy.methods == ["GET", "GET", "POST", "POST", "POST"]
    assert root.is_blank()


def test_requests_of_each_operation(behind: Location, proxy: Proxy) -> None:
    name = behind / "a"
    version = name.create(b"0123456789")
    assert proxy.methods == ["PUT"]
    operations: list[tuple[Callable[[], object], list[str]]] = [
        (lambda: name.write(b"x" * 20_000_000), ["PUT"]),
        (name.read, ["GET"]),
        (name.read_versioned, ["GET"]),
        (lambda: name.read_range(1, 3), ["GET"]),
        (lambda: name.read_tail(3), ["GET"]),
        (lambda: list(behind.list()), ["GET"]),
        (name.size, ["HEAD"]),
        (name.exists, ["HEAD"]),
        (lambda: Location.read_many([(name, 0, 1)] * 5), ["GET"] * 5),
        (lambda: Location.fill_many([(name, 0, [memoryview(bytearray(20_000_000))])]), ["GET"]),
        (lambda: behind.clear("b"), ["GET", "POST"]),
    ]
    for operation, methods in operations:
        operation()
        assert proxy.methods == methods
    with pytest.raises(Changed):
        name.replace(b"other", version)


@pytest.mark.parametrize("method", ["PUT", "GET"])
@pytest.mark.parametrize("fault", ["refuse", "reset", "lose"])
def test_a_passing_fault_is_not_noticed(behind: Location, proxy: Proxy, method: str, fault: str) -> None:
    proxy.method, proxy.faults = method, [fault]
    name = behind / "a"
    first = name.create(b"first")
    assert name.read_versioned() == (b"first", first)
    proxy.faults = [fault]
    second = name.replace(b"second", first)
    assert name.read() == b"second"
    assert name.read_versioned()[1] == second
    assert not proxy.faults


def test_a_store_that_ignores_conditions_is_refused(
    behind: Location, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(urls, "_PROVED", set())
    name = behind / "a"
    version = name.create(b"mine")
    monkeypatch.setattr(proxy, "forgets", True)
    with pytest.raises(StorageFailed, match="ignores the conditions of a write.*or write to another store"):
        name.require_conditional_writes(version)
    assert name.read() == b"mine"
    monkeypatch.setattr(proxy, "forgets", False)
    name.require_conditional_writes(version)
    assert len(proxy.methods) > 3
    name.require_conditional_writes(version)
    assert proxy.methods == []
