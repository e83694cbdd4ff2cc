"""A proxy before an object store that counts requests and injects faults."""

import contextlib
import http.client
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

_CODES = {503: "SlowDown", 500: "InternalError", 429: "TooManyRequests", 403: "AccessDenied", 404: "NoSuchKey"}
_RESET = struct.pack("ii", 1, 0)  # lets a socket end with a reset instead of a good-bye
_CUT = 100  # bytes that a shortened body lacks


@dataclass
class Rule:
    """What goes wrong with some requests.

    ``fault`` is one of:

    - "503", "500", "429", "403", "404": that is the answer, and nothing is done
    - "reset": the connection ends, and nothing is done
    - "lose": it is done, and the connection ends before the answer
    - "break": the connection ends in the middle of the body
    - "truncate": the body is shorter than its Content-Length, and the connection ends as if all was well
    - "shorten": the body is shorter, and the headers agree with it
    - "flip": one bit of the body's second half, or of its ``byte``, is another
    - "delay": the answer comes ``pause`` seconds late

    It happens to requests of ``method`` whose path, query included, has ``path`` (a regular expression) in it: to the
    first ``count`` of them, or to all for ``seconds`` after the first one, each with a probability of ``chance``.
    """

    fault: str
    path: str = ""
    method: str = "GET"
    count: float = 1
    seconds: float = float("inf")
    chance: float = 1
    pause: float = 0
    byte: int | None = None
    _end: float = float("inf")

    def meets(self, method: str, path: str, chance: float) -> bool:
        """Whether a request is to fail; counts it."""
        if method != self.method or not re.search(self.path, path) or chance >= self.chance:
            return False
        now = time.monotonic()
        self._end = min(self._end, now + self.seconds)
        if self.count <= 0 or now >= self._end:
            return False
        self.count -= 1
        return True


class Proxy:
    """What passed, and what is to go wrong.

    ``requests`` are (method, path) in order, ``failed`` the faults that happened. ``rules`` say what happens to which
    requests; the first that a request meets decides. ``faults`` are short for rules of one request of ``method`` each,
    after ``passes`` of them: ``refuse`` (503), ``reset``, ``lose`` or ``cut`` (truncate). With ``forgets`` the server
    never sees conditions.
    """

    def __init__(self, target: str, seed: int = 0) -> None:
        self.target = urlsplit(target).netloc
        self.requests: list[tuple[str, str]] = []
        self.failed: list[str] = []
        self.rules: list[Rule] = []
        self.method, self.faults, self.forgets, self.passes = "PUT", list[str](), False, 0
        self._random, self._lock = random.Random(seed), threading.Lock()
        self.server = _Server(("127.0.0.1", 0), self._handler())
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    @property
    def methods(self) -> list[str]:
        """Methods of the requests since the last look."""
        found = [method for method, _ in self.requests]
        self.requests.clear()
        return found

    @contextlib.contextmanager
    def failing(self, *rules: Rule) -> Iterator[None]:
        """Follow some rules and no others for a while, with nothing counted before."""
        self.rules = list(rules)
        self.requests.clear()
        self.failed.clear()
        try:
            yield
        finally:
            self.rules = []

    def choose(self, method: str, path: str) -> Rule | None:
        """Note a request, and return what is to happen to it."""
        with self._lock:
            self.requests.append((method, path))
            if method == self.method and self.passes:
                self.passes -= 1
                return None
            if method == self.method and self.faults:
                fault = self.faults.pop(0)
                return Rule({"refuse": "503", "cut": "truncate"}.get(fault, fault), method=method)
            rule = next((rule for rule in self.rules if rule.meets(method, path, self._random.random())), None)
            if rule:
                self.failed.append(rule.fault)
            return rule

    def flipped(self, body: bytes, byte: int | None) -> bytes:
        """Return a body in which one bit is another."""
        changed = bytearray(body)
        place = self._random.randrange(len(body) // 2, len(body)) if byte is None else byte
        changed[place] ^= 1 << self._random.randrange(8)
        return bytes(changed)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                rule = proxy.choose(self.command, self.path)
                fault = rule.fault if rule else ""
                self.close_connection = fault not in ("", "delay", "shorten", "flip")
                if fault.isdecimal():
                    self.refuse(int(fault))
                elif fault == "reset":
                    self.reset()
                else:
                    answer, data = self.ask(body)
                    time.sleep(rule.pause if rule else 0)
                    if fault == "lose":
                        self.reset()
                    else:
                        self.reply(answer, data, rule)

            def refuse(self, status: int) -> None:
                body = f"<Error><Code>{_CODES[status]}</Code><Message>a fault</Message></Error>".encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/xml")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body if self.command != "HEAD" else b"")

            def reset(self) -> None:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)

            def ask(self, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
                connection = http.client.HTTPConnection(proxy.target, timeout=30)
                connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    unwanted = ("if-match", "if-none-match") if proxy.forgets else ()
                    if name.lower() not in ("expect", "connection", *unwanted):
                        connection.putheader(name, value)
                connection.endheaders(body)
                with contextlib.closing(connection):
                    answer = connection.getresponse()
                    return answer, answer.read()

            def reply(self, answer: http.client.HTTPResponse, body: bytes, rule: Rule | None) -> None:
                fault = rule.fault if rule else ""
                changed = {}
                if fault == "shorten":
                    body = body[:-_CUT]
                    changed = _shortened(answer)
                elif rule and fault == "flip":
                    body = proxy.flipped(body, rule.byte)
                self.send_response_only(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                        self.send_header(name, changed.get(name.lower(), value))
                length = answer.getheader("Content-Length") if self.command == "HEAD" else None
                self.send_header("Content-Length", length or str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if fault in ("break", "truncate") else body)
                if fault == "break":
                    self.wfile.flush()
                    self.reset()

            def log_message(self, *arguments: Any) -> None:
                pass

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward

        return Handler


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that did not wait."""

    def shutdown_request(self, request: Any) -> None:
        """Close without the good-bye that a shutdown would be, so that a reset is one."""
        if request.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, len(_RESET)) == _RESET:
            request.close()
        else:
            super().shutdown_request(request)


def _shortened(answer: http.client.HTTPResponse) -> Mapping[str, str]:
    """Return the headers of a body that is shorter, so that nothing contradicts it."""
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.getheader("Content-Range", ""))
    if not found:
        return {}
    first, last = int(found[1]), int(found[2]) - _CUT
    return {"content-range": f"bytes {first}-{last}/{last + 1}"}


@contextlib.contextmanager
def proxied(target: str, seed: int = 0) -> Iterator[Proxy]:
    """Run a proxy before a server."""
    proxy = Proxy(target, seed)
    thread = threading.Thread(target=proxy.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.server.shutdown()
        proxy.server.server_close()
        thread.join()
