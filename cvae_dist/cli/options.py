"""The options that commands share, and the flags that are more than the annotation of their argument says."""

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.token import Token
from cyclopts.validators import Number

from cvae_dist.config import TrainConfig
from cvae_dist.progress import Display, open_display

if TYPE_CHECKING:
    from distributed import Client


def _from_json(type_: Any, tokens: Sequence[Token]) -> dict[str, Any]:
    try:
        options = json.loads(tokens[0].value)
    except ValueError as error:
        raise ValueError(f"write it as JSON, such as '{{\"anon\": true}}' ({error})") from None
    if not isinstance(options, dict):
        kind = type(options).__name__  # the value itself may be a secret
        raise ValueError(f"it must be a JSON object, such as '{{\"anon\": true}}', not a {kind}")
    return options


Place = str | Path  # a path or a URL, as it is; shells complete it as a file
Count = Annotated[int, Parameter(validator=Number(gte=1))]
Switch = Annotated[bool, Parameter(negative="", show_default=False)]
Names = Annotated[tuple[str, ...], Parameter(show_default=False)]
Settings = Annotated[TrainConfig, Parameter(name="*", group="Model and training")]
JsonObject = Annotated[dict[str, Any] | None, Parameter(converter=_from_json, accepts_keys=False, n_tokens=1)]

# By the name of the argument.
FLAGS: Mapping[str, Any] = {
    "batch_size": Count,
    "carry": Names,
    "columns": Names,
    "grid_size": Count,
    "n": Annotated[Count, Parameter(name=["--n", "-n"])],
    "n_components": Count,
    "fsync": Switch,
    "overwrite": Switch,
    "source_storage_options": JsonObject,
}


@Parameter(name="*", group="Shared options")
@dataclass(frozen=True)
class SharedOptions:
    """How the command shows itself, and where it reads and writes.

    Parameters
    ----------
    storage_options
        Options of the file system as a JSON object, handed to fsspec.
    config
        YAML file with options of this command, in the same words (dim-latent or dim_latent).
    json
        Print one JSON object per event on stdout, the last one being the result or the error.
    quiet
        Print nothing on the way.
    """

    storage_options: JsonObject = None
    config: Path | None = None
    json: Switch = False
    quiet: Switch = False

    def display(self) -> Display:
        """Return what shows the command."""
        return open_display(as_json=self.json, quiet=self.quiet)

    def client(self) -> AbstractContextManager["Client | None"]:
        """Return a context of the Dask client to use, or of None to work in this process."""
        return nullcontext()


@dataclass(frozen=True)
class Distributed(SharedOptions):
    """The shared options of commands that can use Dask.

    Parameters
    ----------
    scheduler
        Address of a running Dask scheduler, such as tcp://host:8786.
    workers
        Number of local Dask workers to start for this command.
    """

    scheduler: str | None = None
    workers: Count | None = None

    def client(self) -> AbstractContextManager["Client | None"]:
        """Return a context of the Dask client to use, or of None to work in this process."""
        from cvae_dist.cluster import resolve_client

        return resolve_client(scheduler=self.scheduler, workers=self.workers)
