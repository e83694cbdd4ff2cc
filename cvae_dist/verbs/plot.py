"""The verbs ``plot_...``: each reads a store or a model and writes one picture."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cvae_dist.errors import InvalidInput, SourceNotFound
from cvae_dist.events import Event, OnEvent, ignore
from cvae_dist.model.files import HISTORY, read_description
from cvae_dist.plot.figure import write_figure
from cvae_dist.plot.grid import latent_grid
from cvae_dist.plot.labels import shortened
from cvae_dist.plot.latents import scatter_latents
from cvae_dist.plot.loss import loss_curves
from cvae_dist.plot.reconstructions import compare_rows, evenly_spread
from cvae_dist.store import Location, RowStore
from cvae_dist.store.layout import Block
from cvae_dist.store.urls import StorageOptions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_POINTS = 5_000_000


def plot_latents(
    latents: str | os.PathLike[str],
    filename: str | os.PathLike[str],
    *,
    label: str | None = "label",
    title: str | None = None,
    size: float | None = None,
    alpha: float | None = None,
    cmap: str | None = None,
    storage_options: StorageOptions | None = None,
    on_event: OnEvent = ignore,
) -> None:
    """Draw latents, coloured by a carried column.

    Of more than 5 million rows, evenly spread chunks of 5 million are drawn. Rows that are not drawn are counted under
    the title; rows without a label (an empty string) are grey.

    Parameters
    ----------
    latents : path or URL
        Zarr store made by embed.
    filename : path or URL
        Picture to write; the suffix (.png, .svg, .pdf) chooses the format.
    label : str or None
        Column that colours the points. A store without the column label is drawn in one colour.
    title : str, optional
        Title of the picture. Default: the number of rows and of latent dimensions.
    size : float, optional
        Area of a point in square points. By default points are smaller where there are more.
    alpha : float, optional
        Opacity, above 0 and at most 1. By default it is less where there are more points. Above 100,000 rows densities
        are drawn unless size or alpha is given.
    cmap : str, optional
        Colour map of matplotlib. Default: viridis; for classes colours that colour-blind readers can tell apart.
    storage_options, on_event
        As for :func:`cvae_dist.embed`.

    Raises
    ------
    SourceNotFound
        There is no such store.
    InvalidInput
        The store holds no latents, no rows or no such column, a value cannot be drawn, or the suffix is unknown.
    """
    opened = RowStore.open(Location.of(latents, storage_options))
    opened.require_kind("latents")
    label = _carried_column(opened, label)
    ranges = _spread(opened.rows, opened.layout.rows_per_chunk)
    z = _read_ranges(opened, opened.main, ranges)
    labels = None if label is None else _read_ranges(opened, label, ranges)
    figure = scatter_latents(
        z.reshape(len(z), -1), labels, label_name=label or "label", total=opened.rows,
        title=title, size=size, alpha=alpha, cmap=cmap,
    )  # fmt: skip
    _write(figure, filename, "plot latents", storage_options, on_event)


def plot_grid(
    model: str | os.PathLike[str],
    filename: str | os.PathLike[str],
    *,
    xy_range: tuple[float, float] | None = None,
    grid_size: int = 15,
    shape: Sequence[int] | None = None,
    clip: tuple[float, float] | None = None,
    title: str | None = None,
    cmap: str | None = None,
    storage_options: StorageOptions | None = None,
    on_event: OnEvent = ignore,
) -> None:
    """Draw what the decoder makes of a grid of latents.

    Of more than two latent dimensions, the two that change the rows most are varied and the others are 0.

    Parameters
    ----------
    model : path or URL
        Directory of a trained model.
    filename : path or URL
        Picture to write; the suffix (.png, .svg, .pdf) chooses the format.
    xy_range : (float, float), optional
        Range of both latents, cut into equal cells. By default the cells are equally probable under the prior.
    grid_size : int
        Number of rows and columns of the grid.
    shape : sequence of int, optional
        Shape of one decoded row. By default that of the items the model was trained on.
    clip : (float, float), optional
        Decoded values are clipped to this range.
    title : str, optional
        Title of the picture. Default: how the grid is spaced.
    cmap : str, optional
        Colour map of matplotlib for images of one channel. Default: gray.
    storage_options, on_event
        As for :func:`cvae_dist.embed`.

    Raises
    ------
    SourceNotFound, Corrupt
        There is no such model, or its bytes have changed.
    InvalidInput
        A range, the shape, the size of the grid or the colour map cannot be, or the suffix is unknown.
    """
    from cvae_dist.model.directory import load_model  # here, as the other pictures need no torch

    place = Location.of(model, storage_options)
    vae = load_model(place)
    item_shape = shape or read_description(place)["lineage"].get("item_shape") or (vae.n_features,)
    figure = latent_grid(
        vae.decode_rows, vae.dim_latent, item_shape,
        xy_range=xy_range, grid_size=grid_size, clip=clip, title=title, cmap=cmap,
    )  # fmt: skip
    _write(figure, filename, "plot grid", storage_options, on_event)


def plot_loss(
    model: str | os.PathLike[str],
    filename: str | os.PathLike[str],
    *,
    title: str | None = None,
    storage_options: StorageOptions | None = None,
    on_event: OnEvent = ignore,
) -> None:
    """Draw the loss of a training run, finished or not.

    Parameters
    ----------
    model : path or URL
        Directory of the model.
    filename : path or URL
        Picture to write; the suffix (.png, .svg, .pdf) chooses the format.
    title : str, optional
        Title of the picture. Default: the best -ELBO and its step.
    storage_options, on_event
        As for :func:`cvae_dist.embed`.

    Raises
    ------
    SourceNotFound
        There is no model, or its training has not recorded anything yet.
    InvalidInput
        A store is there instead, the history holds no loss, or the suffix is unknown.
    """
    place = Location.of(model, storage_options)
    location = place / HISTORY
    try:
        text = location.read().decode()
    except (FileNotFoundError, NotADirectoryError):
        if (place / "zarr.json").exists():
            raise InvalidInput(
                f"{place} is a store, not the directory of a model, so there is no loss to draw: "
                "give a directory that `cvae-dist train STORE MODEL` wrote"
            ) from None
        raise SourceNotFound(
            f"{location} is not there, so there is no loss to draw: train the model first, or mend the path"
        ) from None
    figure = loss_curves([json.loads(line) for line in text.splitlines()], title=title)
    _write(figure, filename, "plot loss", storage_options, on_event)


def plot_reconstructions(
    store: str | os.PathLike[str],
    reconstructions: str | os.PathLike[str],
    filename: str | os.PathLike[str],
    *,
    n: int = 10,
    title: str | None = None,
    cmap: str | None = None,
    storage_options: StorageOptions | None = None,
    on_event: OnEvent = ignore,
) -> None:
    """Draw rows above what the model made of them. The rows are evenly spread over the store.

    Parameters
    ----------
    store : path or URL
        Zarr store made by ingest.
    reconstructions : path or URL
        Zarr store made by decode from the latents of that store.
    filename : path or URL
        Picture to write; the suffix (.png, .svg, .pdf) chooses the format.
    n : int
        Number of rows to draw.
    title : str, optional
        Title of the picture. Default: how many rows are shown, and their root mean square error.
    cmap : str, optional
        Colour map of matplotlib for images of one channel. Default: gray.
    storage_options, on_event
        As for :func:`cvae_dist.embed`.

    Raises
    ------
    SourceNotFound
        There is no such store.
    InvalidInput
        A store does not hold rows, or the second no decoded ones. They have different numbers of rows or none, n is
        below 1, there is no such colour map, or the suffix is unknown.
    """
    originals = RowStore.open(Location.of(store, storage_options))
    decoded = RowStore.open(Location.of(reconstructions, storage_options))
    _require_reconstructions(originals, decoded)
    if originals.rows != decoded.rows or originals.rows == 0 or n < 1:
        raise InvalidInput(
            f"{n} rows of {originals.url} ({originals.rows:,} rows) cannot be drawn above "
            f"{decoded.url} ({decoded.rows:,} rows): ask for at least one, decoded from these very rows"
        )
    numbers = evenly_spread(originals.rows, n).tolist()
    ranges = [(number, number + 1) for number in numbers]
    above, below = (_read_ranges(opened, opened.main, ranges) for opened in (originals, decoded))
    names, names_are = [f"{number:,}" for number in numbers], "row"
    if "label" in originals.columns:
        labels = _read_ranges(originals, "label", ranges)
        names = [f"{name}\n{shortened(label, 12)}" for name, label in zip(names, labels, strict=True)]
        names_are = "row and its label"
    figure = compare_rows(
        above,
        below,
        originals.item_shape,
        names=names,
        names_are=names_are,
        total=originals.rows,
        title=title,
        cmap=cmap,
    )
    _write(figure, filename, "plot reconstructions", storage_options, on_event)


def _require_reconstructions(originals: RowStore, decoded: RowStore) -> None:
    """Refuse other stores than rows and what a model made of rows."""
    originals.require_kind("rows")
    if decoded.kind != "rows" or "model" not in decoded.document["settings"]:
        raise InvalidInput(
            f"{decoded.url} holds {decoded.kind} that were not decoded, so they are no reconstructions: "
            "name the store of rows first, and then one that `cvae-dist decode LATENTS MODEL RECONSTRUCTIONS` wrote"
        )


def _carried_column(store: RowStore, label: str | None) -> str | None:
    """Return the column to colour by; only the default name may be missing."""
    if label is None or label in store.columns:
        return label
    if label == "label":
        return None
    raise InvalidInput(
        f"{store.url} carries no column {label!r}, so the rows cannot be coloured by it: "
        f"choose one of {', '.join(store.columns) or '(none is carried)'}"
    )


def _spread(rows: int, rows_per_chunk: int) -> list[tuple[int, int]]:
    """Return the row ranges to draw: all, or evenly spread chunks of about ``MAX_POINTS`` rows together."""
    if rows <= MAX_POINTS:
        return [(0, rows)]
    starts = np.linspace(0, rows - rows_per_chunk, max(1, MAX_POINTS // rows_per_chunk)).astype(int)
    aligned = np.unique(starts // rows_per_chunk * rows_per_chunk)
    return [(int(start), int(min(start + rows_per_chunk, rows))) for start in aligned]


def _read_ranges(store: RowStore, name: str, ranges: Sequence[tuple[int, int]]) -> Block:
    rows = np.concatenate([store.read(name, start, stop) for start, stop in ranges])
    store.require_unchanged()
    return rows


def _write(
    figure: Figure,
    filename: str | os.PathLike[str],
    stage: str,
    storage_options: StorageOptions | None,
    on_event: OnEvent,
) -> None:
    write_figure(figure, filename, storage_options)
    on_event(Event(stage, "done", done=1, total=1, unit="pictures", message=f"wrote {filename}"))
