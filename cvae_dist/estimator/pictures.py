"""Pictures of latents and of what the decoder makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cvae_dist import plot
from cvae_dist.errors import InvalidInput
from cvae_dist.estimator import lazy
from cvae_dist.estimator.inference import Inference
from cvae_dist.model import diagnosis
from cvae_dist.model.diagnosis import Diagnosis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_REFERENCE_SHAPE = (28, 28)
_DIAGNOSED_ROWS = 20_000


class Pictures(Inference):
    """The reference's two pictures; rows, reconstructions and a diagnosis."""

    def visualize(
        self,
        z: ArrayLike,
        labels: Sequence[Any] | NDArray[Any] | None = None,
        categories: Sequence[str] | None = None,
        filename: str | None = None,
    ) -> Figure:
        """Draw latents, coloured by labels; see :func:`cvae_dist.plot.scatter_latents`.

        Parameters
        ----------
        z : (n, dim_latent) array
            Dask arrays, DataArrays and Datasets are computed.
        labels : (n,) numbers or strings, optional
        categories : sequence of str, optional
            Names of the classes where the labels are indices.
        filename : str, optional
            Also write the picture there.

        Returns
        -------
        matplotlib.figure.Figure
        """
        with lazy.computed(z, lazy.LATENTS) as latents:
            figure = plot.scatter_latents(np.asarray(latents), labels, categories=categories)
        return self._written(figure, filename)

    def visualize_latent_grid(
        self,
        xy_range: tuple[float, float] | None = (-4.0, 4.0),
        grid_size: int = 10,
        shape: Sequence[int] | None = None,
        clip: tuple[float, float] | None = None,
        figsize: tuple[float, float] = (12.0, 12.0),
        filename: str | None = None,
    ) -> Figure:
        """Draw what the decoder makes of a grid of latents; see :func:`cvae_dist.plot.latent_grid`.

        Parameters
        ----------
        xy_range : (float, float) or None
            Range of both coordinates; None: the normal quantiles of the prior.
        grid_size : int
            Cells along each axis.
        shape : sequence of int, optional
            Shape of one decoded row. Default: the shape of the items the model was trained on; (28, 28) for
            vectors of 784 values.
        clip : (float, float), optional
            Decoded values are clipped to this range.
        figsize : (float, float)
            Inches.
        filename : str, optional
            Also write the picture there.

        Returns
        -------
        matplotlib.figure.Figure
        """
        model = self._model()
        figure = plot.latent_grid(
            model.decode_rows, model.dim_latent, shape or self._picture_shape(),
            xy_range=xy_range, grid_size=grid_size, clip=clip, figsize=figsize,
        )  # fmt: skip
        return self._written(figure, filename)

    def visualize_reconstructions(
        self,
        X: Any,
        labels: Sequence[Any] | NDArray[Any] | None = None,
        n: int = 10,
        shape: Sequence[int] | None = None,
        filename: str | None = None,
    ) -> Figure:
        """Draw rows above what is left of them after the way to the latents and back.

        Parameters
        ----------
        X : array, DataFrame, path, URL or RowStore
            Rows as for :meth:`embed`.
        labels : (n_rows,) numbers or strings, optional
            Written below each pair. Default: the place of the row in X.
        n : int
            Rows to draw, evenly spread over X.
        shape : sequence of int, optional
            Shape of one row, as for :meth:`visualize_latent_grid`.
        filename : str, optional
            Also write the picture there.

        Returns
        -------
        matplotlib.figure.Figure
        """
        model = self._model()
        rows, picked, total = self._picked(X, lambda total: _evenly(total, n))
        names = np.arange(total) if labels is None else np.asarray(labels)
        if names.shape != (total,):
            raise InvalidInput(
                f"{total:,} rows, but labels of shape {names.shape}: give exactly one label for each row"
            )
        originals, reconstructions = rows.astype(np.float64), np.asarray(model.decode_rows(model.embed_rows(rows)))
        figure = plot.compare_rows(
            originals, reconstructions, shape or self._picture_shape(),
            names=[str(name) for name in names[picked]], names_are="row" if labels is None else "label",
        )  # fmt: skip
        return self._written(figure, filename)

    def visualize_rows(
        self, rows: ArrayLike, n_columns: int = 10, shape: Sequence[int] | None = None, filename: str | None = None
    ) -> Figure:
        """Draw rows as tiles, such as those of ``sample``, ``interpolate`` and ``decode``.

        Parameters
        ----------
        rows : (n, n_features) array
        n_columns : int
            Tiles side by side.
        shape : sequence of int, optional
            Shape of one row, as for :meth:`visualize_latent_grid`.
        filename : str, optional
            Also write the picture there.

        Returns
        -------
        matplotlib.figure.Figure
        """
        figure = plot.row_tiles(np.asarray(rows), shape or self._picture_shape(), n_columns=n_columns)
        return self._written(figure, filename)

    def diagnose(self, X: Any, filename: str | None = None) -> Diagnosis:
        """Say what the model makes of rows: active units, KL per dimension, rate and distortion, reconstruction.

        Parameters
        ----------
        X : array, DataFrame, path, URL or RowStore
            Rows as for :meth:`embed`; 20,000 of them at most are looked at. Rows that were not trained on tell more.
        filename : str, optional
            Also draw KL per dimension and explained variance per feature, and write the picture there.

        Returns
        -------
        Diagnosis
            Its figures are attributes; ``print`` shows them.
        """
        result = diagnosis.diagnose(self._model(), self._some_rows(X, _DIAGNOSED_ROWS))
        if filename is not None:
            active = result.latent_variance > diagnosis.ACTIVE_VARIANCE
            title = f"{result.rate:.3g} nats of rate, {result.distortion:.4g} of distortion per row"
            figure = plot.diagnosis_bars(result.kl_per_dimension, active, result.explained, title=title)
            self._written(figure, filename)
        return result

    def _picture_shape(self) -> tuple[int, ...]:
        self._model()  # or say that there is none
        return _REFERENCE_SHAPE if self.item_shape_ == (784,) else self.item_shape_

    def _written(self, figure: Figure, filename: str | None) -> Figure:
        if filename is not None:
            plot.write_figure(figure, filename, self.storage_options)
        return figure


def _evenly(total: int, n: int) -> NDArray[np.int64]:
    """Return the numbers of ``n`` evenly spread rows of ``total``."""
    if not isinstance(n, Integral) or n < 1:
        raise InvalidInput(f"{n!r} of {total:,} rows cannot be drawn: draw a whole number of them, at least one")
    return np.unique(np.linspace(0, total - 1, int(n)).round().astype(np.int64))
