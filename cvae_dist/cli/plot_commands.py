"""The commands of ``plot``, one for each picture."""

from collections.abc import Callable
from typing import Annotated

from cyclopts import App, Parameter

from cvae_dist.cli.options import Count, Local, Output
from cvae_dist.cli.parser import app
from cvae_dist.cli.results import drew

plot = App(name="plot", help="Draw latents, the decoder's grid, the loss, or rows beside their reconstructions.")
app.command(plot)


@plot.command(name="latents")
def plot_latents(latents: str, filename: str, /, *, label: str = "label", shared: Local = Output()) -> None:
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
    from cvae_dist.verbs.plot import plot_latents

    _draw(plot_latents, (latents, filename), shared, label=label)


@plot.command(name="grid")
def plot_grid(model: str, filename: str, /, *, grid_size: Count = 15, shared: Local = Output()) -> None:
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
    from cvae_dist.verbs.plot import plot_grid

    _draw(plot_grid, (model, filename), shared, grid_size=grid_size)


@plot.command(name="loss")
def plot_loss(model: str, filename: str, /, *, shared: Local = Output()) -> None:
    """Draw the loss of a training run, finished or not.

    Parameters
    ----------
    model
        Directory of the model.
    filename
        Picture to write; the suffix (.png, .svg, .pdf) chooses the format.
    """
    from cvae_dist.verbs.plot import plot_loss

    _draw(plot_loss, (model, filename), shared)


@plot.command(name="reconstructions")
def plot_reconstructions(
    store: str,
    reconstructions: str,
    filename: str,
    /,
    *,
    n: Annotated[Count, Parameter(name=["--n", "-n"])] = 10,
    shared: Local = Output(),
) -> None:
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
    from cvae_dist.verbs.plot import plot_reconstructions

    _draw(plot_reconstructions, (store, reconstructions, filename), shared, n=n)


def _draw(verb: Callable[..., None], locations: tuple[str, ...], shared: Output, **options: object) -> None:
    """Run one of the verbs that write a picture to the last of the locations."""
    with shared.report() as report:
        verb(*locations, storage_options=shared.storage_options, on_event=report, **options)
        drew(report, verb.__name__.replace("_", " "), locations[-1])
