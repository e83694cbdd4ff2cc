"""A proxy on loopback that counts HTTP requests on their way to a server, so that no client can hide one."""

import contextlib
import re
import socket
import threading
from collections import Counter
from urllib.parse import urlsplit

_REQUEST = re.compile(rb"(GET|PUT|POST|HEAD|DELETE) [^ \r\n]+ HTTP/1\.1\r\n")
_LONGEST = 4096  # bytes of a request's first line


class CountingProxy:
    """Forwards connections to ``endpoint``; ``counts`` has the requests by method.

    Bytes go through unchanged, so signatures stay valid as long as the client signs the proxy's own address.
    """

    def __init__(self, endpoint: str) -> None:
        parts = urlsplit(endpoint)
        self._target = (parts.hostname, parts.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def take(self) -> "Counter[str]":
        """Return the counts since the last call."""
        with self._lock:
            counts, self.counts = self.counts, Counter()
        return counts

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                for one in (client, server):
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._forward, args=(client, server, True), daemon=True).start()
                threading.Thread(target=self._forward, args=(server, client, False), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, counted: bool) -> None:
        rest = b""
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 20):
                if counted:
                    rest = self._count(rest + data)
                target.sendall(data)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _count(self, data: bytes) -> bytes:
        """Count the requests that begin in ``data``, and return its end, where another may begin."""
        end = 0
        for match in _REQUEST.finditer(data):
            end = match.end()
            with self._lock:
                self.counts[match[1].decode()] += 1
        return data[max(end, len(data) - _LONGEST) :]
