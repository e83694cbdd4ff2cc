"""One driver at a time: a lease object beside the store that names its holder and expires."""

import contextlib
import getpass
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Self

from cvae_dist.errors import OutputLocked
from cvae_dist.store.urls import Location

_LOGGER = logging.getLogger(__name__)
_SECONDS = 60.0


@dataclass(frozen=True)
class Holder:
    """Who holds a lease.

    ``process`` is the pid and its start time, so that a reused pid is not mistaken for it. ``machine`` says where
    the pid means something: hosts and containers may share a name.
    """

    token: str
    host: str
    machine: str
    user: str
    process: tuple[int, str]
    expires: float

    @classmethod
    def me(cls) -> Self:
        """Describe this process."""
        return cls(uuid.uuid4().hex, socket.gethostname(), _machine(), _user(), _process(os.getpid()), 0.0)

    @property
    def is_gone(self) -> bool:
        """Whether the lease has expired, or its process is known to have ended on this machine."""
        if time.time() > self.expires:
            return True
        return self.machine == _machine() and _process(self.process[0]) != tuple(self.process)

    def __str__(self) -> str:
        left = max(0.0, self.expires - time.time())
        return (
            f"process {self.process[0]} of {self.user} on {self.host} (its lease ends in {left:.0f} s unless renewed)"
        )


class Lease:
    """Exclusive right to publish into one output, renewed by a thread until released."""

    def __init__(self, output: Location) -> None:
        self._output = output
        self._object = output.beside(".lease")
        self._holder = Holder.me()
        self._stop = threading.Event()
        self._lost: OutputLocked | None = None
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    @classmethod
    @contextlib.contextmanager
    def held(cls, output: Location) -> Iterator["Lease"]:
        """Hold the lease of ``output``.

        Raises
        ------
        OutputLocked
            Another living driver holds it.
        """
        lease = cls(output)
        lease._acquire()
        try:
            yield lease
        finally:
            lease._release()

    def check(self) -> None:
        """Refuse to go on when another driver took the lease over, e.g. after this one was suspended."""
        current = self._read()
        if current is None or current.token != self._holder.token:
            raise OutputLocked(
                f"the lease of {self._output} was taken over by {current or 'nobody: it was deleted'}. "
                "Nothing was published by this run; run the same command again once the other driver has ended"
            )

    def require(self) -> None:
        """Like :meth:`check`, from what the last renewal found: costs nothing."""
        if self._lost is not None:
            raise self._lost

    def _acquire(self) -> None:
        for _ in range(3):
            try:
                self._object.create(self._document())
            except FileExistsError:
                current = self._read()
                if current is not None and not current.is_gone:
                    raise OutputLocked(
                        f"{self._output} is being written by {current}. Two drivers on one output are refused; "
                        f"wait for it to end, or stop it and run the same command again"
                    ) from None
                _LOGGER.info("taking over the lease of %s left by %s", self._output, current)
                if self._read() == current:  # else another driver was faster
                    self._object.delete()
            else:
                self.check()
                self._thread.start()
                return
        raise OutputLocked(f"other drivers keep taking the lease of {self._output}; wait for them to end")

    def _release(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        current = self._read()
        if current is not None and current.token == self._holder.token:
            self._object.delete()

    def _renew(self) -> None:
        while not self._stop.wait(_SECONDS / 3):
            try:
                self.check()
                self._object.write(self._document())
            except OutputLocked as error:
                self._lost = error
                return
            except Exception as error:  # the driver itself finds out in check(), before it publishes
                _LOGGER.warning("could not renew the lease of %s: %s", self._output, error)

    def _read(self) -> Holder | None:
        try:
            return Holder(**json.loads(self._object.read()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def _document(self) -> bytes:
        return json.dumps({**asdict(self._holder), "expires": time.time() + _SECONDS}).encode()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's uid without a name
        return str(os.getuid())


def _machine() -> str:
    """Name this boot of this machine and the namespace of its pids, or else the host."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _process(pid: int) -> tuple[int, str]:
    """Return the pid and when it began, in clock ticks since boot (proc(5), field 22); empty when it has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rsplit(b") ", 1)[1].split()
        return pid, "" if fields[0] in b"ZX" else fields[19].decode()  # a killed process may wait to be reaped
    except (OSError, IndexError):
        return pid, "" if not _alive(pid) else "alive"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
