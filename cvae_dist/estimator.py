"""The face for Python: one class with the reference's words and scikit-learn's words."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.exceptions import NotFittedError
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import validate_data

from cvae_dist import plot
from cvae_dist.config import TrainConfig, make_config
from cvae_dist.errors import InvalidInput, NotFitted
from cvae_dist.events import OnEvent, ignore
from cvae_dist.model.directory import is_finished, load_model, read_description
from cvae_dist.model.vae import VAE
from cvae_dist.store import Location, Moments, RowStore
from cvae_dist.store.reader import ArrayRows, Reader, RowReader
from cvae_dist.training.history import History
from cvae_dist.training.loop import fit, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    Rows = ArrayLike | str | os.PathLike[str] | RowStore
    Floats = NDArray[np.float32]

_STORE = "rows.zarr"
_BLOCK_BYTES = 32_000_000


class ModelNotTrained(NotFitted, NotFittedError):  # type: ignore[misc]
    """The estimator has no model yet; also what scikit-learn expects to be raised then."""


class CompressionVAE(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Reversible, generative embedding by a variational autoencoder.

    The constructor only stores its arguments. ``train`` (or ``fit``) does the work, ``embed`` (or
    ``transform``) maps rows to latents, ``decode`` (or ``inverse_transform``) maps latents back to rows.

    Parameters
    ----------
    X : array, DataFrame, path, URL or RowStore, optional
        Rows to train on: numbers of shape (n, n_features), or (n, ...) which is flattened to rows and
        remembered as the items' shape; a tree of .npy files, which is first written to ``rows.zarr`` in
        ``logdir``; or a store made by ``ingest``. ``fit(X)`` takes them as well.
    X_valid : array or DataFrame, optional
        Rows to validate on; without them a share of X is held out.
    train_valid_split : float
        Share of X to train on.
    dim_latent : int
        Number of latent dimensions.
    cells_encoder : sequence of int, optional
        Width of every encoder layer; the decoder mirrors it. Default: from the data.
    batch_size : int, optional
        Rows of one step. Default: 256, less for few rows.
    logdir : path or URL, optional
        Model directory. It is written by ``train``, which goes on from a checkpoint found there and does
        nothing where the same training is finished. ``CompressionVAE(logdir=...)`` restores a finished
        model without any data. Default: nothing is written.
    feature_normalization : bool or "auto"
        True: one scale per feature; False: one for all; "auto": from the data.
    tb_logging : bool
        Write TensorBoard scalars to ``logdir``.
    likelihood : {"auto", "gaussian", "bernoulli"}
        Distribution of a row given its latent.
    learning_rate, num_steps : optional
        Peak of the learning rate, gradient steps. Default: from the data.
    kl_warmup, ema_decay, grad_clip, test_every, checkpoint_every : optional
        See :class:`~cvae_dist.config.TrainConfig`.
    random_state : int, RandomState or None
        The same int gives the same model, bit for bit; None a different one each time.
    storage_options : mapping, optional
        Passed to fsspec for URLs.

    Attributes
    ----------
    model_ : VAE
        The trained model.
    history_ : list of dict
        One record per validation: ``step``, ``loss``, ``validation_loss``, ... in nats per row.
    item_shape_ : tuple of int
        Shape of one item before it was flattened to a row.
    n_features_in_ : int
        Features of a row.
    feature_names_in_ : array of str
        Names of the features where a DataFrame was given.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.random.default_rng(0).normal(size=(200, 8)).astype("float32")
    >>> z = CompressionVAE(dim_latent=2, num_steps=20).fit_transform(X)
    >>> z.shape, z.dtype
    ((200, 2), dtype('float32'))
    """

    def __init__(
        self,
        X: Rows | None = None,
        X_valid: ArrayLike | None = None,
        train_valid_split: float = 0.9,
        dim_latent: int = 2,
        *,
        cells_encoder: Sequence[int] | None = None,
        batch_size: int | None = None,
        logdir: str | os.PathLike[str] | None = None,
        feature_normalization: bool | Literal["auto"] = "auto",
        tb_logging: bool = False,
        likelihood: Literal["auto", "gaussian", "bernoulli"] = "auto",
        learning_rate: float | None = None,
        num_steps: int | None = None,
        kl_warmup: float = 0.2,
        ema_decay: float | None = None,
        grad_clip: float = 3.0,
        test_every: int | None = None,
        checkpoint_every: int = 500,
        random_state: int | np.random.RandomState | None = 0,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.X = X
        self.X_valid = X_valid
        self.train_valid_split = train_valid_split
        self.dim_latent = dim_latent
        self.cells_encoder = cells_encoder
        self.batch_size = batch_size
        self.logdir = logdir
        self.feature_normalization = feature_normalization
        self.tb_logging = tb_logging
        self.likelihood = likelihood
        self.learning_rate = learning_rate
        self.num_steps = num_steps
        self.kl_warmup = kl_warmup
        self.ema_decay = ema_decay
        self.grad_clip = grad_clip
        self.test_every = test_every
        self.checkpoint_every = checkpoint_every
        self.random_state = random_state
        self.storage_options = storage_options

    # ------------------------------------------------------------------------------------- training

    def train(
        self,
        learning_rate: float | None = None,
        num_steps: int | None = None,
        *,
        overwrite: bool = False,
        test_every: int | None = None,
        checkpoint_every: int | None = None,
        on_event: OnEvent = ignore,
    ) -> Self:
        """Train on the constructor's ``X``; what is given here wins over the constructor.

        With ``logdir`` an interrupted training goes on from its last checkpoint (also after Ctrl-C), and a
        finished one is restored.

        Parameters
        ----------
        overwrite : bool
            Discard what is in ``logdir`` and begin anew.
        on_event : callable
            Receives progress.

        Returns
        -------
        CompressionVAE
            Itself.

        Raises
        ------
        InvalidInput
            The rows or a setting cannot be used.
        SettingsChanged
            ``logdir`` was begun or finished with other settings or on other rows.
        """
        if self.X is None:
            raise InvalidInput("X is None, so there are no rows to train on: give them in CompressionVAE(X) or fit(X)")
        given = {
            "learning_rate": learning_rate,
            "num_steps": num_steps,
            "test_every": test_every,
            "checkpoint_every": checkpoint_every,
        }
        config = self._config({name: value for name, value in given.items() if value is not None})
        return self._fit(self.X, config, overwrite, on_event)

    def fit(self, X: Rows | None = None, y: object = None) -> Self:
        """Train on ``X``, by default the constructor's; ``y`` is ignored. See :meth:`train`."""
        rows = self.X if X is None else X
        return self.train() if rows is None else self._fit(rows, self._config({}), False, ignore)

    def _config(self, settings: dict[str, Any]) -> TrainConfig:
        own = {name: getattr(self, name) for name in TrainConfig.model_fields if hasattr(self, name)}
        if self.X_valid is not None:
            own["train_valid_split"] = 1.0  # all of X trains
        own["cells_encoder"] = None if self.cells_encoder is None else tuple(self.cells_encoder)
        return make_config(TrainConfig, {name: _plain(value) for name, value in own.items()} | self._seed() | settings)

    def _seed(self) -> dict[str, int]:
        if isinstance(self.random_state, int | np.integer):
            return {"seed": int(self.random_state)}
        return {"seed": int(check_random_state(self.random_state).randint(2**31))}

    def _fit(self, X: Any, config: TrainConfig, overwrite: bool, on_event: OnEvent) -> Self:
        if not _is_place(X):
            rows, item_shape = self._array(X, reset=True)
            self._fit_rows(ArrayRows(rows), Moments.of(rows), item_shape, config, overwrite, on_event)
            return self
        with self._store(X, self._directory, on_event) as store:
            if self._directory is not None and self.X_valid is None:
                self._train(store, config, overwrite, on_event)
            else:
                self.n_features_in_ = store.n_features
                moments = store.statistics()
                self._fit_rows(RowReader(store), moments, store.item_shape, config, overwrite, on_event)
        return self

    def _fit_rows(
        self,
        reader: Reader,
        moments: Moments,
        item_shape: tuple[int, ...],
        config: TrainConfig,
        overwrite: bool,
        on_event: OnEvent,
    ) -> None:
        valid = None if self.X_valid is None else ArrayRows(self._array(self.X_valid, reset=False)[0])
        self.model_, self.history_ = fit(
            reader,
            moments,
            item_shape,
            config,
            self._directory,
            on_event,
            overwrite=overwrite,
            validation=valid,
        )
        self.item_shape_ = item_shape

    def _train(self, store: RowStore, config: TrainConfig, overwrite: bool, on_event: OnEvent) -> None:
        """Train by the verb, which keeps the store's fingerprint in the model's lineage."""
        options = self.storage_options
        directory = cast(str, self._directory)
        result = train(store, directory, config, overwrite=overwrite, storage_options=options, on_event=on_event)
        if result.stopped_because == "interrupted":
            raise KeyboardInterrupt
        self._restore()

    # ------------------------------------------------------------------------------------ inference

    def embed(self, X: Any, batch_size: int = 2048) -> Floats:
        """Return the latents of rows: the posterior means.

        Parameters
        ----------
        X : array, DataFrame, path, URL or RowStore
            Rows as in the constructor.
        batch_size : int
            Rows computed at once; it bounds memory and changes no result.

        Returns
        -------
        (n, dim_latent) float32 array

        Raises
        ------
        NotFitted
            The model is not trained.
        InvalidInput
            The rows have another number of features, or values that are not finite numbers.
        """
        model = self._model()
        if not _is_place(X):
            return model.embed_rows(self._array(X, reset=False)[0], batch_size)
        with self._store(X, None) as store:
            self._check_width(store)
            step = max(1, _BLOCK_BYTES // (store.n_features * 8))
            starts = range(0, store.rows, step)
            blocks = (store.read(store.main, start, min(start + step, store.rows)) for start in starts)
            return np.concatenate([model.embed_rows(block, batch_size) for block in blocks])

    def decode(self, z: ArrayLike) -> NDArray[np.floating[Any]]:
        """Return the rows that latents stand for, in the data's units.

        Parameters
        ----------
        z : (n, dim_latent) array
            Finite numbers.

        Returns
        -------
        (n, n_features) float32 array
            float64 where float32 cannot hold both offset and digits of a feature.
        """
        model = self._model()
        with _as_invalid_input():
            latents = check_array(z, dtype=np.float32, input_name="z")
        return cast("NDArray[np.floating[Any]]", model.decode_rows(latents))

    def transform(self, X: Any) -> Floats:
        """Return the latents of rows; see :meth:`embed`."""
        return self.embed(X)

    def inverse_transform(self, X: ArrayLike) -> NDArray[np.floating[Any]]:
        """Return the rows that latents stand for; see :meth:`decode`."""
        return self.decode(X)

    # ------------------------------------------------------------------------------------- pictures

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
        labels : (n,) numbers or strings, optional
        categories : sequence of str, optional
            Names of the classes where the labels are indices.
        filename : str, optional
            Also write the picture there.

        Returns
        -------
        matplotlib.figure.Figure
        """
        figure = plot.scatter_latents(np.asarray(z), labels, categories=categories)
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
            Shape of one decoded row. Default: the shape of the items the model was trained on.
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
            model.decode_rows, model.dim_latent, shape or self.item_shape_,
            xy_range=xy_range, grid_size=grid_size, clip=clip, figsize=figsize,
        )  # fmt: skip
        return self._written(figure, filename)

    def _written(self, figure: Figure, filename: str | None) -> Figure:
        if filename is not None:
            plot.write_figure(figure, filename, self.storage_options)
        return figure

    # ------------------------------------------------------------------------------------ the model

    @property
    def _directory(self) -> str | None:
        return None if self.logdir is None else os.fspath(self.logdir)

    def _place(self) -> Location:
        return Location.of(cast(str, self._directory), self.storage_options)

    def _model(self) -> VAE:
        """Return the trained model, restoring it from ``logdir`` where this object did not train it."""
        if not hasattr(self, "model_"):
            if not self.__sklearn_is_fitted__():
                raise ModelNotTrained(self._not_trained())
            self._restore()
        return self.model_

    def _not_trained(self) -> str:
        where = "no logdir is given" if self.logdir is None else f"{self.logdir} holds no finished model"
        return (
            f"this {type(self).__name__} instance is not fitted yet ({where}), so it can neither embed nor "
            "decode: call train() or fit(X) first, or give the logdir of a trained model"
        )

    def _restore(self) -> None:
        place = self._place()
        self.model_ = load_model(place)
        self.n_features_in_ = self.model_.n_features
        lineage = read_description(place)["lineage"]
        self.item_shape_ = tuple(lineage.get("item_shape") or (self.n_features_in_,))
        self.history_ = History.read(place / "history.jsonl").records

    def __sklearn_is_fitted__(self) -> bool:
        if hasattr(self, "model_"):
            return True
        return self.logdir is not None and is_finished(self._place())

    @property
    def _n_features_out(self) -> int:
        return self._model().dim_latent

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags

    # ----------------------------------------------------------------------------------------- rows

    def _array(self, X: Any, reset: bool) -> tuple[NDArray[Any], tuple[int, ...]]:
        """Return rows (n, n_features) of real finite numbers in their own dtype, and the shape of an item."""
        with _as_invalid_input():
            items = X if hasattr(X, "shape") else np.asarray(X)
            item_shape = tuple(items.shape[1:]) if len(items.shape) > 2 else None
            flat = items if item_shape is None else np.reshape(items, (len(items), math.prod(item_shape)))
            rows = validate_data(self, flat, reset=reset, dtype="numeric")
        if rows.dtype == np.bool_:
            rows = rows.view(np.uint8)
        rows = rows.astype(rows.dtype.newbyteorder("="), copy=False)
        return rows, item_shape or (rows.shape[1],)

    @contextmanager
    def _store(self, X: Any, directory: str | None, on_event: OnEvent = ignore) -> Iterator[RowStore]:
        """Give the store that X is, or one of the .npy tree X, kept only if a ``directory`` is given."""
        if isinstance(X, RowStore):
            yield X
        elif (Location.of(X, self.storage_options) / "zarr.json").exists():
            yield RowStore.open(os.fspath(X), self.storage_options)
        else:
            from cvae_dist.ingest import ingest  # here, as arrays need no Dask

            with tempfile.TemporaryDirectory(prefix="cvae-dist-") as temporary:
                target = f"{directory or temporary}/{_STORE}"
                ingest(X, target, storage_options=self.storage_options, on_event=on_event)
                yield RowStore.open(target, self.storage_options)

    def _check_width(self, store: RowStore) -> None:
        if store.n_features != self._model().n_features:
            raise InvalidInput(
                f"{store.url} has {store.n_features} features, but {type(self).__name__} is expecting "
                f"{self._model().n_features} features as input: embed rows of the kind it was trained on"
            )


def _is_place(X: object) -> bool:
    return isinstance(X, str | os.PathLike | RowStore)


def _plain(value: Any) -> Any:
    """Return NumPy scalars, as a parameter search gives, as Python's."""
    return value.item() if isinstance(value, np.generic) else value


@contextmanager
def _as_invalid_input() -> Iterator[None]:
    """Give scikit-learn's messages, which name the values, as an error of this package."""
    try:
        yield
    except ValueError as error:
        raise InvalidInput(str(error)) from error
