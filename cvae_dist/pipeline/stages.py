"""The verb ``run``: the stages of a pipeline file in order, each of which finds by itself what is done already."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cvae_dist.cluster import StoreResult, resolve_client
from cvae_dist.errors import Corrupt, OutOfTime
from cvae_dist.events import Event, OnEvent, ignore
from cvae_dist.model.files import CONFIG, HISTORY
from cvae_dist.pipeline.file import Pipeline, Stage, read_pipeline
from cvae_dist.store import Location
from cvae_dist.verbs.quality import Quality, measure


@dataclass(frozen=True)
class StageResult:
    """What one stage did; ``rows`` is None where it makes no rows."""

    stage: str
    url: str
    rows: int | None
    seconds: float
    nothing_to_do: bool


@dataclass(frozen=True)
class PipelineResult:
    """What all stages did, and how good the model is (None where none was trained)."""

    stages: tuple[StageResult, ...]
    seconds: float
    quality: Quality | None

    @property
    def nothing_to_do(self) -> bool:
        """Whether no stage had anything to do."""
        return all(stage.nothing_to_do for stage in self.stages)


def run(
    pipeline: str | os.PathLike[str],
    *,
    scheduler: str | None = None,
    workers: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
    on_event: OnEvent = ignore,
) -> PipelineResult:
    """Run the stages of a pipeline file in order; each does only what is missing.

    The whole file is checked before the first stage starts. After an interruption, run it again to go on.

    Parameters
    ----------
    pipeline : path or URL
        YAML file with a list of stages.
    scheduler : str, optional
        Address of a running Dask scheduler. Replaces what the file says, as do the next two.
    workers : int, optional
        Number of local Dask workers to start.
    storage_options : Mapping, optional
        Options of the file system, for fsspec.
    on_event : callable
        Listener for progress.

    Returns
    -------
    PipelineResult
        One result per stage, and the model's quality on held-out rows.

    Raises
    ------
    SourceNotFound, InvalidPipeline
        There is no such file, or it names an unknown stage or argument, or a value that cannot be. Nothing was run.
    CvaeDistError
        A stage failed. The stages before it are done and stay so.
    """
    plan = read_pipeline(pipeline, scheduler=scheduler, workers=workers, storage_options=storage_options)
    started = time.monotonic()
    with resolve_client(scheduler=plan.shared.scheduler, workers=plan.shared.workers) as client:
        given = {"client": client, "on_event": on_event, "storage_options": plan.shared.storage_options}
        results = tuple(
            _perform(stage, f"{pipeline}, stage {i} ({stage.name} {stage.output})", given)
            for i, stage in enumerate(plan.stages, 1)
        )
    quality = _quality(plan)
    return PipelineResult(results, time.monotonic() - started, quality)


def _perform(stage: Stage, where: str, given: Mapping[str, Any]) -> StageResult:
    """Perform one stage. Its error keeps its kind and its text, and carries as a note where it happened."""
    try:
        return _outcome(stage, given)
    except Exception as error:
        error.add_note(where)
        raise


def _outcome(stage: Stage, given: Mapping[str, Any]) -> StageResult:
    started = time.monotonic()
    if _is_drawn(stage, given["storage_options"]):
        given["on_event"](Event(stage.name, "done", unit="pictures", message="nothing to do"))
        return StageResult(stage.name, stage.output, None, time.monotonic() - started, nothing_to_do=True)
    outcome = stage.verb(given=given, **stage.arguments)
    if stage.name == "train" and outcome.stopped_because == "interrupted":
        raise KeyboardInterrupt  # the stages that follow need the finished model
    if stage.name == "train" and outcome.stopped_because == "out of time":
        raise OutOfTime(
            f"the training of {stage.output} stopped after step {outcome.steps:,}, as its time is over (max_time), and "
            "the stages that follow need the finished model; the same command goes on from there"
        )
    if stage.name == "verify" and not outcome.ok:
        raise Corrupt("\n".join(map(str, outcome.problems)))
    rows = outcome.rows if isinstance(outcome, StoreResult) else None
    nothing_to_do = getattr(outcome, "nothing_to_do", False)
    return StageResult(stage.name, stage.output, rows, time.monotonic() - started, nothing_to_do)


def _is_drawn(stage: Stage, storage_options: Mapping[str, Any] | None) -> bool:
    """Return whether a picture is newer than everything it shows: make's rule, for local files only."""
    if not stage.name.startswith("plot "):
        return False
    picture = Location.of(stage.output, storage_options)
    inputs = [Location.of(stage.arguments[name], storage_options) for name in stage.verb.reads]
    if not all(place.is_local and place.exists() for place in (picture, *inputs)):
        return False
    return max(map(_published_at, inputs)) <= os.path.getmtime(picture.path)


def _published_at(place: Location) -> float:
    """Return when a store or a model was last published, in seconds since the epoch."""
    heads = [place / name for name in ("zarr.json", CONFIG, HISTORY)]
    return max((os.path.getmtime(head.path) for head in heads if head.exists()), default=float("inf"))


def _quality(plan: Pipeline) -> Quality | None:
    """Measure the first model that the pipeline trains, as far as its stages make what that takes."""
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
