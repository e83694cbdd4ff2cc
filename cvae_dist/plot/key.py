"""What says what the colours of a map mean: legend, names on the map, colour bar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cvae_dist.plot.figure import Floats, required
from cvae_dist.plot.labels import Classes, Quantity, shortened
from cvae_dist.plot.palette import NO_LABEL_COLOUR

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.cm import ScalarMappable
    from matplotlib.lines import Line2D

_MOST_LETTERS = 120  # on the map; more of them would cover the points
_MARK_SIZE, _TEXT_SIZE = 11.0, 10.0  # points
_FEWEST_TO_MARK = 5  # rows of a class; its name would hide fewer
_MOST_PLACES = 300


def no_label(missing: NDArray[np.bool_]) -> str:
    """Return the name of the rows that have no label, with their number."""
    return f"no label ({np.count_nonzero(missing):,})"


def with_unit(label_name: str, groups: Quantity) -> str:
    """Return the name of a quantity, with its unit if it has one."""
    return f"{label_name} ({groups.unit})" if groups.unit else label_name


def key_names(groups: Classes) -> list[str]:
    """Return the names of the classes as they are shown, and last that of rows without a label if there are any."""
    names = [shortened(name) for name in groups.names]
    return [*names, no_label(groups.missing)] if groups.missing.any() else names


def width_of_names(groups: Classes, label_name: str) -> float:
    """Return the inches that the names need beside a picture, so that long ones do not take its place."""
    return max(_text_width(name, _TEXT_SIZE) for name in (label_name, *key_names(groups)))


def name_classes(axes: Axes, xy: Floats, groups: Classes, colours: Sequence[str], label_name: str) -> None:
    """Name each class in the legend and among its rows, so that colour is not the only clue."""
    names = key_names(groups)
    handles = [_dot(colour, name) for colour, name in zip([*colours, NO_LABEL_COLOUR], names, strict=False)]
    axes.legend(handles=handles, title=label_name, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    if sum(map(len, names)) <= _MOST_LETTERS:
        _mark_classes(axes, xy, groups, names[: len(groups.names)])


def name_colours(axes: Axes, mappable: ScalarMappable, groups: Quantity | None, label_name: str) -> None:
    """Add a colour bar: of a quantity, or without one of rows per pixel, in plain figures instead of 2 x 10^1."""
    scale = required("matplotlib.cm").ScalarMappable(mappable.norm, mappable.cmap)  # opaque, whatever the points are
    layout: dict[str, Any] = {"ax": axes, "shrink": 0.8, "aspect": 30}
    if groups is None:
        bar = axes.figure.colorbar(scale, label="rows per pixel", **layout)
        low, high = scale.get_clim()
        bar.ax.yaxis.set_major_formatter("{x:,.0f}")
        bar.ax.yaxis.set_minor_formatter("{x:,.0f}" if high < 100 * low else "")
        return
    bar = axes.figure.colorbar(scale, label=with_unit(label_name, groups), extend="both", **layout)
    if groups.dates:
        tick_dates(bar.ax.yaxis)
    if groups.missing.any():
        dot = _dot(NO_LABEL_COLOUR, no_label(groups.missing).replace(" (", "\n("))
        bar.ax.legend(handles=[dot], loc="upper center", bbox_to_anchor=(0.5, -0.06), frameon=False)


def tick_dates(axis: Axis) -> None:
    """Write days since 1970 as dates, as short as they can be told apart."""
    dates = required("matplotlib.dates")
    locator = dates.AutoDateLocator()
    axis.set_major_locator(locator)
    axis.set_major_formatter(dates.ConciseDateFormatter(locator))


def _dot(colour: str, name: str) -> Line2D:
    dot: Line2D = required("matplotlib.lines").Line2D([], [], linestyle="", marker="o", color=colour, label=name)
    return dot


def _mark_classes(axes: Axes, xy: Floats, groups: Classes, names: Sequence[str]) -> None:
    """Write each name where its class lies, the largest first. One that finds no free place is in the legend only."""
    effects = [required("matplotlib.patheffects").withStroke(linewidth=2.5, foreground="white")]
    taken: list[tuple[Floats, Floats]] = []
    scale = _inches_per_unit(axes)
    rows = np.bincount(groups.codes[~groups.missing], minlength=len(names))
    for code in np.argsort(-rows, kind="stable")[: np.count_nonzero(rows >= _FEWEST_TO_MARK)]:
        places, box = _places(xy[groups.codes == code]), _half_box(names[code])
        free = [place for place in places if not any(_overlap(place * scale, box, *other) for other in taken)]
        if free:
            taken.append((free[0] * scale, box))
            axes.annotate(
                names[code], free[0], ha="center", va="center", weight="bold", fontsize=_MARK_SIZE, path_effects=effects
            )


def _places(members: Floats) -> Floats:
    """Return where a class may be named: at the median of its rows, or at some of them, the nearest to it first."""
    middle = np.median(members, axis=0)
    some = members[:: -(-len(members) // _MOST_PLACES)]
    return np.concatenate([middle[None], some[np.argsort(np.linalg.norm(some - middle, axis=1), kind="stable")]])


def _overlap(a: Floats, box_a: Floats, b: Floats, box_b: Floats) -> bool:
    return bool(np.all(np.abs(a - b) < box_a + box_b))


def _half_box(name: str) -> Floats:
    """Return half the width and height, in inches, of a name and its white rim."""
    rim = 4 / 72
    return np.array([_text_width(name, _MARK_SIZE, weight="bold") + rim, _MARK_SIZE / 72 + rim]) / 2


def _text_width(text: str, size: float, weight: str = "normal") -> float:
    """Return the width in inches of a line of text of a size in points."""
    if not text:
        return 0.0
    font = required("matplotlib.font_manager").FontProperties(weight=weight)
    path = required("matplotlib.textpath").TextPath((0, 0), text, size=size, prop=font)
    return float(path.get_extents().width) / 72


def _inches_per_unit(axes: Axes) -> Floats:
    """Return the scale of both axes; a little less, as a legend may still narrow them."""
    inches = np.array(axes.bbox.size) / axes.figure.dpi
    scale = 0.9 * inches / np.abs([np.ptp(axes.get_xlim()), np.ptp(axes.get_ylim())])
    return np.full(2, scale.min()) if axes.get_aspect() == 1 else scale
