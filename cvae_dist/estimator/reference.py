"""Arguments that only the reference has, or that nothing has, and what becomes of each."""

import functools
import logging
from collections.abc import Callable
from inspect import signature
from typing import Any, ParamSpec, TypeVar

from cvae_dist.errors import InvalidInput, suggestion

P = ParamSpec("P")
T = TypeVar("T")

_LOGGER = logging.getLogger(__name__)

_INITIALIZERS = ("orthogonal", "truncated_normal", "lecun_normal")
_SCHEDULE = "the learning rate rises briefly and then falls along a cosine, or stays with lr_scheduling=False"
_WITHOUT_EFFECT = {
    "initializer": "weights are always drawn He-normal, which suits the activations of these networks",
    "batch_size_test": "validation computes as many rows at once as suits the machine, with the same result",
    "dropout_keep_prob": "there is no dropout, which cost the reference about 7 nats on MNIST",
    "lr_scheduling_steps": _SCHEDULE,
    "lr_scheduling_factor": _SCHEDULE,
    "lr_scheduling_min": _SCHEDULE,
}
_THREADS = "the CPU computes, on as many threads as torch.set_num_threads(n) or OMP_NUM_THREADS allows"
_MEANT = {
    **dict.fromkeys(("n_components", "n_latent", "latent_dim", "z_dim"), "did you mean 'dim_latent'?"),
    **dict.fromkeys(("epochs", "n_epochs", "max_epochs", "max_iter", "n_iter"), "did you mean 'num_steps'?"),
    **dict.fromkeys(("hidden_dims", "hidden_layer_sizes", "layers"), "did you mean 'cells_encoder'?"),
    **dict.fromkeys(("lr", "learning_rate_init"), "did you mean 'learning_rate'?"),
    **dict.fromkeys(("seed", "random_seed"), "did you mean 'random_state'?"),
    "beta": "did you mean 'kl_weight'?",
    **dict.fromkeys(("gpu", "use_gpu", "cuda", "use_cuda", "accelerator"), "did you mean 'device'?"),
    "n_jobs": f"{_THREADS}; `cvae-dist embed --workers N` embeds a store in N processes",
}


class UnknownArgument(InvalidInput, TypeError):
    """An argument that does not exist; a TypeError too, as for any Python function."""


def refusing_unknown(function: Callable[P, T]) -> Callable[P, T]:
    """Make calls of ``function`` with unknown arguments raise :class:`UnknownArgument`, which names the nearest known.

    Its signature stays what it is.
    """
    known = [name for name in signature(function).parameters if name != "self"]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        unknown = [name for name in kwargs if name not in known]
        if unknown:
            hints = {name: _MEANT.get(name) or suggestion(name, known) for name in unknown}
            raise UnknownArgument("\n".join(f"unknown argument {name!r}: {hint}" for name, hint in hints.items()))
        return function(*args, **kwargs)

    return checked


def strict_constructor(cls: type[T]) -> type[T]:
    """Make the constructor of ``cls`` refuse unknown arguments; see :func:`refusing_unknown`."""
    setattr(cls, "__init__", refusing_unknown(cls.__init__))  # noqa: B010 - a type checker takes __init__ for fixed
    return cls


def note_without_effect(function: Callable[..., Any], **given: Any) -> None:
    """Log one line for every argument of ``function`` that was given and changes nothing.

    Raises
    ------
    InvalidInput
        The reference would not know the value either.
    """
    _check(**given)
    parameters = signature(function).parameters
    for name, value in given.items():
        if value != parameters[name].default:
            _LOGGER.warning("%s=%r is accepted but has no effect: %s", name, value, _WITHOUT_EFFECT[name])


def _check(initializer: str | None = None, dropout_keep_prob: float = 1.0, **_: Any) -> None:
    if initializer is not None and initializer not in _INITIALIZERS:
        hint = suggestion(str(initializer), _INITIALIZERS)
        raise InvalidInput(f"initializer={initializer!r} is unknown ({hint}). None of them has an effect; leave it out")
    if not 0 < dropout_keep_prob <= 1:
        raise InvalidInput(
            f"dropout_keep_prob={dropout_keep_prob!r} is no probability in (0, 1]; leave it out, there is no dropout"
        )
