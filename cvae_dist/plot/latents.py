"""The picture of latents: points, densities or histograms, coloured by a label."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from cvae_dist.errors import InvalidInput
from cvae_dist.plot.figure import Floats, blank_figure, required
from cvae_dist.plot.labels import Classes, classify
from cvae_dist.plot.palette import CONTINUOUS, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

_LOGGER = logging.getLogger(__name__)

SHADED_ABOVE = 100_000
PIXELS = 600


def scatter_latents(
    z: Floats,
    labels: Sequence[Any] | NDArray[Any] | None = None,
    *,
    categories: Sequence[str] | None = None,
    label_name: str = "label",
    title: str | None = None,
) -> Figure:
    """Draw latents, coloured by a label.

    Two coordinates are drawn as they are. More are projected to their first two principal axes, and the names of the
    axes say so. One coordinate becomes a histogram for each class. Above 1e5 points datashader draws densities instead
    of points.

    Parameters
    ----------
    z : (n, d) float array
        Rows with a NaN or an infinity are left out, which the log says.
    labels : (n,) numbers or strings, optional
        At most 20 classes get a legend; numbers that are no classes get a colour bar.
    categories : sequence of str, optional
        Name of each class where the labels are indices.
    title : str, optional
        Default: the number of rows and of latent coordinates.

    Raises
    ------
    InvalidInput
        z is not (n, d) with n > 0 or has another number of rows than the labels.
    MissingExtra
        matplotlib, or above 1e5 points datashader, is not installed.
    """
    z, tags = _checked(z, labels)
    groups = None if tags is None else classify(tags, categories)
    figure = blank_figure(9.0, 7.0)
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
    _LOGGER.warning("%d of %d latent rows are not finite and left out of the picture", (~finite).sum(), len(z))
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
    """Draw one point per row, in a fixed random order, so that no class hides another by coming later."""
    order = np.random.default_rng(0).permutation(len(xy))
    style: dict[str, Any] = {
        "s": float(np.clip(40_000 / len(xy), 1.5, 36.0)),
        "alpha": float(np.clip(60 / np.sqrt(len(xy)), 0.3, 0.9)),
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
    """Draw for each pixel the mix of the classes, the mean of a quantity, or the number of rows."""
    datashader, shading = required("datashader"), required("datashader.transfer_functions")
    pandas, colours = required("pandas"), required("matplotlib.colors")
    frame = pandas.DataFrame({"x": xy[:, 0], "y": xy[:, 1]})
    (left, bottom), (right, top) = _window(xy)
    canvas = datashader.Canvas(PIXELS, PIXELS, x_range=(left, right), y_range=(bottom, top))
    place: dict[str, Any] = {"extent": (left, right, bottom, top), "origin": "lower", "interpolation": "nearest"}
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
    """Return (left, bottom), (right, top) around all rows, but for outliers that would squeeze the rest."""
    inner = np.percentile(xy, [0.1, 99.9], axis=0).astype(float)
    slack = 0.3 * (inner[1] - inner[0])
    low, high = np.maximum(xy.min(axis=0), inner[0] - slack), np.minimum(xy.max(axis=0), inner[1] + slack)
    pad = np.where(high > low, 0.03 * (high - low), 1.0)
    (left, bottom), (right, top) = (low - pad).tolist(), (high + pad).tolist()
    return (left, bottom), (right, top)


def _colour_range(values: Floats) -> dict[str, Any]:
    """Return a colour scale from the 1st to the 99th percentile, so that few extreme values cannot flatten it."""
    low, high = np.nanpercentile(values, [1, 99]) if np.isfinite(values).any() else (0.0, 1.0)
    return {"vmin": float(low), "vmax": float(high), "cmap": CONTINUOUS}


def _name_classes(axes: Axes, xy: Floats, groups: Classes, label_name: str) -> None:
    """Name each class in the legend and at the median of its rows, so that colour is not the only clue."""
    lines, effects = required("matplotlib.lines"), required("matplotlib.patheffects")
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
    """Draw the only coordinate as one filled histogram per class, one above the other."""
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
    """Frame the rows. Both axes have one scale, as distances mean the same, unless the frame were nearly flat."""
    (left, bottom), (right, top) = _window(xy)
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    axes.set_aspect("equal" if 1 / 3 < (right - left) / (top - bottom) < 3 else "auto")
    outside = np.any((xy < (left, bottom)) | (xy > (right, top)), axis=1).sum()
    if outside:
        axes.set_title(f"{axes.get_title()} ({outside:,} outside the picture)")
