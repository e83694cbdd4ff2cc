"""Pictures: each is a function of arrays that returns a :class:`matplotlib.figure.Figure`, in a module of its own.

Figures are made without pyplot: no window, no global state, nothing to close. The verbs ``plot_...`` read a store or
a model and write such a figure to a file.
"""

from cvae_dist.plot.diagnosis import diagnosis_bars
from cvae_dist.plot.figure import write_figure
from cvae_dist.plot.gallery import row_tiles
from cvae_dist.plot.grid import latent_grid
from cvae_dist.plot.latents import scatter_latents
from cvae_dist.plot.loss import loss_curves
from cvae_dist.plot.reconstructions import compare_rows, evenly_spread

__all__ = [
    "compare_rows",
    "diagnosis_bars",
    "evenly_spread",
    "latent_grid",
    "loss_curves",
    "row_tiles",
    "scatter_latents",
    "write_figure",
]
