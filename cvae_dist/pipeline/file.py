"""A pipeline file: a list of stages, each a verb and its arguments, and the settings that all stages share.

Arguments are named as in the Python functions, or spelled as the flags are (``dim-latent``)::

    workers: 4
    stages:
      - ingest: {source: tree, store: rows.zarr, label: folder}
      - train: {store: rows.zarr, model: model, dim_latent: 8}
      - embed: {store: rows.zarr, model: model, latents: latents.zarr}
      - plot latents: {latents: latents.zarr, filename: latents.png}

Locations are relative to the working directory.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from cvae_dist.config import TrainConfig, invalid_settings, named_as_arguments
from cvae_dist.errors import InvalidInput, InvalidPipeline, SourceNotFound, suggestion
from cvae_dist.store import Location
from cvae_dist.verbs import VERBS, Verb


@dataclass(frozen=True)
class Stage:
    """One step: the verb's name and its checked arguments."""

    name: str
    arguments: Mapping[str, Any]

    @property
    def verb(self) -> Verb:
        """What the name stands for."""
        return VERBS[self.name]

    @property
    def output(self) -> str:
        """Where the stage writes (``verify``: what it reads)."""
        return str(self.arguments[self.verb.writes])


class Shared(BaseModel):
    """Settings of all stages: a running Dask scheduler or local workers, and credentials of the storage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scheduler: str | None = Field(None, description="Address of a running Dask scheduler.")
    workers: int | None = Field(None, ge=1, description="Number of local Dask workers to start.")
    storage_options: dict[str, Any] | None = Field(None, description="Options of the file system, for fsspec.")


@dataclass(frozen=True)
class Pipeline:
    """A checked pipeline file."""

    stages: tuple[Stage, ...]
    shared: Shared

    def of(self, verb: str) -> Iterator[Stage]:
        """Yield the stages of one verb."""
        return (stage for stage in self.stages if stage.name == verb)


def read_pipeline(
    pipeline: str | os.PathLike[str],
    *,
    scheduler: str | None = None,
    workers: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Pipeline:
    """Read and check a whole pipeline file; the keyword arguments replace its shared settings.

    Raises
    ------
    SourceNotFound
        There is no such file.
    InvalidPipeline
        The file names an unknown stage or argument, or a value that cannot be.
    """
    content = _by_argument(_read_yaml(os.fspath(pipeline), storage_options), os.fspath(pipeline))
    entries = content.pop("stages", None)
    if not isinstance(entries, list) or not entries:
        raise InvalidPipeline(
            f"{pipeline} has no list `stages`: nothing was run. Write `stages:` and below it one `- verb: "
            f"{{argument: value}}` per stage; the verbs are {', '.join(VERBS)}"
        )
    given = {"scheduler": scheduler, "workers": workers, "storage_options": storage_options}
    replaced = {name: value for name, value in given.items() if value is not None}
    shared = _check(Shared, {**content, **replaced}, os.fspath(pipeline))
    stages = tuple(_read_stage(entry, f"{pipeline}, stage {i}") for i, entry in enumerate(entries, 1))
    return Pipeline(stages, shared)


def _read_yaml(pipeline: str, storage_options: Mapping[str, Any] | None) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Location.of(pipeline, storage_options).read())
    except FileNotFoundError:
        raise SourceNotFound(f"there is no pipeline file {pipeline}: nothing was run. Check the path.") from None
    except yaml.YAMLError as error:
        raise InvalidPipeline(f"{pipeline} is not YAML, nothing was run: {error}") from error
    if not isinstance(content, dict):
        raise InvalidPipeline(f"{pipeline} must be a mapping with the key `stages`, but it is {content!r:.80}.")
    return content


def _read_stage(entry: object, where: str) -> Stage:
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise InvalidPipeline(f"{where} must be one `verb: {{argument: value}}`, but it is {entry!r:.120}.")
    name, arguments = next(iter(entry.items()))
    if name not in VERBS:
        raise InvalidPipeline(f"{where}: unknown verb {name!r}, nothing was run; {suggestion(str(name), VERBS)}")
    if not isinstance(arguments, dict):
        raise InvalidPipeline(f"{where} ({name}): the arguments must be a mapping, but are {arguments!r:.120}.")
    where = f"{where} ({name})"
    checked = _check(_arguments_model(name), _by_argument(arguments, where), where)
    return Stage(name, {argument: getattr(checked, argument) for argument in checked.model_fields_set})


Model = TypeVar("Model", bound=BaseModel)


def _by_argument(options: Mapping[Any, Any], where: str) -> dict[str, Any]:
    try:
        return named_as_arguments(options)
    except InvalidInput as error:
        raise InvalidPipeline(f"{where}, nothing was run: {error}") from None


def _check(model: type[Model], values: Mapping[str, Any], where: str) -> Model:
    try:
        return model(**values)
    except ValidationError as error:
        raise InvalidPipeline(f"{where}, nothing was run: {invalid_settings(error, model)}") from None


def _arguments_model(name: str) -> type[BaseModel]:
    """Return a model that checks the arguments of a verb."""
    verb = VERBS[name]
    fields: dict[str, Any] = {
        argument.name: (argument.annotation, ... if argument.default is argument.empty else argument.default)
        for argument in verb.arguments()
    }
    if verb.takes("config"):
        fields |= {key: (info.annotation, info) for key, info in TrainConfig.model_fields.items()}
    # the annotations are read in the module of the verb
    return create_model(name, __config__=ConfigDict(extra="forbid"), __module__=verb.module, **fields)
