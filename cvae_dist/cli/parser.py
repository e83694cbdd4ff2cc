"""How a command line is read: flags, environment, configuration file; and the message of wrong usage."""

import json
from typing import Any

import cyclopts.config
import yaml
from cyclopts import App, Parameter
from cyclopts.argument import ArgumentCollection
from cyclopts.exceptions import CycloptsError, ValidationError
from pydantic import ValidationError as PydanticError
from rich.console import Console
from rich.text import Text

from cvae_dist import __version__
from cvae_dist.config import TrainConfig, invalid_settings
from cvae_dist.errors import suggestion


def _config_file(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Fill in what neither flags nor the environment set from the file that ``--config`` names."""
    named = [argument for argument in arguments if argument.name == "--config" and argument.tokens]
    if not named:
        return
    path = named[0].tokens[0].value
    options = {name.replace("_", "-"): value for name, value in _read_mapping(path).items()}
    known = {name[2:] for argument in arguments for name in argument.names if name.startswith("--")}
    for name in options.keys() - known:
        raise CycloptsError(msg=f"--config {path}: unknown option {name!r}: {suggestion(name, known)}")
    if "storage-options" in options:
        options["storage-options"] = json.dumps(options["storage-options"])
    source = cyclopts.config.Dict(options, source=path, use_commands_as_keys=False)
    source(app, commands, arguments)


def _read_mapping(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            options = yaml.safe_load(file)
    except OSError as error:
        raise CycloptsError(msg=f"cannot read --config {path}: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise CycloptsError(msg=f"--config {path} is not YAML: {error}") from error
    if not isinstance(options, dict):
        raise CycloptsError(msg=f"--config {path} must hold `option: value` lines, but it is {options!r:.80}.")
    return {str(name): value for name, value in options.items()}


def _usage_error(error: CycloptsError) -> Text:
    cause = error.__cause__
    if isinstance(error, ValidationError) and isinstance(cause, PydanticError):
        return Text(f"cvae-dist: {invalid_settings(cause, TrainConfig)}")
    return Text(f"cvae-dist: {error}")


app = App(
    name="cvae-dist",
    help=(
        "Reversible, generative embeddings for datasets that outgrow one machine.\n\n"
        "Every location is a path or a URL (s3://, gs://, ...). "
        "Running a command again goes on where it stopped."
    ),
    help_epilogue=(
        "Options: flags, else CVAE_DIST_... in the environment, else --config FILE. "
        "Exit code: 0 done, 1 failed, 2 wrong usage."
    ),
    help_format="plaintext",
    version=__version__,
    default_parameter=Parameter(negative_iterable="", consume_multiple=True),
    error_console=Console(stderr=True, soft_wrap=True, highlight=False),
    config=[cyclopts.config.Env("CVAE_DIST_", command=False, show=False), _config_file],
    error_formatter=_usage_error,
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)
