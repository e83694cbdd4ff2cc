"""One run of a training: when to step, validate, checkpoint and stop, and what it tells."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch

from cvae_dist.config import TrainConfig
from cvae_dist.errors import RankLost, TrainingDiverged
from cvae_dist.events import Event, EventKind, OnEvent
from cvae_dist.model.directory import delete_model, save_model
from cvae_dist.model.files import CHECKPOINTS, HISTORY, LOGS
from cvae_dist.model.threads import torch_threads
from cvae_dist.model.vae import VAE
from cvae_dist.store import Lease
from cvae_dist.store.ranges import RowNumbers
from cvae_dist.training import device
from cvae_dist.training.checkpoint import Checkpoints
from cvae_dist.training.history import GOES_ON, Figures, History, HistoryRecord, Scalars, StoppedBecause, finite
from cvae_dist.training.interruption import Interruption
from cvae_dist.training.loader import Batch, Loader
from cvae_dist.training.precision import multiply_adds
from cvae_dist.training.prepare import Beginning, Training
from cvae_dist.training.sampler import Share
from cvae_dist.training.saving import Saving
from cvae_dist.training.tracking import Tracking
from cvae_dist.training.trainer import Trainer
from cvae_dist.training.validation import Validation
from cvae_dist.training.world import World, as_bytes, from_bytes

_SECONDS_BETWEEN_EVENTS = 0.5
_SHARED_WORK = 30_000_000  # multiply-adds of a step from which a second thread gains more than it waits
_SLOWER = "with a tenth of the learning rate"
_ENDINGS: dict[StoppedBecause, str] = {
    "finished": "trained {step} steps",
    "no improvement": "trained {step} steps: validation has stopped improving; the weights of step {good} are kept",
    "interrupted": "interrupted after step {step}, {kept}",
    "out of time": "stopped after step {step}, as its time is over, {kept}",
    "diverged": "stopped at step {step}: the training diverges",
}
_SAVED = "which is saved; the same command goes on from there"
_UNSAVED = "and the best weights so far are the model"


class Trained(NamedTuple):
    """A training that has ended: its model, ready for inference, its course, its end, and what made it."""

    vae: VAE
    history: list[HistoryRecord]
    figures: Figures
    made_with: Mapping[str, Any]


def run(
    training: Training,
    on_event: OnEvent,
    lease: Lease | None = None,
    state: Mapping[str, Any] | None = None,
    earlier: Trained | None = None,
    world: World | None = None,
) -> Trained:
    """Train to the end, or to an interruption, into the model directory whose ``lease`` is held.

    Without one nothing is written, and SIGTERM is left alone. The training goes on from ``state``, a checkpoint, or
    else from ``earlier``, a finished training. One that is interrupted or out of time gives the best weights so far
    as its model.

    Of several ranks rank 0 holds the lease and decides. The others follow its decisions.

    Raises
    ------
    RankLost
        Another rank has ended, or did not answer. All steps that were done are in a checkpoint.
    TrainingDiverged
        The loss ran away or was not finite, at a thousandth of the learning rate too. The last good weights are kept.
    OutputLocked
        The lease was lost. Nothing in the directory was changed since.
    Corrupt
        The rows were replaced while they were trained on. No model was written.
    """
    world = world or World()
    with Tracking(training if world.leads else None, lease, on_event) as tracking:
        trained = _train(training, on_event, lease, state, earlier, world, tracking)
        tracking.end(trained.figures.stopped_because)
    return trained


def _train(
    training: Training,
    on_event: OnEvent,
    lease: Lease | None,
    state: Mapping[str, Any] | None,
    earlier: Trained | None,
    world: World,
    tracking: Tracking,
) -> Trained:
    config, began = training.config, time.monotonic()
    validation, excluded = training.hold_out(world)
    vae = VAE.of(config, training.data.moments, training.data.reader.dtype, config.seed)
    history = _history(lease, state, earlier)
    tracking.add(*history.records)
    checkpoints = Checkpoints(lease.output / CHECKPOINTS, lease.check, config.keep_checkpoints) if lease else None
    logs = lease.output / LOGS if lease and config.tb_logging else None
    with (
        torch_threads(_threads(vae, config, world)),
        Interruption(sigterm=lease is not None or not world.is_alone, lasting=not world.is_alone) as interruption,
        Saving(checkpoints, config.checkpoint_every, config.checkpoint_minutes) as saving,
    ):
        beginning, trainer = _begin(training, vae, validation, excluded, state, earlier, world)
        share = Share(beginning.sampler, excluded, world.rank, world.size)
        with (
            Loader(training.data.reader, share, buffer_bytes=config.buffer_bytes, device=world.device) as loader,
            Scalars(logs, history.next_step) as scalars,
        ):
            steps = _Run(
                training, beginning, trainer, history, scalars, tracking, lease, saving, interruption, on_event,
                world, began,
            )  # fmt: skip
            steps.tell_start()
            if beginning.notes and not state:
                steps.save()
            stopped = steps.until_stopped(loader)
        figures = steps.end(stopped)
    world.close()
    trainer.use_best_weights()
    vae.cpu()
    if world.leads:
        _conclude(training, vae, validation, trainer, figures, lease, checkpoints)
    trained = Trained(vae.requires_grad_(False).eval(), history.records, figures, training.made_with)
    if trainer.diverged:
        raise _diverged(trainer, lease, trained)
    return trained


def _history(lease: Lease | None, state: Mapping[str, Any] | None, earlier: Trained | None) -> History:
    """Return the course so far, and write it where there is a directory."""
    recorded: list[HistoryRecord] = state["history"] if state else earlier.history if earlier else []
    history = History(lease.output / HISTORY, recorded, lease.require) if lease else History(None, recorded)
    history.write()
    return history


def _begin(
    training: Training,
    vae: VAE,
    validation: Validation,
    excluded: RowNumbers,
    state: Mapping[str, Any] | None,
    earlier: Trained | None,
    world: World,
) -> tuple[Beginning, Trainer]:
    """Return what was or is decided, and a trainer that stands where ``state`` or ``earlier`` ended; in every rank."""
    if not world.leads:
        world.join()
        state = from_bytes(world.broadcast())
    end = earlier.figures if earlier else None
    beginning = Beginning.of(state) if state else training.begin(vae, validation, excluded, end, world)
    steps_per_epoch, compute_dtype = beginning.sampler.steps_per_epoch, beginning.precision.compute_dtype
    trainer = Trainer(vae.to(world.device), training.config, validation, steps_per_epoch, compute_dtype, world)
    if state:
        trainer.restore(state["trainer"])
    elif earlier:
        trainer.go_on_from(earlier.figures, dict(earlier.vae.named_parameters()))
    if world.leads and not world.is_alone:
        world.tell({"rows": training.data.fingerprint})
        world.join()
        world.broadcast(as_bytes({**beginning.state(), "trainer": trainer.state()}))
    return beginning, trainer


def _conclude(
    training: Training,
    vae: VAE,
    validation: Validation,
    trainer: Trainer,
    figures: Figures,
    lease: Lease | None,
    checkpoints: Checkpoints | None,
) -> None:
    """Complete the model, and publish it where the training has ended and left weights that are worth it."""
    training.measure(vae, validation)
    if figures.stopped_because in GOES_ON:
        return
    training.data.require_unchanged()
    if lease and checkpoints:
        if trainer.good_step is not None or not trainer.diverged:
            lease.check()
            delete_model(lease.output)  # first: a run killed before the new one is whole goes on from its checkpoints
            lease.check()
            save_model(lease.output, vae, training.lineage(trainer.begun, figures))
        checkpoints.clear()


def _threads(vae: VAE, config: TrainConfig, world: World) -> int:
    """Return on how many threads to compute: one for small steps, as several would wait for each other."""
    shared = multiply_adds(vae, (config.batch_size or 1) // world.size) >= _SHARED_WORK
    return max(1, torch.get_num_threads() // world.local_size) if shared else 1


def _diverged(trainer: Trainer, lease: Lease | None, trained: Trained) -> TrainingDiverged:
    if trainer.good_step is None:
        return diverged(trainer.config, trainer.step, "No weights were worth keeping")
    kept = f"{lease.output if lease else 'The model'} holds the last good weights, of step {trainer.good_step}"
    return diverged(trainer.config, trainer.step, kept, trained)


def diverged(config: TrainConfig, step: int, kept: str, trained: Trained | None = None) -> TrainingDiverged:
    """Return the error of a training that diverged by ``step``; ``kept`` says what is left of it."""
    rate = cast(float, config.learning_rate)
    return TrainingDiverged(
        f"the training diverged by step {step}: the loss ran away or was not finite, with learning rate {rate:.3g} and "
        f"three times with a tenth of the one before. {kept}. Look for rows of extreme values "
        f"(likelihood='student_t' suits heavy tails) and at kl_weight={config.kl_weight:.3g} and "
        f"grad_clip={config.grad_clip:.3g}; then train anew with --overwrite, and --learning-rate {rate / 1e4:.1g}",
        trained,
    )


@dataclass
class _Run:
    """A trainer, and everything that tells or keeps what it does."""

    training: Training
    beginning: Beginning
    trainer: Trainer
    history: History
    scalars: Scalars
    tracking: Tracking
    lease: Lease | None
    saving: Saving
    interruption: Interruption
    on_event: OnEvent
    world: World
    began: float

    def __post_init__(self) -> None:
        minutes = self.training.config.max_time
        self._until = math.inf if minutes is None else self.began + 60 * minutes
        self._began = time.monotonic() - self.trainer.seconds
        self._told_at = self._recorded_at = time.monotonic()
        self._rows_since_told = self._rows_since_record = 0
        self._waited = 0.0

    def tell_start(self) -> None:
        """Tell what is about to happen."""
        step, sampler, training = self.trainer.step, self.beginning.sampler, self.training
        values = {"variance_inflation": sampler.variance_inflation, "validation_rows": len(self.trainer.validation)}
        self._tell("start", f"going on from step {step}" if step else "", values)
        notes = (*training.reasons, device.note(self.world.device, training.config.device), training.note(sampler))
        for note in (*notes, *self.beginning.notes, *self.scalars.notes):
            if note:
                self._tell("note", note)

    def until_stopped(self, loader: Loader) -> StoppedBecause:
        """Train until there is a reason to stop, and return it."""
        reason = self._reason_to_stop()
        batches = loader.batches(*self.trainer.position)
        try:
            while not reason:
                asked = time.monotonic()
                batch = next(batches)
                self._waited += time.monotonic() - asked
                self._step(batch)
                reason = self._reason_to_stop()
        except RankLost:
            self.save()  # no rank has done the step in which it was lost
            self.saving.wait()
            raise
        return reason

    def end(self, stopped: StoppedBecause) -> Figures:
        """Save what a training needs to go on, if it does, and tell the end."""
        trainer = self.trainer
        trainer.seconds = time.monotonic() - self._began
        if stopped in GOES_ON:
            self.save()
        self.saving.wait()
        figures = {"loss": trainer.loss, "validation_loss": trainer.best_loss, "seconds": trainer.seconds}
        kept = _SAVED if self.lease else _UNSAVED
        ending = _ENDINGS[stopped].format(step=trainer.step, good=trainer.good_step, kept=kept)
        self._tell("done", ending, finite(figures))
        validation = trainer.best_loss if math.isfinite(trainer.best_loss) else None
        epochs = trainer.step / trainer.steps_per_epoch
        return Figures(trainer.step, epochs, trainer.loss, validation, stopped, trainer.seconds)

    def save(self) -> None:
        """Begin to write a checkpoint, where there is a directory."""
        self.trainer.seconds = time.monotonic() - self._began
        decided = {"made_with": self.training.made_with, **self.beginning.state()}
        state = {**decided, "trainer": self.trainer.state(), "history": self.history.records}
        self.saving.save(self.trainer.step, state)

    def _step(self, batch: Batch) -> None:
        trainer = self.trainer
        retreats = trainer.retreats
        stop = self.interruption.requested or self._is_out_of_time
        trainer.advance(batch.x, batch.positions, batch.n_global, stop)
        if self.lease:
            self.lease.require()
        self._rows_since_told += batch.n_global
        self._rows_since_record += batch.n_global
        if trainer.test_is_due:
            self._record()
        if trainer.retreats > retreats:
            self._tell("note", f"diverged; going on from step {trainer.good_step or 0}'s weights, {_SLOWER}")
        if self.saving.is_due(trainer.step) and not trainer.finished:
            self.save()
        if time.monotonic() - self._told_at >= _SECONDS_BETWEEN_EVENTS:
            self._progress()

    def _reason_to_stop(self) -> StoppedBecause | None:
        if self.trainer.diverged:
            return "diverged"
        if self.trainer.finished:
            return "finished"
        if self.trainer.hopeless:
            return "no improvement"
        # alone it may stop right away; several ranks stop after the step at which all of them know
        alone = self.world.is_alone and self.interruption.requested
        return self._why_asked_to_stop() if alone or self.trainer.stop_requested else None

    def _why_asked_to_stop(self) -> StoppedBecause:
        """Return why rank 0 thinks that all are to stop; in every rank."""
        why = "out of time" if self._is_out_of_time and not self.interruption.requested else "interrupted"
        return cast(StoppedBecause, self.world.broadcast(why.encode()).decode())

    @property
    def _is_out_of_time(self) -> bool:
        return self.world.leads and time.monotonic() >= self._until

    def _record(self) -> None:
        now = time.monotonic()
        seconds = max(now - self._recorded_at, 1e-9)
        record = self.trainer.test()
        record["rows_per_second"] = self._rows_since_record / seconds
        record["waiting_share"] = self._waited / seconds
        record["time"] = now - self._began
        self._recorded_at, self._rows_since_record, self._waited = time.monotonic(), 0, 0.0
        self.history.append(record)
        self.scalars.add(record)
        self.tracking.add(record)
        self._tell("test", values=finite(record))

    def _progress(self) -> None:
        now = time.monotonic()
        rate = self._rows_since_told / (now - self._told_at)
        self._told_at, self._rows_since_told = now, 0
        figures = {"loss": self.trainer.loss, "validation_loss": self.trainer.best_loss, "rows_per_second": rate}
        self._tell("progress", values=finite(figures))

    def _tell(self, kind: EventKind, message: str = "", values: Mapping[str, float | int | str] | None = None) -> None:
        step, total = self.trainer.step, self.trainer.num_steps
        self.on_event(Event("train", kind, step, total, "steps", message, values or {}))
