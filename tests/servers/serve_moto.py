"""moto on a port of 127.0.0.1, one request at a time: by itself it compares a condition, and writes somewhat later."""

import sys
import threading
from collections.abc import Iterable
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple

_application = DomainDispatcherApplication(create_backend_app)
_one_at_a_time = threading.Lock()


def answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    with _one_at_a_time:
        answered: Iterable[bytes] = _application(environ, start_response)
    return answered


if __name__ == "__main__":
    run_simple("127.0.0.1", int(sys.argv[1]), answer, threaded=True)
