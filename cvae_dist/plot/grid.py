"""The picture of the latent space: what the decoder makes of a regular grid of latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cvae_dist.errors import InvalidInput
from cvae_dist.plot.figure import Floats, axes_for, figure_of
from cvae_dist.plot.tiles import draw_tiles, grey_limits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

Decode = Callable[[Floats], NDArray[Any]]

_MOST_LABELS = 12  # along an axis; more of them would run into each other
_EXTENDS = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}


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
    cmap: str | Colormap | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw what the decoder makes of a regular grid in the latent space.

    Images are drawn as tiles, rows of any other shape as small line plots. Of more than two latent dimensions, the
    two that change the decoded rows most are varied and the others are 0.

    Parameters
    ----------
    decode : callable
        (n, dim_latent) float32 -> (n, n_features), in the data's units.
    dim_latent : int
        Number of latent dimensions.
    item_shape : sequence of int
        ``(h, w)``, ``(h, w, channels)`` or ``(channels, h, w)`` with 1 or 3 channels is an image.
    xy_range : (float, float), optional
        Range of both coordinates, cut into equal cells. Default: cells of equal probability under the prior, at its
        normal quantiles (i + 1/2) / grid_size.
    grid_size : int
        Cells along each axis.
    clip : (float, float), optional
        Values are clipped to this range, which also becomes the range of grey.
    figsize : (float, float)
        Inches; those of a new figure.
    title : str, optional
        Default: how the grid is spaced.
    cmap : str or Colormap, optional
        Colours of images of one channel. Default: grey.
    ax : Axes, optional
        Axes to draw in, by default those of a new figure.

    Raises
    ------
    InvalidInput
        ``grid_size`` is below 1, a range has not a lower and a higher end, or the shape does not fit the rows.
    """
    if grid_size < 1:
        raise InvalidInput(f"grid_size is {grid_size}; a grid needs at least one cell along each axis")
    for name, ends in (("xy_range", xy_range), ("clip", clip)):
        if ends is not None and (len(ends), list(ends)) != (2, sorted(set(ends))):
            raise InvalidInput(f"{name}={ends} is no range: give two numbers, the lower one first")
    values = _grid_values(xy_range, grid_size)
    varied = _influential_axes(decode, dim_latent)
    codes = _grid_codes(values, dim_latent, varied)
    tiles = np.asarray(decode(codes.reshape(-1, dim_latent)), dtype=np.float32).reshape(*codes.shape[:2], -1)
    low, high = clip or grey_limits(tiles)
    axes = axes_for(ax, *(figsize if dim_latent > 1 else (figsize[0], 2.4)))
    mappable = draw_tiles(axes, tiles if clip is None else np.clip(tiles, low, high), item_shape, (low, high), cmap)
    _label_grid(axes, values, varied)
    spacing = "at the normal quantiles of the prior" if xy_range is None else "from {:g} to {:g}".format(*xy_range)
    rest = ", the other coordinates 0" if dim_latent > 2 else ""
    axes.set_title(f"Decoded latents {spacing}{rest}" if title is None else title)
    if mappable is not None:
        extend = _overshoot(tiles, low, high) if clip is None else "neither"
        axes.figure.colorbar(mappable, ax=axes, label="decoded value", extend=extend, shrink=0.6, aspect=30)
    return figure_of(axes)


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
    """Return latents, (rows, columns, dim_latent): x grows to the right, y upwards."""
    codes = np.zeros((len(values) if len(varied) > 1 else 1, len(values), dim_latent), dtype=np.float32)
    codes[:, :, varied[0]] = values
    if len(varied) > 1:
        codes[:, :, varied[1]] = values[::-1, None]
    return codes


def _overshoot(tiles: Floats, low: float, high: float) -> str:
    """Return the ends of the colour bar that get an arrow, as there are values beyond them."""
    slack = 0.02 * (high - low)
    return _EXTENDS[bool(np.nanmin(tiles) < low - slack), bool(np.nanmax(tiles) > high + slack)]


def _label_grid(axes: Axes, values: Floats, varied: tuple[int, ...]) -> None:
    places = np.arange(len(values)) + 0.5
    every = slice(None, None, -(-len(values) // _MOST_LABELS))
    texts = [f"{value:.2g}" if abs(value) > 1e-6 else "0" for value in values]
    axes.set_xticks(places[every], texts[every])
    axes.set_xlabel(f"z{varied[0] + 1}")
    if len(varied) > 1:
        axes.set_yticks(places[::-1][every], texts[every])
        axes.set_ylabel(f"z{varied[1] + 1}")
    else:
        axes.set_yticks([])
