"""The state of a training and what one step does to it; no files, no signals, no clock."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy.typing as npt
import torch
from torch import Tensor

from cvae_dist.config import TrainConfig
from cvae_dist.model.kernels import compiled, computing_in
from cvae_dist.model.tiling import keep_freed_memory
from cvae_dist.model.vae import VAE, Terms
from cvae_dist.training import schedule
from cvae_dist.training.history import Figures, HistoryRecord
from cvae_dist.training.optimizer import Optimizer, assign, clone
from cvae_dist.training.transfer import Transfer
from cvae_dist.training.validation import Validation
from cvae_dist.training.world import World

_MAX_SKIPPED = 50
_MAX_RETREATS = 3
_RETREAT_FACTOR = 10
_RUNAWAY = 1000  # times the loss of the first weights
_KEPT = (  # numbers of a trainer's state, beside those of tensors
    *("step", "begun", "good_step", "retreats", "seconds"),
    *("_optimizer_begun", "_first_loss", "_skipped_before", "_last_loss", "_next_test"),
)


@dataclass
class _LossSums:
    """What the good steps since the last validation add up to: the terms of their loss in nats, over rows; norms."""

    reconstruction: float = 0.0
    kl: float = 0.0
    rows: int = 0
    norms: float = 0.0
    largest_norm: float = 0.0
    steps: int = 0

    def add(self, reconstruction: float, kl: float, rows: int, norm: float) -> None:
        self.reconstruction += reconstruction
        self.kl += kl
        self.rows += rows
        self.norms += norm
        self.largest_norm = max(self.largest_norm, norm)
        self.steps += 1

    def means(self) -> HistoryRecord:
        if not self.rows:
            return {}
        reconstruction, kl = self.reconstruction / self.rows, self.kl / self.rows
        return {
            "loss": reconstruction + kl,
            "reconstruction": reconstruction,
            "kl": kl,
            "gradient_norm": self.norms / self.steps,
            "largest_gradient_norm": self.largest_norm,
        }

    @property
    def loss(self) -> float:
        return float(self.means().get("loss", math.nan))


class Trainer:
    """Weights, optimiser, position and best weights of one training.

    Every random number is a function of (seed, epoch, step, position in the global batch). So a restored trainer does,
    bit for bit, what the interrupted one would have done. ``vae`` is trained in place, and ``config`` has no automatic
    values. Where no rows validate, the last averaged weights are the best. The matrix products of a step are computed
    in ``compute_dtype``.

    Attributes
    ----------
    good_step : int or None
        Step of the last weights worth going back to; None before the first test.
    retreats : int
        How often the training diverged and went back to them, each time with a tenth of the learning rate.
    diverged : bool
        Whether it diverged once more after the last of three retreats; then it must stop.
    stop_requested : bool
        Whether a rank asked, at the last step, to stop.
    """

    def __init__(
        self,
        vae: VAE,
        config: TrainConfig,
        validation: Validation,
        steps_per_epoch: int,
        compute_dtype: torch.dtype = torch.float32,
        world: World | None = None,
    ) -> None:
        keep_freed_memory()
        self._world = world or World()
        self.vae = vae
        self.config = config
        self.validation = validation
        self.steps_per_epoch = steps_per_epoch
        self._compute_dtype = compute_dtype
        self._forward = compiled(vae, compute_dtype) if config.compile else vae
        self.step = self.begun = self._optimizer_begun = 0
        self.num_steps = cast(int, config.num_steps)
        self.seconds = 0.0
        self._batch_size = cast(int, config.batch_size)
        self._peak_rate = cast(float, config.learning_rate)
        self._optimizer = self._new_optimizer()
        self._generator = torch.Generator()
        self._transfer = Transfer(self._world.device)
        self._next_test = self._test_after(0)
        self._sums = _LossSums()
        self._last_loss = math.nan
        self._best_weights = clone(self._optimizer.average)
        self.best_loss = math.inf
        self._best_step = 0
        self._tests_since_best = 0
        self._first_loss = math.nan
        self._skipped_before = 0
        self.good_step: int | None = None
        self.retreats = 0
        self.diverged = False
        self.stop_requested = False

    @property
    def position(self) -> tuple[int, int]:
        """Epoch, and step inside it, that come next."""
        return divmod(self.step, self.steps_per_epoch)

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.num_steps

    @property
    def hopeless(self) -> bool:
        """Whether validation has stopped improving, counted from the end of the KL warm-up."""
        warm = round(self.config.kl_warmup * self.num_steps)
        since = max(self._best_step, warm)
        return schedule.is_hopeless(self.step, since, self._tests_since_best, self.steps_per_epoch)

    def advance(self, rows: Tensor, positions: npt.NDArray[Any], n_global: int, stop: bool = False) -> None:
        """Do one step on this rank's share of a global batch of ``n_global`` rows, together with all other ranks.

        The gradient is that of their mean. ``rows``, (n, n_features), are in data units and of any real dtype, and on
        the world's device. ``positions``, (n,) int64, are their places in the global batch, which decide their noise;
        the CPU draws it, so that it is the same on any device. Where any rank asks to ``stop``, all ranks know it after
        the step.

        Raises
        ------
        RankLost
            Another rank ended; the step was not done.
        """
        noise = self._transfer(self._noise(n_global)[torch.from_numpy(positions)])
        with computing_in(self._compute_dtype):
            terms: Terms = self._forward(rows, noise)
        weight = self.config.kl_weight * schedule.kl_weight(self.step, self.num_steps, self.config.kl_warmup)
        reconstruction, kl = terms.reconstruction.sum(), terms.kl.sum()
        figures = torch.stack((reconstruction.detach(), kl.detach(), torch.full_like(kl.detach(), float(stop))))
        loss = (reconstruction + weight * kl) / n_global
        good, sums = self._optimizer.step(loss, self.learning_rate, figures)
        if good:
            self._sums.add(sums[0], sums[1], n_global, self._optimizer.norm)
        if not math.isfinite(self._first_loss):
            self._first_loss = (sums[0] + sums[1]) / n_global
        self.stop_requested = sums[2] > 0
        self.step += 1
        if self._optimizer.skipped >= _MAX_SKIPPED:
            self._retreat()

    @property
    def learning_rate(self) -> float:
        """Rate of the step that comes next."""
        falls = self.config.lr_scheduling
        peak = self._peak_rate / _RETREAT_FACTOR**self.retreats
        return schedule.learning_rate(self.step, self.num_steps, peak, self._optimizer_begun, falls)

    @property
    def loss(self) -> float:
        """Mean training -ELBO per row since the last validation, in nats; right after one, of the rows before it."""
        return self._sums.loss if self._sums.rows else self._last_loss

    @property
    def test_is_due(self) -> bool:
        """Whether the history gets its next record now."""
        return self.step >= self._next_test or self.finished

    def test(self) -> HistoryRecord:
        """Validate the averaged weights, keep them if they are the best, and return the figures."""
        record: HistoryRecord = {
            "step": self.step,
            "epoch": self.step / self.steps_per_epoch,
            **self._sums.means(),
            "learning_rate": self.learning_rate,
            "kl_weight": self.config.kl_weight * schedule.kl_weight(self.step, self.num_steps, self.config.kl_warmup),
            "skipped_steps": self._skipped_before + self._optimizer.skipped,
        }
        self._last_loss = self.loss
        if self._has_run_away:
            self._retreat()
        elif len(self.validation):
            record |= self._validate()
        else:
            self._keep()
        self._sums = _LossSums()
        self._next_test = self._test_after(self.step)
        return record

    @property
    def _has_run_away(self) -> bool:
        """Whether the training loss since the last test is far beyond that of the first weights."""
        return self._sums.loss > _RUNAWAY * (abs(self._first_loss) + self.vae.n_features)

    def _retreat(self) -> None:
        """Go back to the last good weights, with a tenth of the learning rate; give up after three times."""
        if self.retreats == _MAX_RETREATS:
            self.diverged = True
            return
        self.retreats += 1
        self._skipped_before += self._optimizer.skipped
        assign(dict(self.vae.named_parameters()), self._best_weights)
        self._optimizer = self._new_optimizer()
        self._optimizer_begun, self._sums = self.step, _LossSums()
        self._best_step, self._tests_since_best = self.step, 0

    def _new_optimizer(self) -> Optimizer:
        config = self.config
        ema_decay, encoder_decay = cast(float, config.ema_decay), cast(float, config.encoder_decay)
        return Optimizer(self.vae, ema_decay, config.grad_clip, self._world, encoder_decay)

    def _validate(self) -> HistoryRecord:
        reconstruction, kl = self.validation.terms(self.vae, self._optimizer.average, self._world)
        loss = reconstruction + self.config.kl_weight * kl
        self._tests_since_best += 1
        if loss < self.best_loss:
            self.best_loss, self._best_step, self._tests_since_best = loss, self.step, 0
            self._keep()
        return {"validation_loss": loss, "validation_reconstruction": reconstruction, "validation_kl": kl}

    def _keep(self) -> None:
        assign(self._best_weights, self._optimizer.average)
        if self._optimizer.updates:
            self.good_step = self.step

    def _test_after(self, step: int) -> int:
        return schedule.next_test(step, len(self.validation) / self._batch_size, self.config.test_every)

    def _noise(self, n_global: int) -> Tensor:
        key = f"noise/{self.config.seed}/{self.step}".encode()
        self._generator.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=4).digest()))
        return torch.randn((n_global, self.vae.dim_latent), generator=self._generator)

    def state(self) -> dict[str, Any]:
        """Return everything :meth:`restore` needs, as tensors, numbers, strings and containers of them."""
        return {
            **{name.lstrip("_"): getattr(self, name) for name in _KEPT},
            "parameters": dict(self.vae.named_parameters()),
            "optimizer": self._optimizer.state(),
            "sums": asdict(self._sums),
            "best": {
                "loss": self.best_loss,
                "step": self._best_step,
                "tests_since": self._tests_since_best,
                "weights": self._best_weights,
            },
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state` of a trainer with the same arguments."""
        for name in _KEPT:
            setattr(self, name, state[name.lstrip("_")])
        assign(dict(self.vae.named_parameters()), state["parameters"])
        self._optimizer.restore(state["optimizer"])
        self._sums = _LossSums(**state["sums"])
        best = state["best"]
        self.best_loss, self._best_step = best["loss"], best["step"]
        self._tests_since_best = best["tests_since"]
        assign(self._best_weights, best["weights"])

    def go_on_from(self, end: Figures, weights: Mapping[str, Tensor]) -> None:
        """Begin where a finished training ended, with its best ``weights`` and a fresh optimiser."""
        self.step = self.begun = self._optimizer_begun = self._best_step = self.good_step = end.steps
        self.best_loss = math.inf if end.validation_loss is None else end.validation_loss
        self.seconds = end.seconds
        self._next_test = self._test_after(end.steps)
        for mine in (dict(self.vae.named_parameters()), self._optimizer.average, self._best_weights):
            assign(mine, weights)

    def use_best_weights(self) -> None:
        """Put the averaged weights of the best validation into the model, or the last ones where nothing validated."""
        validated = len(self.validation) and (self.finished or self.good_step is not None)
        kept = self._best_weights if validated or self.diverged else self._optimizer.average
        assign(dict(self.vae.named_parameters()), kept)
