"""What a user can do, one action a module; and the table of these actions.

The command line and pipelines take names, types and help of their arguments from these functions. A verb therefore
imports torch, Dask and matplotlib when it is called, and not before. The table imports a verb when it is needed.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

# Arguments that a face gives, not its user.
_GIVEN = frozenset({"client", "config", "on_event", "storage_options"})


@dataclass(frozen=True)
class Verb:
    """A function that a user can call: where it lives, and which of its arguments it reads and writes."""

    module: str
    function: str
    reads: tuple[str, ...]
    writes: str

    def load(self) -> Callable[..., Any]:
        """Import the function."""
        function: Callable[..., Any] = getattr(import_module(self.module), self.function)
        return function

    def __call__(self, *locations: str, given: Mapping[str, Any], **arguments: Any) -> Any:
        """Call the function with its user's arguments, and with those of the given ones that it takes."""
        taken = {name: value for name, value in given.items() if self.takes(name)}
        return self.load()(*locations, **arguments, **taken)

    def takes(self, name: str) -> bool:
        """Return whether the function has an argument of this name."""
        return name in inspect.signature(self.load()).parameters

    def arguments(self) -> list[inspect.Parameter]:
        """Return the arguments that a user gives, in their order. A location is text, in Python also an open store."""
        return [
            argument.replace(annotation=str) if self.is_location(argument.name) else argument
            for argument in inspect.signature(self.load()).parameters.values()
            if argument.name not in _GIVEN and argument.kind is not argument.VAR_KEYWORD
        ]

    def is_location(self, name: str) -> bool:
        """Return whether the argument of this name is a path or a URL."""
        return name in (*self.reads, self.writes)

    @property
    def summary(self) -> str:
        """First line of the function's docstring. It is read from the source, as an import takes a second."""
        source = Path(__file__).parents[2].joinpath(*self.module.split(".")).with_suffix(".py").read_text("utf-8")
        _, _, definition = source.partition(f"\ndef {self.function}(")
        return definition.split('"""')[1].splitlines()[0]


VERBS: Mapping[str, Verb] = {
    "ingest": Verb("cvae_dist.verbs.ingest", "ingest", ("source",), "store"),
    "train": Verb("cvae_dist.verbs.train", "train", ("store",), "model"),
    "embed": Verb("cvae_dist.verbs.embed", "embed", ("store", "model"), "latents"),
    "decode": Verb("cvae_dist.verbs.decode", "decode", ("latents", "model"), "out"),
    "score": Verb("cvae_dist.verbs.score", "score", ("store", "model"), "out"),
    "fit-prior": Verb("cvae_dist.verbs.fit_prior", "fit_prior", ("store",), "model"),
    "sample": Verb("cvae_dist.verbs.sample", "sample", ("model",), "out"),
    "verify": Verb("cvae_dist.verbs.verify", "verify", ("url",), "url"),
    "plot latents": Verb("cvae_dist.verbs.plot", "plot_latents", ("latents",), "filename"),
    "plot grid": Verb("cvae_dist.verbs.plot", "plot_grid", ("model",), "filename"),
    "plot loss": Verb("cvae_dist.verbs.plot", "plot_loss", ("model",), "filename"),
    "plot reconstructions": Verb(
        "cvae_dist.verbs.plot", "plot_reconstructions", ("store", "reconstructions"), "filename"
    ),
}
