"""The options that commands share."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.token import Token
from cyclopts.validators import Number

from cvae_dist.progress import Report, open_report

if TYPE_CHECKING:
    from distributed import Client


def _from_json(type_: Any, tokens: Sequence[Token]) -> dict[str, Any]:
    try:
        options = json.loads(tokens[0].value)
    except ValueError as error:
        raise ValueError(f"write it as JSON, such as '{{\"anon\": true}}' ({error})") from None
    if not isinstance(options, dict):
        raise ValueError(f"it must be a JSON object, such as '{{\"anon\": true}}', not {tokens[0].value}")
    return options


Count = Annotated[int, Parameter(validator=Number(gte=1))]
Switch = Parameter(negative="", show_default=False)
StorageOptions = Annotated[dict[str, Any] | None, Parameter(converter=_from_json, accepts_keys=False, n_tokens=1)]


@dataclass(frozen=True)
class Output:
    """How the command shows itself, and where it reads and writes.

    Parameters
    ----------
    storage_options
        Options of the file system as a JSON object, handed to fsspec.
    config
        YAML file with options of this command, in the same words.
    json
        Print one JSON object per event on stdout, the last one being the result.
    quiet
        Print nothing on the way.
    """

    storage_options: StorageOptions = None
    config: str | None = None
    json: Annotated[bool, Switch] = False
    quiet: Annotated[bool, Switch] = False

    def report(self) -> Report:
        """Return what shows the events."""
        return open_report(as_json=self.json, quiet=self.quiet)


@dataclass(frozen=True)
class Distributed(Output):
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

    @contextmanager
    def client(self) -> Iterator["Client | None"]:
        """Yield the Dask client to use, or None to work in this process."""
        from cvae_dist.cluster import resolve_client

        with resolve_client(scheduler=self.scheduler, workers=self.workers) as client:
            yield client


Local = Annotated[Output, Parameter(name="*", group="Shared options")]
OnCluster = Annotated[Distributed, Parameter(name="*", group="Shared options")]
Overwrite = Annotated[bool, Switch]
