"""Rows as tiles in a grid of unit cells: images where their shape is one, else small line plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cvae_dist.errors import InvalidInput
from cvae_dist.plot.figure import Floats, colour_map, required
from cvae_dist.plot.palette import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Colormap


def as_images(rows: Floats, item_shape: Sequence[int]) -> Floats | None:
    """Return rows (..., n_features) as images (..., h, w) or (..., h, w, 3), or None for other shapes."""
    shape = tuple(item_shape)
    if math.prod(shape) != rows.shape[-1]:
        raise InvalidInput(
            f"rows of {rows.shape[-1]} features cannot be drawn in the shape {shape}, which has "
            f"{math.prod(shape)}: give a shape whose product is the number of features"
        )
    images = rows.reshape(*rows.shape[:-1], *shape)
    if len(shape) == 2 and min(shape) > 1:
        return images
    if len(shape) == 3 and shape[-1] in (1, 3):
        return images[..., 0] if shape[-1] == 1 else images
    if len(shape) == 3 and shape[0] in (1, 3):
        return images[..., 0, :, :] if shape[0] == 1 else np.moveaxis(images, -3, -1)
    return None


def grey_limits(tiles: Floats) -> tuple[float, float]:
    """Return the values to draw as black and white: the extremes but for a few, which would grey the rest."""
    low, high = np.nanpercentile(tiles, [0.5, 99.5]).tolist()
    return low, high


def draw_tiles(
    axes: Axes,
    tiles: Floats,
    item_shape: Sequence[int],
    limits: tuple[float, float],
    cmap: str | Colormap | None = None,
) -> ScalarMappable | None:
    """Draw rows (r, c, n_features) in unit cells from the upper left; return what a colour bar shows, if any.

    ``cmap`` colours images of one channel; the others have colours, and lines have one.
    """
    colour_scale = colour_map(cmap, "gray")
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
    shown = axes.imshow(colours, extent=extent, aspect="auto", cmap=colour_scale, vmin=low, vmax=high)
    axes.set_aspect(images.shape[2] / images.shape[3])
    _draw_borders(axes, tiles.shape[0], tiles.shape[1], "0.4")
    return shown if grey else None


def _draw_borders(axes: Axes, n_rows: int, n_columns: int, colour: str) -> None:
    axes.vlines(range(1, n_columns), 0, n_rows, color=colour, linewidth=0.6)
    axes.hlines(range(1, n_rows), 0, n_columns, color=colour, linewidth=0.6)


def _draw_lines(axes: Axes, tiles: Floats) -> None:
    """Draw rows of values in [0, 1] as one line in each cell, all on one scale."""
    collections = required("matplotlib.collections")
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
