"""The commands but for ``plot``."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from cvae_dist.cli.options import Count, Distributed, Local, OnCluster, Output, Overwrite
from cvae_dist.cli.parser import app
from cvae_dist.cli.results import described, fitted, ran, trained, verified, wrote_rows
from cvae_dist.config import ComputePrecision, TrainConfig


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
    shared: OnCluster = Distributed(),
) -> None:
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
    from cvae_dist.verbs.ingest import ingest

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
        wrote_rows(report, "ingest", result)


@app.command
def train(
    store: str,
    model: str,
    /,
    *,
    settings: Annotated[TrainConfig, Parameter(name="*", group="Model and training")] = TrainConfig(),
    overwrite: Overwrite = False,
    shared: Local = Output(),
) -> None:
    """Train a model on the rows of a store. Goes on by itself after an interruption.

    Parameters
    ----------
    store
        Zarr store made by ingest.
    model
        Directory of the model to write.
    overwrite
        Train anew and replace the model that is there, whatever its settings.
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
        trained(report, result)


@app.command
def embed(
    store: str,
    model: str,
    latents: str,
    /,
    *,
    batch_size: Count = 16_384,
    precision: ComputePrecision = "float32",
    overwrite: Overwrite = False,
    shared: OnCluster = Distributed(),
) -> None:
    """Compute the latents of every row. Ids and carried columns travel along.

    Parameters
    ----------
    store
        Zarr store made by ingest.
    model
        Directory of a trained model.
    latents
        Zarr store to write.
    batch_size
        Rows the model sees at once.
    precision
        Type to compute in; bf16 is about 1.6 times as fast on processors that have it, and errs by 1 %.
    overwrite
        Replace latents that were made otherwise.
    """
    from cvae_dist.verbs.embed import embed

    options: dict[str, Any] = {"batch_size": batch_size, "precision": precision, "overwrite": overwrite}
    _map_rows(embed, (store, model, latents), shared, **options)


@app.command
def decode(
    latents: str,
    model: str,
    out: str,
    /,
    *,
    batch_size: Count = 2048,
    overwrite: Overwrite = False,
    shared: OnCluster = Distributed(),
) -> None:
    """Turn latents back into rows in the units of the data.

    Parameters
    ----------
    latents
        Zarr store made by embed.
    model
        Directory of the model that made them.
    out
        Zarr store to write.
    batch_size
        Rows the model sees at once.
    overwrite
        Replace rows that were made otherwise.
    """
    from cvae_dist.verbs.decode import decode

    _map_rows(decode, (latents, model, out), shared, batch_size=batch_size, overwrite=overwrite)


@app.command
def score(
    store: str,
    model: str,
    out: str,
    /,
    *,
    batch_size: Count = 2048,
    overwrite: Overwrite = False,
    shared: OnCluster = Distributed(),
) -> None:
    """Compute score, -ELBO and reconstruction error of every row. Rows unlike the training rows score low.

    Parameters
    ----------
    store
        Zarr store made by ingest.
    model
        Directory of a trained model.
    out
        Zarr store to write.
    batch_size
        Rows the model sees at once.
    overwrite
        Replace scores that were made otherwise.
    """
    from cvae_dist.verbs.score import score

    _map_rows(score, (store, model, out), shared, batch_size=batch_size, overwrite=overwrite)


@app.command
def fit_prior(
    store: str,
    model: str,
    /,
    *,
    prior: Literal["mixture", "flow"] = "mixture",
    n_components: Count = 10,
    seed: int = 0,
    shared: Local = Output(),
) -> None:
    """Fit a prior to the latents of a store's rows, for sample to draw from. The model's directory keeps it.

    Parameters
    ----------
    store
        Zarr store made by ingest.
    model
        Directory of a trained model.
    prior
        A mixture of Gaussians, or a neural spline flow (needs the extra `flow`).
    n_components
        Gaussians of the mixture.
    seed
        Seed of the fit: the same seed gives the same prior.
    """
    from cvae_dist.verbs.fit_prior import fit_prior

    options: dict[str, Any] = {"prior": prior, "n_components": n_components, "seed": seed}
    with shared.report() as report:
        fitted(report, fit_prior(store, model, storage_options=shared.storage_options, on_event=report, **options))


@app.command
def sample(
    model: str,
    out: str,
    /,
    *,
    n: Annotated[Count, Parameter(name=["--n", "-n"])],
    seed: int = 0,
    temperature: float = 1.0,
    noise: bool = True,
    prior: Literal["normal", "mixture", "flow"] = "normal",
    overwrite: Overwrite = False,
    shared: OnCluster = Distributed(),
) -> None:
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
    temperature
        Scales the spread of the latents: below 1 for more typical rows.
    noise
        Draw from the likelihood, as the data does; without it, the mean row of each latent.
    prior
        Where latents are drawn: N(0, I), or what fit-prior fitted.
    overwrite
        Replace rows that were made otherwise.
    """
    from cvae_dist.verbs.sample import sample

    options = {"seed": seed, "temperature": temperature, "noise": noise, "prior": prior}
    _map_rows(sample, (model, out, n), shared, overwrite=overwrite, **options)


def _map_rows(verb: Callable[..., Any], locations: tuple[Any, ...], shared: Distributed, **options: Any) -> None:
    """Run one of the verbs that map a store to a store through a model."""
    with shared.report() as report, shared.client() as client:
        result = verb(*locations, storage_options=shared.storage_options, client=client, on_event=report, **options)
        wrote_rows(report, verb.__name__, result)


@app.command
def verify(url: str, /, *, shared: Local = Output()) -> int:
    """Read a store again and compare every digest. Exit code 1 if a shard is missing, torn or changed.

    Parameters
    ----------
    url
        Zarr store to check.
    """
    from cvae_dist.verbs.verify import verify

    with shared.report() as report:
        result = verify(url, storage_options=shared.storage_options, on_event=report)
        return verified(report, url, result)


@app.command
def info(url: str, /, *, shared: Local = Output()) -> None:
    """Show what a store or a model is, on one screen.

    Parameters
    ----------
    url
        Zarr store or directory of a model.
    """
    from cvae_dist.verbs.info import info

    with shared.report() as report:
        described(report, info(url, storage_options=shared.storage_options))


@app.command
def run(pipeline: str, /, *, shared: OnCluster = Distributed()) -> None:
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
    ran(report, pipeline, result)
