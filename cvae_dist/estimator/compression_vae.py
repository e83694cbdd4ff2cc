"""The estimator: what it is given, and its training."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import numpy as np
from numpy.typing import ArrayLike
from sklearn.utils import check_random_state

from cvae_dist.config import LikelihoodName, Precision, TrainConfig, make_config
from cvae_dist.errors import InvalidInput, TrainingDiverged
from cvae_dist.estimator import lazy, reference
from cvae_dist.estimator.exporting import Exporting
from cvae_dist.estimator.generation import Generation
from cvae_dist.estimator.inputs import checked_array, is_place, store_of
from cvae_dist.estimator.pictures import Pictures
from cvae_dist.estimator.scoring import Scoring
from cvae_dist.events import OnEvent, ignore
from cvae_dist.store import Moments, RowStore
from cvae_dist.store.reader import ArrayRows, Reader, RowReader
from cvae_dist.training.fit import fit
from cvae_dist.training.loop import Trained
from cvae_dist.verbs.train import train

if TYPE_CHECKING:
    Rows = ArrayLike | str | os.PathLike[str] | RowStore


class CompressionVAE(Generation, Scoring, Pictures, Exporting):
    """Reversible, generative embedding by a variational autoencoder.

    The constructor only stores its arguments. ``train`` (or ``fit``) does the work, ``embed`` (or
    ``transform``) maps rows to latents, ``decode`` (or ``inverse_transform``) maps latents back to rows.

    Parameters
    ----------
    X : array, DataFrame, path, URL or RowStore, optional
        Rows to train on: numbers of shape (n, n_features), or (n, ...) which is flattened to rows and
        remembered as the items' shape; a tree of .npy files, which is first written to a store beside
        ``logdir``, named like it with ``.rows.zarr``, by ``ingest`` with its defaults: the first axis of a file
        counts rows unless it is the only one (for an image per file, ``ingest(..., rows_per_file="one")`` first);
        a Dask array, DataArray or Dataset, whose blocks are computed once, into a temporary file; or a store made
        by ``ingest``. ``fit(X)`` takes them as well.
    X_valid : array, DataFrame, path, URL or RowStore, optional
        Rows to validate on, as for X; 10,000 of them at most are looked at. Without them a share of X is held out.
    train_valid_split : float, optional
        Share of X to train on. Default: 0.9; 1 below 1,000 rows of no more features than ``dim_latent``.
    dim_latent : int
        Number of latent dimensions.
    iaf_flow_length : int, optional
        Steps of the inverse autoregressive flow of the posterior; 0: a Gaussian. Default: 5 for a Bernoulli
        likelihood and more than 2 latent dimensions, else 0.
    cells_encoder : sequence of int, optional
        Width of every encoder layer; the decoder mirrors it. Default: from the data.
    initializer, batch_size_test : optional
        Arguments of the reference, accepted and without effect, which the log says.
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
    likelihood : str
        Distribution of a row given its latent; "auto": from the data. See :class:`~cvae_dist.config.ModelConfig`.
    loss : {"bce", "mse"}, optional
        Another name for the likelihood "bernoulli" (binary cross-entropy) or "gaussian_unit" (squared error).
    kl_weight : float
        Weight of the KL term; 0: a plain autoencoder.
    residual_blocks : int, optional
        Residual blocks before the encoder's head and after the decoder's first layer.
    learning_rate, num_steps : optional
        Peak of the learning rate, gradient steps. Default: from the data.
    lr_scheduling : bool
        False: the learning rate stays constant after its warm-up, instead of falling along a cosine.
    kl_warmup, ema_decay, grad_clip, multi_start, precision, test_every, checkpoint_every : optional
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

    @reference.refusing_unknown
    def __init__(
        self,
        X: Rows | None = None,
        X_valid: Rows | None = None,
        train_valid_split: float | None = None,
        dim_latent: int = 2,
        iaf_flow_length: int | None = None,
        cells_encoder: Sequence[int] | None = None,
        initializer: Literal["orthogonal", "truncated_normal", "lecun_normal"] | None = None,
        batch_size: int | None = None,
        batch_size_test: int | None = None,
        logdir: str | os.PathLike[str] | None = None,
        feature_normalization: bool | Literal["auto"] = "auto",
        tb_logging: bool = False,
        *,
        likelihood: LikelihoodName = "auto",
        loss: Literal["bce", "mse"] | None = None,
        kl_weight: float = 1.0,
        residual_blocks: int | None = None,
        learning_rate: float | None = None,
        num_steps: int | None = None,
        lr_scheduling: bool = True,
        kl_warmup: float = 0.2,
        ema_decay: float | None = None,
        grad_clip: float = 3.0,
        multi_start: bool | Literal["auto"] = "auto",
        precision: Precision = "auto",
        test_every: int | None = None,
        checkpoint_every: int = 500,
        random_state: int | np.random.RandomState | None = 0,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.X = X
        self.X_valid = X_valid
        self.train_valid_split = train_valid_split
        self.dim_latent = dim_latent
        self.iaf_flow_length = iaf_flow_length
        self.cells_encoder = cells_encoder
        self.initializer = initializer
        self.batch_size = batch_size
        self.batch_size_test = batch_size_test
        self.logdir = logdir
        self.feature_normalization = feature_normalization
        self.tb_logging = tb_logging
        self.likelihood = likelihood
        self.loss = loss
        self.kl_weight = kl_weight
        self.residual_blocks = residual_blocks
        self.learning_rate = learning_rate
        self.num_steps = num_steps
        self.lr_scheduling = lr_scheduling
        self.kl_warmup = kl_warmup
        self.ema_decay = ema_decay
        self.grad_clip = grad_clip
        self.multi_start = multi_start
        self.precision = precision
        self.test_every = test_every
        self.checkpoint_every = checkpoint_every
        self.random_state = random_state
        self.storage_options = storage_options

    @reference.refusing_unknown
    def train(
        self,
        learning_rate: float | None = None,
        num_steps: int | None = None,
        dropout_keep_prob: float = 1.0,
        overwrite: bool = False,
        test_every: int | None = None,
        lr_scheduling: bool | None = None,
        lr_scheduling_steps: int = 5,
        lr_scheduling_factor: float = 5,
        lr_scheduling_min: float = 1e-5,
        checkpoint_every: int | None = None,
        *,
        on_event: OnEvent = ignore,
    ) -> Self:
        """Train on the constructor's ``X``; what is given here wins over the constructor.

        With ``logdir`` an interrupted training goes on from its last checkpoint (also after Ctrl-C), and a
        finished one is restored. A finished training, of ``logdir`` or of this object, goes on where ``num_steps`` is
        larger than it was and all else is the same: from its best weights and at its last step, with a fresh
        optimiser and the learning rate that the longer training has there, after a new warm-up. That is not, to the
        bit, the model of a training that was longer from the start.

        Parameters
        ----------
        learning_rate, num_steps, test_every, lr_scheduling, checkpoint_every : optional
            As in the constructor. ``num_steps`` counts from the very first step, also when a training goes on.
        overwrite : bool
            Discard the model that is there, and begin anew.
        dropout_keep_prob, lr_scheduling_steps, lr_scheduling_factor, lr_scheduling_min : optional
            Arguments of the reference, accepted and without effect, which the log says.
        on_event : callable
            Receives progress.

        Returns
        -------
        CompressionVAE
            Itself.

        Raises
        ------
        InvalidInput
            The rows or a setting cannot be used, or an argument is unknown.
        SettingsChanged
            ``logdir`` was begun or finished with other settings (but for a larger ``num_steps``) or on other rows.
        KeyboardInterrupt
            The training was interrupted. With ``logdir`` it is saved, and goes on when called again.
        TrainingDiverged
            The loss ran away or was not finite, at low learning rates too; the last good weights are the model.
        """
        if self.X is None:
            raise InvalidInput("X is None, so there are no rows to train on: give them in CompressionVAE(X) or fit(X)")
        given = dict(learning_rate=learning_rate, num_steps=num_steps)
        given |= dict(test_every=test_every, lr_scheduling=lr_scheduling, checkpoint_every=checkpoint_every)
        config = self._config({name: value for name, value in given.items() if value is not None})
        asked = {
            "dropout_keep_prob": dropout_keep_prob,
            "lr_scheduling_steps": lr_scheduling_steps,
            "lr_scheduling_factor": lr_scheduling_factor,
            "lr_scheduling_min": lr_scheduling_min,
        }
        parameters = signature(CompressionVAE.train).parameters
        reference.note_without_effect({k: value for k, value in asked.items() if value != parameters[k].default})
        if overwrite:
            self.__dict__.pop("_trained", None)
        return self._fit(self.X, config, overwrite, on_event)

    def fit(self, X: Rows | None = None, y: object = None) -> Self:
        """Train on ``X``, by default the constructor's; ``y`` is ignored. See :meth:`train`.

        As in scikit-learn, a model in memory is never gone on with.
        """
        self.__dict__.pop("_trained", None)
        rows = self.X if X is None else X
        return self.train() if rows is None else self._fit(rows, self._config({}), False, ignore)

    def _config(self, settings: dict[str, Any]) -> TrainConfig:
        own = {name: getattr(self, name) for name in TrainConfig.model_fields if hasattr(self, name)}
        own = {name: _plain(value) for name, value in own.items() if value is not None}
        if self.X_valid is not None:
            own["train_valid_split"] = 1.0  # all of X trains
        if self.loss is not None:
            own["loss"] = self.loss
        if isinstance(self.cells_encoder, Iterable):
            own["cells_encoder"] = tuple(self.cells_encoder)
        return make_config(TrainConfig, own | self._seed() | settings)

    def _seed(self) -> dict[str, int]:
        if isinstance(self.random_state, int | np.integer):
            return {"seed": int(self.random_state)}
        return {"seed": int(check_random_state(self.random_state).randint(2**31))}

    def _fit(self, X: Any, config: TrainConfig, overwrite: bool, on_event: OnEvent) -> Self:
        asked = {"initializer": self.initializer, "batch_size_test": self.batch_size_test}
        reference.note_without_effect({name: value for name, value in asked.items() if value is not None})
        self.__dict__.pop("priors_", None)  # they belong to the latents of an earlier model
        if lazy.is_labelled_or_lazy(X):
            with lazy.computed(X) as items:
                return self._fit_array(items, config, overwrite, on_event)
        if not is_place(X):
            return self._fit_array(X, config, overwrite, on_event)
        with store_of(X, self._directory, self.storage_options, on_event) as store:
            if self._directory is not None and self.X_valid is None:
                self._train(store, config, overwrite, on_event)
            else:
                self.n_features_in_ = store.n_features
                moments = store.statistics()
                self._fit_rows(RowReader(store), moments, store.item_shape, config, overwrite, on_event)
        return self

    def _fit_array(self, X: Any, config: TrainConfig, overwrite: bool, on_event: OnEvent) -> Self:
        rows, item_shape = checked_array(self, X, reset=True)
        self._fit_rows(ArrayRows(rows), Moments.of(rows), item_shape, config, overwrite, on_event)
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
        directory = self._place() if self._directory is not None else None
        self.item_shape_ = item_shape
        try:
            with self._validation_rows() as valid:
                self._trained = fit(
                    reader, moments, item_shape, config, directory, on_event,
                    overwrite=overwrite, validation=valid, earlier=getattr(self, "_trained", None),
                )  # fmt: skip
        except TrainingDiverged as error:
            if isinstance(error.trained, Trained):
                self.model_, self.history_ = error.trained.vae, error.trained.history
            raise
        self.model_, self.history_ = self._trained.vae, self._trained.history
        if self._directory is not None:
            self._keep_feature_names()

    @contextmanager
    def _validation_rows(self) -> Iterator[Reader | None]:
        """Give the rows of ``X_valid``, wherever they are."""
        if self.X_valid is None:
            yield None
        elif is_place(self.X_valid):
            with store_of(self.X_valid, None, self.storage_options) as store:
                self._check_width(store)
                yield RowReader(store)
        else:
            with self._in_memory(self.X_valid) as rows:
                yield ArrayRows(rows)

    def _train(self, store: RowStore, config: TrainConfig, overwrite: bool, on_event: OnEvent) -> None:
        """Train by the verb, which keeps the store's fingerprint in the model's lineage."""
        options = self.storage_options
        directory = cast(str, self._directory)
        result = train(store, directory, config, overwrite=overwrite, storage_options=options, on_event=on_event)
        if result.stopped_because == "interrupted":
            raise KeyboardInterrupt
        self._restore()


def _plain(value: Any) -> Any:
    """Return NumPy scalars, as a parameter search gives, as Python's."""
    return value.item() if isinstance(value, np.generic) else value
