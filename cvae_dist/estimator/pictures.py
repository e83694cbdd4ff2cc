"""Pictures of what a model makes of rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cvae_dist import plot
from cvae_dist.errors import InvalidInput
from cvae_dist.estimator.inputs import GivenRows
from cvae_dist.model.diagnosis import ACTIVE_VARIANCE, Diagnosis
from cvae_dist.model.vae import VAE
from cvae_dist.plot.labels import as_labels, is_missing, shortened
from cvae_dist.store.ranges import RowNumbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_REFERENCE_SHAPE = (28, 28)


def tile_shape(item_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape to draw an item in; the reference takes 784 values for an image."""
    return _REFERENCE_SHAPE if item_shape == (784,) else item_shape


def flattened(items: NDArray[Any], item_shape: tuple[int, ...]) -> tuple[NDArray[Any], tuple[int, ...]]:
    """Return items (n, ...) as rows (n, n_features), and the shape to draw one in; that of flat rows is the model's."""
    if items.ndim <= 2:
        return items, tile_shape(item_shape)
    return items.reshape(len(items), math.prod(items.shape[1:])), items.shape[1:]


def reconstructions(
    model: VAE,
    rows: GivenRows,
    labels: Sequence[Any] | NDArray[Any] | None,
    n: int,
    shape: Sequence[int],
    **look: Any,
) -> Figure:
    """Draw ``n`` evenly spread rows above their reconstructions, each pair with its label or its number.

    ``look`` is title, cmap and ax of :func:`cvae_dist.plot.compare_rows`.
    """
    originals, numbers, total = rows.chosen(lambda total: _evenly(total, n))
    names = np.arange(total) if labels is None else as_labels(labels)
    if names.shape != (total,):
        raise InvalidInput(f"{total:,} rows, but labels of shape {names.shape}: give exactly one label for each row")
    shown = names[numbers]
    return plot.compare_rows(
        originals.astype(np.float64),
        np.asarray(model.decode_rows(model.embed_rows(originals))),
        shape,
        names=[
            "no label" if gone else shortened(str(name), 12)
            for name, gone in zip(shown, is_missing(shown), strict=True)
        ],
        names_are="row" if labels is None else "label",
        total=total,
        **look,
    )


def diagnosis(figures: Diagnosis) -> Figure:
    """Draw KL per dimension and explained variance per feature."""
    active = figures.latent_variance > ACTIVE_VARIANCE
    title = f"{figures.rate:.3g} nats of rate, {figures.distortion:.4g} of distortion per row"
    return plot.diagnosis_bars(figures.kl_per_dimension, active, figures.explained, title=title)


def _evenly(total: int, n: int) -> RowNumbers:
    """Return the numbers of ``n`` evenly spread rows of ``total``."""
    if not isinstance(n, Integral) or n < 1:
        raise InvalidInput(f"{n!r} of {total:,} rows cannot be drawn: draw a whole number of them, at least one")
    return plot.evenly_spread(total, int(n))
