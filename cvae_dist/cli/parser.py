"""How a command line is read: flags, environment, configuration file; and the message of wrong usage."""

import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import cyclopts.config
import yaml
from cyclopts import App, Parameter
from cyclopts.argument import Argument, ArgumentCollection
from cyclopts.exceptions import CycloptsError, ValidationError
from pydantic import ValidationError as PydanticError

from cvae_dist import __version__
from cvae_dist.config import TrainConfig, invalid_settings, named_as_arguments
from cvae_dist.errors import InvalidInput, suggestion

VARIABLES = "CVAE_DIST_"  # what the environment's options begin with
_from_variables = cyclopts.config.Env(VARIABLES, command=False, show=False, source="the environment")


def _environment(command: App, names: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Fill in what flags did not set from the environment, and warn of a variable that no command knows."""
    _from_variables(command, names, arguments)
    unknown = {name for name in os.environ if name.startswith(VARIABLES)} - _variables(arguments)
    if not unknown:
        return  # the other commands are made only to tell what they know
    known = set().union(*(_variables(each.assemble_argument_collection()) for each in _commands(app)))
    for name in sorted(unknown - known):
        print(f"cvae-dist: {name} in the environment has no effect: {suggestion(name, known)}", file=sys.stderr)


def _variables(arguments: ArgumentCollection) -> set[str]:
    return {VARIABLES + name.lstrip("-").replace("-", "_").upper() for each in arguments for name in each.names}


def _commands(parent: App) -> Iterator[App]:
    """Yield what is below ``parent`` and takes options."""
    for name in parent:
        if not name.startswith("-"):
            yield from _commands(parent[name])
    if parent.default_command:
        yield parent


def _config_file(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Fill in what neither flags nor the environment set from the file that ``--config`` names."""
    named = [argument for argument in arguments if argument.name == "--config" and argument.tokens]
    if not named:
        return
    token = named[0].tokens[0]
    where = f"{token.keyword} {token.value}"
    options = _read_options(token.value, where)
    flags = {name for each in arguments for name in each.names if name.startswith("--")} - {"--config"}
    known = {flag[2:].replace("-", "_") for flag in flags}
    for name in options.keys() - known:
        raise CycloptsError(msg=f"{where}: unknown option {name!r}: {suggestion(name, known)}")
    for name in ("storage_options", "source_storage_options"):
        given = options.get(name, {})
        if not isinstance(given, dict):
            raise CycloptsError(msg=f"{where}: {name} must be a mapping, not a {type(given).__name__}.")
        if given:
            options[name] = json.dumps(given)
    source = cyclopts.config.Dict(options, source=where, use_commands_as_keys=False)
    source(app, commands, arguments)


def _read_options(path: str, where: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            options = yaml.safe_load(file)
    except OSError as error:
        raise CycloptsError(msg=f"cannot read {where}: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise CycloptsError(msg=f"{where} is not YAML: {error}") from error
    if not isinstance(options, dict):
        raise CycloptsError(msg=f"{where} must hold `option: value` lines, but it is {options!r:.80}.")
    try:
        return named_as_arguments(options)
    except InvalidInput as error:
        raise CycloptsError(msg=f"{where}: {error}") from None


def usage_error(error: CycloptsError) -> str:
    """Return what was wrong with the command line, and where each bad value came from."""
    cause = error.__cause__
    if isinstance(error, ValidationError) and isinstance(cause, PydanticError) and error.argument:
        return str(invalid_settings(cause, TrainConfig, _sources(error.argument)))
    return str(error)


def _sources(settings: Argument) -> dict[str, str]:
    """Return by name what gave each setting: its flag, its variable or the file."""
    given = {each.field_info.name: each.tokens[0] for each in settings.children if each.tokens}
    return {
        name: token.keyword if token.keyword and token.source in ("cli", _from_variables.source) else token.source
        for name, token in given.items()
    }


app = App(
    name="cvae-dist",
    help=(
        "Reversible, generative embeddings for datasets that outgrow one machine.\n\n"
        "Every location is a path or a URL (s3://, gs://, ...). "
        "Running a command again goes on where it stopped."
    ),
    help_epilogue=(
        "Options: flags, else CVAE_DIST_... in the environment, else --config FILE. "
        "Exit code: 0 done, 1 failed, 2 wrong usage, 124 out of time (train --max-time): the same command goes on."
    ),
    help_format="plaintext",
    version=__version__,
    default_parameter=Parameter(negative_iterable="", consume_multiple=True),
    config=[_environment, _config_file],
    print_error=False,
    exit_on_error=False,
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)
