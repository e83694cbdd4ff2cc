"""The picture of a diagnosis: what each latent dimension carries, and how well each feature is reconstructed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cvae_dist.plot.figure import Floats, blank_figure
from cvae_dist.plot.palette import INK, OTHER_COLOUR

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FEWEST_AS_CURVE = 64


def diagnosis_bars(
    kl_per_dimension: Floats, active: NDArray[np.bool_], explained: Floats, *, title: str | None = None
) -> Figure:
    """Draw KL per latent dimension above, explained variance per feature below.

    ``kl_per_dimension``, shape (dim_latent,), is in nats; dimensions that are not ``active`` are drawn in grey.
    ``explained``, shape (n_features,), holds shares of each feature's variance; features that are NaN are left out.
    """
    figure = blank_figure(9.0, 7.0)
    above, below = figure.subplots(2, 1)
    order = np.argsort(-kl_per_dimension, kind="stable")
    above.bar(np.arange(len(order)), kl_per_dimension[order], color=np.where(active[order], INK, OTHER_COLOUR))
    above.set_xlabel(f"latent dimension, by KL ({np.count_nonzero(active)} of {len(active)} active)")
    above.set_ylabel("KL to the prior (nats)")
    if len(order) <= _FEWEST_AS_CURVE:
        above.set_xticks(np.arange(len(order)), [f"z{index + 1}" for index in order], rotation=90 * (len(order) > 16))
    _draw_features(below, np.sort(explained[np.isfinite(explained)])[::-1])
    if title:
        figure.suptitle(title)
    return figure


def _draw_features(axes: Axes, shares: Floats) -> None:
    if len(shares) < _FEWEST_AS_CURVE:
        axes.bar(np.arange(len(shares)), shares, color=INK)
    else:
        axes.fill_between(np.arange(len(shares)), shares, color=INK, step="mid", linewidth=0)
    axes.set_ylim(min(0.0, max(-1.0, float(shares.min(initial=0.0)))), 1)
    axes.set_xlabel(f"{len(shares):,} features that vary, best first")
    axes.set_ylabel("share of variance explained")
