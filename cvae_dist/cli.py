"""The command line: one function per command, each a thin wrapper of the verb of the same name.

Options come from flags, else from the environment (``CVAE_DIST_DIM_LATENT=8``), else from the YAML file
named by ``--config``, else from the defaults. Results go to stdout, everything else to stderr. Exit codes:
0 done (also when there was nothing to do), 1 failed, 2 wrong usage, 130 interrupted, 143 terminated.

Commands import their verbs inside, so that ``--help`` needs neither torch nor Dask.
"""

import difflib
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import cyclopts.config
import yaml
from cyclopts import App, Parameter
from cyclopts.argument import ArgumentCollection
from cyclopts.exceptions import CycloptsError, ValidationError
from cyclopts.token import Token
from cyclopts.validators import Number
from pydantic import ValidationError as PydanticError
from rich.console import Console
from rich.text import Text

from cvae_dist import __version__
from cvae_dist.config import TrainConfig, invalid_settings
from cvae_dist.errors import CvaeDistError, InvalidPipeline
from cvae_dist.report import Report, duration, error_text, figure, open_report

if TYPE_CHECKING:
    from distributed import Client

    from cvae_dist.cluster import StoreResult
    from cvae_dist.pipeline import PipelineResult, StageResult
    from cvae_dist.quality import Quality
    from cvae_dist.training.loop import TrainResult

DONE, FAILED, WRONG_USAGE, INTERRUPTED, TERMINATED, BROKEN_PIPE = 0, 1, 2, 130, 143, 141


# --------------------------------------------------------------------------------- the shared options


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


# --------------------------------------------------------------------------- the sources of an option


def _config_file(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Fill in what neither flags nor the environment set from the file that ``--config`` names."""
    named = [argument for argument in arguments if argument.name == "--config" and argument.tokens]
    if not named:
        return
    path = named[0].tokens[0].value
    options = {name.replace("_", "-"): value for name, value in _read_mapping(path).items()}
    known = {name.lstrip("-") for argument in arguments for name in argument.names}
    for name in options.keys() - known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"`cvae-dist {' '.join(commands)} --help` lists them."
        raise CycloptsError(msg=f"--config {path}: unknown option {name}. {hint}")
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
plot = App(name="plot", help="Draw latents, the decoder's grid, the loss, or rows beside their reconstructions.")
app.command(plot)


# ---------------------------------------------------------------------------------------- the commands


@app.command
def ingest(
    source: str,
    store: str,
    /,
    *,
    rows_per_file: Literal["auto", "one", "many"] = "auto",
    label: Literal["folder"] | None = None,
    nonfinite: Literal["raise", "drop"] = "raise",
    overwrite: Overwrite = False,
    shared: OnCluster = Distributed(),  # noqa: B008 - frozen
) -> int:
    """Copy rows from a tree of .npy files into a chunked Zarr store, with statistics.

    Parameters
    ----------
    source
        Folder or bucket prefix of the .npy files, nested as you like.
    store
        Zarr store to write.
    rows_per_file
        Whether a file is one row or its first axis counts rows.
    label
        'folder' carries the folder of each file along as the column `label`.
    nonfinite
        What to do about rows with NaN or infinity.
    overwrite
        Replace a store that was made with other settings.
    """
    from cvae_dist.ingest import ingest

    with shared.report() as report, shared.client() as client:
        result = ingest(
            source,
            store,
            rows_per_file=rows_per_file,
            label=label,
            nonfinite=nonfinite,
            overwrite=overwrite,
            storage_options=shared.storage_options,
            client=client,
            on_event=report,
        )
        return _wrote_rows(report, "ingest", result)


@app.command
def train(
    store: str,
    model: str,
    /,
    *,
    settings: Annotated[TrainConfig, Parameter(name="*", group="Model and training")] = TrainConfig(),  # noqa: B008
    overwrite: Overwrite = False,
    shared: Local = Output(),  # noqa: B008 - frozen
) -> int:
    """Train a model on the rows of a store. Goes on by itself after an interruption.

    Parameters
    ----------
    store
        Zarr store made by ingest.
    model
        Directory of the model to write.
    overwrite
        Replace a model that was trained with other settings.
    """
    from cvae_dist.training.loop import train

    with shared.report() as report:
        result = train(
            store,
            model,
            settings,
            overwrite=overwrite,
            storage_options=shared.storage_options,
            on_event=report,
        )
        return _trained(report, result)


@app.command
def embed(
    store: str,
    model: str,
    latents: str,
    /,
    *,
    batch_rows: Count = 2048,
    overwrite: Overwrite = False,
    shared: OnCluster = Distributed(),  # noqa: B008 - frozen
) -> int:
    """Compute the latents of every row. Ids and carried columns travel along.

    Parameters
    ----------
    store
        Zarr store made by ingest.
    model
        Directory of a trained model.
    latents
        Zarr store to write.
    batch_rows
        Rows the model sees at once.
    overwrite
        Replace latents that were made otherwise.
    """
    from cvae_dist.embed import embed

    return _map_rows(embed, (store, model, latents), shared, batch_rows=batch_rows, overwrite=overwrite)


@app.command
def decode(
    latents: str,
    model: str,
    out: str,
    /,
    *,
    batch_rows: Count = 2048,
    overwrite: Overwrite = False,
    shared: OnCluster = Distributed(),  # noqa: B008 - frozen
) -> int:
    """Turn latents back into rows in the units of the data.

    Parameters
    ----------
    latents
        Zarr store made by embed.
    model
        Directory of the model that made them.
    out
        Zarr store to write.
    batch_rows
        Rows the model sees at once.
    overwrite
        Replace rows that were made otherwise.
    """
    from cvae_dist.embed import decode

    return _map_rows(decode, (latents, model, out), shared, batch_rows=batch_rows, overwrite=overwrite)


@app.command
def score(
    store: str,
    model: str,
    out: str,
    /,
    *,
    batch_rows: Count = 2048,
    overwrite: Overwrite = False,
    shared: OnCluster = Distributed(),  # noqa: B008 - frozen
) -> int:
    """Compute -ELBO and reconstruction error of every row: high where a row is unlike the training rows.

    Parameters
    ----------
    store
        Zarr store made by ingest.
    model
        Directory of a trained model.
    out
        Zarr store to write.
    batch_rows
        Rows the model sees at once.
    overwrite
        Replace scores that were made otherwise.
    """
    from cvae_dist.embed import score

    return _map_rows(score, (store, model, out), shared, batch_rows=batch_rows, overwrite=overwrite)


@app.command
def sample(
    model: str,
    out: str,
    /,
    *,
    n: Annotated[Count, Parameter(name=["--n", "-n"])],
    seed: int = 0,
    noise: bool = True,
    overwrite: Overwrite = False,
    shared: OnCluster = Distributed(),  # noqa: B008 - frozen
) -> int:
    """Draw new rows from the model's prior.

    Parameters
    ----------
    model
        Directory of a trained model.
    out
        Zarr store to write.
    n
        Number of rows.
    seed
        Seed of the draw: the same seed gives the same rows.
    noise
        Draw from the likelihood, as the data does; without it, the mean row of each latent.
    overwrite
        Replace rows that were made otherwise.
    """
    from cvae_dist.embed import sample

    return _map_rows(sample, (model, out, n), shared, seed=seed, noise=noise, overwrite=overwrite)


@app.command
def verify(url: str, /, *, shared: Local = Output()) -> int:  # noqa: B008 - frozen
    """Read a store again and compare every digest. Exit code 1 if a shard is missing, torn or changed.

    Parameters
    ----------
    url
        Zarr store to check.
    """
    from cvae_dist.verify import verify

    with shared.report() as report:
        result = verify(url, storage_options=shared.storage_options, on_event=report)
        problems = [{"array": p.array, "shard": p.shard, "reason": p.reason} for p in result.problems]
        found = [str(problem) for problem in result.problems]
        verdict = f"{url} is damaged in {len(found)} places" if found else f"{url}: every shard is as written"
        report.result("\n".join([*found, verdict]), {"stage": "verify", "url": url, "problems": problems})
        return DONE if result.ok else FAILED


@app.command
def info(url: str, /, *, shared: Local = Output()) -> int:  # noqa: B008 - frozen
    """Show what a store or a model is, on one screen.

    Parameters
    ----------
    url
        Zarr store or directory of a model.
    """
    from cvae_dist.verify import info

    with shared.report() as report:
        facts = info(url, storage_options=shared.storage_options)
        entries = dict(_flattened(facts))
        width = max(map(len, entries), default=0)
        lines = [f"{name:<{width}}  {figure(value)}" for name, value in entries.items()]
        report.result("\n".join(lines), facts)
    return DONE


def _flattened(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every entry of nested mappings, its path as its name."""
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


@plot.command(name="latents")
def plot_latents(
    latents: str,
    filename: str,
    /,
    *,
    label: str = "label",
    shared: Local = Output(),  # noqa: B008 - frozen
) -> int:
    """Draw latents, coloured by a carried column.

    Parameters
    ----------
    latents
        Zarr store made by embed.
    filename
        Picture to write; the suffix (.png, .svg, .pdf) chooses the format.
    label
        Column that colours the points.
    """
    from cvae_dist.plot import plot_latents

    with shared.report() as report:
        plot_latents(latents, filename, label=label, storage_options=shared.storage_options, on_event=report)
        return _drew(report, "plot latents", filename)


@plot.command(name="grid")
def plot_grid(
    model: str,
    filename: str,
    /,
    *,
    grid_size: Count = 15,
    shared: Local = Output(),  # noqa: B008 - frozen
) -> int:
    """Draw what the decoder makes of a grid of latents.

    Parameters
    ----------
    model
        Directory of a trained model.
    filename
        Picture to write; the suffix (.png, .svg, .pdf) chooses the format.
    grid_size
        Number of rows and columns of the grid.
    """
    from cvae_dist.plot import plot_grid

    with shared.report() as report:
        plot_grid(model, filename, grid_size=grid_size, storage_options=shared.storage_options, on_event=report)
        return _drew(report, "plot grid", filename)


@plot.command(name="loss")
def plot_loss(model: str, filename: str, /, *, shared: Local = Output()) -> int:  # noqa: B008 - frozen
    """Draw the loss of a training run, finished or not.

    Parameters
    ----------
    model
        Directory of the model.
    filename
        Picture to write; the suffix (.png, .svg, .pdf) chooses the format.
    """
    from cvae_dist.plot import plot_loss

    with shared.report() as report:
        plot_loss(model, filename, storage_options=shared.storage_options, on_event=report)
        return _drew(report, "plot loss", filename)


@plot.command(name="reconstructions")
def plot_reconstructions(
    store: str,
    reconstructions: str,
    filename: str,
    /,
    *,
    n: Annotated[Count, Parameter(name=["--n", "-n"])] = 10,
    shared: Local = Output(),  # noqa: B008 - frozen
) -> int:
    """Draw rows beside what the model made of them.

    Parameters
    ----------
    store
        Zarr store made by ingest.
    reconstructions
        Zarr store made by decode from the latents of that store.
    filename
        Picture to write; the suffix (.png, .svg, .pdf) chooses the format.
    n
        Number of rows to draw.
    """
    from cvae_dist.plot import plot_reconstructions

    with shared.report() as report:
        plot_reconstructions(
            store, reconstructions, filename, n=n, storage_options=shared.storage_options, on_event=report
        )
        return _drew(report, "plot reconstructions", filename)


@app.command
def run(pipeline: str, /, *, shared: OnCluster = Distributed()) -> int:  # noqa: B008 - frozen
    """Run the stages of a pipeline file in order; each does only what is missing.

    Parameters
    ----------
    pipeline
        YAML file with a list of stages.
    """
    from cvae_dist.pipeline import run

    with shared.report() as report:
        result = run(
            pipeline,
            scheduler=shared.scheduler,
            workers=shared.workers,
            storage_options=shared.storage_options,
            on_event=report,
        )
    return _ran(report, pipeline, result)


# ------------------------------------------------------------------------------------ the closing line


def _map_rows(verb: Callable[..., Any], locations: tuple[Any, ...], shared: Distributed, **options: Any) -> int:
    """Run one of the verbs that map a store to a store through a model."""
    with shared.report() as report, shared.client() as client:
        result = verb(*locations, storage_options=shared.storage_options, client=client, on_event=report, **options)
        return _wrote_rows(report, verb.__name__, result)


def _wrote_rows(report: Report, stage: str, result: "StoreResult") -> int:
    if not result.nothing_to_do:
        line = f"{stage}: wrote {result.rows_written:,} rows to {result.url} in {duration(result.seconds)}"
    else:
        line = f"{stage}: nothing to do, {result.url} has its {result.rows:,} rows already"
    report.result(line, {"stage": stage, **asdict(result)})
    return DONE


def _trained(report: Report, result: "TrainResult") -> int:
    if result.stopped_because == "interrupted":
        raise KeyboardInterrupt
    if result.stopped_because == "already finished":
        line = f"train: nothing to do, {result.model} is trained already ({result.steps:,} steps)"
    else:
        line = f"train: wrote {result.model} after {result.steps:,} steps in {duration(result.seconds)}"
    loss = result.validation_loss
    line += f", validation -ELBO {loss:.4g} nats per row" if loss is not None and math.isfinite(loss) else ""
    report.result(line, {"stage": "train", **asdict(result)})
    return DONE


def _drew(report: Report, stage: str, filename: str) -> int:
    report.result(f"{stage}: wrote {filename}", {"stage": stage, "url": filename})
    return DONE


def _ran(report: Report, pipeline: str, result: "PipelineResult") -> int:
    report.table(("stage", "output", "rows", "time"), [_stage_row(stage) for stage in result.stages])
    if result.quality is not None:
        report.table(("quality", "", ""), _quality_rows(result.quality))
    verdict = "nothing to do, all of it was done already" if result.already_done else "done"
    report.result(f"{pipeline}: {verdict} ({duration(result.seconds)})", asdict(result))
    return DONE


def _quality_rows(quality: "Quality") -> list[tuple[str, str, str]]:
    """Return name, figure and meaning of what could be measured."""
    rows = f"{quality.held_out_rows:,} rows held out of training"
    fraction = quality.reconstruction_fraction
    of_variance = "" if fraction is None else f", {fraction:.1%} of the data's variance"
    table = [
        ("validation -ELBO", quality.negative_elbo, ".4g", f"nats per row, on {rows}"),
        (
            "5-NN accuracy",
            quality.neighbour_accuracy,
            ".1%",
            f"{rows}, classified by their nearest training rows",
        ),
        (
            "reconstruction MSE",
            quality.reconstruction_mse,
            ".4g",
            f"per feature, in data units squared{of_variance}",
        ),
    ]
    return [(name, format(value, shape), meaning) for name, value, shape, meaning in table if value is not None]


def _stage_row(stage: "StageResult") -> tuple[str, str, str, str]:
    rows = "" if stage.rows is None else f"{stage.rows:,}"
    return stage.stage, stage.url, rows, "already done" if stage.already_done else duration(stage.seconds)


# --------------------------------------------------------------------------------------- the way out


@contextmanager
def _signals() -> Iterator[Callable[[], set[int]]]:
    """Make SIGTERM interrupt like Ctrl-C; yield what returns the signals that arrived since.

    Python writes every signal's number to the descriptor, also of those that a verb handles itself.
    """
    reader, writer = os.pipe()
    for end in (reader, writer):
        os.set_blocking(end, False)
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def arrived() -> set[int]:
        with suppress(BlockingIOError):  # none did
            return set(os.read(reader, 64))
        return set()

    try:
        yield arrived
    finally:
        signal.set_wakeup_fd(descriptor)
        signal.signal(signal.SIGTERM, handler)
        os.close(reader)
        os.close(writer)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    with _signals() as arrived:
        try:
            code = app(arguments)
            sys.stdout.flush()
            return code if isinstance(code, int) else DONE
        except BrokenPipeError:
            # The reader went away (`cvae-dist info ... | head`); python would complain once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return BROKEN_PIPE
        except KeyboardInterrupt:
            terminated = signal.SIGTERM in arrived()
            _complain(f"{'terminated' if terminated else 'interrupted'}; the same command goes on from here")
            return TERMINATED if terminated else INTERRUPTED
        except (CvaeDistError, OSError) as error:
            _complain(error_text(error))
            return WRONG_USAGE if isinstance(error, InvalidPipeline) else FAILED


def _complain(message: str) -> None:
    print(f"cvae-dist: {message}", file=sys.stderr, flush=True)
