"""Pictures: latents, the decoder's grid, the loss of a training run, reconstructions.

Each picture is a pure function of arrays that returns a :class:`matplotlib.figure.Figure`
(:func:`scatter_latents`, :func:`latent_grid`, :func:`loss_curves`, :func:`compare_rows`, :func:`row_tiles`; one
module each); verbs read a store or a model and write such a figure to a file (``plot_*``, in ``verbs``). Figures are
made without pyplot: no window, no global state, nothing to close.
"""

from cvae_dist.plot.diagnosis import diagnosis_bars
from cvae_dist.plot.figure import write_figure
from cvae_dist.plot.gallery import row_tiles
from cvae_dist.plot.grid import latent_grid
from cvae_dist.plot.latents import scatter_latents
from cvae_dist.plot.loss import loss_curves
from cvae_dist.plot.reconstructions import compare_rows

__all__ = [
    "compare_rows",
    "diagnosis_bars",
    "latent_grid",
    "loss_curves",
    "row_tiles",
    "scatter_latents",
    "write_figure",
]
