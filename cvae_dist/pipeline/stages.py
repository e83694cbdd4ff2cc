"""The verb ``run``: the stages of a YAML file in order, each of which finds by itself what is done already.

A file is a list of stages, each a verb and its arguments in the words of the Python functions, and the
settings that all stages share::

    workers: 4
    stages:
      - ingest: {source: tree, store: rows.zarr, label: folder}
      - train: {store: rows.zarr, model: model, dim_latent: 8}
      - embed: {store: rows.zarr, model: model, latents: latents.zarr}
      - plot latents: {latents: latents.zarr, filename: latents.png}

Locations are relative to the working directory. The whole file is checked before the first stage starts.
"""

import difflib
import inspect
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from cvae_dist.cluster import StoreResult, resolve_client
from cvae_dist.config import TrainConfig, invalid_settings
from cvae_dist.errors import Corrupt, InvalidPipeline, SourceNotFound
from cvae_dist.events import Event, OnEvent, ignore
from cvae_dist.model.files import CONFIG, HISTORY
from cvae_dist.store import Location
from cvae_dist.verbs.quality import Quality, measure


@dataclass(frozen=True)
class Verb:
    """A function that can be a stage: where it lives and which of its arguments it reads and writes."""

    module: str
    function: str
    reads: tuple[str, ...]
    writes: str

    def load(self) -> Callable[..., Any]:
        """Import the function."""
        function: Callable[..., Any] = getattr(import_module(self.module), self.function)
        return function


VERBS: Mapping[str, Verb] = {
    "ingest": Verb("cvae_dist.verbs.ingest", "ingest", ("source",), "store"),
    "train": Verb("cvae_dist.training.loop", "train", ("store",), "model"),
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
# Arguments that `run` gives to every verb that takes them.
SHARED = ("client", "config", "on_event", "storage_options")


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


@dataclass(frozen=True)
class StageResult:
    """What one stage did; ``rows`` is None where rows are not what it makes."""

    stage: str
    url: str
    rows: int | None
    seconds: float
    already_done: bool


@dataclass(frozen=True)
class PipelineResult:
    """What all stages did, and how good the model is (None where none was trained)."""

    stages: tuple[StageResult, ...]
    seconds: float
    quality: Quality | None

    @property
    def already_done(self) -> bool:
        """Whether no stage had anything to do."""
        return all(stage.already_done for stage in self.stages)


def run(
    pipeline: str | os.PathLike[str],
    *,
    scheduler: str | None = None,
    workers: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
    on_event: OnEvent = ignore,
) -> PipelineResult:
    """Run the stages of a pipeline file in order.

    Run it again to go on after an interruption: every stage does only what is missing.

    Parameters
    ----------
    pipeline : path or fsspec URL
        The YAML file.
    scheduler, workers, storage_options
        Replace what the file says.

    Returns
    -------
    PipelineResult
        One result per stage, and the model's quality on held-out rows.

    Raises
    ------
    InvalidPipeline
        The file names an unknown stage or argument, or a value that cannot be; nothing was run.
    CvaeDistError
        A stage failed. The stages before it are done and stay so.
    """
    plan = read_pipeline(pipeline, scheduler=scheduler, workers=workers, storage_options=storage_options)
    started = time.monotonic()
    with resolve_client(scheduler=plan.shared.scheduler, workers=plan.shared.workers) as client:
        results = tuple(_perform(stage, plan.shared, client, on_event) for stage in plan.stages)
    quality = _quality(plan)
    return PipelineResult(results, time.monotonic() - started, quality)


# ------------------------------------------------------------------------------------------ the file


def read_pipeline(
    pipeline: str | os.PathLike[str],
    *,
    scheduler: str | None = None,
    workers: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Pipeline:
    """Read and check a whole pipeline file; the keyword arguments replace its shared settings."""
    content = _read_yaml(os.fspath(pipeline), storage_options)
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
        near = difflib.get_close_matches(str(name), VERBS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the verbs are {', '.join(VERBS)}."
        raise InvalidPipeline(f"{where}: unknown verb {name!r}, nothing was run; {hint}")
    if not isinstance(arguments, dict):
        raise InvalidPipeline(f"{where} ({name}): the arguments must be a mapping, but are {arguments!r:.120}.")
    checked = _check(_arguments_model(name), arguments, f"{where} ({name})")
    return Stage(name, {argument: getattr(checked, argument) for argument in checked.model_fields_set})


Model = TypeVar("Model", bound=BaseModel)


def _check(model: type[Model], values: Mapping[str, Any], where: str) -> Model:
    try:
        return model(**{str(name): value for name, value in values.items()})
    except ValidationError as error:
        raise InvalidPipeline(f"{where}, nothing was run: {invalid_settings(error, model)}") from None


def _arguments_model(name: str) -> type[BaseModel]:
    """Return the arguments of a verb, from its signature, as something that checks values."""
    verb = VERBS[name]
    function = verb.load()
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            fields |= {key: (info.annotation, info) for key, info in TrainConfig.model_fields.items()}
        elif parameter.name not in SHARED:
            default = ... if parameter.default is parameter.empty else parameter.default
            is_location = parameter.name in (*verb.reads, verb.writes)  # in Python also an open store
            fields[parameter.name] = (str if is_location else parameter.annotation, default)
    home = function.__module__  # where the names in its annotations mean something
    return create_model(name, __config__=ConfigDict(extra="forbid"), __module__=home, **fields)


# ---------------------------------------------------------------------------------------- the stages


def _perform(stage: Stage, shared: Shared, client: Any, on_event: OnEvent) -> StageResult:
    started = time.monotonic()
    if _is_drawn(stage, shared.storage_options):
        on_event(Event(stage.name, "done", unit="pictures", message="already done"))
        return StageResult(stage.name, stage.output, None, time.monotonic() - started, already_done=True)
    function = stage.verb.load()
    given = {"client": client, "on_event": on_event, "storage_options": shared.storage_options}
    taken = inspect.signature(function).parameters
    outcome = function(**stage.arguments, **{key: value for key, value in given.items() if key in taken})
    if stage.name == "verify" and not outcome.ok:
        raise Corrupt("\n".join(f"{p.array} shard {p.shard}: {p.reason}" for p in outcome.problems))
    return _stage_result(stage, outcome, time.monotonic() - started)


def _stage_result(stage: Stage, outcome: Any, seconds: float) -> StageResult:
    rows = outcome.rows if isinstance(outcome, StoreResult) else None
    already_done = getattr(outcome, "nothing_to_do", False)
    if stage.name == "train":
        if outcome.stopped_because == "interrupted":
            raise KeyboardInterrupt  # the stages that follow need the finished model
        already_done = outcome.stopped_because == "already finished"
    return StageResult(stage.name, stage.output, rows, seconds, already_done)


def _is_drawn(stage: Stage, storage_options: Mapping[str, Any] | None) -> bool:
    """Whether a picture is newer than everything it shows: make's rule, for local files only."""
    if not stage.name.startswith("plot "):
        return False
    picture = Location.of(stage.output, storage_options)
    inputs = [Location.of(stage.arguments[name], storage_options) for name in stage.verb.reads]
    places = [picture, *inputs]
    if not all(place.is_local and place.exists() for place in places):
        return False
    return max(map(_published, inputs)) <= os.path.getmtime(picture.path)


def _published(place: Location) -> float:
    """Return when a store or a model was last published, in seconds since the epoch."""
    heads = [place / name for name in ("zarr.json", CONFIG, HISTORY)]
    return max((os.path.getmtime(head.path) for head in heads if head.exists()), default=float("inf"))


# --------------------------------------------------------------------------------------- the quality


def _quality(plan: Pipeline) -> Quality | None:
    """Measure the first model that the pipeline trains, as far as its stages made what that takes."""
    trained = next(plan.of("train"), None)
    if trained is None:
        return None
    store, model = trained.arguments["store"], trained.arguments["model"]
    embedded = next((s for s in plan.of("embed") if s.arguments["store"] == store), None)
    latents = embedded.output if embedded else None
    decoded = next((s for s in plan.of("decode") if s.arguments["latents"] == latents), None)
    return measure(
        store,
        model,
        latents=latents,
        reconstructions=decoded.output if decoded else None,
        storage_options=plan.shared.storage_options,
    )
