"""Listing a bucket of a million objects and comparing it with a manifest of as many: seconds, memory."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np

from cvae_dist.store import Entries, Location
from cvae_dist.store.manifest import Manifest, write_manifest
from cvae_dist.store.publication import Publication, Stored
from tests.bench.table import Row

_KEYS = 1_000_000
_NEW, _CHANGED, _DELETED = 10_000, 100, 50
_PAGE = 1000
_BATCH = 65_536


def rows() -> Iterator[Row]:
    """Measure a million keys, and ten million, each in a fresh process."""
    seconds, megabytes, wall = _measured(_KEYS, "compare")
    alone = _measured(_KEYS, "list")[0]
    note = f"{wall:.1f} s from end to end; obstore's list alone {alone:.1f} CPU s"
    yield Row("list and diff 1e6 keys on S3: CPU s", seconds, 10, goal=3, note=note, lower=True)
    yield Row("list and diff 1e6 keys on S3: MB", megabytes, 100, lower=True)
    more, larger, wall = _measured(10 * _KEYS, "compare")
    note = f"{larger:.0f} MB, {more:.0f} CPU s, {wall:.0f} s from end to end"
    yield Row("list and diff 1e7 keys / 1e6: memory", larger / megabytes, 1.2, note=note, lower=True)


def _measured(count: int, what: str) -> list[float]:
    with TemporaryDirectory() as folder, _bucket(count) as endpoint:
        publication = Publication(Location.of(folder), "0", {})
        write_manifest(publication, _known(count) if what == "compare" else [])
        arrays = json.dumps({name: asdict(stored) for name, stored in publication.arrays.items()})
        command = [sys.executable, "-m", "tests.bench.bench_listing", what, endpoint, folder, str(count), arrays]
        made = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return [float(figure) for figure in made.stdout.split()]


def _measure(what: str, endpoint: str, folder: str, count: int, arrays: str) -> None:
    """List and compare, or only list; print CPU seconds, MB of memory, and seconds."""
    import obstore

    from cvae_dist.sources.changes import compare
    from cvae_dist.sources.listing import find_files
    from cvae_dist.store import objects

    client = {"endpoint_url": endpoint, "region_name": "us-east-1"}
    root = Location.of("s3://bucket/data", {"key": "bench", "secret": "bench-secret", "client_kwargs": client})
    stored = {name: Stored.from_json(one) for name, one in json.loads(arrays).items()}
    manifest = Manifest(Publication(Location.of(folder), "0", stored), count)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak of memory counts from here
    before, began, cpu = _memory("VmRSS"), time.perf_counter(), time.process_time()
    if what == "list":
        pages = obstore.list(objects._client(root.storage), "data/", chunk_size=1000, return_arrow=True)
        assert sum(page.num_rows for page in pages) == count
    else:
        found = compare(find_files(root, {".npy"})[1], manifest.batches())
        assert (len(found.new), len(found.changed), len(found.deleted)) == (_NEW, _CHANGED, _DELETED)
        assert found.unchanged == count - _NEW - _CHANGED
    print(time.process_time() - cpu, _memory("VmHWM") - before, time.perf_counter() - began)


def _memory(what: str) -> float:
    """Return a figure of this process's memory in MB."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1000 for line in file if line.startswith(what))


def _key(number: int) -> str:
    return f"{number // 1000:05d}/{number:010d}.npy"


def _etag(number: int) -> str:
    return f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}{number:016x}"


def _known(count: int) -> Iterator[Entries]:
    """Yield the entries of a store that was made of all but the new files, before some changed or were deleted."""
    new, changed, deleted = count // _NEW, count // _CHANGED, count // _DELETED
    for first in range(0, count, _BATCH):
        files = []
        for number in range(first, min(first + _BATCH, count)):
            if number % new != 3:
                files.append((_key(number), "old" if number % changed == 7 else _etag(number)))
            if number % deleted == 11:
                files.append((_key(number).replace(".npy", "x.npy"), "old"))
        paths, versions = zip(*files, strict=True)
        ones, none = np.ones(len(files), np.int64), np.full(len(files), "", object)
        path, version = np.array(paths, object), np.array(versions, object)
        yield Entries(path, 3264 * ones, version, 0 * ones, 0 * ones, none, none, none)


@contextlib.contextmanager
def _bucket(count: int) -> Iterator[str]:
    """Run a server that lists so many objects, in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.bench_listing", "serve", str(count)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield f"http://127.0.0.1:{int(server.stdout.readline())}"
    finally:
        server.kill()
        server.communicate()


class _Lists(BaseHTTPRequestHandler):
    """Answers ListObjectsV2, a page at a time; the token is the number of the next object."""

    protocol_version = "HTTP/1.1"
    count = 0

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        first = int(query.get("continuation-token", ["0"])[0])
        stop = min(first + _PAGE, self.count)
        more = f"<NextContinuationToken>{stop}</NextContinuationToken>" * (stop < self.count)
        objects = "".join(
            f"<Contents><Key>data/{_key(number)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>&quot;{_etag(number)}&quot;</ETag><Size>3264</Size><StorageClass>STANDARD</StorageClass></Contents>"
            for number in range(first, stop)
        )
        body = (
            f"<ListBucketResult><Name>bucket</Name><Prefix>data/</Prefix><KeyCount>{stop - first}</KeyCount>"
            f"<IsTruncated>{str(stop < self.count).lower()}</IsTruncated>{more}{objects}</ListBucketResult>"
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


def _serve(count: int) -> None:
    _Lists.count = count
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Lists)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what == "serve":
        _serve(int(arguments[0]))
    else:
        endpoint, folder, count, arrays = arguments
        _measure(what, endpoint, folder, int(count), arrays)
