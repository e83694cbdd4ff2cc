"""How a command ends: its exit code, and the line or table that says what came of it."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cvae_dist.progress import Display, duration, figure

if TYPE_CHECKING:
    from cvae_dist.cluster import StoreResult
    from cvae_dist.pipeline import PipelineResult, StageResult
    from cvae_dist.verbs.fit_prior import PriorResult
    from cvae_dist.verbs.quality import Quality
    from cvae_dist.verbs.train import TrainResult
    from cvae_dist.verbs.verify import VerifyResult

DONE, FAILED, WRONG_USAGE, INTERRUPTED, TERMINATED, BROKEN_PIPE = 0, 1, 2, 130, 143, 141
OUT_OF_TIME = 124  # as of timeout(1)


def show(display: Display, command: str, output: str, result: Any) -> int:
    """Show what a verb returned; return the exit code."""
    match command:
        case "train":
            return trained(display, result)
        case "fit-prior":
            fitted(display, result)
        case "verify":
            return verified(display, output, result)
        case "info":
            described(display, result)
        case _ if command.startswith("plot "):
            drew(display, command, output)
        case _:
            wrote_rows(display, command, result)
    return DONE


def wrote_rows(display: Display, stage: str, result: "StoreResult") -> None:
    """Say what an ingest, embed, decode, score or sample wrote."""
    if result.nothing_to_do:
        line = f"{stage}: nothing to do, {result.url} has its {result.rows:,} rows already"
    elif result.rows_written:
        line = f"{stage}: wrote {result.rows_written:,} rows to {result.url} in {duration(result.seconds)}"
        line += f", which has {result.rows_removed:,} rows fewer than before" if result.rows_removed else ""
    elif result.rows_removed:
        line = f"{stage}: took {result.rows_removed:,} rows away from {result.url}, which has {result.rows:,} now"
    else:
        line = f"{stage}: published {result.url}, whose {result.rows:,} rows were written before"
    display.result(line, {"stage": stage, **asdict(result)})


def trained(display: Display, result: "TrainResult") -> int:
    """Say what a training came to; return the exit code. An interrupted one is an interruption of the command."""
    if result.stopped_because == "interrupted":
        raise KeyboardInterrupt
    if result.stopped_because == "out of time":
        line = f"train: its time is over after {result.steps:,} steps; the same command goes on from there"
        display.result(line, {"stage": "train", **asdict(result)})
        return OUT_OF_TIME
    if result.nothing_to_do:
        line = f"train: nothing to do, {result.model} is trained already ({result.steps:,} steps)"
    else:
        line = f"train: wrote {result.model} after {result.steps:,} steps in {duration(result.seconds)}"
    loss = result.validation_loss
    line += f", validation -ELBO {loss:.4g} nats per row" if loss is not None and math.isfinite(loss) else ""
    display.result(line, {"stage": "train", **asdict(result)})
    return DONE


def fitted(display: Display, result: "PriorResult") -> None:
    """Say which prior was fitted, and what it gains."""
    whose = f"to the latents of {result.rows:,} rows"
    if result.nothing_to_do:
        line = f"fit-prior: nothing to do, {result.model} has {result.prior!r} fitted {whose} already"
    else:
        line = f"fit-prior: fitted {result.prior!r} {whose} of {result.model}"
    line += f": log p(z) {result.log_density:.4g} nats per latent, {result.log_density_of_normal:.4g} under N(0, I)"
    display.result(line, {"stage": "fit-prior", **asdict(result)})


def drew(display: Display, stage: str, filename: str) -> None:
    """Say where the picture is."""
    display.result(f"{stage}: wrote {filename}", {"stage": stage, "url": filename})


def verified(display: Display, url: str, result: "VerifyResult") -> int:
    """List what is damaged; return the exit code, as scripts ask it."""
    problems = [asdict(problem) for problem in result.problems]
    found = [str(problem) for problem in result.problems]
    places = "1 place" if len(found) == 1 else f"{len(found)} places"
    verdict = f"{url}: every byte is as written"
    if found:
        verdict = f"{url} is damaged in {places}; put it back from a copy, or make it anew with --overwrite"
    display.result("\n".join([*found, verdict]), {"stage": "verify", "url": url, "problems": problems})
    return DONE if result.ok else FAILED


def described(display: Display, facts: Mapping[str, Any]) -> None:
    """Show facts, one on each line."""
    entries = dict(_flattened(facts))
    width = max(map(len, entries), default=0)
    lines = [f"{name:<{width}}  {figure(value)}" for name, value in entries.items()]
    display.result("\n".join(lines), facts)


def _flattened(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every entry of nested mappings, its path as its name."""
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def ran(display: Display, pipeline: str, result: "PipelineResult") -> None:
    """Show the stages of a pipeline, the quality of its model, and how long it took."""
    display.table(("stage", "output", "rows", "time"), [_stage_row(stage) for stage in result.stages])
    if result.quality is not None:
        display.table(("quality", "", ""), _quality_rows(result.quality))
    verdict = "nothing to do, all of it was done already" if result.nothing_to_do else "done"
    display.result(f"{pipeline}: {verdict} ({duration(result.seconds)})", asdict(result))


def _quality_rows(quality: "Quality") -> list[tuple[str, str, str]]:
    """Return name, figure and meaning of what could be measured."""
    rows = f"{quality.held_out_rows:,} rows held out of training"
    fraction = quality.reconstruction_fraction
    of_variance = "" if fraction is None else f", {fraction:.1%} of the data's variance"
    table = [
        ("validation -ELBO", quality.negative_elbo, ".4g", f"nats per row, on {rows}"),
        ("5-NN accuracy", quality.neighbour_accuracy, ".1%", f"{rows}, classified by their nearest training rows"),
        ("reconstruction MSE", quality.reconstruction_mse, ".4g", f"per feature, in data units squared{of_variance}"),
    ]
    return [(name, format(value, shape), meaning) for name, value, shape, meaning in table if value is not None]


def _stage_row(stage: "StageResult") -> tuple[str, str, str, str]:
    rows = "" if stage.rows is None else f"{stage.rows:,}"
    return stage.stage, stage.url, rows, "nothing to do" if stage.nothing_to_do else duration(stage.seconds)
