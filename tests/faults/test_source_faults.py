"""Files are read from a storage that fails now and then: the store is that of a quiet day, or the file is named."""

import contextlib
import functools
import http.server
import io
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from distributed import Client, LocalCluster

from cvae_dist.errors import InvalidInput, StorageFailed
from cvae_dist.sources import Files, Reader, files, npy_header
from cvae_dist.sources.formats import FileSource
from cvae_dist.store import Layout, RowStore, objects
from cvae_dist.store.urls import Location
from cvae_dist.verbs.ingest import ingest
from tests.faults.drivers import small_grid
from tests.faults.remote import content
from tests.proxy import Proxy, Rule, proxied
from tests.servers import Served, serve, server

PATIENT = objects._RETRIES["backoff"]
KINDS = ("items", "blocks")
FILE = r"\.npy"


class Objects(NamedTuple):
    """Objects of one kind, and the store that they make when nothing fails."""

    name: str
    served: Served
    behind: Served
    expected: dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def _impatient() -> Iterator[None]:
    """Small shards, ranges and pauses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(objects._RETRIES, "backoff", {"init_backoff": timedelta(seconds=0.05), "base": 2})
        patch.setattr(files, "_RANGE", 1_000_000)
        patch.setattr(Layout, "of", small_grid(8))
        yield


@pytest.fixture(autouse=True)
def _forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known of files that an earlier test read."""
    npy_header.read_header.cache_clear()
    monkeypatch.setattr(files, "_digested", {})


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with proxied(serve("weed").options["endpoint_url"]) as running:
        yield running


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def contents(kind: str) -> dict[str, bytes]:
    """Return files of one vector each, or of many rows: two to a shard, and one of several shards."""
    random = np.random.default_rng(0)
    if kind == "items":
        return {f"{n // 10}/{n:02d}.npy": npy(random.normal(size=784).astype(np.float32)) for n in range(30)}
    return {f"{n}.npy": npy(random.normal(size=(rows, 80_000)).astype(np.float32)) for n, rows in enumerate((4, 4, 12))}


@pytest.fixture(scope="module", params=KINDS)
def there(request: pytest.FixtureRequest, proxy: Proxy, tmp_path_factory: pytest.TempPathFactory) -> Objects:
    served = serve("weed")
    put(served, contents(request.param))
    store = str(tmp_path_factory.mktemp("clean") / "store")
    ingest(served.url, store, source_storage_options=served.options)
    behind = served._replace(options={**served.options, "endpoint_url": proxy.endpoint})
    return Objects(request.param, served, behind, content(store, Served(store, {}, {})))


def put(served: Served, data: dict[str, bytes]) -> None:
    root = Location.of(served.url, served.options)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda path: (root / path).write(data[path]), data))


def require_same(store: str, expected: dict[str, Any], options: dict[str, Any] | None = None) -> None:
    found = content(store, Served(store, options or {}, {}))
    assert sorted(found) == sorted(expected)
    assert [name for name in found if found[name] != expected[name]] == []


PASSING = {
    "slow down for 2 s": [Rule("503", count=1000, seconds=2)],
    "slow down now and then": [Rule("503", count=1000, chance=0.3)],
    "too many requests": [Rule("429", count=4)],
    "internal errors": [Rule("500", count=4)],
    "reset": [Rule("reset", count=5)],
    "reset in the body": [Rule("break", FILE, count=5)],
    "truncated": [Rule("truncate", FILE, count=5)],
    "late": [Rule("delay", FILE, count=10, pause=0.02)],
    "all of it": [
        Rule(fault, FILE, count=3, chance=0.2) for fault in ("503", "429", "reset", "break", "truncate", "lose")
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("reset in the body", "all of it") else pytest.mark.heavy)
        for name in PASSING
    ],
)
def test_a_passing_fault_leaves_no_trace(there: Objects, proxy: Proxy, tmp_path: Path, name: str) -> None:
    with proxy.failing(*map(fresh, PASSING[name])):
        ingest(there.behind.url, tmp_path / "store", source_storage_options=there.behind.options)
        assert proxy.failed
    require_same(str(tmp_path / "store"), there.expected)


@pytest.mark.parametrize("there", ["items"], indirect=True)
def test_a_cluster_meets_the_same_faults(there: Objects, proxy: Proxy, client: Client, tmp_path: Path) -> None:
    with proxy.failing(*map(fresh, PASSING["all of it"])):
        ingest(there.behind.url, tmp_path / "store", source_storage_options=there.behind.options, client=client)
        assert proxy.failed
    require_same(str(tmp_path / "store"), there.expected)
    with proxy.failing(Rule("403", "17.npy", count=1000)), pytest.raises(StorageFailed, match=r"17\.npy .*403"):
        ingest(there.behind.url, tmp_path / "again", source_storage_options=there.behind.options, client=client)
    assert sum("17.npy" in path for _, path in proxy.requests) == 1


def fresh(rule: Rule) -> Rule:
    return Rule(**{name: value for name, value in vars(rule).items() if not name.startswith("_")})


# what is to come for one of the objects, and what is said of it
FINAL = {
    "forbidden": (Rule("403", count=1000), StorageFailed, r"{} does not answer as it should.*403"),
    "gone": (Rule("404", count=1000), InvalidInput, r"{} was deleted after it was listed"),
    "shorter every time": (Rule("shorten", count=1000), InvalidInput, r"{} gave [\d,]+ bytes where [\d,]+ were asked"),
}  # fmt: skip


@pytest.mark.parametrize("name", FINAL)
def test_a_final_fault_names_the_object_at_once(there: Objects, proxy: Proxy, tmp_path: Path, name: str) -> None:
    rule, error, words = FINAL[name]
    rule = fresh(rule)
    rule.path = victim = sorted(contents(there.name))[-1]
    with proxy.failing(rule), pytest.raises(error, match=words.format(re.escape(f"{there.served.url}/{victim}"))):
        ingest(there.behind.url, tmp_path / "store", source_storage_options=there.behind.options)
    asked = [path for _, path in proxy.requests if victim in path]
    assert len(asked) <= 1 if there.name == "items" else len(asked) <= files._THREADS, "nothing is asked again"
    ingest(there.behind.url, tmp_path / "store", source_storage_options=there.behind.options)
    require_same(str(tmp_path / "store"), there.expected)


def test_an_answer_that_was_short_once_names_the_object(there: Objects, proxy: Proxy, tmp_path: Path) -> None:
    rule = Rule("shorten", r"[1-9]\.npy")  # which is not the first one
    with proxy.failing(rule), pytest.raises(InvalidInput, match=r"[1-9]\.npy gave .* asked for"):
        ingest(there.behind.url, tmp_path / "store", source_storage_options=there.behind.options)
    ingest(there.behind.url, tmp_path / "store", source_storage_options=there.behind.options)
    require_same(str(tmp_path / "store"), there.expected)


small = pytest.mark.parametrize("there", ["items"], indirect=True)  # files that are read whole
large = pytest.mark.parametrize("there", ["blocks"], indirect=True)


@small
@pytest.mark.parametrize("rule", [Rule("flip", FILE, count=1), Rule("flip", FILE, count=3, chance=0.2)])
def test_a_flipped_bit_of_a_small_file_leaves_no_trace(
    there: Objects, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: Rule
) -> None:
    with proxy.failing(fresh(rule)):
        ingest(there.behind.url, tmp_path / "store", source_storage_options=there.behind.options)
        assert proxy.failed
    require_same(str(tmp_path / "store"), there.expected)


@small
def test_a_file_that_never_comes_the_same_is_named(
    there: Objects, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        proxy.failing(Rule("flip", "17.npy", count=1000)),
        pytest.raises(InvalidInput, match=r"17\.npy came otherwise each of 4 times it was read"),
    ):
        ingest(there.behind.url, tmp_path / "store", source_storage_options=there.behind.options)


@small
def test_etags_that_are_no_digests_cost_one_more_request(
    there: Objects, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it is with objects that are encrypted by a key of their owner."""
    monkeypatch.setattr(objects.ObjectStore, "confirms", lambda *_: False)
    with proxy.failing():
        ingest(there.behind.url, tmp_path / "store", source_storage_options=there.behind.options)
        asked = [path for _, path in proxy.requests if path.endswith(".npy")]
    assert len(asked) == len(contents("items")) + 2, "the first file, as a model, and once more"
    require_same(str(tmp_path / "store"), there.expected)


@large
@pytest.mark.parametrize("byte", [0, 6, 8, 30])
def test_a_flipped_bit_of_a_header_names_the_file(there: Objects, proxy: Proxy, tmp_path: Path, byte: int) -> None:
    with (
        proxy.failing(Rule("flip", "1.npy", byte=byte)),
        pytest.raises(InvalidInput, match=r"1\.npy (is|has) "),
    ):
        ingest(there.behind.url, tmp_path / "store", source_storage_options=there.behind.options)


def test_an_answer_that_never_comes_is_asked_for_again(
    there: Objects, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(objects._CLIENT, "timeout", "500ms")
    impatient = {**there.behind.options, "client_kwargs": {"region_name": "us-east-1"}}  # a client of its own
    with proxy.failing(Rule("delay", FILE, count=2, pause=2)):
        ingest(there.behind.url, tmp_path / "store", source_storage_options=impatient)
    require_same(str(tmp_path / "store"), there.expected)


@pytest.mark.heavy
def test_a_storm_of_half_a_minute_passes(
    there: Objects, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(objects._RETRIES, "backoff", PATIENT)
    patient = {**there.behind.options, "client_kwargs": {}}  # a client of its own, too, and another one
    with proxy.failing(Rule("503", count=100_000, seconds=30)):
        ingest(there.behind.url, tmp_path / "store", source_storage_options=patient)
        assert proxy.failed
    require_same(str(tmp_path / "store"), there.expected)


STORED = {
    "all goes well": [],
    "lost acknowledgements": [Rule("lose", method="PUT", count=4, chance=0.5)],
    "everything now and then": [
        *PASSING["all of it"],
        *(Rule(fault, method="PUT", chance=0.3) for fault in ("503", "429", "reset", "lose")),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    "name", ["all goes well", *(pytest.param(name, marks=pytest.mark.heavy) for name in STORED if STORED[name])]
)
def test_a_store_behind_the_same_faults(there: Objects, proxy: Proxy, name: str) -> None:
    store = serve("weed").url
    Location.of(f"{store}/connected", there.behind.options).write(b"")
    with proxy.failing(*map(fresh, STORED[name])):
        ingest(there.behind.url, f"{store}/store", storage_options=there.behind.options)
        assert bool(proxy.failed) == bool(STORED[name])
    require_same(f"{store}/store", there.expected, there.served.options)


# ------------------------------------------------------------------------------------- every kind of storage


class WebServer:
    """A folder on the web, by the standard library: pages that list it, and no ranges."""

    def __init__(self, folder: Path) -> None:
        handler = functools.partial(_Pages, directory=str(folder))
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class _Pages(http.server.SimpleHTTPRequestHandler):
    """Every file has an ETag."""

    protocol_version = "HTTP/1.1"

    def end_headers(self) -> None:
        path = Path(self.translate_path(self.path))
        if path.is_file():
            self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        super().end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


class Place(NamedTuple):
    """Where files are: URL, options, and what writes one."""

    url: str
    options: dict[str, Any]
    put: Callable[[str, bytes], object]

    def fill(self, folder: str) -> "Place":
        """Write some files into a folder, and return that."""
        for path in SOME:
            self.put(f"{folder}/{path}", contents("items")[path])
        put = self.put
        return Place(f"{self.url}/{folder}", self.options, lambda path, data: put(f"{folder}/{path}", data))


class Remote(NamedTuple):
    """A place, directly and behind a proxy."""

    place: Place
    behind: Place
    proxy: Proxy


@contextlib.contextmanager
def somewhere(name: str, folder: Path) -> Iterator[Place]:
    if name == "http":
        with contextlib.closing(WebServer(folder)) as web:
            yield Place(web.endpoint, {}, functools.partial(save, folder))
        return
    urls = {"local": str(folder), "memory": f"memory://{folder}"}
    served = Served(urls[name], {}, {}) if name in urls else serve(name)
    root = Location.of(served.url, served.options)
    yield Place(served.url, served.options, lambda path, data: (root / path).write(data))


@pytest.fixture(scope="module", params=["azurite", "gcs", "http"])
def remote(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    with somewhere(request.param, tmp_path_factory.mktemp("there")) as place:
        endpoint = place.url if request.param == "http" else server(request.param).endpoint
        with proxied(endpoint) as proxy:
            options = {name: value.replace(endpoint, proxy.endpoint) for name, value in place.options.items()}
            yield Remote(place, Place(place.url.replace(endpoint, proxy.endpoint), options, place.put), proxy)


@pytest.fixture(scope="module")
def anywhere(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with somewhere(request.param, tmp_path_factory.mktemp("there")) as place:
        yield place


def save(folder: Path, path: str, data: bytes) -> None:
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_bytes(data)


PLACES = ("local", "memory", "weed", "azurite", "gcs", "http")
SOME = ("0/00.npy", "0/09.npy", "1/17.npy", "2/23.npy")
EVERYWHERE = {
    "all goes well": [],
    "busy": [Rule("503", count=2), Rule("429", count=1)],
    "broken": [Rule("reset", FILE, count=2), Rule("break", FILE, count=1)],
}  # fmt: skip


@pytest.mark.parametrize(
    "name", ["broken", *(pytest.param(name, marks=pytest.mark.heavy) for name in EVERYWHERE if name != "broken")]
)
def test_files_elsewhere(remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("cvae_dist.store.remote._PAUSES", (0.01,) * 5)
    there, behind = remote.place.fill(name[0]), f"{remote.behind.url}/{name[0]}"
    with remote.proxy.failing(*map(fresh, EVERYWHERE[name])):
        ingest(behind, tmp_path / "store", source_storage_options=remote.behind.options)
        assert bool(remote.proxy.failed) == bool(EVERYWHERE[name])
    require_some(tmp_path / "store", SOME)
    again = ingest(there.url, tmp_path / "store", source_storage_options=there.options)
    assert (again.files, again.rows_written) == (0, 0)


def require_some(store: Path, paths: Sequence[str]) -> None:
    found = RowStore.open(str(store))
    np.testing.assert_array_equal(found.read("x"), [np.load(io.BytesIO(contents("items")[path])) for path in paths])
    assert found.read("id").tolist() == list(paths)


@pytest.mark.parametrize("remote", ["gcs"], indirect=True)
def test_a_flipped_bit_from_google_is_noticed(remote: Remote, tmp_path: Path) -> None:
    """Google sends the checksum of the object with it."""
    remote.place.fill("flipped")
    with remote.proxy.failing(Rule("flip", FILE, count=2)):
        ingest(f"{remote.behind.url}/flipped", tmp_path / "store", source_storage_options=remote.behind.options)
        assert remote.proxy.failed
    require_some(tmp_path / "store", SOME)
    with (
        remote.proxy.failing(Rule("flip", "17.npy", count=100)),
        pytest.raises(StorageFailed, match=r"17\.npy .*checks"),
    ):
        ingest(f"{remote.behind.url}/flipped", tmp_path / "again", source_storage_options=remote.behind.options)


def test_a_short_answer_from_elsewhere_names_the_file(remote: Remote, tmp_path: Path) -> None:
    remote.place.fill("short")
    words = r"17\.npy (gave .* asked for|does not answer)"
    with (
        remote.proxy.failing(Rule("shorten", "17.npy", count=1000)),
        pytest.raises((InvalidInput, StorageFailed), match=words),
    ):
        ingest(f"{remote.behind.url}/short", tmp_path / "store", source_storage_options=remote.behind.options)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address="127.0.0.1:0") as cluster:
        yield Client(cluster, set_as_default=False)


@pytest.mark.parametrize(
    ("anywhere", "how"),
    [
        *((name, "here") for name in PLACES),
        ("weed", "through Dask"),
        *(pytest.param(name, "through Dask", marks=pytest.mark.heavy) for name in PLACES if name != "weed"),
    ],
    indirect=["anywhere"],
)
def test_a_file_that_changes_after_it_was_listed(
    anywhere: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, how: str
) -> None:
    """The new content has the size of the old one."""
    there = anywhere.fill(how[0])
    client = request.getfixturevalue("client") if how == "through Dask" else None
    real = FileSource.reader

    def change_and_read(source: FileSource, model: Files) -> Reader:
        reader = real(source, model)
        there.put(SOME[2], npy(np.zeros(784, np.float32)))
        return reader

    options = {"source_storage_options": there.options, "client": client}
    with monkeypatch.context() as patch:
        patch.setattr(FileSource, "reader", change_and_read)
        with pytest.raises(InvalidInput, match=r"17\.npy was changed after it was listed"):
            ingest(there.url, tmp_path / "store", **options)
        there.put(SOME[2], contents("items")[SOME[2]])
        told: list[str] = []
        result = ingest(there.url, tmp_path / "store", bad="skip", on_event=lambda e: told.append(e.message), **options)
    assert (result.files, result.bad_files, result.rows) == (4, 1, 3)
    require_some(tmp_path / "store", [path for path in SOME if path != SOME[2]])
    assert [message for message in told if "17.npy was changed after it was listed" in message]
    there.put(SOME[2], contents("items")[SOME[2]])
    assert ingest(there.url, tmp_path / "store", **options).files == 1
    require_some(tmp_path / "store", [path for path in SOME if path != SOME[2]] + [SOME[2]])
