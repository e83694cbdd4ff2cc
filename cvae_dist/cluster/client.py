"""Which Dask cluster to use: none, a running one, or one started here."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from cvae_dist.errors import InvalidInput, StorageFailed

if TYPE_CHECKING:
    from distributed import Client

# Dask's nanny lowers the allocator's thresholds, so that every activation above 128 kB is mapped and page-faulted
# anew: an encoder ran 1.3 to 2.6 times slower under it. One hardware thread per worker process.
_ENVIRONMENT = {
    "MALLOC_TRIM_THRESHOLD_": "268435456",
    "MALLOC_MMAP_THRESHOLD_": "268435456",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
_CONFIG = {
    "distributed.nanny.pre-spawn-environ": _ENVIRONMENT,
    "distributed.scheduler.allowed-failures": 10,  # a dead worker suspects every task it held; shards may be redone
}


def resolve_client(scheduler: str | None = None, workers: int | None = None) -> AbstractContextManager["Client | None"]:
    """Return a context of a client of the cluster that was asked for, or of None to work in this process.

    ``scheduler`` is the address of a running one, such as ``tcp://10.0.0.1:8786``; ``workers`` are processes to start
    on this machine for the time of the context.

    Raises
    ------
    InvalidInput
        Both were given, or ``workers`` is not positive.
    StorageFailed
        The scheduler does not answer.
    """
    if scheduler is not None and workers is not None:
        raise InvalidInput(f"both scheduler={scheduler!r} and workers={workers} were given; name one of them")
    if scheduler is not None:
        return _connect(scheduler)
    if workers is None:
        return contextlib.nullcontext()
    if workers < 1:
        raise InvalidInput(
            f"workers={workers} starts no worker; use 1 or more, or leave it out to work in this process"
        )
    return _start(workers)


def _connect(address: str) -> "Client":
    from distributed import Client

    if "://" not in address or not address.rpartition(":")[2].isdecimal():
        raise InvalidInput(f"scheduler={address!r} is no address of a Dask scheduler; write tcp://host:8786")
    try:
        return Client(address, timeout="20s", set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        raise StorageFailed(
            f"no Dask scheduler answers at {address} ({error}). Nothing was started; "
            "mend the address, start a scheduler, or leave it out to work in this process"
        ) from error


@contextlib.contextmanager
def _start(workers: int) -> Iterator["Client"]:
    import dask
    from distributed import Client, LocalCluster

    with dask.config.set(_CONFIG), contextlib.ExitStack() as stack:
        with _interrupts_ignored():
            cluster = stack.enter_context(
                LocalCluster(
                    n_workers=workers,
                    threads_per_worker=1,
                    processes=True,
                    # without an address it would take port 8787, and warn where another cluster has it
                    dashboard_address="127.0.0.1:0",
                    scheduler_kwargs={"dashboard": False},
                    silence_logs=50,
                )
            )
        yield stack.enter_context(Client(cluster, set_as_default=False))


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Start processes to which Ctrl-C means nothing: the driver stops them, without a traceback each."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
