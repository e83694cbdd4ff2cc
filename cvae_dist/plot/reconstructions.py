"""The picture of reconstructions: original rows above what the model made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cvae_dist.errors import InvalidInput
from cvae_dist.plot.figure import Floats, axes_for, figure_of
from cvae_dist.plot.tiles import as_images, draw_tiles
from cvae_dist.store.ranges import RowNumbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

_BESIDE, _ABOVE_AND_BELOW = 2.3, 1.2  # inches for names and colour bar, for title and labels


def evenly_spread(total: int, n: int) -> RowNumbers:
    """Return the numbers of at most ``n`` rows that are evenly spread over ``total``."""
    return np.unique(np.linspace(0, total - 1, n).round().astype(np.int64))


def compare_rows(
    originals: Floats,
    reconstructions: Floats,
    item_shape: Sequence[int],
    *,
    names: Sequence[str] | None = None,
    names_are: str = "row",
    title: str | None = None,
    cmap: str | Colormap | None = None,
    ax: Axes | None = None,
    total: int | None = None,
) -> Figure:
    """Draw originals (n, n_features) above their reconstructions, in one range of values: that of the originals.

    Images are drawn as tiles, other shapes as line plots (see :func:`latent_grid`). Under each pair is its name (by
    default 0, 1, ...), and below the names what they are. The title is by default how many rows of ``total`` are shown,
    and their root mean square error. ``cmap`` and ``ax`` are those of :func:`latent_grid`.

    Raises
    ------
    InvalidInput
        The arrays differ in shape or are empty, the shape of an item does not fit the rows, or there is no such colour
        map.
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
    width = max(6.0, 1.1 * len(above) + _BESIDE)
    axes = axes_for(ax, width, 2 * tall * (width - _BESIDE) / len(above) + _ABOVE_AND_BELOW)
    mappable = draw_tiles(axes, tiles, item_shape, (float(np.nanmin(above)), float(np.nanmax(above))), cmap)
    axes.axhline(1, color="white" if image is not None else "0.3", linewidth=3)
    axes.set_yticks([0.5, 1.5], ["original", "reconstruction"])
    axes.set_xticks(np.arange(len(above)) + 0.5, [str(i) for i in range(len(above))] if names is None else names)
    axes.set_xlabel(names_are)
    error = float(np.sqrt(np.mean((above.astype(np.float64) - below) ** 2)))
    shown = f"{len(above):,} of {len(above) if total is None else total:,} rows and their reconstructions\n"
    axes.set_title(f"{shown}(root mean square error of these rows {error:.3g})" if title is None else title)
    if mappable is not None:
        axes.figure.colorbar(mappable, ax=axes, label="value", shrink=0.7, aspect=12)
    return figure_of(axes)
