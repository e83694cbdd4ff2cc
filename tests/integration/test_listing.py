"""What is found in real object stores: names as they are, in order, also when an answer breaks off."""

import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest

from cvae_dist.errors import SourceNotFound, StorageFailed
from cvae_dist.sources.file_table import FileTable
from cvae_dist.sources.listing import find_files
from cvae_dist.store import Location, objects
from tests.proxy import proxied
from tests.servers import Served, free_port, serve

ODD = ["a b", "a%20b", "a+b=&c", "é/日本", "x#y", "x?y", "[z]*", "p/q", "p-q", "p"]
NAMES = [*(f"{name}.npy" for name in ODD), "p.NPY"]
OTHERS = ["notes.txt", "README", ".hidden.npy", "p/.cache/c.npy"]


def paths(table: FileTable) -> list[str]:
    return [path for batch in table.batches() for path in batch.path]


def test_odd_names_are_found_in_order(storage: Served) -> None:
    root = Location.of(storage.url, storage.options)
    for name in [*NAMES, *OTHERS]:
        (root / name).write(name.encode())
    root.beside("-other.npy").write(b"not below it")
    found, table = find_files(root, {".npy"})
    assert found == root
    assert paths(table) == sorted(NAMES, key=str.encode)
    assert {kind: count for kind, (count, _) in table.kinds.items()} == {".npy": len(NAMES), ".txt": 1, "": 1}
    (files,) = table.batches()
    for file in files.of(root):
        assert file.read() == file.path.encode()
    (single,) = find_files(root / "a+b=&c.npy", {".npy"})[1].batches()
    assert next(single.of(root)).read() == b"a+b=&c.npy"
    assert files.version[files.path == "a+b=&c.npy"] == single.version
    assert paths(find_files(root / "é", {".npy"})[1]) == ["日本.npy"]
    assert len(find_files(root / "README", {".npy"})[1]) == 0
    with pytest.raises(SourceNotFound, match="there is no directory or file"):
        find_files(root / "none", {".npy"})


@pytest.mark.parametrize("client", ["obstore", "s3fs"])
def test_marks_of_folders_are_no_files(client: str) -> None:
    served = serve("moto")
    root = Location.of(served.url, {**served.options, **({"config_kwargs": {}} if client == "s3fs" else {})})
    (root / "d/x.npy").write(b"content")
    (root / "e.npy").write(b"")
    for mark in ("", "d/", "e/"):  # as consoles make them
        url = f"{served.options['endpoint_url']}/{served.url.removeprefix('s3://')}/{mark}"
        urllib.request.urlopen(urllib.request.Request(url, data=b"", method="PUT")).close()
    table = find_files(root, {".npy"})[1]
    assert (paths(table), table.kinds) == (["d/x.npy", "e.npy"], {".npy": (2, "d/x.npy")})


@pytest.fixture(scope="module")
def many() -> Location:
    served = serve("weed")
    root = Location.of(served.url, served.options)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda number: (root / f"{number:04d}.npy").write(b"x"), range(2_100)))
    return root


def test_a_list_that_breaks_off_goes_on(many: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "_LIST_PAUSE", 0)
    options = serve("weed").options
    with proxied(options["endpoint_url"]) as proxy:
        behind = Location.of(str(many), {**options, "endpoint_url": proxy.endpoint})
        proxy.method = "GET"
        for passes, faults in ((0, ["cut"]), (1, ["cut"] * 3), (2, ["refuse", "cut"])):
            proxy.passes, proxy.faults = passes, faults
            assert paths(find_files(behind, {".npy"})[1]) == [f"{number:04d}.npy" for number in range(2_100)]
            assert not proxy.faults
        proxy.passes, proxy.faults = 1, ["cut"] * 20
        with pytest.raises(StorageFailed, match="does not answer as it should"):
            find_files(behind, {".npy"})


def test_a_list_without_order_does_not_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names could be left out after the last one: it fails."""
    import obstore
    from arro3.core import RecordBatch

    def broken(*_: object, **__: object) -> "object":
        for names in (["b", "a"], ["c"]):
            yield RecordBatch.from_arrow(pa.record_batch({"path": names, "size": [1] * len(names), "e_tag": names}))
        raise obstore.exceptions.GenericError("broken off")

    monkeypatch.setattr(obstore, "list", broken)
    with pytest.raises(obstore.exceptions.GenericError):
        list(objects._pages(None, ""))


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_an_endpoint_where_nobody_listens_is_told_at_once(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client alone would try it again for two minutes."""
    monkeypatch.setattr(objects, "_KNOCKS", (0, 0))
    endpoint = f"http://{host}:{free_port()}"
    for url, options in {
        "s3://bucket/data": {"key": "k", "secret": "s" * 8, "endpoint_url": endpoint},
        "az://container/data": {"connection_string": f"AccountName=name;AccountKey=a2V5;BlobEndpoint={endpoint}/name;"},
    }.items():
        with pytest.raises(StorageFailed, match=f"nobody listens at {endpoint}"):
            find_files(Location.of(url, options), {".npy"})
