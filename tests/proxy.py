"""A proxy before an object store that counts requests and injects faults."""

import contextlib
import http.client
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


class Proxy:
    """What passed, and what is to go wrong.

    ``requests`` are (method, path) in order. ``faults`` name what happens to the next requests of ``method``, after
    ``passes`` of them: ``refuse`` (503), ``reset`` (the connection ends and nothing is done), ``lose`` (it is done and
    nobody hears of it) or ``cut`` (half of the answer is sent). With ``forgets`` the server never sees conditions.
    """

    def __init__(self, target: str) -> None:
        self.target = urlsplit(target).netloc
        self.requests: list[tuple[str, str]] = []
        self.method, self.faults, self.forgets, self.passes = "PUT", list[str](), False, 0
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    @property
    def methods(self) -> list[str]:
        """Methods of the requests since the last look."""
        found = [method for method, _ in self.requests]
        self.requests.clear()
        return found

    def next_fault(self) -> str | None:
        """Return what happens to the next request of the method."""
        if self.passes:
            self.passes -= 1
            return None
        return self.faults.pop(0) if self.faults else None

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                proxy.requests.append((self.command, self.path))
                fault = proxy.next_fault() if self.command == proxy.method else None
                self.close_connection = fault is not None
                if fault == "refuse":
                    self.send_response(503)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                elif fault != "reset":
                    answer = self.ask(body)
                    if fault != "lose":
                        self.reply(*answer, cut=fault == "cut")

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

            def reply(self, answer: http.client.HTTPResponse, body: bytes, cut: bool) -> None:
                self.send_response_only(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                        self.send_header(name, value)
                length = answer.getheader("Content-Length") if self.command == "HEAD" else None
                self.send_header("Content-Length", length or str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if cut else body)

            def log_message(self, *arguments: Any) -> None:
                pass

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward

        return Handler


@contextlib.contextmanager
def proxied(target: str) -> Iterator[Proxy]:
    """Run a proxy before a server."""
    proxy = Proxy(target)
    thread = threading.Thread(target=proxy.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.server.shutdown()
        proxy.server.server_close()
        thread.join()
