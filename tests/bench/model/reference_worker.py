"""The reference in its own environment: one command a line on stdin, one answer a line on stdout, both JSON.

Run by that environment's interpreter, with the CPUs it may use as arguments; knows nothing of this package.
"""

import functools
import json
import os
import sys
import time

os.sched_setaffinity(0, [int(cpu) for cpu in sys.argv[1:]])  # before TensorFlow counts them

import numpy as np  # noqa: E402
from cvae.cvae import CompressionVAE  # noqa: E402

_load = functools.lru_cache(maxsize=4)(np.load)


class Worker:
    """The reference; every method returns wall and CPU-seconds (of all threads) of the reference's own call."""

    def train(self, rows, settings, **arguments):
        x = _load(rows)
        return _timed(lambda: self._train(x, settings, arguments))[1]

    def _train(self, x, settings, arguments):
        self._model = CompressionVAE(x, **settings)
        self._model.train(**arguments)

    def embed(self, rows, into, batch_size):
        x = _load(rows)
        return _saved(into, lambda: self._model.embed(x, batch_size=batch_size))

    def decode(self, rows, into):
        z = _load(rows)
        return _saved(into, lambda: self._model.decode(z))


def _saved(into, run):
    array, took = _timed(run)
    np.save(into, array)
    return took


def _timed(run):
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return result, {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the reference prints
    worker = Worker()
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(getattr(worker, command.pop("do"))(**command)), file=answers, flush=True)


if __name__ == "__main__":
    main()
