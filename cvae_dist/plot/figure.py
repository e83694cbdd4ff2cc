"""What all pictures share: an empty figure, its file, and libraries imported only where they are needed."""

from __future__ import annotations

import importlib
import io
import os
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cvae_dist.errors import InvalidInput, MissingExtra
from cvae_dist.store import Location
from cvae_dist.store.urls import StorageOptions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

Floats = NDArray[np.floating[Any]]
DPI = 150
_NEED_LATEX = {"pgf"}  # which may not be there


def required(module: str) -> Any:
    """Import a library of the extra ``plot``."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f"pictures need {module.split('.')[0]}, which is not installed: nothing was drawn. "
            "Install it with: pip install 'cvae-dist[plot]'"
        ) from error


def blank_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches."""
    figure: Figure = required("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    return figure


def axes_for(ax: Axes | None, width: float, height: float) -> Axes:
    """Return the axes to draw in: those given, or the only ones of a new figure of a size in inches.

    Raises
    ------
    InvalidInput
        What is given is something else, such as an array of axes.
    """
    if ax is None:
        return blank_figure(width, height).add_subplot()
    if not isinstance(ax, required("matplotlib.axes").Axes):
        raise InvalidInput(
            f"ax is of type {type(ax).__name__}, in which nothing can be drawn: "
            "give one matplotlib Axes, such as that of `figure, ax = plt.subplots()`"
        )
    given: Axes = ax  # isinstance took its type
    return given


def figure_of(axes: Axes) -> Figure:
    """Return the whole figure of axes, also where they belong to a part of it."""
    return axes.figure.figure


def colour_map(cmap: str | Colormap | None, default: str) -> Colormap:
    """Return a colour map of matplotlib, by its name where it has one.

    Raises
    ------
    InvalidInput
        There is none of this name.
    """
    try:
        found: Colormap = required("matplotlib").colormaps.get_cmap(default if cmap is None else cmap)
    except (TypeError, ValueError):
        raise InvalidInput(
            f"cmap={cmap!r} is no colour map, so nothing was drawn: give a name that matplotlib knows, "
            "such as 'viridis' or 'cividis'"
        ) from None
    return found


def write_figure(
    figure: Figure, filename: str | os.PathLike[str], storage_options: StorageOptions | None = None
) -> None:
    """Write a figure atomically to a path or URL; the suffix chooses the format.

    Raises
    ------
    InvalidInput
        matplotlib cannot write files of this suffix.
    StorageFailed
        The storage refused.
    """
    suffix = PurePosixPath(str(filename)).suffix.lstrip(".").lower()
    known = sorted(figure.canvas.get_supported_filetypes().keys() - _NEED_LATEX)
    if suffix not in known:
        raise InvalidInput(f"no picture was written to {filename}: its name must end in one of {', '.join(known)}")
    picture = io.BytesIO()
    figure.savefig(picture, format=suffix, dpi=DPI)
    content = _compact(picture) if suffix == "png" else picture.getvalue()
    Location.of(filename, storage_options).write(content)


def _compact(picture: io.BytesIO) -> bytes:
    """Return the PNG without transparency if it is opaque, and without colours if it is grey: half the bytes."""
    image = required("PIL.Image").open(picture)
    *colours, alpha = image.convert("RGBA").split()
    if alpha.getextrema() != (255, 255):
        return picture.getvalue()
    compact = io.BytesIO()
    image.convert("L" if colours[0] == colours[1] == colours[2] else "RGB").save(compact, "png", optimize=True)
    return compact.getvalue()
