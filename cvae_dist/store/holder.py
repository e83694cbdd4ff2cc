"""Who holds a lease, and what became of that process where this machine can tell."""

import getpass
import os
import socket
from dataclasses import dataclass
from typing import Literal, Self

Fate = Literal["gone", "running", "unknown"]


@dataclass(frozen=True)
class Holder:
    """A process that holds a lease.

    ``process`` is the pid and its start time, so that a reused pid is not mistaken for it. ``machine`` says where
    the pid means something: hosts and containers may share a name. It is empty where that cannot be told.
    """

    host: str
    machine: str
    user: str
    process: tuple[int, str]

    @classmethod
    def me(cls) -> Self:
        """Describe this process."""
        pid, machine = os.getpid(), _machine()
        began = _state_and_start(pid)[1] if machine else ""
        return cls(socket.gethostname(), machine, _user(), (pid, began))

    @property
    def fate(self) -> Fate:
        """What can be proved: the process is gone, or it is running. A stopped one may go on, so it is unknown."""
        if not self.machine or self.machine != _machine():
            return "unknown"
        pid, began = self.process
        try:
            state, found = _state_and_start(pid)
        except OSError:  # it has ended, or belongs to another user whose processes /proc hides (hidepid)
            return "unknown" if _exists(pid) else "gone"
        if state in "ZX" or found != began:  # a killed process may wait to be reaped
            return "gone"
        return "unknown" if state in "Tt" else "running"

    def __str__(self) -> str:
        return f"process {self.process[0]} of {self.user} on {self.host}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's uid without a name
        return str(os.getuid())


def _machine() -> str:
    """Name this boot of this machine and the namespace of its pids; empty where the system does not tell."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _state_and_start(pid: int) -> tuple[str, str]:
    """Return the state of a process and when it began, in clock ticks since boot (proc(5), fields 3 and 22)."""
    with open(f"/proc/{pid}/stat", errors="replace") as file:
        fields = file.read().rsplit(") ", 1)[1].split()
    return fields[0], fields[19]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
