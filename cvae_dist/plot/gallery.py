"""The picture of rows, such as samples and interpolations, as tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cvae_dist.errors import InvalidInput
from cvae_dist.plot.figure import Floats, axes_for, figure_of
from cvae_dist.plot.tiles import as_images, draw_tiles, grey_limits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

_WIDTH, _TALLEST = 9.0, 30.0  # inches


def row_tiles(
    rows: Floats,
    item_shape: Sequence[int],
    *,
    n_columns: int = 10,
    title: str | None = None,
    cmap: str | Colormap | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw rows (n, n_features) as tiles, from left to right and from top to bottom.

    Where ``item_shape`` is that of an image, they are drawn as images, else as line plots. ``cmap`` and ``ax`` are
    those of :func:`latent_grid`.

    Raises
    ------
    InvalidInput
        There are no rows, no columns, no such colour map, or the shape does not fit the rows.
    """
    rows = np.asarray(rows, dtype=np.float32)
    if rows.ndim != 2 or 0 in rows.shape or n_columns < 1:
        raise InvalidInput(
            f"rows of shape {rows.shape} cannot be drawn {n_columns} side by side: "
            "give (rows, features), none of them 0, and at least one column"
        )
    across = min(n_columns, len(rows))
    down = -(-len(rows) // across)
    blank = np.full((down * across - len(rows), rows.shape[1]), np.nan, dtype=np.float32)
    tiles = np.concatenate([rows, blank]).reshape(down, across, -1)
    image = as_images(tiles, item_shape)
    tall = 1.0 if image is None else image.shape[2] / image.shape[3]
    axes = axes_for(ax, _WIDTH, min(_WIDTH * tall * down / across + (0.4 if title else 0.1), _TALLEST))
    draw_tiles(axes, tiles, item_shape, grey_limits(tiles), cmap)
    axes.set_xticks([])
    axes.set_yticks([])
    if title:
        axes.set_title(title)
    return figure_of(axes)
