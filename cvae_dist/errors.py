"""Every error a user can cause. Each says what happened, the values, the consequence and the remedy."""

import difflib
from collections.abc import Iterable


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return what to say after an unknown name: the nearest known one, or else all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


class CvaeDistError(Exception):
    """Base of all errors raised on purpose by this package."""


class InvalidInput(CvaeDistError, ValueError):
    """Rows, files or values that cannot be used as given."""


class DriftTooLarge(InvalidInput):
    """New rows that differ from the rows before them by more than was allowed; they are not published."""


class InvalidPipeline(InvalidInput):
    """A pipeline file that cannot be run as it is written; nothing was run."""


class SourceNotFound(CvaeDistError, FileNotFoundError):
    """A source, store or model that is not there, or holds nothing usable."""


class SettingsChanged(CvaeDistError, ValueError):
    """An output already exists and was made with other settings."""


class OutputLocked(CvaeDistError, RuntimeError):
    """Another driver holds the lease of the output."""


class Corrupt(CvaeDistError, ValueError):
    """Stored bytes do not match their digest, or are missing."""


class StorageFailed(CvaeDistError, OSError):
    """The storage refused a read or a write (disk full, permission, connection)."""


class NotFitted(CvaeDistError, ValueError):
    """A model is asked for something before it was trained."""


class TrainingDiverged(CvaeDistError, ArithmeticError):
    """The loss ran away or became non-finite, at low learning rates too.

    Attributes
    ----------
    trained : cvae_dist.training.loop.Trained or None
        What was good before; None where nothing was.
    """

    def __init__(self, message: str, trained: object = None) -> None:
        super().__init__(message)
        self.trained = trained


class OutOfTime(CvaeDistError, TimeoutError):
    """A pipeline stopped, as the ``max_time`` of its training is over; the same command goes on."""


class RankLost(CvaeDistError, RuntimeError):
    """Another rank of a training ended, or did not answer in time."""


class RankFailed(CvaeDistError, RuntimeError):
    """A rank of a training failed by itself; the text ends in its last lines."""


class MissingExtra(CvaeDistError, ImportError):
    """An optional dependency is not installed; the text ends in the pip line."""
