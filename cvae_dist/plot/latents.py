"""The picture of latents: points, densities or histograms, coloured by a label."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cvae_dist.errors import InvalidInput
from cvae_dist.plot.figure import Floats, axes_for, colour_map, figure_of
from cvae_dist.plot.key import key_names, name_classes, name_colours, tick_dates, width_of_names, with_unit
from cvae_dist.plot.labels import NO_LABEL, Classes, Quantity, as_labels, classify, shortened
from cvae_dist.plot.palette import CONTINUOUS, INK, NO_LABEL_COLOUR
from cvae_dist.plot.points import Groups, Look, Window, draw_density, draw_points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

_LOGGER = logging.getLogger(__name__)

SHADED_ABOVE = 100_000
_WIDTH, _HEIGHT = 9.0, 7.0  # inches


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
    look = Look(size, alpha, colour_map(cmap, CONTINUOUS), colours_classes=cmap is not None)
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
    if z.shape[1] > 1:
        axes, lost = _draw_map(ax, z, groups, look, name)
    elif isinstance(groups, Quantity):
        axes, lost = _draw_against(ax, z[:, 0], groups, look, name)
    else:
        axes, lost = _draw_histograms(ax, z[:, 0], groups, look, name), {}
    axes.set_title(_headline(title, total, z.shape[1], {**undrawn, **lost}))
    return figure_of(axes)


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


def _draw_map(
    ax: Axes | None, z: Floats, groups: Groups, look: Look, label_name: str
) -> tuple[Axes, Mapping[str, int]]:
    """Draw rows in the plane, and what their colours mean. Return the axes, and how many rows are not there and why."""
    xy, names = _two_axes(z)
    window = Window.around(xy)
    axes = axes_for(ax, *_figure_size(window, groups, label_name))
    mappable = _draw_rows(axes, xy, groups, look, window)
    axes.set(xlabel=names[0], ylabel=names[1])
    window.show(axes, one_scale=not window.is_nearly_flat)
    if isinstance(groups, Classes):
        name_classes(axes, xy, groups, look.of_classes(groups), label_name)
    elif mappable is not None:
        name_colours(axes, mappable, groups, label_name)
    return axes, {"outside the picture": window.n_outside(xy)}


def _draw_against(
    ax: Axes | None, values: Floats, quantity: Quantity, look: Look, label_name: str
) -> tuple[Axes, Mapping[str, int]]:
    """Draw a quantity over the only coordinate. Return the axes, and how many rows are not there and why."""
    known = ~quantity.missing
    xy = np.column_stack([values[known], quantity.values[known]])
    window = Window.around(xy)
    axes = axes_for(ax, _WIDTH, _HEIGHT)
    mappable = _draw_rows(axes, xy, None, look, window)
    axes.set(xlabel="z1", ylabel=with_unit(label_name, quantity))
    window.show(axes, one_scale=False)
    if mappable is not None:
        name_colours(axes, mappable, None, label_name)
    if quantity.dates:
        tick_dates(axes.yaxis)
    return axes, {"without a label": int(np.count_nonzero(~known)), "outside the picture": window.n_outside(xy)}


def _draw_rows(axes: Axes, xy: Floats, groups: Groups, look: Look, window: Window) -> ScalarMappable | None:
    """Draw points, or the density of very many rows; return what a colour bar shows, if any."""
    is_dense = len(xy) > SHADED_ABOVE and look.size is None and look.alpha is None
    return (draw_density if is_dense else draw_points)(axes, xy, groups, look, window)


def _figure_size(window: Window, groups: Groups, label_name: str) -> tuple[float, float]:
    """Return the inches of a figure for a map of this window, the names of its axes, and what stands beside it.

    The map has the same size whatever the names beside it.
    """
    beside, n_names = 1.1, 0
    if isinstance(groups, Classes):
        beside, n_names = 0.7 + width_of_names(groups, label_name), len(groups.names) + 1
    ratio = 1.2 if window.is_nearly_flat else window.ratio
    wide, tall = (6 * ratio, 6.0) if ratio < 1.25 else (7.5, 7.5 / ratio)
    return max(wide, 4.0) + 0.8 + beside, max(tall, 3.5, 0.22 * n_names) + 0.7


def _two_axes(z: Floats) -> tuple[Floats, tuple[str, str]]:
    """Return (n, 2) coordinates and their names: z itself, or its first two principal axes."""
    if z.shape[1] == 2:
        return z, ("z1", "z2")
    centred = z - z.mean(axis=0, dtype=np.float64).astype(z.dtype)
    variance, axes = np.linalg.eigh(np.cov(centred, rowvar=False, bias=True))
    share = 100 * variance[::-1] / max(float(variance.sum()), np.finfo(np.float64).tiny)
    names = [f"principal axis {i} of {z.shape[1]} ({part:.0f} % of the variance)" for i, part in enumerate(share, 1)]
    return centred @ axes[:, :-3:-1].astype(z.dtype), (names[0], names[1])


def _draw_histograms(ax: Axes | None, values: Floats, groups: Classes | None, look: Look, label_name: str) -> Axes:
    """Draw the only coordinate as one filled histogram per class, one above the other."""
    axes = axes_for(ax, _WIDTH + (0 if groups is None else width_of_names(groups, label_name)), _HEIGHT)
    axes.set_xlabel("z1")
    edges = np.histogram_bin_edges(values, bins=int(np.clip(np.sqrt(len(values)), 10, 120)))
    if groups is None:
        counts = np.histogram(values, edges)[0]
        axes.stairs(counts, edges, fill=True, color=INK, alpha=0.7 if look.alpha is None else look.alpha)
        axes.set_ylabel("rows per bin")
        return axes
    names = key_names(groups)
    levels = [*range(len(groups.names)), NO_LABEL][: len(names)]
    for level, colour in zip(levels, [*look.of_classes(groups), NO_LABEL_COLOUR], strict=False):
        counts = np.histogram(values[groups.codes == level], edges)[0]
        height = 0.9 * counts / max(1, counts.max())
        alpha = 0.8 if look.alpha is None else look.alpha
        axes.stairs(level + height, edges, baseline=level, fill=True, color=colour, alpha=alpha)
        axes.axhline(level, color="0.8", linewidth=0.5, zorder=0)
    axes.set_yticks(levels, names)
    axes.set_ylabel(f"{label_name} (each histogram scaled to its own peak)")
    return axes
