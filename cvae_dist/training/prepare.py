"""What is trained on, and what is decided before the first step."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from cvae_dist.config import MAX_VALIDATION_ROWS, WITHOUT_EFFECT_ON_WEIGHTS, TrainConfig
from cvae_dist.model.vae import VAE, decide
from cvae_dist.store import Moments, RowStore
from cvae_dist.store.lineage import versions, without_credentials
from cvae_dist.store.ranges import RowNumbers
from cvae_dist.store.reader import Reader, RowReader
from cvae_dist.training.history import Figures
from cvae_dist.training.loader import read_rows
from cvae_dist.training.multistart import MAX_LANDMARKS, choose_start, is_worthwhile
from cvae_dist.training.permutation import pick_rows
from cvae_dist.training.plan import plan_sampler
from cvae_dist.training.precision import Decision, choose_precision
from cvae_dist.training.sampler import NO_ROWS, Sampler
from cvae_dist.training.validation import Validation, choose_rows


@dataclass(frozen=True)
class TrainingData:
    """The rows of a training.

    Attributes
    ----------
    reader : Reader
        Reads them.
    moments : Moments
        Their statistics.
    item_shape : tuple of int
        Shape of an item before it was flattened to a row.
    fingerprint : str
        Differs from that of any other rows.
    url : str
        Where they are, without credentials.
    validation : Reader or None
        Rows to validate on; without them a part of the rows is held out.
    """

    reader: Reader
    moments: Moments
    item_shape: tuple[int, ...]
    fingerprint: str
    url: str
    validation: Reader | None = None

    @classmethod
    def of(cls, store: RowStore) -> Self:
        """Describe the rows of a store."""
        url = without_credentials(store.url)
        return cls(RowReader(store), store.statistics(), store.item_shape, store.fingerprint, url)


@dataclass(frozen=True)
class Training:
    """A training whose settings are all decided.

    Attributes
    ----------
    data : TrainingData
        What is trained on.
    asked : TrainConfig
        The settings as they were given.
    config : TrainConfig
        The settings without automatic values.
    reasons : tuple of str
        Why the statistics of the rows led to theirs.
    """

    data: TrainingData
    asked: TrainConfig
    config: TrainConfig
    reasons: tuple[str, ...]

    @classmethod
    def of(cls, data: TrainingData, asked: TrainConfig) -> Self:
        """Decide every automatic setting."""
        config = asked.resolve(data.reader.n_rows, data.reader.n_features)
        decided, reasons = decide(config, data.moments, data.reader.dtype, data.item_shape)
        return cls(data, asked, config.model_copy(update=decided.model_dump()), reasons)

    @property
    def made_with(self) -> dict[str, Any]:
        """Everything that decides the weights: the rows and the settings."""
        settings = self.config.model_dump(mode="json", exclude=set(WITHOUT_EFFECT_ON_WEIGHTS))
        return {"rows": self.data.fingerprint, **settings}

    def asks_for_more(self, there: Mapping[str, Any]) -> bool:
        """Whether this is the training that was made with ``there``, but with more steps.

        Settings that follow from the number of steps may differ too.
        """
        asked = self.made_with
        follows = {"num_steps", "ema_decay"} if self.asked.ema_decay is None else {"num_steps"}
        same = all(there.get(name) == asked[name] for name in asked.keys() - follows)
        return same and asked["num_steps"] > there["num_steps"]

    def untrained(self) -> VAE:
        """Return the model with random weights, those of the seed."""
        return VAE.of(self.config, self.data.moments, self.data.reader.dtype, self.config.seed)

    def hold_out(self) -> tuple[Validation, RowNumbers]:
        """Return what validates, and which of the rows it takes away from training."""
        config, reader, own = self.config, self.data.reader, self.data.validation
        if own is not None:
            chosen = choose_rows(own, MAX_VALIDATION_ROWS, config.seed)
            return Validation.read(own, chosen, config.dim_latent, config.seed), NO_ROWS
        chosen = choose_rows(reader, config.validation_count(reader.n_rows), config.seed)
        return Validation.read(reader, chosen, config.dim_latent, config.seed), chosen

    def _plan_order(self, excluded_rows: int) -> Sampler:
        """Choose the order of the rows, ``excluded_rows`` of which are not trained on."""
        reader, config = self.data.reader, self.config
        return plan_sampler(
            reader.n_rows - excluded_rows,
            config.batch_size or 1,
            reader.n_features * reader.dtype.itemsize,
            config.seed,
            config.buffer_bytes,
            reader.block_rows_hint,
            excluded_rows,
        )

    def begin(self, vae: VAE, validation: Validation, excluded: RowNumbers, earlier: Figures | None) -> "Beginning":
        """Decide what only trying can decide; the best of several starts is put into ``vae``.

        Parameters
        ----------
        vae : VAE
            Untrained.
        validation : Validation
            The rows that validate.
        excluded : numpy.ndarray, int64, ascending
            Rows that are not trained on.
        earlier : Figures or None
            How the training ended whose weights are gone on with; then no other start is tried.
        """
        if earlier:
            start = f"the best weights of {earlier.steps} finished steps go on, with a fresh optimiser"
        else:
            start = self._improve_start(vae, validation, excluded)
        sampler = self._plan_order(len(excluded))
        return Beginning(sampler, start, choose_precision(self.config.precision, vae, sampler.batch_size))

    def _improve_start(self, vae: VAE, validation: Validation, excluded: RowNumbers) -> str:
        """Give ``vae`` a better start than random weights where that pays, and say which; empty where it does not."""
        reader = self.data.reader
        if not is_worthwhile(self.config, reader.n_rows, reader.n_features):
            return ""
        picked = pick_rows(reader.n_rows, MAX_LANDMARKS + len(excluded), self.config.seed)
        landmarks = read_rows(reader, np.setdiff1d(picked, excluded))
        return choose_start(vae, self.config, landmarks, validation.rows)

    def lineage(self, held_out: int, begun: int, figures: Figures) -> dict[str, Any]:
        """Return where the model came from, for ``config.json``.

        Parameters
        ----------
        held_out : int
            Number of rows that were not trained on.
        begun : int
            Last step of the finished training that was gone on with; 0 where there was none.
        figures : Figures
            How the training ended.
        """
        reader = self.data.reader
        return {
            "store": self.data.url,
            "made_with": self.made_with,
            "item_shape": list(self.data.item_shape),
            "dtype": reader.dtype.str,
            "held_out": {"rows": reader.n_rows, "count": held_out, "seed": self.config.seed},
            "continued_from_step": begun,
            "figures": asdict(figures),
            "versions": versions(),
        }


@dataclass(frozen=True)
class Beginning:
    """What is decided just before the first step. Every checkpoint holds it, so that a resumed run keeps to it.

    Attributes
    ----------
    sampler : Sampler
        The order of the rows.
    start : str
        What the first weights are; empty for random ones.
    precision : Decision
        Type that steps are computed in.
    """

    sampler: Sampler
    start: str
    precision: Decision

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Self:
        """Return what a checkpoint kept."""
        precision = Decision(state["precision"], "as this training began")
        return cls(Sampler(**state["sampler"]), state["start"], precision)

    def state(self) -> dict[str, Any]:
        """Return what :meth:`of` reads."""
        return {"sampler": asdict(self.sampler), "start": self.start, "precision": self.precision.value}

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should be told."""
        return (*self.precision.notes, *([self.start] if self.start else []))

    @property
    def was_tried(self) -> bool:
        """Whether a timing or several starts decided: a second try may decide otherwise."""
        return self.precision.timed or bool(self.start)
