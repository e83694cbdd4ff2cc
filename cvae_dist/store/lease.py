"""One driver at a time: a lease object beside the output names its holder, who renews it while it works.

No clock is compared with that of another host. A lease is taken over when its process is known to have ended, or when
it stood still for its whole term while we watched. A holder whose renewals did not arrive for a term stops by itself.
Every change of the object is conditional on the version that was seen, so that of two that see the same one wins.
"""

import contextlib
import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Self

from cvae_dist.errors import OutputLocked
from cvae_dist.store.holder import Holder
from cvae_dist.store.urls import Changed, Location

OnWait = Callable[[str], None]

_LOGGER = logging.getLogger(__name__)
_TERM = 60.0  # seconds that a lease lasts without a renewal
_RENEWALS = 6  # in a term
_LOOKS = 30  # in a term, by a driver that waits
_ATTEMPTS = 5


@dataclass(frozen=True)
class _Document:
    """What a lease object says. ``state`` is "held", "ending" or "released"."""

    token: str
    holder: Holder | None  # None: the object cannot be read
    term: float
    renewals: int = 0
    state: str = "held"

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read an object, whatever else it says. One that cannot be read is held by somebody, as far as we know."""
        try:
            known = json.loads(data)
            pid, began = known["process"]
            holder = Holder(known["host"], known["machine"], known["user"], (pid, began))
            document = cls(known["token"], holder, float(known["term"]), known["renewals"], known["state"])
            readable = 0 < document.term < float("inf") and 0 < pid < 2**31
        except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
            readable = False
        return document if readable else cls("", None, _TERM)

    @property
    def is_over(self) -> bool:
        """Whether nobody holds it any more, for certain."""
        return self.state == "released" or (self.holder is not None and self.holder.fate == "gone")

    @property
    def is_alive(self) -> bool:
        """Whether its holder is at work, for certain."""
        return self.holder is not None and self.holder.fate == "running"

    def encode(self) -> bytes:
        """Return what :meth:`parse` reads."""
        known = asdict(self)
        return json.dumps(known.pop("holder") | known).encode()

    def __str__(self) -> str:
        return str(self.holder or "somebody unknown, as the lease object cannot be read")


@dataclass(frozen=True)
class LeaseToken:
    """The lease of a driver as its tasks know it, wherever they run."""

    output: Location = field(repr=False)
    token: str

    def require(self) -> None:
        """Look at the lease object, and refuse to write for a driver that no longer holds it or is ending.

        Raises
        ------
        OutputLocked
            The task must not write another shard.
        """
        try:
            found = _Document.parse(_object(self.output).read())
            if found.token == self.token and found.state == "held":
                return
            why = "is ending" if found.token == self.token else f"lost the lease to {found}"
        except FileNotFoundError:
            why = "no longer holds the lease"
        raise OutputLocked(f"the driver that writes {self.output} {why}, so its tasks write nothing more")


class Lease:
    """Exclusive right to change one output, renewed by a thread until released. Any thread may ask for it.

    Attributes
    ----------
    output : Location
        What may be changed.
    """

    def __init__(self, output: Location, on_wait: OnWait | None = None) -> None:
        self.output = output
        self._on_wait = on_wait
        self._object = _object(output)
        self._document = _Document(uuid.uuid4().hex, Holder.me(), _TERM)
        self._version = ""
        self._renewed = 0.0  # when the last renewal that arrived was sent, by the monotonic clock
        self._lost = ""
        self._changing = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_renewing, name="lease", daemon=True)

    @classmethod
    @contextlib.contextmanager
    def held(cls, output: Location, on_wait: OnWait | None = None) -> Iterator["Lease"]:
        """Hold the lease of ``output``.

        ``on_wait`` is told when it must first be seen, for a term at most, whether an earlier holder is still alive.

        Raises
        ------
        OutputLocked
            Another driver holds it.
        StorageFailed
            The storage cannot keep two drivers apart.
        """
        lease = cls(output, on_wait)
        lease._acquire()
        try:
            lease._object.require_conditional_writes(lease._version)
            lease._thread.start()
            yield lease
        finally:
            lease._release()

    @property
    def token(self) -> LeaseToken:
        """What tasks ask whether they may still write."""
        return LeaseToken(self.output, self._document.token)

    def check(self) -> None:
        """Renew the lease now, and refuse to go on when another driver has taken it: a whole term is left then.

        Raises
        ------
        OutputLocked
            The lease is lost, for good.
        StorageFailed
            The storage does not answer.
        """
        self._renew()

    def require(self) -> None:
        """Like :meth:`check`, from what the last renewal found: costs nothing."""
        idle = time.monotonic() - self._renewed
        if not self._lost and idle > self._document.term:
            self._lose(
                f"could not be renewed for {idle:.0f} s, as this process was stopped or the storage did not answer; "
                "another driver may have it"
            )
        if self._lost:
            raise OutputLocked(self._lost)

    def ending(self) -> None:
        """Tell tasks that still run to stop before their next shard."""
        with self._tolerant("tell the tasks, through its lease, to stop"):
            self._renew("ending")

    def _acquire(self) -> None:
        for _ in range(_ATTEMPTS):
            with contextlib.suppress(FileExistsError, FileNotFoundError):  # another was faster, or gave it back
                self._take()
                return
        raise OutputLocked(f"other drivers keep taking the lease of {self.output}; wait for them to end")

    def _take(self) -> None:
        """Make the lease ours; ``FileExistsError`` when another driver was faster."""
        try:
            self._write(self._document, self._object.create)
        except FileExistsError:
            version = self._abandoned()
            self._write(self._document, lambda data: self._object.replace(data, version))

    def _abandoned(self) -> str:
        """Return the version of a lease that nobody holds any more, after a term if that cannot be known at once."""
        first, began = "", 0.0
        while True:
            asked = time.monotonic()
            found, version = self._look()
            ours = found.token == self._document.token  # a write of ours that seemed to fail
            if ours or found.is_over or (version == first and asked - began >= found.term):
                _LOGGER.info("taking over the lease of %s left by %s", self.output, found)
                return version
            if found.is_alive or first not in ("", version):
                raise OutputLocked(
                    f"{self.output} is being written by {found}. Two drivers on one output are refused; "
                    "wait for it to end, or stop it and run the same command again"
                )
            if not first:
                first, began = version, time.monotonic()
                self._tell_wait(found)
            time.sleep(min(found.term, _TERM) / _LOOKS)

    def _tell_wait(self, found: _Document) -> None:
        message = (
            f"{self.output} was being written by {found}; waiting up to {found.term:.0f} s to see whether it still is"
        )
        _LOGGER.info(message)
        if self._on_wait is not None:
            self._on_wait(message)

    def _release(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        with self._changing, self._tolerant("release its lease"):
            version = self._own_version()
            self._lose("was given back")  # a thread that is still there must not renew it
            if not self._object.remove(version):
                self._object.replace(replace(self._document, state="released").encode(), version)

    def _keep_renewing(self) -> None:
        while not self._lost and not self._stop.wait(self._document.term / _RENEWALS):
            with self._tolerant("renew its lease"):
                self._renew()

    def _renew(self, state: str = "") -> None:
        with self._changing:
            self.require()
            document = self._document
            document = replace(document, renewals=document.renewals + 1, state=state or document.state)
            try:
                self._write(document, lambda data: self._object.replace(data, self._version))
            except Changed:  # perhaps by a write of ours that seemed to fail
                version = self._own_version()
                self._write(document, lambda data: self._object.replace(data, version))

    def _write(self, document: _Document, write: Callable[[bytes], str]) -> None:
        sent = time.monotonic()
        self._version = write(document.encode())
        self._document, self._renewed = document, sent

    def _own_version(self) -> str:
        """Return the version of the object as it is now; ``OutputLocked`` when it is not ours."""
        try:
            found, version = self._look()
            if found.token == self._document.token:
                return version
            self._lose(f"was taken over by {found}")
        except FileNotFoundError:
            self._lose("was deleted")
        raise OutputLocked(self._lost)

    def _lose(self, how: str) -> None:
        self._lost = (
            f"the lease of {self.output} {how}. This run changes nothing more; "
            "run the same command again once no other driver is at work"
        )

    def _look(self) -> tuple[_Document, str]:
        data, version = self._object.read_versioned()
        return _Document.parse(data), version

    @contextlib.contextmanager
    def _tolerant(self, what: str) -> Iterator[None]:
        """Go on when the lease turns out to be lost, which is kept in mind, and when the storage fails."""
        try:
            yield
        except (OutputLocked, Changed):
            pass
        except Exception as error:
            _LOGGER.warning("the driver of %s could not %s: %s", self.output, what, error)


def _object(output: Location) -> Location:
    return output.beside(".lease")
