"""The verbs: each reads a store or a model and writes one picture to a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cvae_dist.errors import InvalidInput, SourceNotFound
from cvae_dist.events import Event, OnEvent, ignore
from cvae_dist.model.files import HISTORY, read_description
from cvae_dist.plot.figure import write_figure
from cvae_dist.plot.grid import latent_grid
from cvae_dist.plot.latents import scatter_latents
from cvae_dist.plot.loss import loss_curves
from cvae_dist.plot.reconstructions import compare_rows
from cvae_dist.store import Location, RowStore
from cvae_dist.store.urls import StorageOptions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_POINTS = 5_000_000


def plot_latents(
    latents: str,
    filename: str,
    *,
    label: str | None = "label",
    storage_options: StorageOptions | None = None,
    on_event: OnEvent = ignore,
) -> None:
    """Draw a store of latents, coloured by a carried column (see :func:`scatter_latents`).

    Of more than 5 million rows, evenly spread chunks of 5 million are drawn, which the title says.

    Parameters
    ----------
    latents : str
        What ``embed`` wrote.
    filename : str
        Path or URL of the picture; the suffix chooses the format.
    label : str or None
        Carried column; None, or a store without a column ``label``, draws without colours.

    Raises
    ------
    InvalidInput
        The store has no rows, no such column, or the suffix is unknown.
    """
    opened = RowStore.open(latents, storage_options)
    label = _carried_column(opened, label)
    ranges = _spread(opened.rows, opened.layout.rows_per_chunk)
    z = _read_ranges(opened, opened.main, ranges)
    labels = None if label is None else _read_ranges(opened, label, ranges)
    title = None if len(z) == opened.rows else f"{len(z):,} of {opened.rows:,} rows"
    figure = scatter_latents(z.reshape(len(z), -1), labels, label_name=label or "label", title=title)
    _write(figure, filename, "plot latents", storage_options, on_event)


def plot_grid(
    model: str,
    filename: str,
    *,
    xy_range: tuple[float, float] | None = None,
    grid_size: int = 15,
    shape: Sequence[int] | None = None,
    clip: tuple[float, float] | None = None,
    storage_options: StorageOptions | None = None,
    on_event: OnEvent = ignore,
) -> None:
    """Draw what a model decodes on a grid of latents (see :func:`latent_grid`).

    Parameters
    ----------
    model : str
        What ``train`` wrote.
    filename : str
        Path or URL of the picture; the suffix chooses the format.
    shape : sequence of int, optional
        Shape of one decoded row. Default: the shape of the items the model was trained on.
    """
    # Here, as the other pictures need no torch.
    from cvae_dist.model.directory import load_model

    vae = load_model(model, storage_options=storage_options)
    lineage = read_description(Location.of(model, storage_options))["lineage"]
    figure = latent_grid(
        vae.decode_rows,
        vae.dim_latent,
        shape or lineage.get("item_shape") or (vae.n_features,),
        xy_range=xy_range,
        grid_size=grid_size,
        clip=clip,
    )
    _write(figure, filename, "plot grid", storage_options, on_event)


def plot_loss(
    model: str,
    filename: str,
    *,
    storage_options: StorageOptions | None = None,
    on_event: OnEvent = ignore,
) -> None:
    """Draw the loss of a training run (see :func:`loss_curves`) from the model's ``history.jsonl``.

    Raises
    ------
    SourceNotFound
        There is no history: no model is there, or its training has not recorded anything yet.
    """
    location = Location.of(model, storage_options) / HISTORY
    try:
        text = location.read().decode()
    except FileNotFoundError:
        raise SourceNotFound(
            f"{location} is not there, so there is no loss to draw: train the model first, or mend the path"
        ) from None
    figure = loss_curves([json.loads(line) for line in text.splitlines()])
    _write(figure, filename, "plot loss", storage_options, on_event)


def plot_reconstructions(
    store: str,
    reconstructions: str,
    filename: str,
    *,
    n: int = 10,
    storage_options: StorageOptions | None = None,
    on_event: OnEvent = ignore,
) -> None:
    """Draw ``n`` evenly spread rows above their reconstructions (see :func:`compare_rows`).

    Parameters
    ----------
    store, reconstructions : str
        The rows, and what ``decode`` made of their latents: the same rows in the same order.
    filename : str
        Path or URL of the picture; the suffix chooses the format.
    n : int
        Number of rows.
    """
    originals = RowStore.open(store, storage_options)
    decoded = RowStore.open(reconstructions, storage_options)
    if originals.rows != decoded.rows or originals.rows == 0 or n < 1:
        raise InvalidInput(
            f"{n} rows of {originals.url} ({originals.rows:,} rows) cannot be drawn above "
            f"{decoded.url} ({decoded.rows:,} rows): ask for at least one, decoded from these very rows"
        )
    picked = np.unique(np.linspace(0, originals.rows - 1, n).round().astype(int))
    ranges = [(int(i), int(i) + 1) for i in picked]
    above, below = (_read_ranges(opened, opened.main, ranges) for opened in (originals, decoded))
    names, names_are = [f"{i:,}" for i in picked], "row"
    if "label" in originals.columns:
        labels = _read_ranges(originals, "label", ranges)
        names = [f"{name}\n{label}" for name, label in zip(names, labels, strict=True)]
        names_are = "row and its label"
    figure = compare_rows(above, below, originals.item_shape, names=names, names_are=names_are)
    _write(figure, filename, "plot reconstructions", storage_options, on_event)


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


def _read_ranges(store: RowStore, name: str, ranges: Sequence[tuple[int, int]]) -> NDArray[Any]:
    return np.concatenate([store.read(name, start, stop) for start, stop in ranges])


def _write(
    figure: Figure, filename: str, stage: str, storage_options: StorageOptions | None, on_event: OnEvent
) -> None:
    write_figure(figure, filename, storage_options)
    on_event(Event(stage, "done", done=1, total=1, unit="pictures", message=f"wrote {filename}"))
