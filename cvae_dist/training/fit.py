"""Training on any rows that can be read, into a model directory or into memory: what the estimator calls."""

import numpy as np

from cvae_dist.config import MAX_VALIDATION_ROWS, TrainConfig
from cvae_dist.events import OnEvent, ignore
from cvae_dist.store import Location, Moments
from cvae_dist.store.lineage import digest_bytes
from cvae_dist.store.reader import Reader
from cvae_dist.training.loader import read_rows
from cvae_dist.training.loop import Trained, run
from cvae_dist.training.prepare import Training, TrainingData
from cvae_dist.training.resume import finished, train_in
from cvae_dist.training.validation import choose_rows


def fit(
    reader: Reader,
    moments: Moments,
    item_shape: tuple[int, ...],
    config: TrainConfig,
    directory: str | Location | None = None,
    on_event: OnEvent = ignore,
    *,
    overwrite: bool = False,
    validation: Reader | None = None,
    earlier: Trained | None = None,
) -> Trained:
    """Train on the rows of ``reader``, whose items had the shape ``item_shape`` before they were flattened.

    By default nothing is written, and ``earlier`` goes on where this is the same training with more steps. With a
    model ``directory`` the training there goes on, as for the verb, or with ``overwrite`` is discarded. Of the rows of
    ``validation`` 10,000 at most validate; then all rows of ``reader`` are trained on.

    Raises
    ------
    KeyboardInterrupt
        The training was interrupted; with a ``directory`` it goes on when called again.
    TrainingDiverged
        As for the verb; what was good before, if anything, is its ``trained``.
    """
    if validation is not None:
        config = config.model_copy(update={"train_valid_split": 1.0})
    data = TrainingData(reader, moments, item_shape, _digest(moments, validation), "memory", validation)
    training = Training.of(data, config)
    if directory is None:
        goes_on = earlier is not None and training.asks_for_more(earlier.made_with)
        return run(training, on_event, earlier=earlier if goes_on else None)
    place = Location.of(directory)
    figures, _ = train_in(place, training, overwrite, on_event)
    if figures.stopped_because == "interrupted":
        raise KeyboardInterrupt
    return finished(place)


def _digest(moments: Moments, validation: Reader | None) -> str:
    """Return a digest of rows that have no ledger: of their moments, and of the rows that validate."""
    parts = [np.array(moments.count), moments.mean, moments.m2, moments.minimum, moments.maximum]
    if validation is not None:
        parts.append(read_rows(validation, choose_rows(validation, MAX_VALIDATION_ROWS, 0)))
    return digest_bytes(b"".join(part.tobytes() for part in parts))
