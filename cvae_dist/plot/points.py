"""Points and densities in the plane: how rows look, and which part of the plane is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from cvae_dist.errors import InvalidInput
from cvae_dist.plot.figure import Floats, required
from cvae_dist.plot.labels import Classes, Quantity
from cvae_dist.plot.palette import INK, NO_LABEL_COLOUR

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Colormap

PIXELS = 600

Groups = Classes | Quantity | None


@dataclass(frozen=True)
class Look:
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


@dataclass(frozen=True)
class Window:
    """The part of the plane that is shown, from (left, bottom) to (right, top)."""

    low: tuple[float, float]
    high: tuple[float, float]

    @classmethod
    def around(cls, xy: Floats) -> Self:
        """Choose a window around all rows, but for outliers that would squeeze the rest."""
        inner = np.percentile(xy, [0.1, 99.9], axis=0).astype(float)
        slack = 0.3 * (inner[1] - inner[0])
        low, high = np.maximum(xy.min(axis=0), inner[0] - slack), np.minimum(xy.max(axis=0), inner[1] + slack)
        pad = np.where(high > low, 0.03 * (high - low), 1.0)
        (left, bottom), (right, top) = (low - pad).tolist(), (high + pad).tolist()
        return cls((left, bottom), (right, top))

    @property
    def ratio(self) -> float:
        """Width over height."""
        return (self.high[0] - self.low[0]) / (self.high[1] - self.low[1])

    @property
    def is_nearly_flat(self) -> bool:
        """Whether one scale for both axes would make a picture too flat to read."""
        return not 1 / 3 < self.ratio < 3

    def n_outside(self, xy: Floats) -> int:
        """Return how many rows are not in it."""
        return int(np.count_nonzero(np.any((xy < self.low) | (xy > self.high), axis=1)))

    def show(self, axes: Axes, *, one_scale: bool) -> None:
        """Frame it. With one scale for both axes, distances mean the same; the rest of the place stays blank."""
        axes.set_xlim(self.low[0], self.high[0])
        axes.set_ylim(self.low[1], self.high[1])
        axes.set_aspect("equal" if one_scale else "auto", anchor="NW")


def draw_points(axes: Axes, xy: Floats, groups: Groups, look: Look, window: Window) -> ScalarMappable | None:
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
        style["cmap"] = look.cmap.with_extremes(bad=NO_LABEL_COLOUR)
        style["alpha"] = 1 if look.alpha is None else look.alpha  # points that shine through mix colours of no value
    else:
        style["c"] = INK
    points = axes.scatter(xy[order, 0], xy[order, 1], **style)
    return points if isinstance(groups, Quantity) else None


def draw_density(axes: Axes, xy: Floats, groups: Groups, look: Look, window: Window) -> ScalarMappable | None:
    """Draw for each pixel the mix of the classes, the mean of a quantity, or the number of rows."""
    datashader, pandas = required("datashader"), required("pandas")
    colours = required("matplotlib.colors")
    (left, bottom), (right, top) = window.low, window.high
    canvas = datashader.Canvas(PIXELS, PIXELS, x_range=(left, right), y_range=(bottom, top))
    place: dict[str, Any] = {"extent": (left, right, bottom, top), "origin": "lower", "interpolation": "nearest"}
    frame = pandas.DataFrame({"x": xy[:, 0], "y": xy[:, 1]})
    if groups is None:
        counts = canvas.points(frame, "x", "y", datashader.count()).to_numpy()
        return axes.imshow(np.ma.masked_equal(counts, 0), cmap=look.cmap, norm=colours.LogNorm(), **place)
    if groups.missing.any():
        behind = canvas.points(frame[groups.missing], "x", "y", datashader.count()).to_numpy()
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


def _colour_scale(groups: Quantity, look: Look) -> dict[str, Any]:
    """Return a colour scale from the 1st to the 99th percentile, so that few extreme values cannot flatten it."""
    low, high = np.nanpercentile(groups.values, [1, 99]).tolist()
    wider = 0.5 * (low == high)  # a scale without length would have no middle
    return {"vmin": low - wider, "vmax": high + wider, "cmap": look.cmap}
