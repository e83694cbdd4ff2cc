"""Arguments that only the reference has, or that nothing has: what becomes of each."""

import difflib
import functools
import logging
from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any, ParamSpec, TypeVar

from cvae_dist.errors import InvalidInput

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger(__name__)

INITIALIZERS = ("orthogonal", "truncated_normal", "lecun_normal")
_SCHEDULE = "the learning rate rises briefly and then falls along a cosine, or stays with lr_scheduling=False"
_WITHOUT_EFFECT = {
    "initializer": "weights are always drawn He-normal, which suits the activations of these networks",
    "batch_size_test": "validation computes as many rows at once as suits the machine, with the same result",
    "dropout_keep_prob": "there is no dropout, which cost the reference about 7 nats on MNIST",
    "lr_scheduling_steps": _SCHEDULE,
    "lr_scheduling_factor": _SCHEDULE,
    "lr_scheduling_min": _SCHEDULE,
}


class UnknownArgument(InvalidInput, TypeError):
    """An argument that does not exist; a TypeError too, as for any Python function."""


def refusing_unknown(function: Callable[P, T]) -> Callable[P, T]:
    """Make ``function`` refuse arguments that it does not have by naming, for each, the nearest one it has.

    Its signature stays what it is. Calls raise :class:`UnknownArgument`.
    """
    known = [name for name in signature(function).parameters if name != "self"]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        lines = [_suggest(name, known) for name in kwargs if name not in known]
        if lines:
            raise UnknownArgument("\n".join(lines))
        return function(*args, **kwargs)

    return checked


def _suggest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known arguments: {', '.join(known)}"
    return f"unknown argument {name!r}: {hint}"


def note_without_effect(given: Mapping[str, Any]) -> None:
    """Log one line for every argument of the reference that is accepted and changes nothing.

    Raises
    ------
    InvalidInput
        A value that the reference would not know either.
    """
    _check(given)
    for name, value in given.items():
        logger.warning("%s=%r is accepted but has no effect: %s", name, value, _WITHOUT_EFFECT[name])


def _check(given: Mapping[str, Any]) -> None:
    initializer = given.get("initializer")
    if initializer is not None and initializer not in INITIALIZERS:
        near = difflib.get_close_matches(str(initializer), INITIALIZERS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(INITIALIZERS)}"
        raise InvalidInput(f"initializer={initializer!r} is unknown: {hint} None of them has an effect; leave it out")
    keep = given.get("dropout_keep_prob", 1.0)
    if not 0 < keep <= 1:
        raise InvalidInput(f"dropout_keep_prob={keep!r} is no probability in (0, 1]; leave it out, there is no dropout")
