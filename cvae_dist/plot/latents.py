"""The picture of latents: points, densities or histograms, coloured by a label."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cvae_dist.errors import InvalidInput
from cvae_dist.plot.figure import Floats, axes_for, colour_map, figure_of, required
from cvae_dist.plot.key import name_classes, name_colours, no_label, tick_dates, with_unit
from cvae_dist.plot.labels import Classes, Quantity, as_labels, classify, shortened
from cvae_dist.plot.palette import CONTINUOUS, INK, NO_LABEL_COLOUR

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

_LOGGER = logging.getLogger(__name__)

SHADED_ABOVE = 100_000
PIXELS = 600

Groups = Classes | Quantity | None


def scatter_latents(
    z: Floats,
    labels: Sequence[Any] | NDArray[Any] | None = None,
    *,
    categories: Sequence[str] | None = None,
    label_name: str = "label",
    title: str | None = None,
    size: float | None = None,
    alpha: float | None = None,
    cmap: str | Colormap | None = None,
    ax: Axes | None = None,
    total: int | None = None,
) -> Figure:
    """Draw latents, coloured by a label.

    Two coordinates are drawn as they are. More are projected to their first two principal axes, and the names of the
    axes say so. One coordinate becomes a histogram for each class. Above 1e5 points datashader draws densities instead
    of points, unless ``size`` or ``alpha`` asks for points. Rows that are not drawn are counted under the title.

    Parameters
    ----------
    z : (n, d) float array
        Rows with a NaN or an infinity are left out.
    labels : (n,) numbers, strings, booleans, dates or durations, optional
        At most 20 classes get a legend; numbers that are no classes, dates and durations get a colour bar. Rows whose
        label is missing (None, NaN, NaT, NA or an empty string) are grey, behind the others.
    categories : sequence of str, optional
        Name of each class where the labels are indices.
    title : str, optional
        Default: the number of rows and of latent coordinates.
    size : float, optional
        Area of a point in square points (1/72 inch). Default: smaller for more rows.
    alpha : float, optional
        Opacity of points and histograms, above 0 and at most 1. Default: less for more rows; 1 where a colour bar
        has to be compared with the points.
    cmap : str or Colormap, optional
        Colours of a quantity, a density or the classes. Default: viridis; for classes the palette of this package.
    ax : Axes, optional
        Axes to draw in, by default those of a new figure. A legend stands to their right; a figure with
        ``layout="constrained"`` makes room for it.
    total : int, optional
        Number of rows that z was chosen from, where it is not all of them.

    Returns
    -------
    Figure
        The new figure, or that of ``ax``.

    Raises
    ------
    InvalidInput
        z is not (n, d) with n > 0, has another number of rows than the labels, or an argument is out of its range.
    MissingExtra
        matplotlib, or above 1e5 points datashader, is not installed.
    """
    look = _Look(size, alpha, colour_map(cmap, CONTINUOUS), colours_classes=cmap is not None)
    given, tags = _checked(z, labels)
    finite = np.isfinite(given).all(axis=1)
    if not finite.any():
        raise InvalidInput(f"none of the {len(given):,} latent rows is finite: there is nothing to draw")
    groups = None if tags is None else classify(tags[finite], categories)
    z, name = given[finite], shortened(label_name)
    if len(z) < len(given):
        _LOGGER.warning("%d of %d latent rows are not finite and left out", len(given) - len(z), len(given))
    total = len(given) if total is None else total
    undrawn = {"left out to draw fewer": total - len(given), "not finite": len(given) - len(z)}
    axes = axes_for(ax, 9.0, 7.0)
    if z.shape[1] > 1 or isinstance(groups, Quantity):
        undrawn |= _draw_map(axes, z, groups, look, name)
    else:
        _draw_histograms(axes, z[:, 0], groups, look, name)
    axes.set_title(_headline(title, total, z.shape[1], undrawn))
    return figure_of(axes)


@dataclass(frozen=True)
class _Look:
    """How points look: what the caller asked for, checked."""

    size: float | None
    alpha: float | None
    cmap: Colormap
    colours_classes: bool

    def __post_init__(self) -> None:
        for name, value, most in (("size", self.size, np.finfo(float).max), ("alpha", self.alpha, 1)):
            if value is not None and not (isinstance(value, Real) and 0 < value <= most):
                at_most = f" and at most {most}" if most == 1 else ""
                raise InvalidInput(f"{name}={value!r} cannot be drawn: give one number above 0{at_most}")

    def of_classes(self, groups: Classes) -> list[str]:
        """Return a colour for each class: of the palette, or where a colour map was asked for, of that one."""
        n = len(groups.names)
        if not self.colours_classes:
            return groups.colours
        if n > self.cmap.N:
            raise InvalidInput(
                f"the colour map {self.cmap.name!r} has {self.cmap.N} colours for {n} classes, "
                "so some would look the same: choose one with more"
            )
        is_list = self.cmap.N <= 20  # of colours for classes, not a scale
        to_hex = required("matplotlib.colors").to_hex
        return [to_hex(colour) for colour in self.cmap(np.arange(n) if is_list else np.linspace(0, 1, n))]


def _checked(z: Floats, labels: Sequence[Any] | NDArray[Any] | None) -> tuple[Floats, NDArray[Any] | None]:
    z = np.asarray(z)
    if z.ndim != 2 or 0 in z.shape:
        raise InvalidInput(f"latents have shape {z.shape}; a picture needs (rows, dimensions), none of them 0")
    tags = None if labels is None else as_labels(labels)
    if tags is not None and tags.shape != (len(z),):
        raise InvalidInput(
            f"{len(z):,} latent rows, but labels of shape {tags.shape}: give exactly one label for each row"
        )
    return z.astype(np.float32, copy=False), tags


def _headline(title: str | None, total: int, n_dims: int, undrawn: Mapping[str, int]) -> str:
    """Return the title, and below it how many rows are not drawn, and why."""
    lost = sum(undrawn.values())
    rows = f"{total - lost:,} of {total:,} rows" if lost else f"{total:,} rows"
    reasons = [f"{count:,} {reason}" for reason, count in undrawn.items() if count]
    head = f"{rows} in {n_dims} latent dimension{'s'[: n_dims > 1]}" if title is None else title
    return f"{head}\n({', '.join(reasons)})" if reasons else head


def _draw_map(axes: Axes, z: Floats, groups: Groups, look: _Look, label_name: str) -> Mapping[str, int]:
    """Draw rows in the plane, and what their colours mean. Return how many rows are not in it, by reason."""
    unlabelled = 0
    if z.shape[1] == 1 and isinstance(groups, Quantity):  # it takes the second axis
        known = ~groups.missing
        unlabelled = int(np.count_nonzero(~known))
        xy, names = np.column_stack([z[known, 0], groups.values[known]]), ("z1", with_unit(label_name, groups))
        if groups.dates:
            tick_dates(axes.yaxis)
        groups = None
    else:
        xy, names = _two_axes(z)
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])
    window = _window(xy)
    is_dense = len(xy) > SHADED_ABOVE and look.size is None and look.alpha is None
    mappable = (_draw_density if is_dense else _draw_points)(axes, xy, groups, look)
    _set_window(axes, window)
    if isinstance(groups, Classes):
        name_classes(axes, xy, groups, look.of_classes(groups), label_name)
    elif mappable is not None:
        name_colours(axes, mappable, groups, label_name)
    outside = np.any((xy < window[0]) | (xy > window[1]), axis=1)
    return {"without a label": unlabelled, "outside the picture": int(np.count_nonzero(outside))}


def _two_axes(z: Floats) -> tuple[Floats, tuple[str, str]]:
    """Return (n, 2) coordinates and their names: z itself, or its first two principal axes."""
    if z.shape[1] == 2:
        return z, ("z1", "z2")
    centred = z - z.mean(axis=0, dtype=np.float64).astype(z.dtype)
    variance, axes = np.linalg.eigh(np.cov(centred, rowvar=False, bias=True))
    share = 100 * variance[::-1] / max(float(variance.sum()), np.finfo(np.float64).tiny)
    names = [f"principal axis {i} of {z.shape[1]} ({part:.0f} % of the variance)" for i, part in enumerate(share, 1)]
    return centred @ axes[:, :-3:-1].astype(z.dtype), (names[0], names[1])


def _draw_points(axes: Axes, xy: Floats, groups: Groups, look: _Look) -> ScalarMappable | None:
    """Draw one point per row. The order is random but fixed, so that no class hides another by coming later."""
    order = np.random.default_rng(0).permutation(len(xy))
    if groups is not None:  # rows without a label come first, and so lie behind
        order = order[np.argsort(~groups.missing[order], kind="stable")]
    style: dict[str, Any] = {
        "s": float(np.clip(40_000 / len(xy), 1.5, 36.0)) if look.size is None else look.size,
        "alpha": float(np.clip(60 / np.sqrt(len(xy)), 0.3, 0.9)) if look.alpha is None else look.alpha,
        "linewidths": 0,
        "rasterized": True,
    }
    if isinstance(groups, Classes):
        style["c"] = groups.of_rows(look.of_classes(groups))[order]
    elif groups is not None:
        style |= {"c": groups.values[order], "plotnonfinite": True} | _colour_scale(groups, look)
        style["alpha"] = 1 if look.alpha is None else look.alpha  # points that shine through mix colours of no value
    else:
        style["c"] = INK
    points = axes.scatter(xy[order, 0], xy[order, 1], **style)
    return points if isinstance(groups, Quantity) else None


def _draw_density(axes: Axes, xy: Floats, groups: Groups, look: _Look) -> ScalarMappable | None:
    """Draw for each pixel the mix of the classes, the mean of a quantity, or the number of rows."""
    datashader, pandas = required("datashader"), required("pandas")
    colours = required("matplotlib.colors")
    (left, bottom), (right, top) = _window(xy)
    canvas = datashader.Canvas(PIXELS, PIXELS, x_range=(left, right), y_range=(bottom, top))
    place: dict[str, Any] = {"extent": (left, right, bottom, top), "origin": "lower", "interpolation": "nearest"}
    frame = pandas.DataFrame({"x": xy[:, 0], "y": xy[:, 1]})
    if groups is None:
        counts = canvas.points(frame, "x", "y", datashader.count()).to_numpy()
        return axes.imshow(np.ma.masked_equal(counts, 0), cmap=look.cmap, norm=colours.LogNorm(), **place)
    if groups.missing.any():
        behind = canvas.points(frame[groups.missing], "x", "y", datashader.any()).to_numpy()
        axes.imshow(np.ma.masked_equal(behind, 0), cmap=colours.ListedColormap([NO_LABEL_COLOUR]), **place)
    if isinstance(groups, Quantity):
        means = canvas.points(frame.assign(value=groups.values), "x", "y", datashader.mean("value"))
        return axes.imshow(np.ma.masked_invalid(means.to_numpy()), **place, **_colour_scale(groups, look))
    if groups.names:
        axes.imshow(_mix_of_classes(canvas, frame, groups, look.of_classes(groups)), **place)
    return None


def _mix_of_classes(canvas: Any, frame: Any, groups: Classes, colours: Sequence[str]) -> NDArray[np.uint8]:
    """Return an image (h, w, 4) in which each pixel has the mixed colour of the classes there."""
    datashader, shading, pandas = (required(name) for name in ("datashader", "datashader.transfer_functions", "pandas"))
    frame = frame.assign(label=pandas.Categorical.from_codes(groups.codes, list(groups.names)))[~groups.missing]
    counts = canvas.points(frame, "x", "y", datashader.count_cat("label"))
    image = shading.shade(counts, color_key=list(colours), min_alpha=130)
    image = shading.dynspread(image, threshold=0.6, max_px=2)
    return image.to_numpy().view(np.uint8).reshape(*image.shape, 4)  # type: ignore[no-any-return]


def _window(xy: Floats) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return (left, bottom), (right, top) around all rows, but for outliers that would squeeze the rest."""
    inner = np.percentile(xy, [0.1, 99.9], axis=0).astype(float)
    slack = 0.3 * (inner[1] - inner[0])
    low, high = np.maximum(xy.min(axis=0), inner[0] - slack), np.minimum(xy.max(axis=0), inner[1] + slack)
    pad = np.where(high > low, 0.03 * (high - low), 1.0)
    (left, bottom), (right, top) = (low - pad).tolist(), (high + pad).tolist()
    return (left, bottom), (right, top)


def _set_window(axes: Axes, window: tuple[tuple[float, float], tuple[float, float]]) -> None:
    """Frame the rows. Both axes have one scale, as distances mean the same, unless the frame were nearly flat."""
    (left, bottom), (right, top) = window
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    axes.set_aspect("equal" if 1 / 3 < (right - left) / (top - bottom) < 3 else "auto")


def _colour_scale(groups: Quantity, look: _Look) -> dict[str, Any]:
    """Return a colour scale from the 1st to the 99th percentile, so that few extreme values cannot flatten it."""
    low, high = np.nanpercentile(groups.values, [1, 99])
    return {"vmin": float(low), "vmax": float(high), "cmap": look.cmap.with_extremes(bad=NO_LABEL_COLOUR)}


def _draw_histograms(axes: Axes, values: Floats, groups: Classes | None, look: _Look, label_name: str) -> None:
    """Draw the only coordinate as one filled histogram per class, one above the other."""
    axes.set_xlabel("z1")
    edges = np.histogram_bin_edges(values, bins=int(np.clip(np.sqrt(len(values)), 10, 120)))
    if groups is None:
        counts = np.histogram(values, edges)[0]
        axes.stairs(counts, edges, fill=True, color=INK, alpha=0.7 if look.alpha is None else look.alpha)
        axes.set_ylabel("rows per bin")
        return
    for level, (_, colour, members) in enumerate(strips := _strips(groups, look)):
        counts = np.histogram(values[members], edges)[0]
        height = 0.9 * counts / max(1, counts.max())
        alpha = 0.8 if look.alpha is None else look.alpha
        axes.stairs(level + height, edges, baseline=level, fill=True, color=colour, alpha=alpha)
        axes.axhline(level, color="0.8", linewidth=0.5, zorder=0)
    axes.set_yticks(np.arange(len(strips)), [name for name, *_ in strips])
    axes.set_ylabel(f"{label_name} (each histogram scaled to its own peak)")


def _strips(groups: Classes, look: _Look) -> list[tuple[str, str, NDArray[np.bool_]]]:
    """Return name, colour and rows of each class, and below them of the rows without a label."""
    colours = look.of_classes(groups)
    strips = [(shortened(name), colours[code], groups.codes == code) for code, name in enumerate(groups.names)]
    unlabelled = [(no_label(groups.missing), NO_LABEL_COLOUR, groups.missing)] if groups.missing.any() else []
    return unlabelled + strips
