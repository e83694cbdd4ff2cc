"""The commands. All but ``run`` are made from their verbs: arguments become flags, docstrings become help."""

import inspect
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

from cyclopts import App

from cvae_dist.cli.options import FLAGS, Distributed, Place, Settings, SharedOptions
from cvae_dist.cli.parser import app
from cvae_dist.cli.results import ran, show
from cvae_dist.config import TrainConfig
from cvae_dist.verbs import VERBS, Verb

Command = Callable[..., int]

plot = App(name="plot", help="Draw latents, the decoder's grid, the loss, or rows beside their reconstructions.")

_COMMANDS = {**VERBS, "info": Verb("cvae_dist.verbs.info", "info", ("url",), "url")}  # info is no stage of a pipeline
for _name, _verb in _COMMANDS.items():
    _parent, _, _word = _name.rpartition(" ")
    (plot if _parent else app).command(f"{__name__}:{_name}", name=_word, help=_verb.summary)
app.command(plot)
app.register_install_completion_command(help="Let the shell complete commands and flags.")


def __getattr__(name: str) -> Command:
    """Make a command when it is first asked for, as importing its verb takes a second."""
    if name not in _COMMANDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _command(name, _COMMANDS[name])


def _command(name: str, verb: Verb) -> Command:
    defaults = Distributed() if verb.takes("client") else SharedOptions()
    parameters = list(_parameters(verb, defaults))

    @wraps(verb.load())
    def command(
        *locations: str, shared: SharedOptions = defaults, settings: TrainConfig | None = None, **options: Any
    ) -> int:
        with shared.display() as display, shared.client() as client:
            given = {"config": settings, "on_event": display, "storage_options": shared.storage_options}
            result = verb(*locations, given={**given, "client": client}, **options)
        return show(display, name, locations[-1], result)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined] # cyclopts reads it
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _parameters(verb: Verb, shared: SharedOptions) -> Iterator[inspect.Parameter]:
    """Yield what cyclopts is to read: a verb's locations in order, its options, and the groups of options."""
    for argument in verb.arguments():
        if verb.is_location(argument.name):
            yield argument.replace(kind=argument.POSITIONAL_ONLY, annotation=Place)
        else:
            annotation = FLAGS.get(argument.name, argument.annotation)
            yield argument.replace(kind=argument.KEYWORD_ONLY, annotation=annotation)
    if verb.takes("config"):
        yield inspect.Parameter("settings", inspect.Parameter.KEYWORD_ONLY, annotation=Settings, default=None)
    yield inspect.Parameter("shared", inspect.Parameter.KEYWORD_ONLY, annotation=type(shared), default=shared)


@app.command
def run(pipeline: Place, /, *, shared: Distributed = Distributed()) -> None:
    """Run the stages of a pipeline file in order; each does only what is missing.

    Parameters
    ----------
    pipeline
        YAML file with a list of stages.
    """
    from cvae_dist.pipeline import run

    with shared.display() as display:
        result = run(
            pipeline,
            scheduler=shared.scheduler,
            workers=shared.workers,
            storage_options=shared.storage_options,
            on_event=display,
        )
    ran(display, str(pipeline), result)
