"""One update of the weights: adaptive clipping, AdamW, and the running average of the weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw  # the function: the class imports torch's compiler first, which takes a second

from cvae_dist.config import WEIGHT_DECAY
from cvae_dist.model.kernels import lerp
from cvae_dist.training.world import World

_BETAS = (0.9, 0.99)
_EPS = 1e-8
_NORM_DECAY = 0.99
_AVERAGE_START = 10  # the average forgets the initial weights within the first tens of steps


class Optimizer:
    """AdamW on a module, with clipping at a multiple of the running gradient norm and averaged weights.

    Gradients are added up over all ranks of ``world`` before they are clipped. So every rank makes the same update.

    Attributes
    ----------
    average : dict[str, Tensor]
        Exponential moving average of every parameter, by name: what validation and the saved model use.
    updates, skipped : int
        Updates made; updates left out because a gradient was not finite.
    norm : float
        Norm of the last gradient before it was clipped, the same in every rank.
    """

    def __init__(
        self,
        module: nn.Module,
        ema_decay: float,
        grad_clip: float,
        world: World | None = None,
        encoder_decay: float = WEIGHT_DECAY,
    ) -> None:
        self._world = world or World()
        self._parameters: list[Tensor] = list(module.parameters())
        self._means = [torch.zeros_like(value) for value in self._parameters]
        self._squares = [torch.zeros_like(value) for value in self._parameters]
        self._steps = [torch.zeros((), device=value.device) for value in self._parameters]
        self._decays = [
            encoder_decay if name.startswith("encoder.") else WEIGHT_DECAY for name, _ in module.named_parameters()
        ]
        self._ema_decay = ema_decay
        self._grad_clip = grad_clip
        self._running_norm = self.norm = 0.0
        self.average = clone(dict(module.named_parameters()))
        self.updates = 0
        self.skipped = 0

    def step(self, loss: Tensor, learning_rate: float, figures: Tensor) -> tuple[bool, list[float]]:
        """Follow the gradient of ``loss``, added up over all ranks; change no weight when it is not finite.

        Return whether it was, and the ``figures``, shape (n,), added up likewise.
        """
        loss.backward()  # type: ignore[no-untyped-call]
        figures = self._add_up(figures)
        total = nn.utils.get_total_norm([value.grad for value in self._parameters if value.grad is not None])
        self.norm, *sums = torch.cat((total.reshape(1), figures)).tolist()  # the only wait for the device
        good = self._clip(total, self.norm)
        if good:
            self.updates += 1
            decay = min(self._ema_decay, self.updates / (_AVERAGE_START + self.updates))
            with torch.no_grad():
                self._update(learning_rate)
                lerp(list(self.average.values()), self._parameters, 1 - decay)
        else:
            self.skipped += 1
        for value in self._parameters:  # at once: the next step finds their memory in a cache
            value.grad = None
        return good, sums

    def _add_up(self, figures: Tensor) -> Tensor:
        """Add up gradients and figures over all ranks, in one message."""
        if self._world.is_alone:
            return figures
        used = [value for value in self._parameters if value.grad is not None]
        flat = torch.cat([*(value.grad.reshape(-1) for value in used if value.grad is not None), figures])
        self._world.sum(flat)
        *gradients, figures = flat.split([*(value.numel() for value in used), len(figures)])  # type: ignore[no-untyped-call]
        for value, gradient in zip(used, gradients, strict=True):
            value.grad = gradient.view_as(value)
        return figures

    def _update(self, learning_rate: float) -> None:
        """Do one step of AdamW (Loshchilov and Hutter 2019) on every parameter that has a gradient."""
        for decay in dict.fromkeys(self._decays):
            self._update_those(learning_rate, decay)

    def _update_those(self, learning_rate: float, decay: float) -> None:
        """Update the parameters of one weight decay."""
        used = [
            index
            for index, value in enumerate(self._parameters)
            if value.grad is not None and self._decays[index] == decay
        ]
        values, means, squares, steps = (
            [each[index] for index in used] for each in (self._parameters, self._means, self._squares, self._steps)
        )
        adamw(
            values,
            [value.grad for value in values if value.grad is not None],
            means,
            squares,
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=_BETAS[0],
            beta2=_BETAS[1],
            lr=learning_rate,
            weight_decay=decay,
            eps=_EPS,
            maximize=False,
        )

    def _clip(self, total: Tensor, norm: float) -> bool:
        """Scale gradients of norm ``norm`` down to the running norm's multiple; return whether they are finite."""
        if not norm < float("inf"):
            return False
        limit = self._grad_clip * (self._running_norm or norm)
        if norm > limit:
            nn.utils.clip_grads_with_norm_(self._parameters, limit, total)
        kept = min(norm, limit)
        self._running_norm = _NORM_DECAY * self._running_norm + (1 - _NORM_DECAY) * kept if self._running_norm else kept
        return True

    def state(self) -> dict[str, Any]:
        """Return everything :meth:`restore` needs, the module's own parameters apart."""
        return {
            "adam": {"means": self._means, "squares": self._squares, "steps": self._steps},
            "average": self.average,
            "running_norm": self._running_norm,
            "updates": self.updates,
            "skipped": self.skipped,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`; the module's parameters must have been restored in place."""
        for name, own in (("means", self._means), ("squares", self._squares), ("steps", self._steps)):
            for target, source in zip(own, state["adam"][name], strict=True):
                target.copy_(source)
        assign(self.average, state["average"])
        self._running_norm = state["running_norm"]
        self.updates = state["updates"]
        self.skipped = state["skipped"]


def assign(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """Copy ``source`` into the tensors of ``target`` in place."""
    with torch.no_grad():
        for name, value in target.items():
            value.copy_(source[name])


def clone(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of weights that later updates leave alone."""
    return {name: value.detach().clone() for name, value in weights.items()}
