"""The verb ``train``: rows to a model directory, going on by itself where an earlier run stopped."""

import contextlib
import hashlib
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch

from cvae_dist.config import MAX_VALIDATION_ROWS, WITHOUT_EFFECT_ON_WEIGHTS, TrainConfig, make_config
from cvae_dist.errors import InvalidInput, SettingsChanged, TrainingDiverged
from cvae_dist.events import Event, EventKind, OnEvent, ignore
from cvae_dist.model.directory import delete_model, load_model, save_model
from cvae_dist.model.files import CHECKPOINTS, HISTORY, LOGS, WEIGHTS, is_finished, read_description
from cvae_dist.model.threads import torch_threads
from cvae_dist.model.tiling import tensor_of
from cvae_dist.model.vae import VAE, decide
from cvae_dist.store import Lease, Location, Moments, RowStore
from cvae_dist.store.lineage import versions, without_credentials
from cvae_dist.store.ranges import RowNumbers
from cvae_dist.store.reader import Reader, RowReader
from cvae_dist.store.urls import StorageOptions
from cvae_dist.training.checkpoint import Checkpoints
from cvae_dist.training.history import History, Record, Scalars
from cvae_dist.training.interruption import Interruption
from cvae_dist.training.loader import Batch, Loader, read_rows
from cvae_dist.training.multistart import MAX_LANDMARKS, choose_start, is_worthwhile
from cvae_dist.training.precision import Decision, choose_precision
from cvae_dist.training.sampler import NO_ROWS, Sampler, plan_sampler, validation_rows
from cvae_dist.training.trainer import Trainer
from cvae_dist.training.validation import Validation, affordable_count

_STAGE = "train"
_SECONDS_BETWEEN_EVENTS = 0.5
_SHARED_WORK = 30_000_000  # multiply-adds of a step from which a second thread gains more than it waits

StoppedBecause = Literal["finished", "no improvement", "interrupted", "diverged", "already finished"]


@dataclass(frozen=True)
class TrainResult:
    """How a training ended.

    Attributes
    ----------
    steps : int
        Gradient steps done, in this run and those it went on from.
    epochs : float
        Passes over the training rows.
    loss : float
        Mean training loss per row since the last validation before the end, in nats.
    validation_loss : float or None
        Best validation -ELBO per row, in nats; None without validation rows.
    stopped_because : str
        ``finished``, ``no improvement``, ``interrupted`` (run again to go on) or ``already finished``.
    seconds : float
        Time spent training, over all runs.
    model : str
        URL of the model directory.
    """

    steps: int
    epochs: float
    loss: float
    validation_loss: float | None
    stopped_because: StoppedBecause
    seconds: float
    model: str


def train(
    store: str | RowStore,
    model: str,
    config: TrainConfig | None = None,
    *,
    overwrite: bool = False,
    storage_options: StorageOptions | None = None,
    on_event: OnEvent = ignore,
    **settings: Any,
) -> TrainResult:
    """Train a model on the rows of a store; run again, it goes on from the last checkpoint.

    A finished model goes on where only ``num_steps`` is larger than it was: from its best weights and at its last
    step, with a fresh optimiser and the learning rate and KL weight that the longer training has there, after a new
    warm-up of the rate. That is not, to the bit, the model of a training that was longer from the start.

    Parameters
    ----------
    store : str or RowStore
        A published store of rows.
    model : str
        Path or URL of the model directory to write.
    config : TrainConfig, optional
        All settings at once.
    overwrite : bool
        Discard what is at ``model`` and begin anew.
    storage_options : Mapping, optional
        Passed to fsspec for both locations.
    on_event : callable
        Receives progress.
    **settings
        Single settings of :class:`~cvae_dist.config.TrainConfig`; they win over ``config``.

    Raises
    ------
    InvalidInput
        A setting is unknown or out of range, or the store has no rows.
    SettingsChanged
        ``model`` was begun or finished with other settings (but for a larger ``num_steps``) or on other rows.
    TrainingDiverged
        The loss ran away or was not finite, at a thousandth of the learning rate too. The last good weights are kept.
    Corrupt
        The rows or the checkpoints are damaged.
    OutputLocked
        Another process is training this model.
    """
    config = make_config(TrainConfig, (config.model_dump(exclude_unset=True) if config else {}) | settings)
    rows = store if isinstance(store, RowStore) else RowStore.open(store, storage_options)
    data = _Data(RowReader(rows), rows.statistics(), rows.item_shape, rows.fingerprint, without_credentials(rows.url))
    rows.require_kind("rows")
    place = Location.of(model, storage_options)
    if place.lies_in(rows.location):
        raise InvalidInput(
            f"the model {place} lies in the store {rows.location} that it is trained on. Nothing was changed; "
            "name a directory of its own"
        )
    return _train_at(place, data, config, overwrite, on_event)


def _train_at(place: Location, data: "_Data", config: TrainConfig, overwrite: bool, on_event: OnEvent) -> TrainResult:
    """Train into a model directory, under its lease."""
    with Lease.held(place):
        _require_ours(place)
        if overwrite:
            _discard(place)
        if not is_finished(place):
            return _run(data, config, place, on_event)[0]
        if _asks_for_more(_made_with_at(place), data, config):
            return _run(data, config, place, on_event, _finished(place))[0]
        return _already_finished(place, data, config, on_event)


class Trained(NamedTuple):
    """A finished training: its model, ready for inference, its course, and what made it."""

    vae: VAE
    history: list[Record]
    steps: int
    seconds: float
    best_loss: float
    made_with: Mapping[str, Any]


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
    """Train on any reader of rows.

    Without ``directory`` nothing is written, and ``earlier`` goes on where this is the same training with more steps.
    With it this is :func:`train`: an interrupted training goes on, and so does a finished one.
    With ``validation`` its rows validate, 10,000 of them at most, and every row of ``reader`` is trained on.

    Raises
    ------
    KeyboardInterrupt
        The training was interrupted; with a ``directory`` it goes on when called again.
    TrainingDiverged
        As for :func:`train`; what was good before, if anything, is its ``trained``.
    """
    if validation is not None:
        config = config.model_copy(update={"train_valid_split": 1.0})
    data = _Data(reader, moments, item_shape, _digest(moments, validation), "memory", validation)
    if directory is None:
        more = earlier is not None and _asks_for_more(earlier.made_with, data, config)
        return _run(data, config, None, on_event, earlier if more else None)[1]
    place = Location.of(directory)
    if _train_at(place, data, config, overwrite, on_event).stopped_because == "interrupted":
        raise KeyboardInterrupt
    return _finished(place)


@dataclass(frozen=True)
class _Data:
    """What is trained on."""

    reader: Reader
    moments: Moments
    item_shape: tuple[int, ...]
    fingerprint: str
    url: str
    validation: Reader | None = None


def _digest(moments: Moments, validation: Reader | None) -> str:
    """Return a digest of rows that have no ledger: of their moments, and of the rows that validate."""
    parts = [np.array(moments.count), moments.mean, moments.m2, moments.minimum, moments.maximum]
    if validation is not None:
        parts.append(read_rows(validation, _chosen(validation, MAX_VALIDATION_ROWS, 0)))
    return hashlib.blake2b(b"".join(part.tobytes() for part in parts), digest_size=16).hexdigest()


def _discard(place: Location) -> None:
    """Delete what an earlier training left; first what makes it a model, then what makes it resumable."""
    delete_model(place)
    Checkpoints(place / CHECKPOINTS).clear()
    for name in (HISTORY, LOGS):
        (place / name).delete()


def _require_ours(place: Location) -> None:
    """Refuse a directory in which a training would replace or delete files of somebody else."""
    if is_finished(place):
        read_description(place)
        return
    checkpoints = Checkpoints(place / CHECKPOINTS)
    ours = checkpoints.begun or (place / HISTORY).exists()  # a killed run may have left weights alone beside it
    if (checkpoints.foreign() and not checkpoints.begun) or ((place / WEIGHTS).exists() and not ours):
        raise InvalidInput(
            f"{place} holds files that cvae-dist did not write where a training keeps its own. "
            "Nothing was changed; name another directory for the model"
        )


def _finished(place: Location) -> Trained:
    """Return the finished training at ``place``, without what a longer one has recorded since."""
    figures = read_description(place)["lineage"]["figures"]
    history = [record for record in History.read(place / HISTORY).records if record["step"] <= figures["steps"]]
    best_loss = math.inf if figures["validation_loss"] is None else figures["validation_loss"]
    return Trained(load_model(place), history, figures["steps"], figures["seconds"], best_loss, _made_with_at(place))


def _made_with_at(place: Location) -> Mapping[str, Any]:
    made_with: Mapping[str, Any] = read_description(place)["lineage"].get("made_with", {})
    return made_with


def _asks_for_more(there: Mapping[str, Any], data: _Data, config: TrainConfig) -> bool:
    """Whether this is the training there, but with more steps; settings that follow from them may differ too."""
    asked = _made_with(data, _decide(data, config)[0])
    follows = {"num_steps", "ema_decay"} if config.ema_decay is None else {"num_steps"}
    same = all(there.get(name) == asked[name] for name in asked.keys() - follows)
    return same and asked["num_steps"] > there["num_steps"]


def _already_finished(place: Location, data: _Data, config: TrainConfig, on_event: OnEvent) -> TrainResult:
    """Return the result of the finished training at ``place``, or refuse when it was another one."""
    lineage = read_description(place)["lineage"]
    figures = lineage["figures"]
    decided, _ = _decide(data, config)
    if _has_grown(data, lineage):
        asked = config.model_dump(mode="json", exclude=set(WITHOUT_EFFECT_ON_WEIGHTS), exclude_unset=True)
        _require_same(place, lineage["made_with"], {name: value for name, value in asked.items() if value is not None})
        message = (
            f"already trained, on {lineage['held_out']['rows']:,} of what are now {data.reader.n_rows:,} rows; "
            "--overwrite trains anew on all of them"
        )
    else:
        _require_same(place, lineage.get("made_with", {}), _made_with(data, decided))
        message = f"already trained: {place} has all its {figures['steps']} steps; --overwrite trains anew"
    if figures["stopped_because"] == "diverged":
        raise _diverged(decided, figures["steps"], f"{place} holds the last good weights", _finished(place))
    on_event(Event(_STAGE, "done", figures["steps"], figures["steps"], "steps", message, _known(figures)))
    return TrainResult(**figures | {"stopped_because": "already finished", "model": str(place)})


def _has_grown(data: _Data, lineage: Mapping[str, Any]) -> bool:
    """Whether the store of a finished training has more rows now: every night it may, and the model stays good."""
    return bool(data.url == lineage["store"] != "memory" and data.reader.n_rows > lineage["held_out"]["rows"])


def _run(
    data: _Data, config: TrainConfig, place: Location | None, on_event: OnEvent, earlier: Trained | None = None
) -> tuple[TrainResult, Trained]:
    """Train from the last checkpoint, an earlier end or the start, to the end or an interruption."""
    config, reasons = _decide(data, config)
    made_with = _made_with(data, config)
    checkpoints = Checkpoints(place / CHECKPOINTS) if place else None
    state = _last_state(place, checkpoints, made_with, earlier) if place and checkpoints else None
    validation, excluded = _validation(data, config)
    sampler = Sampler(**state["sampler"]) if state else _plan(data.reader, config, len(excluded))
    vae = VAE.of(config, data.moments, data.reader.dtype, config.seed)
    history = History(place / HISTORY if place else None, _recorded(state, earlier))
    history.write()
    logs = place / LOGS if place and config.tb_logging else None
    first_step = int(history.records[-1]["step"]) + 1 if history.records else 0
    with (
        _threads(sum(weight.numel() for weight in vae.parameters()) * sampler.batch_size),
        Loader(data.reader, sampler, excluded=excluded, buffer_bytes=config.buffer_bytes) as loader,
        Scalars(logs, first_step) as scalars,
        Interruption() if place else contextlib.nullcontext() as interruption,
    ):
        start = state["start"] if state else _start(data, config, vae, validation, excluded, earlier)
        precision = _precision(state, config, vae)
        trainer = Trainer(vae, config, validation, sampler.steps_per_epoch, precision.compute_dtype)
        if state:
            trainer.restore(state["trainer"])
        elif earlier:
            trainer.go_on_from(earlier.steps, dict(earlier.vae.named_parameters()), earlier.best_loss)
            trainer.seconds = earlier.seconds
        made = {"made_with": made_with, "sampler": asdict(sampler), "start": start, "precision": precision.value}
        run = _Run(trainer, history, scalars, checkpoints, made, interruption, on_event)
        notes = (*reasons, *precision.notes, *([start] if start else []))
        run.start(notes, loader.variance_inflation, keep=not state and (precision.timed or bool(start)))
        stopped = run.steps(loader)
    result = run.end(stopped, str(place or ""))
    if stopped != "interrupted":
        trainer.use_best_weights()
        if place and checkpoints:
            if trainer.good_step is not None or not trainer.diverged:
                delete_model(place)  # until the longer one is whole there is none; its checkpoints are
                save_model(place, vae, _lineage(data, config, len(excluded), result, trainer.begun))
            checkpoints.clear()
    vae.requires_grad_(False).eval()
    trained = Trained(vae, history.records, trainer.step, trainer.seconds, trainer.best_loss, made_with)
    if trainer.diverged:
        raise _given_up(trained, config, trainer.good_step, place)
    return result, trained


def _last_state(
    place: Location, checkpoints: Checkpoints, made_with: Mapping[str, Any], earlier: Trained | None
) -> dict[str, Any] | None:
    """Return what the last checkpoint of this training holds, and delete what a killed one left half-written."""
    state = checkpoints.load()
    if state and earlier and state["made_with"] == earlier.made_with:
        state = None  # that of the earlier training, which was killed just after its end
    if state:
        _require_same(place, state["made_with"], made_with)
    place.sweep_partial()
    checkpoints.sweep()
    return state


def _given_up(trained: Trained, config: TrainConfig, good_step: int | None, place: Location | None) -> TrainingDiverged:
    if good_step is None:
        return _diverged(config, trained.steps, "No weights were worth keeping")
    kept = f"{place or 'The model'} holds the last good weights, of step {good_step}"
    return _diverged(config, trained.steps, kept, trained)


def _diverged(config: TrainConfig, step: int, kept: str, trained: Trained | None = None) -> TrainingDiverged:
    rate = cast(float, config.learning_rate)
    return TrainingDiverged(
        f"the training diverged by step {step}: the loss ran away or was not finite, with learning rate {rate:.3g} and "
        f"three times with a tenth of the one before. {kept}. Look for rows of extreme values "
        f"(likelihood='student_t' suits heavy tails) and at kl_weight={config.kl_weight:.3g} and "
        f"grad_clip={config.grad_clip:.3g}; then train anew with --overwrite, and --learning-rate {rate / 1e4:.1g}",
        trained,
    )


def _recorded(state: Mapping[str, Any] | None, earlier: Trained | None) -> list[Record]:
    """Return the history that a training goes on from."""
    if state:
        records: list[Record] = state["history"]
        return records
    return earlier.history if earlier else []


class _Run:
    """One run of a training: its trainer, and everything that tells or keeps what it does."""

    def __init__(
        self,
        trainer: Trainer,
        history: History,
        scalars: Scalars,
        checkpoints: Checkpoints | None,
        made: Mapping[str, Any],
        interruption: Interruption | None,
        on_event: OnEvent,
    ) -> None:
        self._trainer = trainer
        self._history = history
        self._scalars = scalars
        self._checkpoints = checkpoints
        self._made = made
        self._interruption = interruption
        self._on_event = on_event
        self._began = time.monotonic() - trainer.seconds
        self._told = self._recorded = time.monotonic()
        self._rows_since_told = self._rows_since_record = 0

    def start(self, reasons: tuple[str, ...], variance_inflation: float, keep: bool) -> None:
        """Tell what is about to happen; ``keep`` what was decided, as a second try may decide otherwise."""
        trainer = self._trainer
        values = {"variance_inflation": variance_inflation, "validation_rows": len(trainer.validation)}
        going_on = f"going on from step {trainer.step}" if trainer.step else ""
        self._tell("start", going_on, values)
        for reason in reasons:
            self._tell("note", reason)
        if keep:
            self._save()

    def steps(self, loader: Loader) -> StoppedBecause:
        """Train until there is a reason to stop, and return it."""
        reason = self._reason_to_stop()
        batches = loader.batches(*self._trainer.position)
        while not reason:
            self._step(next(batches))
            reason = self._reason_to_stop()
        return reason

    def end(self, stopped: StoppedBecause, model: str) -> TrainResult:
        """Save what an interrupted training needs to go on, tell the end and return the result."""
        trainer = self._trainer
        trainer.seconds = time.monotonic() - self._began
        if stopped == "interrupted":
            self._save()
        figures = {"loss": trainer.loss, "validation_loss": trainer.best_loss, "seconds": trainer.seconds}
        self._tell("done", _ENDINGS[stopped].format(step=trainer.step, good=trainer.good_step), _known(figures))
        validation = trainer.best_loss if math.isfinite(trainer.best_loss) else None
        epochs = trainer.step / trainer.steps_per_epoch
        return TrainResult(trainer.step, epochs, trainer.loss, validation, stopped, trainer.seconds, model)

    def _step(self, batch: Batch) -> None:
        trainer = self._trainer
        retreats = trainer.retreats
        trainer.advance(tensor_of(batch.x), batch.positions, batch.n_global)
        self._rows_since_told += batch.n_global
        self._rows_since_record += batch.n_global
        if trainer.test_is_due:
            self._record()
        if trainer.retreats > retreats:
            self._tell("note", f"diverged; going on from step {trainer.good_step or 0}'s weights, {_SLOWER}")
        if trainer.step % trainer.config.checkpoint_every == 0 and not trainer.finished:
            self._save()
        if time.monotonic() - self._told >= _SECONDS_BETWEEN_EVENTS:
            self._progress()

    def _reason_to_stop(self) -> StoppedBecause | None:
        if self._trainer.diverged:
            return "diverged"
        if self._trainer.finished:
            return "finished"
        if self._trainer.hopeless:
            return "no improvement"
        return "interrupted" if self._interruption and self._interruption.requested else None

    def _record(self) -> None:
        now = time.monotonic()
        record = self._trainer.test()
        record["rows_per_second"] = self._rows_since_record / max(now - self._recorded, 1e-9)
        record["time"] = now - self._began
        self._recorded, self._rows_since_record = time.monotonic(), 0
        self._history.append(record)
        self._scalars.add(record)

    def _save(self) -> None:
        if self._checkpoints:
            self._trainer.seconds = time.monotonic() - self._began
            state = {**self._made, "trainer": self._trainer.state(), "history": self._history.records}
            self._checkpoints.save(self._trainer.step, state)

    def _progress(self) -> None:
        now = time.monotonic()
        rate = self._rows_since_told / (now - self._told)
        self._told, self._rows_since_told = now, 0
        figures = {
            "loss": self._trainer.loss,
            "validation_loss": self._trainer.best_loss,
            "rows_per_second": rate,
        }
        self._tell("progress", values=_known(figures))

    def _tell(self, kind: EventKind, message: str = "", values: Mapping[str, float | int | str] | None = None) -> None:
        trainer = self._trainer
        self._on_event(Event(_STAGE, kind, trainer.step, trainer.num_steps, "steps", message, values or {}))


_SLOWER = "with a tenth of the learning rate"
_ENDINGS: dict[StoppedBecause, str] = {
    "finished": "trained {step} steps",
    "no improvement": "trained {step} steps: validation has stopped improving; the weights of step {good} are kept",
    "interrupted": "interrupted after step {step}, which is saved; the same command goes on from there",
    "diverged": "stopped at step {step}: the training diverges",
}


def _threads(work: int) -> contextlib.AbstractContextManager[None]:
    """Compute small steps on one thread: several would wait for each other, long on a busy machine."""
    return torch_threads(torch.get_num_threads() if work >= _SHARED_WORK else 1)


def _known(figures: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures that are finite numbers."""
    return {name: value for name, value in figures.items() if isinstance(value, int | float) and math.isfinite(value)}


def _decide(data: _Data, config: TrainConfig) -> tuple[TrainConfig, tuple[str, ...]]:
    """Return the settings without automatic values, and why the statistics led to theirs."""
    config = config.resolve(data.reader.n_rows, data.reader.n_features)
    decided, reasons = decide(config, data.moments, data.reader.dtype, data.item_shape)
    return config.model_copy(update=decided.model_dump()), reasons


def _start(
    data: _Data, config: TrainConfig, vae: VAE, validation: Validation, excluded: RowNumbers, earlier: Trained | None
) -> str:
    """Give ``vae`` a better start than random weights where that pays, and say which; empty where it does not."""
    if earlier:
        return f"the best weights of {earlier.steps} finished steps go on, with a fresh optimiser"
    n_rows = data.reader.n_rows
    if not is_worthwhile(config, n_rows, data.reader.n_features):
        return ""
    nearest = validation_rows(n_rows, min(n_rows, MAX_LANDMARKS + len(excluded)), config.seed)
    landmarks = read_rows(data.reader, np.setdiff1d(nearest, excluded))
    return choose_start(vae, config, landmarks, validation.rows)


def _precision(state: Mapping[str, Any] | None, config: TrainConfig, vae: VAE) -> Decision:
    """Return the precision of the steps; a resumed training keeps the one it began with."""
    if state:
        return Decision(state["precision"], "as this training began")
    return choose_precision(config.precision, vae, config.batch_size or 1)


def _made_with(data: _Data, config: TrainConfig) -> dict[str, Any]:
    """Return everything that decides the weights: the rows and the settings."""
    settings = config.model_dump(mode="json", exclude=set(WITHOUT_EFFECT_ON_WEIGHTS))
    return {"rows": data.fingerprint, **settings}


def _require_same(place: Location, there: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    changed = [name for name in asked if there.get(name) != asked[name]]
    if changed:
        differences = ", ".join(f"{name}: {there.get(name)!r} there, {asked[name]!r} asked for" for name in changed)
        raise SettingsChanged(
            f"the model at {place} was made with other settings or rows ({differences}). Nothing changed; "
            "go on with the same settings, name another directory, or use --overwrite to train it anew"
        )


def _validation(data: _Data, config: TrainConfig) -> tuple[Validation, RowNumbers]:
    """Return what validates, and which of the rows it takes away from training."""
    if data.validation is not None:
        chosen = _chosen(data.validation, MAX_VALIDATION_ROWS, config.seed)
        return Validation.read(data.validation, chosen, config.dim_latent, config.seed), NO_ROWS
    chosen = _chosen(data.reader, config.validation_count(data.reader.n_rows), config.seed)
    return Validation.read(data.reader, chosen, config.dim_latent, config.seed), chosen


def _chosen(reader: Reader, count: int, seed: int) -> RowNumbers:
    """Choose ``count`` rows, or as many as there are and may be held in memory."""
    return validation_rows(reader.n_rows, affordable_count(min(count, reader.n_rows), reader), seed)


def _plan(reader: Reader, config: TrainConfig, held_out: int) -> Sampler:
    """Choose the order of the rows; a resumed training keeps the one it began with."""
    return plan_sampler(
        reader.n_rows - held_out,
        config.batch_size or 1,
        reader.n_features * reader.dtype.itemsize,
        config.seed,
        config.buffer_bytes,
        reader.block_rows_hint,
        held_out,
    )


def _lineage(data: _Data, config: TrainConfig, held_out: int, result: TrainResult, begun: int) -> dict[str, Any]:
    """Return where the model came from, for ``config.json``; ``begun`` is not 0 where a finished training went on."""
    figures = {name: value for name, value in asdict(result).items() if name != "model"}
    return {
        "store": data.url,
        "made_with": _made_with(data, config),
        "item_shape": list(data.item_shape),
        "dtype": data.reader.dtype.str,
        "held_out": {"rows": data.reader.n_rows, "count": held_out, "seed": config.seed},
        "continued_from_step": begun,
        "figures": figures,
        "versions": versions(),
    }
