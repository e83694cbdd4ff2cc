"""What a trained estimator does: rows to latents and back, new rows, likelihoods, pictures, export."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from functools import partial
from numbers import Integral
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, Self, cast, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator

from cvae_dist import plot
from cvae_dist.config import ComputePrecision
from cvae_dist.errors import InvalidInput
from cvae_dist.estimator import generation, lazy, pictures, saved
from cvae_dist.estimator.arrays import as_frame, checked_latents, output_library, random_state_of
from cvae_dist.estimator.generation import Floats
from cvae_dist.estimator.inputs import GivenRows
from cvae_dist.model.diagnosis import Diagnosis, diagnose
from cvae_dist.model.export import Direction, export_bytes
from cvae_dist.model.files import is_finished
from cvae_dist.model.kernels import drawback
from cvae_dist.model.metric import Metric
from cvae_dist.model.prior import Prior, PriorName, check_name
from cvae_dist.model.sampling import Interpolation, posterior_draws_of_block, posterior_spread, standard_normal
from cvae_dist.model.scoring import Score, log_likelihood
from cvae_dist.model.vae import VAE
from cvae_dist.store import Location
from cvae_dist.training.history import HistoryRecord, StoppedBecause

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

Latents = NDArray[np.float32]
RandomState = int | np.random.RandomState | np.random.Generator | None

_LOGGER = logging.getLogger(__name__)
_RESTORED = ("model_", "history_", "stopped_because_", "item_shape_", "n_features_in_")
_DIAGNOSED_ROWS = 20_000
_SCORE_DRAWS: dict[Score, int] = {"elbo": 8, "reconstruction": 8, "iwae": 100}


class Fitted(BaseEstimator):  # type: ignore[misc]
    """An estimator that has a trained model, or restores it from ``logdir`` when it is first asked for.

    Raises
    ------
    NotFitted
        Every method that needs a model: there is none.
    """

    X: Any
    logdir: str | os.PathLike[str] | None
    storage_options: Mapping[str, Any] | None
    model_: VAE
    history_: list[HistoryRecord]
    stopped_because_: StoppedBecause
    item_shape_: tuple[int, ...]
    n_features_in_: int
    feature_names_in_: NDArray[Any]
    priors_: dict[PriorName, Prior]

    @overload
    def embed(
        self,
        X: Any,
        batch_size: int = ...,
        *,
        return_std: Literal[False] = ...,
        precision: ComputePrecision = ...,
        metric: Metric = ...,
    ) -> Latents: ...
    @overload
    def embed(
        self, X: Any, batch_size: int = ..., *, return_std: Literal[True], precision: ComputePrecision = ...
    ) -> tuple[Latents, Latents]: ...
    def embed(
        self,
        X: Any,
        batch_size: int = 16_384,
        *,
        return_std: bool = False,
        precision: ComputePrecision = "float32",
        metric: Metric = "latent",
    ) -> Latents | tuple[Latents, Latents]:
        """Return the latents of rows, (n, dim_latent) float32: the posterior means.

        Parameters
        ----------
        X : array, DataFrame, path, URL or RowStore
            Rows as in the constructor. Of a Dask array the latents are a Dask array, of a DataArray or Dataset a
            DataArray or Dataset with the coordinates of the rows. They are computed only when they are needed.
        batch_size : int
            Rows computed at once. It bounds memory and changes no result.
        return_std : bool
            Also return the standard deviations of the posteriors, of the same shape: how uncertain the encoding is.
            They do not say how unusual a row is, see :meth:`score_samples`. Behind a flow they are estimated from 64
            draws.
        precision : {"float32", "bf16"}
            Type that matrix products are computed in. bf16 is about 1.6 times as fast on processors that have it,
            and errs by about 1 % of the latents' spread.
        metric : {"latent", "data"}
            What Euclidean distances mean. ``latent``: the latents as they are, where every direction weighs alike.
            ``data``: every direction is stretched by how much it changes the rows, and where rows have one length,
            as embeddings do, lengths of latents count less; for searching neighbours and for clustering.
            ``decode(z, metric="data")`` undoes it.

        Raises
        ------
        InvalidInput
            The rows have other features or values that are not finite, or there is no such precision or metric.
        """
        model = self._model()
        model.check_metric(metric)
        if return_std and metric == "data":
            raise InvalidInput(
                "return_std=True gives the standard deviations of the latents as they are, not of those that "
                "metric='data' stretches: ask for them with metric='latent'"
            )
        if told := drawback(precision):
            _LOGGER.warning(told)
        compute: dict[str, Any] = {"batch_size": batch_size, "precision": precision}
        embed = partial(model.embed_rows, **compute, metric=metric)
        rows, latents = GivenRows(self, X), lazy.latents_of(model)
        means = rows.map(embed, latents, refuses_nan=True)
        return (means, rows.map(partial(posterior_spread, model, **compute), latents)) if return_std else means

    def decode(self, z: ArrayLike, metric: Metric = "latent") -> Floats:
        """Return the items that latents stand for, (n, *item_shape_), in the data's units.

        So a model of images gives images, and one of rows gives rows (n, n_features). They are float32, or float64
        where float32 cannot hold both offset and digits of a feature. After ``set_output(transform="pandas")`` rows are
        a DataFrame with the names of the features; so it is for every method that gives rows.

        Parameters
        ----------
        z : (n, dim_latent) array
            Of a Dask array, DataArray or Dataset the rows are one too, and are computed only when they are needed.
        metric : {"latent", "data"}
            The metric that the latents were embedded with.
        """
        model = self._model()
        model.check_metric(metric)
        decode = partial(model.decode_rows, metric=metric)
        if lazy.is_labelled_or_lazy(z):
            items = lazy.items_of(model, self.item_shape_)
            return cast(Floats, lazy.apply(z, decode, lazy.latents_of(model), items))
        return self._items(cast(Floats, decode(checked_latents(z))), z)

    def sample(
        self,
        n: int = 1,
        temperature: float = 1.0,
        noise: bool = True,
        prior: Literal["normal"] | PriorName = "normal",
        random_state: RandomState = None,
    ) -> Floats:
        """Return new items, (n, *item_shape_), in the data's units; see :meth:`decode`.

        Parameters
        ----------
        n : int
            Number of rows.
        temperature : float
            Scales the spread of the latents: 1 as trained, less for more typical rows, 0 for the most typical one.
        noise : bool
            Draw rows from the likelihood, as the data scatter. Without it rows are its means, which are smoother and
            vary less than the data.
        prior : {"normal", "mixture", "flow"}
            N(0, I), or a prior fitted by :meth:`fit_prior`, which covers only where latents of rows lie. One that was
            not fitted yet is fitted on the constructor's ``X``.
        random_state : int, RandomState, Generator or None
            None: other rows at every call.

        Raises
        ------
        NotFitted
            The prior was not fitted, and there is no ``X`` to fit it on.
        InvalidInput
            An argument is out of its range.
        MissingExtra
            The flow's package is not installed.
        """
        model = self._model()
        generation.check_draws(n, temperature)
        fitted = None if prior == "normal" else self._prior(prior)
        return self._items(generation.sample(model, n, temperature, noise, fitted, random_state_of(random_state)))

    def fit_prior(
        self, X: Any = None, prior: PriorName = "mixture", n_components: int = 10, random_state: RandomState = 0
    ) -> Self:
        """Fit a prior to the latents of rows, for ``sample(prior=...)``. It is kept in ``priors_`` and in ``logdir``.

        Parameters
        ----------
        X : array, DataFrame, path, URL or RowStore, optional
            Rows as in the constructor, by default those; 20,000 of them at most are looked at.
        prior : {"mixture", "flow"}
            A mixture of Gaussians, or a neural spline flow, which takes seconds to fit and suits many rows.
        n_components : int
            Gaussians of the mixture; no more than rows.
        random_state : int, RandomState, Generator or None
            None: another prior at every call.

        Raises
        ------
        NotFitted
            There are no rows.
        InvalidInput
            There is no such prior, or there are fewer than two rows.
        MissingExtra
            The flow's package is not installed.
        """
        model = self._model()
        check_name(prior)
        rows = self.X if X is None else X
        if rows is None:
            raise saved.ModelNotTrained(f"there are no rows to fit the prior {prior!r} on: call fit_prior(X) with some")
        random = random_state_of(random_state)
        fitted = generation.fit_prior(model, GivenRows(self, rows), prior, n_components, random)
        self.priors_ = {**getattr(self, "priors_", {}), prior: fitted}
        saved.keep_prior(self._place, prior, fitted, model)
        return self

    def posterior_sample(self, X: Any, k: int = 1, random_state: RandomState = None) -> Latents:
        """Return draws of the latents that rows may have come from, (n, k, dim_latent) float32.

        Parameters
        ----------
        X : array, DataFrame, path, URL or RowStore
            Rows as for :meth:`embed`; lazy ones give lazy draws, with the dimension ``draw``.
        k : int
            Draws for each row.
        random_state : int, RandomState, Generator or None
            The same int gives the same draws for the same rows in the same blocks.
        """
        model = self._model()
        generation.check_draws(k)
        seed = int(random_state_of(random_state).randint(2**31))
        draws = lazy.Variable("z", {"draw": k, "latent": model.dim_latent}, np.float32)
        return GivenRows(self, X).map(partial(posterior_draws_of_block, model, k=k, seed=seed), draws)

    def interpolate(self, a: ArrayLike, b: ArrayLike, n: int = 10, kind: Interpolation = "linear") -> Floats:
        """Return items, (n, *item_shape_), on the way from one to another through the latent space.

        Parameters
        ----------
        a, b : (n_features,) array, or an item of the shape trained on
            The two items.
        n : int
            Items to return, the reconstructions of ``a`` and ``b`` included.
        kind : {"linear", "slerp"}
            The straight line between the latents, or the arc around the origin, which suits many latent dimensions.

        Raises
        ------
        InvalidInput
            The rows do not fit the model, the kind is unknown, or n is below 2.
        """
        return self._items(generation.interpolate(self._model(), a, b, n, kind))

    def score_samples(
        self, X: Any, kind: Score = "elbo", k: int | None = None, random_state: RandomState = 0
    ) -> NDArray[np.float64]:
        """Return how normal rows are to the model: higher is more normal, as in scikit-learn.

        Parameters
        ----------
        X : array, DataFrame, path, URL or RowStore
            Rows as for :meth:`embed`; lazy ones give lazy scores with their coordinates.
        kind : {"elbo", "reconstruction", "iwae"}
            ``elbo``: the lower bound of log p(x). ``reconstruction``: its first part, E[log p(x | z)]. Take one of
            these to find unusual rows. With the Bernoulli likelihood the row's own entropy is added to them, so that
            they are relative to the best any model could do for this row; otherwise dark, empty rows would score as
            normal whatever they show. ``iwae``: the importance-weighted estimate of log p(x) itself, as published
            figures are given; nothing is added.
        k : int, optional
            Draws of the latent. Default: 8, or 100 for ``iwae``.
        random_state : int, RandomState, Generator or None
            Seed of the draws. They are the same for all rows, so a row scores the same in any company. None: other
            draws at every call.

        Returns
        -------
        (n,) float64 array
            Nats, as a density over the data's units; with Bernoulli features a probability. A plain autoencoder
            (``kl_weight=0``) has no bound; its ``elbo`` is its reconstruction.
        """
        model = self._model()
        if kind not in _SCORE_DRAWS:
            raise InvalidInput(f"kind={kind!r} is unknown: choose one of {', '.join(_SCORE_DRAWS)}")
        count = _SCORE_DRAWS[kind] if k is None else k
        if not isinstance(count, Integral) or count < 1:
            raise InvalidInput(f"k={k!r}: a score needs at least 1 draw of the latent, and a whole number of them")
        draws = list(standard_normal(count, model.dim_latent, random_state_of(random_state)))
        scores = partial(log_likelihood, model, kind=kind, draws=draws)
        return GivenRows(self, X).map(scores, lazy.Variable("score", {}, np.float64))

    def score(self, X: Any, y: object = None) -> float:
        """Return the mean of :meth:`score_samples`, for model selection by ``GridSearchCV``; ``y`` is ignored.

        It compares models of the same rows whose likelihoods are all densities. A model with the likelihood
        ``bernoulli`` cannot be compared with them: a probability of shares is no density.
        """
        with lazy.computed(self.score_samples(X), "score") as scores:
            return float(np.mean(scores))

    def visualize(
        self,
        z: ArrayLike,
        labels: Sequence[Any] | NDArray[Any] | None = None,
        categories: Sequence[str] | None = None,
        filename: str | None = None,
        *,
        ax: Axes | None = None,
        title: str | None = None,
        size: float | None = None,
        alpha: float | None = None,
        cmap: str | Colormap | None = None,
    ) -> Figure:
        """Draw latents, coloured by labels; see :func:`cvae_dist.plot.scatter_latents`.

        Parameters
        ----------
        z : (n, dim_latent) array
            Dask arrays, DataArrays and Datasets are computed.
        labels : (n,) numbers, strings, booleans, dates or durations, optional
            They colour the points. Rows whose label is missing (None, NaN, NaT, NA or an empty string) are grey.
        categories : sequence of str, optional
            Names of the classes where the labels are indices.
        filename : str, optional
            Also write the picture there.
        ax : matplotlib Axes, optional
            Axes to draw in; the figure returned is then theirs. Default: those of a new figure.
        title : str, optional
            Default: the number of rows and of latent dimensions.
        size : float, optional
            Area of a point in square points. Default: smaller for more rows.
        alpha : float, optional
            Opacity, above 0 and at most 1. Default: less for more rows; 1 beside a colour bar.
        cmap : str or matplotlib Colormap, optional
            Default: viridis; for classes colours that colour-blind readers can tell apart.
        """
        with lazy.computed(z, "z") as latents:
            figure = plot.scatter_latents(
                np.asarray(latents),
                labels,
                categories=categories,
                title=title,
                size=size,
                alpha=alpha,
                cmap=cmap,
                ax=ax,
            )
        return self._written(figure, filename)

    def visualize_latent_grid(
        self,
        xy_range: tuple[float, float] | None = (-4.0, 4.0),
        grid_size: int = 10,
        shape: Sequence[int] | None = None,
        clip: tuple[float, float] | None = None,
        figsize: tuple[float, float] = (12.0, 12.0),
        filename: str | None = None,
        *,
        ax: Axes | None = None,
        title: str | None = None,
        cmap: str | Colormap | None = None,
    ) -> Figure:
        """Draw what the decoder makes of a grid of latents; see :func:`cvae_dist.plot.latent_grid`.

        Parameters
        ----------
        xy_range : (float, float) or None
            Range of both coordinates; None: the normal quantiles of the prior.
        grid_size : int
            Cells along each axis.
        shape : sequence of int, optional
            Shape of one decoded row. Default: that of the items trained on; (28, 28) for vectors of 784 values.
        clip : (float, float), optional
            Decoded values are clipped to this range.
        figsize : (float, float)
            Inches; those of a new figure.
        filename : str, optional
            Also write the picture there.
        ax : matplotlib Axes, optional
            Axes to draw in; the figure returned is then theirs. Default: those of a new figure.
        title : str, optional
            Default: how the grid is spaced.
        cmap : str or matplotlib Colormap, optional
            Colours of images of one channel. Default: grey.
        """
        model = self._model()
        figure = plot.latent_grid(
            model.decode_rows, model.dim_latent, shape or pictures.tile_shape(self.item_shape_),
            xy_range=xy_range, grid_size=grid_size, clip=clip, figsize=figsize, title=title, cmap=cmap, ax=ax,
        )  # fmt: skip
        return self._written(figure, filename)

    def visualize_reconstructions(
        self,
        X: Any,
        labels: Sequence[Any] | NDArray[Any] | None = None,
        n: int = 10,
        shape: Sequence[int] | None = None,
        filename: str | None = None,
        *,
        ax: Axes | None = None,
        title: str | None = None,
        cmap: str | Colormap | None = None,
    ) -> Figure:
        """Draw rows above their reconstructions: what is left of them after the way to the latents and back.

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
        ax : matplotlib Axes, optional
            Axes to draw in; the figure returned is then theirs. Default: those of a new figure.
        title : str, optional
            Default: how many rows are shown, and their root mean square error.
        cmap : str or matplotlib Colormap, optional
            Colours of images of one channel. Default: grey.
        """
        model = self._model()
        figure = pictures.reconstructions(
            model, GivenRows(self, X), labels, n, shape or pictures.tile_shape(self.item_shape_),
            title=title, cmap=cmap, ax=ax,
        )  # fmt: skip
        return self._written(figure, filename)

    def visualize_rows(
        self,
        rows: ArrayLike,
        n_columns: int = 10,
        shape: Sequence[int] | None = None,
        filename: str | None = None,
        *,
        ax: Axes | None = None,
        title: str | None = None,
        cmap: str | Colormap | None = None,
    ) -> Figure:
        """Draw rows as tiles, such as those of ``sample``, ``interpolate`` and ``decode``.

        Parameters
        ----------
        rows : (n, n_features) array, or items (n, ...) such as images
        n_columns : int
            Tiles side by side.
        shape : sequence of int, optional
            Shape of one row. Default: that of the items given; for flat rows as for :meth:`visualize_latent_grid`.
        filename : str, optional
            Also write the picture there.
        ax : matplotlib Axes, optional
            Axes to draw in; the figure returned is then theirs. Default: those of a new figure.
        title : str, optional
            Default: none.
        cmap : str or matplotlib Colormap, optional
            Colours of images of one channel. Default: grey.
        """
        self._model()
        flat, own_shape = pictures.flattened(np.asarray(rows), self.item_shape_)
        figure = plot.row_tiles(flat, shape or own_shape, n_columns=n_columns, title=title, cmap=cmap, ax=ax)
        return self._written(figure, filename)

    def diagnose(self, X: Any, filename: str | None = None) -> Diagnosis:
        """Say what the model makes of rows: active units, KL per dimension, rate and distortion, reconstruction.

        The figures are attributes of the result; ``print`` shows them.

        Parameters
        ----------
        X : array, DataFrame, path, URL or RowStore
            Rows as for :meth:`embed`; 20,000 of them at most are looked at. Rows that were not trained on tell more.
        filename : str, optional
            Also draw KL per dimension and explained variance per feature, and write the picture there.
        """
        names = getattr(self, "feature_names_in_", None)
        figures = diagnose(self._model(), GivenRows(self, X).some(_DIAGNOSED_ROWS), names)
        if filename is not None:
            self._written(pictures.diagnosis(figures), filename)
        return figures

    def export(self, path: str | os.PathLike[str], direction: Direction = "embed") -> None:
        """Write one direction of the model, the scaling included, as one file. It takes any number of rows.

        ``torch.export.load(path).module()(rows)`` then needs torch alone, and an ``.onnx`` file only an ONNX runtime.

        Parameters
        ----------
        path : path or URL
            Its suffix decides: ``.pt2`` (torch.export) or ``.onnx``.
        direction : {"embed", "decode"}
            Rows (n, n_features) in the data's units to latents (n, dim_latent), or back. Rows are float32, or float64
            where :meth:`decode` returns float64.

        Raises
        ------
        InvalidInput
            The direction or the suffix is unknown.
        MissingExtra
            ONNX is asked for and ``onnx`` or ``onnxscript`` is not installed.
        """
        data = export_bytes(self._model(), direction, PurePosixPath(os.fspath(path)).suffix.lower())
        Location.of(path, self.storage_options).write(data)

    def _written(self, figure: Figure, filename: str | None) -> Figure:
        if filename is not None:
            plot.write_figure(figure, filename, self.storage_options)
        return figure

    def _items(self, rows: Floats, z: Any = None) -> Floats:
        """Return decoded rows as items of the shape trained on, or as a DataFrame where ``set_output`` asks for one."""
        library = output_library(self)
        if library == "default":
            return rows.reshape(len(rows), *self.item_shape_)
        names = getattr(self, "feature_names_in_", [f"x{number}" for number in range(rows.shape[1])])
        return cast(Floats, as_frame(rows, names, library, getattr(z, "index", None)))

    def _prior(self, name: PriorName) -> Prior:
        """Return a fitted prior: this object's, the one beside the model, or one fitted now."""
        check_name(name)
        priors = getattr(self, "priors_", {})
        known = priors.get(name) or saved.kept_prior(self._place, name)
        if known is None:
            return self.fit_prior(prior=name).priors_[name]
        self.priors_ = {**priors, name: known}
        return known

    def _model(self) -> VAE:
        """Return the trained model, restoring it from ``logdir`` where this object did not train it."""
        if not self.__sklearn_is_fitted__():
            where = "no logdir is given" if self.logdir is None else f"{self.logdir} holds no finished model"
            raise saved.ModelNotTrained(
                f"this {type(self).__name__} instance is not fitted yet ({where}), so it can neither embed nor "
                "decode: call train() or fit(X) first, or give the logdir of a trained model"
            )
        return self.model_

    @property
    def _place(self) -> Location | None:
        return None if self.logdir is None else Location.of(self.logdir, self.storage_options)

    if not TYPE_CHECKING:  # a type checker would take every name for an attribute

        def __getattr__(self, name: str) -> Any:
            """Restore the model of ``logdir`` where what it holds is asked for first."""
            if name not in _RESTORED or not self.__sklearn_is_fitted__():
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            self.__dict__.update(saved.restored(self._place))
            return self.__dict__[name]

    def __sklearn_is_fitted__(self) -> bool:
        return "model_" in self.__dict__ or (self._place is not None and is_finished(self._place))
