"""The estimator: its constructor, its training, and scikit-learn's words."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy, deepcopy
from dataclasses import KW_ONLY, dataclass, replace
from inspect import signature
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin

from cvae_dist.config import Device, LikelihoodName, Precision, TrainConfig, make_config
from cvae_dist.errors import InvalidInput, TrainingDiverged
from cvae_dist.estimator import lazy, reference
from cvae_dist.estimator.arrays import checked_rows, random_state_of
from cvae_dist.estimator.fitted import Fitted, Latents
from cvae_dist.estimator.generation import Floats
from cvae_dist.estimator.inputs import GivenRows, RowsLike, is_place, store_of
from cvae_dist.estimator.saved import keep_feature_names
from cvae_dist.events import OnEvent
from cvae_dist.progress import Display, open_python_display
from cvae_dist.store import Moments
from cvae_dist.store.reader import ArrayRows
from cvae_dist.training.fit import fit
from cvae_dist.training.loop import Trained
from cvae_dist.training.prepare import TrainingData
from cvae_dist.training.world import require_no_ranks


@reference.strict_constructor
@dataclass(eq=False, repr=False)  # scikit-learn has its own
class CompressionVAE(ClassNamePrefixFeaturesOutMixin, TransformerMixin, Fitted):  # type: ignore[misc]
    """Reversible, generative embedding by a variational autoencoder.

    The constructor only stores its arguments. ``train`` (or ``fit``) does the work, ``embed`` (or ``transform``) maps
    rows to latents, ``decode`` (or ``inverse_transform``) maps latents back to rows.

    Parameters
    ----------
    X : array, DataFrame, path, URL or RowStore, optional
        Rows to train on; ``fit(X)`` takes the same. Numbers have the shape (n, n_features), or (n, ...): then items are
        flattened to rows, and their shape is remembered. The blocks of a Dask array, DataArray or Dataset are computed
        once, into a temporary file. A path or URL is that of a store made by ``ingest``, or of a tree of .npy files.
        Such a tree is first ingested, into a store beside ``logdir`` that is named like it with ``.rows.zarr``, or
        else a temporary one. There the first axis of a file counts rows, unless it is the only one; for an image per
        file call ``ingest(..., rows_per_file="one")`` first.
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
        Arguments of the reference. They are accepted and have no effect, which the log says.
    batch_size : int, optional
        Rows of one step. Default: 256, less for few rows.
    logdir : path or URL, optional
        Model directory, which ``train`` writes. It goes on from a checkpoint that it finds there, and does nothing
        where the same training is finished. ``CompressionVAE(logdir=...)`` restores a finished model without any data.
        Default: nothing is written.
    feature_normalization : bool or "auto"
        True: one scale per feature; False: one for all; "auto": from the data.
    tb_logging : bool
        Write TensorBoard scalars to ``logdir``.
    likelihood : str
        Distribution of a row given its latent; "auto": from the data. See :class:`~cvae_dist.config.ModelConfig`.
    loss : {"bce", "mse"}, optional
        Another name for the likelihood "bernoulli" (binary cross-entropy) or "gaussian_unit" (squared error).
    iaf_context, iaf_cells : int, optional
        Values that tell the flow about a row; width of the hidden layer of its steps. Default: from ``dim_latent``.
    kl_weight : float
        Weight of the KL term; 0: a plain autoencoder.
    residual_blocks : int, optional
        Residual blocks before the encoder's head and after the decoder's first layer.
    learning_rate, num_steps : optional
        Peak of the learning rate, gradient steps. Default: from the data.
    lr_scheduling : bool
        False: the learning rate stays constant after its warm-up, instead of falling along a cosine.
    kl_warmup, ema_decay, encoder_decay, grad_clip, multi_start, precision : optional
        See :class:`~cvae_dist.config.TrainConfig`.
    device : {"auto", "cpu", "cuda"}
        Where training computes. Default: a card where torch sees one. The trained model is on the CPU.
    compile : bool
        Let torch compile the training step first.
    test_every, checkpoint_every, checkpoint_minutes, keep_checkpoints, buffer_bytes, max_time : optional
        See :class:`~cvae_dist.config.TrainConfig`.
    mlflow_logging : bool
        Record the training in MLflow, where its own variables say, such as ``MLFLOW_TRACKING_URI``.
    random_state : int, RandomState, Generator or None
        The same int gives the same model, on the CPU bit for bit; None gives a different one each time.
    verbose : bool
        Show the progress of trainings: a bar on a terminal or in a notebook; elsewhere log records of level INFO, one
        for each validation.
    storage_options : Mapping, optional
        Options of the file system, for fsspec.

    Attributes
    ----------
    model_ : VAE
        The trained model.
    history_ : list of dict
        One record per validation: ``step``, ``loss``, ``validation_loss``, ..., as
        :mod:`cvae_dist.training.history` lists them.
    stopped_because_ : {"finished", "no improvement", "interrupted", "out of time", "diverged"}
        How the training ended. The model of one that was interrupted, or out of time, has the best weights until then.
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

    X: RowsLike | None = None
    X_valid: RowsLike | None = None
    train_valid_split: float | None = None
    dim_latent: int = 2
    iaf_flow_length: int | None = None
    cells_encoder: Sequence[int] | None = None
    initializer: Literal["orthogonal", "truncated_normal", "lecun_normal"] | None = None
    batch_size: int | None = None
    batch_size_test: int | None = None
    logdir: str | os.PathLike[str] | None = None
    feature_normalization: bool | Literal["auto"] = "auto"
    tb_logging: bool = False
    _: KW_ONLY
    likelihood: LikelihoodName = "auto"
    loss: Literal["bce", "mse"] | None = None
    iaf_context: int | None = None
    iaf_cells: int | None = None
    kl_weight: float = 1.0
    residual_blocks: int | None = None
    learning_rate: float | None = None
    num_steps: int | None = None
    lr_scheduling: bool = True
    kl_warmup: float = 0.2
    ema_decay: float | None = None
    encoder_decay: float | None = None
    grad_clip: float = 3.0
    multi_start: bool | Literal["auto"] = "auto"
    precision: Precision = "auto"
    device: Device = "auto"
    compile: bool = False
    test_every: int | None = None
    checkpoint_every: int = 500
    checkpoint_minutes: float = 10
    keep_checkpoints: int = 2
    buffer_bytes: int = 256_000_000
    max_time: float | None = None
    mlflow_logging: bool = False
    random_state: int | np.random.RandomState | np.random.Generator | None = 0
    verbose: bool = True
    storage_options: Mapping[str, Any] | None = None

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
        verbose: bool | None = None,
        on_event: OnEvent | None = None,
    ) -> Self:
        """Train on the constructor's ``X``; what is given here wins over the constructor.

        With ``logdir`` an interrupted training goes on from its last checkpoint (also after Ctrl-C, or when its
        ``max_time`` was over), and a finished one is restored. A finished training, of ``logdir`` or of this object,
        goes on where only ``num_steps`` is larger than it was: from its best weights and at its last step, with a
        fresh optimiser and the learning rate that the longer training has there, after a new warm-up. The model is
        not, to the bit, that of a training that was longer from the start.

        Parameters
        ----------
        learning_rate, num_steps, test_every, lr_scheduling, checkpoint_every : optional
            As in the constructor. ``num_steps`` counts from the very first step, also when a training goes on.
        overwrite : bool
            Discard the model that is there, and begin anew.
        dropout_keep_prob, lr_scheduling_steps, lr_scheduling_factor, lr_scheduling_min : optional
            Arguments of the reference. They are accepted and have no effect, which the log says.
        verbose : bool, optional
            As in the constructor.
        on_event : callable, optional
            Listener for progress; then nothing else shows it.

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
            The training was interrupted. The best weights so far are the model, and ``stopped_because_`` is
            "interrupted". With ``logdir`` the training goes on when called again.
        TrainingDiverged
            The loss ran away or was not finite, at low learning rates too; the last good weights are the model.
        """
        given = dict(learning_rate=learning_rate, num_steps=num_steps, test_every=test_every)
        config = self._config(**given, lr_scheduling=lr_scheduling, checkpoint_every=checkpoint_every)
        reference.note_without_effect(
            CompressionVAE.train,
            dropout_keep_prob=dropout_keep_prob,
            lr_scheduling_steps=lr_scheduling_steps,
            lr_scheduling_factor=lr_scheduling_factor,
            lr_scheduling_min=lr_scheduling_min,
        )
        if overwrite:
            self.__dict__.pop("_trained", None)
        verbose = self.verbose if verbose is None else verbose
        return self._fit(self.X, config, overwrite, verbose, on_event)

    def fit(self, X: RowsLike | None = None, y: object = None) -> Self:
        """Train on ``X``, by default the constructor's; ``y`` is ignored. See :meth:`train`.

        As in scikit-learn, training begins anew, but for what ``logdir`` holds.
        """
        self.__dict__.pop("_trained", None)
        return self._fit(self.X if X is None else X, self._config(), overwrite=False, verbose=self.verbose)

    def transform(self, X: Any) -> Latents:
        """Return the latents of rows; see :meth:`embed`."""
        return self.embed(X)

    def inverse_transform(self, X: ArrayLike) -> Floats:
        """Return the rows that latents stand for; see :meth:`decode`."""
        return self.decode(X)

    @property
    def _n_features_out(self) -> int:
        return self._model().dim_latent

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags

    def _config(self, **given: Any) -> TrainConfig:
        """Return the settings, every field of TrainConfig by its name but for the seed; what is ``given`` wins."""
        own = {name: _plain(getattr(self, name)) for name in TrainConfig.model_fields if name != "seed"}
        own |= {"seed": self._seed(), "loss": self.loss}
        if self.X_valid is not None:
            own["train_valid_split"] = 1.0  # all of X trains
        if isinstance(self.cells_encoder, Iterable):
            own["cells_encoder"] = tuple(self.cells_encoder)
        return make_config(TrainConfig, _known(own) | _known(given))

    def _seed(self) -> int:
        if isinstance(self.random_state, int | np.integer):
            return int(self.random_state)
        return int(random_state_of(self.random_state).randint(2**31))

    def _fit(
        self, X: Any, config: TrainConfig, overwrite: bool, verbose: bool, on_event: OnEvent | None = None
    ) -> Self:
        if X is None:
            raise InvalidInput("X is None, so there are no rows to train on: give them in CompressionVAE(X) or fit(X)")
        require_no_ranks()
        reference.note_without_effect(
            CompressionVAE, initializer=self.initializer, batch_size_test=self.batch_size_test
        )
        self.__dict__.pop("priors_", None)  # they belong to the latents of an earlier model
        with _listener(verbose, on_event) as listener, self._data(X, listener) as data:
            self._fit_data(data, config, overwrite, listener)
        if self._trained.figures.stopped_because == "interrupted":
            raise KeyboardInterrupt
        return self

    @contextmanager
    def _data(self, X: Any, on_event: OnEvent) -> Iterator[TrainingData]:
        """Give the rows to train on, and those to validate on."""
        valid = nullcontext() if self.X_valid is None else GivenRows(self, self.X_valid).reader()
        if not is_place(X):
            with lazy.computed(X) as items:
                rows, self.item_shape_ = checked_rows(self, items, reset=True)
                with valid as validation:
                    yield TrainingData.in_memory(ArrayRows(rows), Moments.of(rows), self.item_shape_, validation)
            return
        with store_of(X, self.storage_options, self.logdir, on_event) as store:
            whole = TrainingData.of(store)
            self.n_features_in_, self.item_shape_ = store.n_features, store.item_shape
            self.__dict__.pop("feature_names_in_", None)
            if self.logdir is not None and self.X_valid is None:
                yield whole  # the model's lineage names the store
                return
            with valid as validation:
                data = TrainingData.in_memory(whole.reader, whole.moments, whole.item_shape, validation)
                yield replace(data, store=store)

    def _fit_data(self, data: TrainingData, config: TrainConfig, overwrite: bool, on_event: OnEvent) -> None:
        earlier = getattr(self, "_trained", None)
        try:
            self._trained = fit(data, config, self._place, on_event, overwrite=overwrite, earlier=earlier)
        except TrainingDiverged as error:
            if isinstance(error.trained, Trained):
                self._take(error.trained)
            raise
        self._take(self._trained)
        if self._place is not None:
            keep_feature_names(self._place, getattr(self, "feature_names_in_", None))

    def _take(self, trained: Trained) -> None:
        if trained.figures.steps:  # weights that were never trained are no model
            self.model_, self.history_ = trained.vae, trained.history
            self.stopped_because_ = trained.figures.stopped_because

    def __repr__(self, N_CHAR_MAX: int = 700) -> str:
        """Return the arguments that are not the defaults; of rows only what they are."""
        given = {name: (getattr(self, name), known.default) for name, known in signature(type(self)).parameters.items()}
        shown = [f"{name}={_shown(value)}" for name, (value, default) in given.items() if not _is(value, default)]
        return f"{type(self).__name__}({', '.join(shown)})"

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle holds: no rows, as they may be many; a path to them stays."""
        state: dict[str, Any] = super().__getstate__()
        return state | {name: None for name in ("X", "X_valid") if not is_place(state.get(name))}

    def __copy__(self) -> Self:
        """Return a copy with the same rows, which a pickle would lose."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a copy with a copy of the rows."""
        twin = copy(self)
        twin.__dict__.update(deepcopy(self.__dict__, memo))
        return twin


@contextmanager
def _listener(verbose: bool, on_event: OnEvent | None) -> Iterator[OnEvent]:
    """Give what listens to a training: the caller's own listener, or what shows it to a person."""
    if on_event is not None:
        yield on_event
        return
    with open_python_display() if verbose else Display() as display:
        yield display


def _shown(value: Any) -> str:
    """Return the repr of an argument; of an array its kind, shape and type."""
    if not hasattr(value, "shape"):
        return reprlib.repr(value)
    dtype = f" {value.dtype}" if hasattr(value, "dtype") else ""
    return f"<{type(value).__name__} {tuple(value.shape)}{dtype}>"


def _is(value: Any, default: Any) -> bool:
    """Whether an argument is the default; arrays are not compared."""
    return value is default or (type(value) is type(default) and bool(value == default))


def _known(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def _plain(value: Any) -> Any:
    """Return NumPy scalars, as a parameter search gives, as Python's."""
    return value.item() if isinstance(value, np.generic) else value
