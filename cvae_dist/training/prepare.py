"""What is trained on, and what is decided before the first step."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from cvae_dist.config import MAX_VALIDATION_ROWS, WITHOUT_EFFECT_ON_WEIGHTS, TrainConfig
from cvae_dist.errors import SettingsChanged
from cvae_dist.model.metric import rows_to_look_at
from cvae_dist.model.scaling import are_vectors
from cvae_dist.model.vae import VAE, decide
from cvae_dist.store import Moments, RowStore
from cvae_dist.store.lineage import digest_bytes, versions, without_credentials
from cvae_dist.store.permutation import hold_out, pick_rows
from cvae_dist.store.ranges import RowNumbers
from cvae_dist.store.reader import Reader, RowReader
from cvae_dist.training.history import Figures
from cvae_dist.training.loader import read_rows
from cvae_dist.training.multistart import MAX_LANDMARKS, choose_start, is_worthwhile
from cvae_dist.training.plan import plan_sampler
from cvae_dist.training.precision import Decision, choose_precision
from cvae_dist.training.sampler import NO_ROWS, ORDER, Sampler
from cvae_dist.training.validation import Validation, affordable_rows, choose_rows
from cvae_dist.training.world import World

_FEW_ROWS = 10
_INFLATION_TOLD = 1.1  # of the variance of batches

MEMORY = "memory"  # the url of rows that are in no store


@dataclass(frozen=True)
class TrainingData:
    """The rows of a training, and the rows to validate on; without these a part of the former is held out.

    ``item_shape`` is that of an item before it was flattened to a row. The ``fingerprint`` differs from that of any
    other rows. The ``url`` is without credentials. The ``store`` is None where the rows are in none.
    """

    reader: Reader
    moments: Moments
    item_shape: tuple[int, ...]
    fingerprint: str
    url: str
    validation: Reader | None = None
    store: RowStore | None = None

    @classmethod
    def in_memory(
        cls, reader: Reader, moments: Moments, item_shape: tuple[int, ...], validation: Reader | None = None
    ) -> Self:
        """Describe rows that have no ledger: their moments, and the rows that validate, tell them from others."""
        parts = [np.array(moments.count), moments.mean, moments.m2, moments.minimum, moments.maximum]
        if validation is not None:
            parts.append(read_rows(validation, choose_rows(validation, MAX_VALIDATION_ROWS, 0)))
        fingerprint = digest_bytes(b"".join(part.tobytes() for part in parts))
        return cls(reader, moments, item_shape, fingerprint, MEMORY, validation)

    @classmethod
    def of(cls, store: RowStore) -> Self:
        """Describe the rows of a store.

        Raises
        ------
        InvalidInput
            The store holds no rows, but latents or scores.
        """
        store.require_kind("rows")
        url = without_credentials(store.url)
        store.records()  # what the rows are compared with in the end
        return cls(RowReader(store), store.statistics(), store.item_shape, store.fingerprint, url, store=store)

    def require_unchanged(self) -> None:
        """Refuse rows that were replaced while they were read. A store may have grown.

        Raises
        ------
        Corrupt
            What was made from them is worth nothing.
        """
        if self.store is not None:
            self.store.require_unchanged()


@dataclass(frozen=True)
class Training:
    """A training whose settings are all decided.

    ``asked`` is what the user gave. ``config`` is the same with every automatic value filled in, for ``reasons`` that
    the statistics of the rows gave.
    """

    data: TrainingData
    asked: TrainConfig
    config: TrainConfig
    reasons: tuple[str, ...]

    @classmethod
    def of(cls, data: TrainingData, asked: TrainConfig) -> Self:
        """Decide every automatic setting."""
        vectors = are_vectors(data.moments, data.reader.dtype, data.item_shape)
        config = asked.resolve(data.reader.n_rows, data.reader.n_features, vectors=vectors)
        decided, reasons = decide(config, data.moments, data.reader.dtype, data.item_shape)
        n_rows = data.reader.n_rows
        if n_rows < _FEW_ROWS:
            rows = "1 row" if n_rows == 1 else f"{n_rows} rows"
            reasons += (f"only {rows}: a model learns so few by heart, and nothing tells what else it knows",)
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

    def hold_out(self, world: World) -> tuple[Validation, RowNumbers]:
        """Return what validates, and which of the rows it takes away from training."""
        config, reader, own = self.config, self.data.reader, self.data.validation
        if own is not None:
            chosen = choose_rows(own, MAX_VALIDATION_ROWS, config.seed)
            return Validation.read(own, chosen, config.dim_latent, config.seed, world), NO_ROWS
        chosen, excluded = hold_out(**self._held_out)
        return Validation.read(reader, chosen, config.dim_latent, config.seed, world), excluded

    @property
    def _held_out(self) -> dict[str, Any]:
        """What says which rows validate, for :func:`hold_out`."""
        reader, split = self.data.reader, self.config.train_valid_split
        share = 0.0 if self.data.validation is not None or split is None else 1 - split
        return {"rows": reader.n_rows, "share": share, "most": affordable_rows(reader), "seed": self.config.seed}

    def begin(
        self, vae: VAE, validation: Validation, excluded: RowNumbers, earlier: Figures | None, world: World
    ) -> "Beginning":
        """Decide what only trying can decide; the best of several starts is put into ``vae``, which is untrained.

        ``excluded`` rows, ascending, are not trained on. No start is tried where an ``earlier`` training goes on.
        Starts are few rows of few features, and are trained on the CPU; then ``vae`` goes where ``world`` computes.
        """
        reader, config = self.data.reader, self.config
        if earlier:
            start = f"the best weights of {earlier.steps} finished steps go on, with a fresh optimiser"
        else:
            start = self._improve_start(vae, validation, excluded)
        sampler = plan_sampler(
            reader.n_rows - len(excluded),
            config.batch_size or 1,
            reader.n_features * reader.dtype.itemsize,
            config.seed,
            config.buffer_bytes,
            reader.block_rows_hint,
            len(excluded),
        )
        return Beginning(sampler, start, choose_precision(config.precision, vae.to(world.device), sampler.batch_size))

    def note(self, sampler: Sampler) -> str:
        """Say what the order lacks, and the remedy; empty where it lacks nothing."""
        inflation, store = sampler.variance_inflation, self.data.store
        shuffled = store is not None and store.document["settings"].get("shuffle") is not None
        if inflation <= _INFLATION_TOLD or shuffled:
            return ""
        return (
            f"batches vary {inflation:.2f} times as much as those of independent rows where neighbouring rows are "
            f"alike: {sampler.block_rows} rows are read together, of {sampler.buffer_rows:,} that are shuffled. "
            "Shuffle them once, `cvae-dist ingest SOURCE OTHER_STORE --shuffle 0`, or give more --buffer-bytes"
        )

    def _improve_start(self, vae: VAE, validation: Validation, excluded: RowNumbers) -> str:
        """Give ``vae`` a better start than random weights where that pays, and say which; empty where it does not."""
        reader = self.data.reader
        if not is_worthwhile(self.config, reader.n_rows, reader.n_features):
            return ""
        picked = pick_rows(reader.n_rows, MAX_LANDMARKS + len(excluded), self.config.seed)
        landmarks = read_rows(reader, np.setdiff1d(picked, excluded))
        return choose_start(vae, self.config, landmarks, validation.rows)

    def measure(self, vae: VAE, validation: Validation) -> None:
        """Let the trained ``vae`` find what ``metric="data"`` needs, at rows that validate, or else at others."""
        rows, seed = validation.rows, self.config.seed
        if not len(rows):
            reader = self.data.reader
            rows = read_rows(reader, pick_rows(reader.n_rows, rows_to_look_at(vae.dim_latent), seed))
        vae.measure_stretch(rows[pick_rows(len(rows), rows_to_look_at(vae.dim_latent), seed)])

    def lineage(self, begun: int, figures: Figures) -> dict[str, Any]:
        """Return where the model came from, for ``config.json``.

        ``begun`` is the last step of the finished training that was gone on with, or 0.
        """
        reader = self.data.reader
        return {
            "store": self.data.url,
            "made_with": self.made_with,
            "item_shape": list(self.data.item_shape),
            "dtype": reader.dtype.str,
            "held_out": self._held_out,
            "continued_from_step": begun,
            "figures": asdict(figures),
            "versions": versions(),
        }


@dataclass(frozen=True)
class Beginning:
    """What is decided just before the first step. Every checkpoint holds it, so that a resumed run keeps to it.

    ``start`` says what the first weights are; it is empty for random ones.
    """

    sampler: Sampler
    start: str
    precision: Decision

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Self:
        """Return what a checkpoint kept."""
        if state.get("order") != ORDER:
            raise SettingsChanged(
                f"the checkpoint is of a training whose rows came in order {state.get('order', 1)}, and this version "
                f"has order {ORDER}: it cannot go on. Nothing changed; use --overwrite to train anew"
            )
        return cls(Sampler(**state["sampler"]), state["start"], Decision(state["precision"]))

    def state(self) -> dict[str, Any]:
        """Return what :meth:`of` reads."""
        return {"order": ORDER, "sampler": asdict(self.sampler), "start": self.start, "precision": self.precision.value}

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should be told: what a timing or several starts decided. A second try may decide otherwise."""
        return tuple(note for note in (self.precision.note, self.start) if note)
