"""The picture of a training run: -ELBO and its two parts against the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cvae_dist.errors import InvalidInput
from cvae_dist.plot.figure import Floats, blank_figure
from cvae_dist.plot.palette import INK, OTHER_COLOUR

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Panel:
    """One set of axes of the loss picture: history key -> (legend text, colour)."""

    name: str
    series: Mapping[str, tuple[str, str]]


TRAINING, VALIDATION = ("training batches", OTHER_COLOUR), ("validation, averaged weights", INK)
PANELS = (
    Panel("-ELBO (nats per row)", {"loss": TRAINING, "validation_loss": VALIDATION}),
    Panel("reconstruction", {"reconstruction": TRAINING, "validation_reconstruction": VALIDATION}),
    Panel("KL to the prior", {"kl": TRAINING, "validation_kl": VALIDATION}),
)


def loss_curves(history: Sequence[Mapping[str, Any]], *, title: str | None = None) -> Figure:
    """Draw a training run: -ELBO and below it its two parts, in nats per row, against the step.

    ``history`` holds the lines of a model's ``history.jsonl``; each has ``step`` and any of the recorded figures. The
    title is by default the best -ELBO and its step.

    Raises
    ------
    InvalidInput
        The history holds no loss yet.
    """
    panels = [panel for panel in PANELS if any(key in line for line in history for key in panel.series)]
    if not panels:
        raise InvalidInput("the training history holds no loss yet: train for some steps first")
    figure = blank_figure(9.0, 7.0)
    stack = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, panel in zip(stack, panels, strict=True):
        _draw_panel(axes, history, panel)
    stack[-1].set_xlabel("training step")
    figure.suptitle(_best_loss(history) if title is None else title)
    return figure


def _series(history: Sequence[Mapping[str, Any]], key: str) -> tuple[Floats, Floats]:
    points = [(line["step"], line[key]) for line in history if line.get(key) is not None]
    steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def _draw_panel(axes: Axes, history: Sequence[Mapping[str, Any]], panel: Panel) -> None:
    """Draw the curves; the first tenth of the steps does not decide the scale."""
    shown = []
    for key, (name, colour) in panel.series.items():
        steps, values = _series(history, key)
        if len(steps):
            marker = "." if len(steps) < 60 else None
            axes.plot(steps, values, label=name, color=colour, linewidth=1.4, marker=marker)
            shown.append(values[steps >= 0.1 * steps.max()])
    settled = np.concatenate(shown)
    settled = settled[np.isfinite(settled)]
    if len(settled):
        low, high = settled.min(), settled.max()
        pad = 0.08 * (high - low) or 1.0
        axes.set_ylim(low - pad, high + pad)
    axes.set_ylabel(panel.name)
    axes.grid(color="0.9")
    if panel is PANELS[0]:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderaxespad=0.2)


def _best_loss(history: Sequence[Mapping[str, Any]]) -> str:
    for key, what in (("validation_loss", "validation"), ("loss", "training")):
        steps, values = _series(history, key)
        if np.isfinite(values).any():
            best = int(np.nanargmin(values))
            return f"Best {what} -ELBO: {values[best]:.4g} nats per row at step {int(steps[best]):,}"
    return "Training run"
