"""The verb ``plot``: latents, the decoder's grid, the loss of a training run, reconstructions.

Each picture is a pure function of arrays that returns a :class:`matplotlib.figure.Figure`
(:func:`scatter_latents`, :func:`latent_grid`, :func:`loss_curves`, :func:`compare_rows`) and a verb that
reads a store or a model and writes that figure to a file (``plot_*``). Figures are made without pyplot:
no window, no global state, nothing to close.
"""

from __future__ import annotations

import importlib
import io
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from cvae_dist.errors import InvalidInput, MissingExtra, SourceNotFound
from cvae_dist.events import Event, OnEvent, ignore
from cvae_dist.store import Location, RowStore
from cvae_dist.store.urls import StorageOptions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Floats = NDArray[np.floating[Any]]
    Decode = Callable[[Floats], NDArray[Any]]

__all__ = [
    "compare_rows",
    "latent_grid",
    "loss_curves",
    "plot_grid",
    "plot_latents",
    "plot_loss",
    "plot_reconstructions",
    "scatter_latents",
    "write_figure",
]

logger = logging.getLogger(__name__)

# Found by farthest-point search over sRGB in Oklab (Ottosson 2020), seen normally and through the simulations
# of deuteranopia and protanopia of Machado et al. (2009). A prefix is as distinct as its length allows: to
# the colour-blind the two nearest of all 20 are further apart than the two nearest of matplotlib's tab10.
PALETTE = (
    *(
        "#a53c00",
        "#0000ff",
        "#00ff00",
        "#87d2ff",
        "#780096",
        "#006969",
        "#a5a51e",
        "#ff1eb4",
        "#ffa5a5",
        "#7878ff",
    ),
    *(
        "#d278e1",
        "#00a569",
        "#4b00c3",
        "#4b3c69",
        "#00f0e1",
        "#87e169",
        "#6987b4",
        "#87003c",
        "#d20fe1",
        "#ff5a69",
    ),
)
INK = "#2f5597"
OTHER_COLOUR = "#b0b0b0"
CONTINUOUS = "viridis"
MAX_CLASSES = len(PALETTE)
SHADED_ABOVE = 100_000
MAX_POINTS = 5_000_000
PIXELS = 600
DPI = 150


# ---------------------------------------------------------------------------------------------- labels


@dataclass(frozen=True)
class Classes:
    """Labels as classes: ``codes`` (n,) index ``names``; ``colours`` has one entry per name."""

    names: tuple[str, ...]
    codes: NDArray[np.intp]

    @property
    def colours(self) -> list[str]:
        """One colour for each name; grey for the classes that were put together."""
        merged = [name.startswith("other (") for name in self.names]
        return [OTHER_COLOUR if grey else PALETTE[i] for i, grey in enumerate(merged)]


def _as_numbers(labels: NDArray[Any]) -> NDArray[Any] | None:
    """Return the labels as numbers, strings such as "7" included, or None where one of them is no number."""
    try:
        numbers = labels.astype(np.float64)
    except (TypeError, ValueError):
        return None
    return numbers


def _as_strings(labels: NDArray[Any]) -> NDArray[Any]:
    """Return the labels as strings; NumPy cannot cast those of variable width, as stores hold, to fixed."""
    return labels if labels.dtype.kind == "T" else labels.astype(str)


def _merge_rare(names: NDArray[Any], codes: NDArray[np.intp]) -> Classes:
    """Keep the most frequent classes in their order and put all others into one."""
    kept = np.sort(np.argsort(-np.bincount(codes), kind="stable")[: MAX_CLASSES - 1])
    renumbered = np.full(len(names), len(kept))
    renumbered[kept] = np.arange(len(kept))
    others = f"other ({len(names) - len(kept)} classes)"
    return Classes((*(str(names[i]) for i in kept), others), renumbered[codes])


def classify(labels: NDArray[Any], categories: Sequence[str] | None = None) -> Classes | Floats:
    """Decide whether labels are classes or a measured quantity.

    Strings are classes, and so are whole numbers (also written as strings) of at most 20 different
    values; other numbers are a quantity. Of more than 20 classes the 19 most frequent keep their names.

    Parameters
    ----------
    labels : (n,) array of numbers or strings
    categories : sequence of str, optional
        Name of each class where the labels are indices 0, 1, ...
    """
    numbers = _as_numbers(labels)
    if categories is not None and numbers is not None:
        codes = numbers.astype(np.intp)
        if len(codes) and (codes.min() < 0 or codes.max() >= len(categories)):
            raise InvalidInput(
                f"labels run from {codes.min()} to {codes.max()} with {len(categories)} categories, "
                "so some cannot be named: give one category name for every label 0, 1, ..."
            )
        names = np.array([str(name) for name in categories])
        return _merge_rare(names, codes) if len(names) > MAX_CLASSES else Classes(tuple(names), codes)
    if numbers is not None:
        values, codes = np.unique(numbers, return_inverse=True)
        if len(values) > MAX_CLASSES or not np.all(values == np.round(values)):
            return numbers
        return Classes(tuple(f"{value:.0f}" for value in values), codes)
    names, codes = np.unique(_as_strings(labels), return_inverse=True)
    return _merge_rare(names, codes) if len(names) > MAX_CLASSES else Classes(tuple(map(str, names)), codes)


# --------------------------------------------------------------------------------------------- latents


def scatter_latents(
    z: Floats,
    labels: Sequence[Any] | NDArray[Any] | None = None,
    *,
    categories: Sequence[str] | None = None,
    label_name: str = "label",
    title: str | None = None,
) -> Figure:
    """Draw latents, coloured by a label.

    Two coordinates are drawn as they are. More are projected to their first two principal axes, which
    the axes' names say. One coordinate becomes histograms, one per class. Above 1e5 points datashader
    draws densities instead of points.

    Parameters
    ----------
    z : (n, d) float array
        Rows with a NaN or an infinity are left out.
    labels : (n,) numbers or strings, optional
        At most 20 classes get a legend; numbers that are no classes get a colour bar.
    categories : sequence of str, optional
        Name of each class where the labels are indices.
    label_name : str
        What the labels are, for the legend.
    title : str, optional
        Default: the number of rows and of latent coordinates.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    InvalidInput
        z is not (n, d) with n > 0 or has another number of rows than the labels.
    MissingExtra
        matplotlib, or above 1e5 points datashader, is not installed.
    """
    z, tags = _checked(z, labels)
    groups = None if tags is None else classify(tags, categories)
    figure = _figure(9.0, 7.0)
    axes = figure.add_subplot()
    axes.set_title(title or f"{len(z):,} rows in {z.shape[1]} latent dimension{'s'[: z.shape[1] > 1]}")
    if z.shape[1] == 1 and not isinstance(groups, np.ndarray):
        _draw_histograms(axes, z[:, 0], groups, label_name)
        return figure
    if z.shape[1] == 1:
        xy, names = np.column_stack([z[:, 0], cast("Floats", groups)]), ("z1", label_name)
        groups = None
    else:
        xy, names = _two_axes(z)
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])
    draw = _draw_density if len(xy) > SHADED_ABOVE else _draw_points
    mappable = draw(axes, xy, groups)
    if isinstance(groups, Classes):
        _name_classes(axes, xy, groups, label_name)
    elif mappable is not None:
        _name_colours(figure, axes, mappable, None if groups is None else label_name)
    _set_window(axes, xy)
    return figure


def _checked(z: Floats, labels: Sequence[Any] | NDArray[Any] | None) -> tuple[Floats, NDArray[Any] | None]:
    z = np.asarray(z)
    if z.ndim != 2 or 0 in z.shape:
        raise InvalidInput(f"latents have shape {z.shape}; a picture needs (rows, dimensions), none of them 0")
    tags = None if labels is None else np.asarray(labels)
    if tags is not None and tags.shape != (len(z),):
        raise InvalidInput(
            f"{len(z):,} latent rows, but labels of shape {tags.shape}: give exactly one label for each row"
        )
    z = z.astype(np.float32, copy=False)
    finite = np.isfinite(z).all(axis=1)
    if not finite.any():
        raise InvalidInput(f"none of the {len(z):,} latent rows is finite: there is nothing to draw")
    if finite.all():
        return z, tags
    logger.warning("%d of %d latent rows are not finite and left out of the picture", (~finite).sum(), len(z))
    return z[finite], None if tags is None else tags[finite]


def _two_axes(z: Floats) -> tuple[Floats, tuple[str, str]]:
    """Return (n, 2) coordinates and their names: z itself, or its first two principal axes."""
    if z.shape[1] == 2:
        return z, ("z1", "z2")
    centred = z - z.mean(axis=0, dtype=np.float64).astype(z.dtype)
    variance, axes = np.linalg.eigh(np.cov(centred, rowvar=False, bias=True))
    share = 100 * variance[::-1] / max(float(variance.sum()), np.finfo(np.float64).tiny)
    names = [f"principal axis {i} of {z.shape[1]} ({part:.0f} % of the variance)" for i, part in enumerate(share, 1)]
    return centred @ axes[:, :-3:-1].astype(z.dtype), (names[0], names[1])


def _draw_points(axes: Axes, xy: Floats, groups: Classes | Floats | None) -> ScalarMappable | None:
    """Draw one point per row, in a fixed random order: no class may hide another by coming later."""
    order = np.random.default_rng(0).permutation(len(xy))
    style: dict[str, Any] = {
        "s": float(np.clip(40_000 / len(xy), 1.5, 36.0)),
        "alpha": float(np.clip(30 / np.sqrt(len(xy)), 0.3, 0.9)),
        "linewidths": 0,
        "rasterized": True,
    }
    if isinstance(groups, Classes):
        style["c"] = np.array(groups.colours)[groups.codes[order]]
    elif groups is not None:
        style |= {"c": groups[order], "plotnonfinite": True} | _colour_range(groups)
    else:
        style["c"] = INK
    points = axes.scatter(xy[order, 0], xy[order, 1], **style)
    return None if groups is None or isinstance(groups, Classes) else points


def _draw_density(axes: Axes, xy: Floats, groups: Classes | Floats | None) -> ScalarMappable | None:
    """Draw densities: the mix of the classes, the mean of a quantity, or the count, per pixel."""
    datashader, shading = _required("datashader"), _required("datashader.transfer_functions")
    pandas, colours = _required("pandas"), _required("matplotlib.colors")
    frame = pandas.DataFrame({"x": xy[:, 0], "y": xy[:, 1]})
    (left, bottom), (right, top) = _window(xy)
    canvas = datashader.Canvas(PIXELS, PIXELS, x_range=(left, right), y_range=(bottom, top))
    place: dict[str, Any] = {
        "extent": (left, right, bottom, top),
        "origin": "lower",
        "interpolation": "nearest",
    }
    if isinstance(groups, Classes):
        frame["class"] = pandas.Categorical.from_codes(groups.codes, list(groups.names))
        counts = canvas.points(frame, "x", "y", datashader.count_cat("class"))
        image = shading.shade(counts, color_key=groups.colours, min_alpha=130)
        image = shading.dynspread(image, threshold=0.6, max_px=2)
        axes.imshow(image.to_numpy().view(np.uint8).reshape(*image.shape, 4), **place)
        return None
    if groups is not None:
        frame["value"] = groups
        means = canvas.points(frame, "x", "y", datashader.mean("value"))
        return axes.imshow(means.to_numpy(), **place, **_colour_range(groups))
    counts = canvas.points(frame, "x", "y", datashader.count()).to_numpy()
    return axes.imshow(np.ma.masked_equal(counts, 0), cmap=CONTINUOUS, norm=colours.LogNorm(), **place)


def _window(xy: Floats) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return (left, bottom), (right, top) around all rows but outliers that would squeeze the rest."""
    inner = np.percentile(xy, [0.1, 99.9], axis=0).astype(float)
    slack = 0.3 * (inner[1] - inner[0])
    low, high = np.maximum(xy.min(axis=0), inner[0] - slack), np.minimum(xy.max(axis=0), inner[1] + slack)
    pad = np.where(high > low, 0.03 * (high - low), 1.0)
    (left, bottom), (right, top) = (low - pad).tolist(), (high + pad).tolist()
    return (left, bottom), (right, top)


def _colour_range(values: Floats) -> dict[str, Any]:
    """Return a colour scale that two percent of extreme values cannot flatten."""
    low, high = np.nanpercentile(values, [1, 99]) if np.isfinite(values).any() else (0.0, 1.0)
    return {"vmin": float(low), "vmax": float(high), "cmap": CONTINUOUS}


def _name_classes(axes: Axes, xy: Floats, groups: Classes, label_name: str) -> None:
    """Write each class beside a legend handle and on its median, so that colour is not the only clue."""
    lines, effects = _required("matplotlib.lines"), _required("matplotlib.patheffects")
    handles = [
        lines.Line2D([], [], linestyle="", marker="o", color=colour, label=name or "(empty)")
        for name, colour in zip(groups.names, groups.colours, strict=True)
    ]
    axes.legend(handles=handles, title=label_name, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    if sum(map(len, groups.names)) > 60:  # words this long would cover the points
        return
    for code, name in enumerate(groups.names):
        members = xy[groups.codes == code]
        if len(members):
            middle = np.median(members, axis=0)
            text = axes.annotate(name, middle, ha="center", va="center", weight="bold", fontsize=11)
            text.set_path_effects([effects.withStroke(linewidth=2.5, foreground="white")])


def _name_colours(figure: Figure, axes: Axes, mappable: ScalarMappable, label_name: str | None) -> None:
    """Add a colour bar: of a quantity, or of counts, in plain figures instead of 2 x 10^1."""
    name, extend = ("rows per pixel", "neither") if label_name is None else (label_name, "both")
    bar = figure.colorbar(mappable, ax=axes, label=name, extend=extend, shrink=0.8, aspect=30)
    if label_name is None:
        low, high = mappable.get_clim()
        bar.ax.yaxis.set_major_formatter("{x:,.0f}")
        bar.ax.yaxis.set_minor_formatter("{x:,.0f}" if high < 100 * low else "")


def _draw_histograms(axes: Axes, values: Floats, groups: Classes | None, label_name: str) -> None:
    """Draw the distribution of the only coordinate: one filled histogram per class, one above the other."""
    axes.set_xlabel("z1")
    edges = np.histogram_bin_edges(values, bins=int(np.clip(np.sqrt(len(values)), 10, 120)))
    if groups is None:
        axes.stairs(np.histogram(values, edges)[0], edges, fill=True, color=INK, alpha=0.7)
        axes.set_ylabel("rows per bin")
        return
    for code, colour in enumerate(groups.colours):
        counts = np.histogram(values[groups.codes == code], edges)[0]
        height = 0.9 * counts / max(1, counts.max())
        axes.stairs(code + height, edges, baseline=code, fill=True, color=colour, alpha=0.8)
        axes.axhline(code, color="0.8", linewidth=0.5, zorder=0)
    axes.set_yticks(np.arange(len(groups.names)), [name or "(empty)" for name in groups.names])
    axes.set_ylabel(f"{label_name} (each histogram scaled to its own peak)")


def _set_window(axes: Axes, xy: Floats) -> None:
    """Frame the rows, with one scale for both axes (as distances are the same) unless one is nearly flat."""
    (left, bottom), (right, top) = _window(xy)
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    axes.set_aspect("equal" if 1 / 3 < (right - left) / (top - bottom) < 3 else "auto")
    outside = np.any((xy < (left, bottom)) | (xy > (right, top)), axis=1).sum()
    if outside:
        axes.set_title(f"{axes.get_title()} ({outside:,} outside the picture)")


# ----------------------------------------------------------------------------------------- grid of tiles


def latent_grid(
    decode: Decode,
    dim_latent: int,
    item_shape: Sequence[int],
    *,
    xy_range: tuple[float, float] | None = None,
    grid_size: int = 15,
    clip: tuple[float, float] | None = None,
    figsize: tuple[float, float] = (9.0, 8.0),
    title: str | None = None,
) -> Figure:
    """Draw what the decoder makes of a regular grid in the latent space.

    Images are drawn as tiles, rows of any other shape as small line plots. With more than two latent
    dimensions the two that change the decoded rows most are varied and the others are 0.

    Parameters
    ----------
    decode : callable
        (n, dim_latent) float32 -> (n, n_features), in the data's units.
    dim_latent : int
    item_shape : sequence of int
        ``(h, w)``, ``(h, w, channels)`` or ``(channels, h, w)`` with 1 or 3 channels is an image.
    xy_range : (float, float), optional
        Range of both coordinates, cut into equal cells. Default: cells of equal probability under the
        prior, that is its normal quantiles (i + 1/2) / grid_size.
    grid_size : int
        Cells along each axis.
    clip : (float, float), optional
        Values are clipped to this range, which also becomes the range of grey.
    figsize : (float, float)
        Inches.
    title : str, optional

    Returns
    -------
    matplotlib.figure.Figure
    """
    if grid_size < 1:
        raise InvalidInput(f"grid_size is {grid_size}; a grid needs at least one cell along each axis")
    values = _grid_values(xy_range, grid_size)
    varied = _influential_axes(decode, dim_latent)
    codes = _grid_codes(values, dim_latent, varied)
    tiles = np.asarray(decode(codes.reshape(-1, dim_latent)), dtype=np.float32).reshape(*codes.shape[:2], -1)
    low, high = clip or np.nanpercentile(tiles, [0.5, 99.5]).tolist()  # a few overshoots must not grey the rest
    figure = _figure(*(figsize if dim_latent > 1 else (figsize[0], 2.4)))
    axes = figure.add_subplot()
    mappable = _draw_tiles(axes, tiles if clip is None else np.clip(tiles, low, high), item_shape, (low, high))
    _label_grid(axes, values, varied)
    spacing = "at the normal quantiles of the prior" if xy_range is None else "from {:g} to {:g}".format(*xy_range)
    rest = ", the other coordinates 0" if dim_latent > 2 else ""
    axes.set_title(title or f"Decoded latents {spacing}{rest}")
    if mappable is not None:
        extend = "both" if clip is None else "neither"
        figure.colorbar(mappable, ax=axes, label="decoded value", extend=extend, shrink=0.6, aspect=30)
    return figure


def _grid_values(xy_range: tuple[float, float] | None, grid_size: int) -> Floats:
    centres = (np.arange(grid_size) + 0.5) / grid_size
    if xy_range is None:
        return np.array([NormalDist().inv_cdf(p) for p in centres], dtype=np.float32)
    return (xy_range[0] + centres * (xy_range[1] - xy_range[0])).astype(np.float32)


def _influential_axes(decode: Decode, dim_latent: int) -> tuple[int, ...]:
    """Return the (at most two) coordinates whose step from -1 to 1 moves the decoded row furthest."""
    if dim_latent <= 2:
        return tuple(range(dim_latent))
    steps = np.eye(dim_latent, dtype=np.float32)
    moved = np.asarray(decode(np.concatenate([steps, -steps])), dtype=np.float64)
    distance = np.linalg.norm(moved[:dim_latent] - moved[dim_latent:], axis=1)
    return tuple(sorted(np.argsort(-distance, kind="stable")[:2].tolist()))


def _grid_codes(values: Floats, dim_latent: int, varied: tuple[int, ...]) -> Floats:
    """Return (rows, columns, dim_latent): x grows to the right, y grows upwards."""
    codes = np.zeros((len(values) if len(varied) > 1 else 1, len(values), dim_latent), dtype=np.float32)
    codes[:, :, varied[0]] = values
    if len(varied) > 1:
        codes[:, :, varied[1]] = values[::-1, None]
    return codes


def _label_grid(axes: Axes, values: Floats, varied: tuple[int, ...]) -> None:
    places = np.arange(len(values)) + 0.5
    every = slice(None, None, -(-len(values) // 20))
    texts = [f"{value:.2g}" if abs(value) > 1e-6 else "0" for value in values]
    axes.set_xticks(places[every], texts[every])
    axes.set_xlabel(f"z{varied[0] + 1}")
    if len(varied) > 1:
        axes.set_yticks(places[::-1][every], texts[every])
        axes.set_ylabel(f"z{varied[1] + 1}")
    else:
        axes.set_yticks([])


def as_images(rows: Floats, item_shape: Sequence[int]) -> Floats | None:
    """Return rows (..., n_features) as images (..., h, w) or (..., h, w, 3), or None for other shapes."""
    shape = tuple(item_shape)
    images = rows.reshape(*rows.shape[:-1], *shape)
    if len(shape) == 2 and min(shape) > 1:
        return images
    if len(shape) == 3 and shape[-1] in (1, 3):
        return images[..., 0] if shape[-1] == 1 else images
    if len(shape) == 3 and shape[0] in (1, 3):
        return images[..., 0, :, :] if shape[0] == 1 else np.moveaxis(images, -3, -1)
    return None


def _draw_tiles(
    axes: Axes, tiles: Floats, item_shape: Sequence[int], limits: tuple[float, float]
) -> ScalarMappable | None:
    """Draw rows (r, c, n_features) in unit cells from the upper left; return what a colour bar needs."""
    if math.prod(item_shape) != tiles.shape[-1]:
        raise InvalidInput(
            f"rows of {tiles.shape[-1]} features cannot be drawn in the shape {tuple(item_shape)}, which has "
            f"{math.prod(item_shape)}: give a shape whose product is the number of features"
        )
    low, high = limits if limits[1] > limits[0] else (limits[0], limits[0] + 1.0)
    images = as_images(tiles, item_shape)
    axes.tick_params(length=0)
    if images is None:
        _draw_lines(axes, np.clip((tiles - low) / (high - low), -0.05, 1.05))
        return None
    canvas = np.concatenate(np.concatenate(list(images), axis=-2 if images.ndim == 4 else -3), axis=1)
    extent = (0, tiles.shape[1], tiles.shape[0], 0)
    grey = images.ndim == 4
    colours = canvas if grey else np.clip((canvas - low) / (high - low), 0, 1)
    shown = axes.imshow(colours, extent=extent, aspect="auto", cmap="gray", vmin=low, vmax=high)
    axes.set_aspect(images.shape[2] / images.shape[3])
    _draw_borders(axes, tiles.shape[0], tiles.shape[1], "0.4")
    return shown if grey else None


def _draw_borders(axes: Axes, n_rows: int, n_columns: int, colour: str) -> None:
    axes.vlines(range(1, n_columns), 0, n_rows, color=colour, linewidth=0.6)
    axes.hlines(range(1, n_rows), 0, n_columns, color=colour, linewidth=0.6)


def _draw_lines(axes: Axes, tiles: Floats) -> None:
    """Draw rows of values in [0, 1] as one line in each cell, all on one scale."""
    collections = _required("matplotlib.collections")
    n_rows, n_columns, n_features = tiles.shape
    across = np.linspace(0.06, 0.94, n_features) if n_features > 1 else np.array([0.5])
    points = np.empty((n_rows, n_columns, n_features, 2))
    points[..., 0] = np.arange(n_columns)[None, :, None] + across
    points[..., 1] = np.arange(n_rows)[:, None, None] + 0.94 - 0.88 * tiles
    lines = list(points.reshape(-1, n_features, 2))
    axes.add_collection(collections.LineCollection(lines, color=INK, linewidth=0.9))
    if n_features == 1:  # a line of one point is invisible
        axes.plot(points[..., 0].ravel(), points[..., 1].ravel(), "o", color=INK, markersize=3)
    axes.set_xlim(0, n_columns)
    axes.set_ylim(n_rows, 0)
    _draw_borders(axes, n_rows, n_columns, "0.85")


# -------------------------------------------------------------------------------------- reconstructions


def compare_rows(
    originals: Floats,
    reconstructions: Floats,
    item_shape: Sequence[int],
    *,
    names: Sequence[str] | None = None,
    names_are: str = "row",
    title: str | None = None,
) -> Figure:
    """Draw originals above their reconstructions, both on the scale of the originals.

    Parameters
    ----------
    originals, reconstructions : (n, n_features) arrays
    item_shape : sequence of int
        Images are drawn as tiles, other shapes as line plots (see :func:`latent_grid`).
    names : sequence of str, optional
        What to write under each pair. Default: 0, 1, ...
    names_are : str
        What the names are, written below them.
    title : str, optional
        Default: the root mean square error of the rows shown.
    """
    above, below = (np.asarray(rows, dtype=np.float32) for rows in (originals, reconstructions))
    if above.shape != below.shape or above.ndim != 2 or 0 in above.shape:
        raise InvalidInput(
            f"originals have shape {above.shape} and reconstructions {below.shape}: "
            "both must be (rows, features) and equal, so that each row has its reconstruction"
        )
    tiles = np.stack([above, below])
    image = as_images(tiles, item_shape)
    tall = 1.0 if image is None else image.shape[2] / image.shape[3]
    width = max(6.0, 1.1 * len(above) + 1.6)
    figure = _figure(width, 2 * tall * (width - 1.6) / len(above) + 1.2)
    axes = figure.add_subplot()
    mappable = _draw_tiles(axes, tiles, item_shape, (float(np.nanmin(above)), float(np.nanmax(above))))
    axes.axhline(1, color="white" if image is not None else "0.3", linewidth=3)
    axes.set_yticks([0.5, 1.5], ["original", "reconstruction"])
    axes.set_xticks(np.arange(len(above)) + 0.5, [str(i) for i in range(len(above))] if names is None else names)
    axes.set_xlabel(names_are)
    error = float(np.sqrt(np.mean((above.astype(np.float64) - below) ** 2)))
    axes.set_title(title or f"Reconstructions (root mean square error of these rows {error:.3g})")
    if mappable is not None:
        figure.colorbar(mappable, ax=axes, label="value", shrink=0.7, aspect=12)
    return figure


# ------------------------------------------------------------------------------------------------- loss


def loss_curves(history: Sequence[Mapping[str, Any]], *, title: str | None = None) -> Figure:
    """Draw a training run: -ELBO above, its two parts below, in nats per row against the step.

    Parameters
    ----------
    history : sequence of mappings
        The lines of a model's ``history.jsonl``; each has ``step`` and any of the recorded figures.
    title : str, optional
        Default: the best -ELBO and its step.
    """
    if not any(key in line for line in history for panel in PANELS for key in panel.series):
        raise InvalidInput("the training history holds no loss yet: train for some steps first")
    figure = _figure(9.0, 7.0)
    panels = [panel for panel in PANELS if any(key in line for line in history for key in panel.series)]
    stack = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, panel in zip(stack, panels, strict=True):
        _draw_panel(axes, history, panel)
    stack[-1].set_xlabel("training step")
    figure.suptitle(title or _best_loss(history))
    return figure


@dataclass(frozen=True)
class Panel:
    """One set of axes of the loss picture: history key -> (legend text, colour)."""

    name: str
    series: Mapping[str, tuple[str, str]]


TRAINING, VALIDATION = ("training batches", "#9fb3d1"), ("validation, averaged weights", PALETTE[0])
PANELS = (
    Panel("-ELBO (nats per row)", {"loss": TRAINING, "validation_loss": VALIDATION}),
    Panel("reconstruction", {"reconstruction": TRAINING, "validation_reconstruction": VALIDATION}),
    Panel("KL to the prior", {"kl": TRAINING, "validation_kl": VALIDATION}),
)


def _series(history: Sequence[Mapping[str, Any]], key: str) -> tuple[Floats, Floats]:
    points = [(line["step"], line[key]) for line in history if line.get(key) is not None]
    steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def _draw_panel(axes: Axes, history: Sequence[Mapping[str, Any]], panel: Panel) -> None:
    """Draw the curves; what the first tenth of the steps looked like does not decide the scale."""
    shown = []
    for key, (name, colour) in panel.series.items():
        steps, values = _series(history, key)
        if len(steps):
            marker = "." if len(steps) < 60 else None
            axes.plot(steps, values, label=name, color=colour, linewidth=1.4, marker=marker)
            shown.append(values[steps >= 0.1 * steps.max()])
    settled = np.concatenate(shown)
    settled = settled[np.isfinite(settled)]
    if len(settled):
        low, high = settled.min(), settled.max()
        pad = 0.08 * (high - low) or 1.0
        axes.set_ylim(low - pad, high + pad)
    axes.set_ylabel(panel.name)
    axes.grid(color="0.9")
    if panel is PANELS[0]:
        axes.legend(loc="upper right", frameon=False)


def _best_loss(history: Sequence[Mapping[str, Any]]) -> str:
    for key, what in (("validation_loss", "validation"), ("loss", "training")):
        steps, values = _series(history, key)
        if np.isfinite(values).any():
            best = int(np.nanargmin(values))
            return f"Best {what} -ELBO: {values[best]:.4g} nats per row at step {int(steps[best]):,}"
    return "Training run"


# ------------------------------------------------------------------------------------------------ verbs


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
    from cvae_dist.model.directory import load_model, read_description

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
    location = Location.of(model, storage_options) / "history.jsonl"
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


# ------------------------------------------------------------------------------------------------ files


def write_figure(figure: Figure, filename: str, storage_options: StorageOptions | None = None) -> None:
    """Write a figure atomically to a path or URL; the suffix chooses the format.

    Raises
    ------
    InvalidInput
        The suffix is none matplotlib can write.
    StorageFailed
        The storage refused.
    """
    suffix = PurePosixPath(str(filename)).suffix.lstrip(".").lower()
    known = sorted(figure.canvas.get_supported_filetypes())
    if suffix not in known:
        raise InvalidInput(f"no picture was written to {filename}: its name must end in one of {', '.join(known)}")
    picture = io.BytesIO()
    figure.savefig(picture, format=suffix, dpi=DPI)
    Location.of(filename, storage_options).write(picture.getvalue())


def _required(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f"pictures need {module.split('.')[0]}, which is not installed: nothing was drawn. "
            "Install it with: pip install 'cvae-dist[plot]'"
        ) from error


def _figure(width: float, height: float) -> Figure:
    figure: Figure = _required("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    return figure
