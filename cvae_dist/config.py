"""Settings of the model and of its training: names, limits and automatic values."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from cvae_dist.errors import InvalidInput, suggestion

Width = Annotated[int, Field(ge=1, le=65_536)]
ComputePrecision = Literal["float32", "bf16"]
Precision = Literal["auto", "float32", "bf16"]
Device = Literal["auto", "cpu", "cuda"]
LikelihoodName = Literal[
    "auto",
    "gaussian",
    "gaussian_per_feature",
    "gaussian_unit",
    "student_t",
    "bernoulli",
    "continuous_bernoulli",
]
_LIKELIHOOD_OF_LOSS = {"bce": "bernoulli", "mse": "gaussian_unit"}


class ModelConfig(BaseModel):
    """What the model is: its size and how it treats the data."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dim_latent: int = Field(2, ge=1, le=4096, description="Number of latent dimensions.")
    cells_encoder: tuple[Width, ...] | None = Field(
        None,
        description="Width of every encoder layer; the decoder mirrors it. Default: from rows and features, a single "
        "layer for vectors such as embeddings from 10,000 rows and 32 latent dimensions on. Twice the "
        "width costs two to three times the time, and buys detail where latents have 16 dimensions or more.",
    )
    iaf_flow_length: int | None = Field(
        None,
        ge=0,
        le=64,
        description="Autoregressive steps of the posterior; 0: a Gaussian. "
        "Default: 5 for a Bernoulli likelihood and more than 2 latent dimensions, else 0.",
    )
    iaf_context: Width | None = Field(
        None, description="Values that tell the flow about the row. Default: 8 for each latent dimension, at most 64."
    )
    iaf_cells: Width | None = Field(
        None,
        description="Width of the hidden layer of every step of the flow. "
        "Default: iaf_context, or twice dim_latent where that is more.",
    )
    kl_weight: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="Weight of the KL term; 0: a plain autoencoder, without noise."
    )
    residual_blocks: int | None = Field(
        None,
        ge=0,
        le=64,
        description="Residual blocks before the encoder's head and after the decoder's first layer. "
        "Default: 2 from 10,000 rows on; none where cells_encoder is given, nor for vectors such as embeddings.",
    )
    likelihood: LikelihoodName = Field(
        "auto",
        description="Distribution of a row given its latent. 'gaussian' learns one sigma, 'gaussian_per_feature' one "
        "per feature, 'gaussian_unit' none (the squared error); 'student_t' suits heavy tails; 'bernoulli' (the binary "
        "cross-entropy) and 'continuous_bernoulli' scale to [0, 1].",
    )
    feature_normalization: bool | Literal["auto"] = Field(
        "auto",
        description="True: a scale per feature (mixed units); False: one for all (images, embeddings). Default: one "
        "for all where the standard deviations of the features lie close together, or those of neighbours do.",
    )

    @model_validator(mode="before")
    @classmethod
    def name_likelihood_of_loss(cls, settings: Any) -> Any:
        """Take ``loss="bce"`` or ``"mse"`` for the likelihood whose negative logarithm it is."""
        if not isinstance(settings, Mapping) or "loss" not in settings:
            return settings
        loss, likelihood = settings["loss"], settings.get("likelihood", "auto")
        named = _LIKELIHOOD_OF_LOSS.get(loss)
        if named is None or likelihood not in ("auto", named):
            known = " and ".join(f"loss={name!r} is likelihood={same!r}" for name, same in _LIKELIHOOD_OF_LOSS.items())
            raise ValueError(f"loss={loss!r} and likelihood={likelihood!r} cannot be used together: {known}")
        return {name: value for name, value in settings.items() if name != "loss"} | {"likelihood": named}


class TrainConfig(ModelConfig):
    """How the model is trained. ``None`` means: chosen from the data by :meth:`resolve`."""

    batch_size: int | None = Field(None, ge=1, description="Rows of one step. Default: 256, less for few rows.")
    num_steps: int | None = Field(None, ge=1, description="Gradient steps. Default: 20 epochs within 3,000 to 50,000.")
    learning_rate: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Peak of the schedule. Default: 3e-3 * sqrt(batch_size / 256), at most 8e-3; "
        "2e-3 instead of 3e-3 for one or two latent dimensions of 10,000 rows or more.",
    )
    lr_scheduling: bool = Field(
        True, description="Let the learning rate fall along a cosine; otherwise it stays constant after its warm-up."
    )
    kl_warmup: float = Field(0.2, ge=0, le=1, description="Share of the steps over which the KL weight grows to 1.")
    ema_decay: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Decay of the averaged weights. Default: 0.999, or 0.99 below 5,000 steps.",
    )
    grad_clip: float = Field(3.0, gt=0, description="Gradients are clipped at this multiple of their running norm.")
    encoder_decay: float | None = Field(
        None,
        ge=0,
        description="Weight decay of the encoder: a larger one bends the rows less, and keeps more of their "
        "neighbours. Default: of 10,000 vectors or more, such as embeddings, 1 in 3 dimensions or more and 3 in 32 or "
        "more; else 1e-4.",
    )
    train_valid_split: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of the rows to train on; the rest (at most 10,000 rows) validates. Default: 0.9; 1 below "
        "1,000 rows that have no more features than there are latent dimensions.",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the initial weights, the row order and the noise.")
    multi_start: bool | Literal["auto"] = Field(
        "auto",
        description="Begin from the best of several starts, manifold coordinates among them. Default: for up to 20,000 "
        "rows of up to 16 features, and one or two latent dimensions.",
    )
    precision: Precision = Field(
        "auto",
        description="Matrix products of training in float32 or bf16. Default: bf16 where a short timing shows a gain.",
    )
    device: Device = Field(
        "auto", description="Where training computes; cuda: a card of NVIDIA. Default: a card where torch sees one."
    )
    compile: bool = Field(
        False, description="Let torch compile the training step first, which takes a minute and needs a C++ compiler."
    )
    test_every: int | None = Field(
        None, ge=1, description="Steps between validations. Default: grows with the steps done so far."
    )
    checkpoint_every: int = Field(500, ge=1, description="Steps between checkpoints.")
    checkpoint_minutes: float = Field(
        10, gt=0, description="Minutes after which a checkpoint is due too, however few steps were done."
    )
    keep_checkpoints: int = Field(
        2, ge=1, description="How many of the last checkpoints stay; each holds the best weights so far, too."
    )
    max_time: float | None = Field(
        None,
        gt=0,
        description="Minutes after which the training stops, with a checkpoint; the same command goes on.",
    )
    buffer_bytes: int = Field(256_000_000, ge=1, description="Memory of the shuffling loader, in bytes.")
    tb_logging: bool = Field(True, description="Write TensorBoard scalars to MODEL/logs, on a local disk.")
    mlflow_logging: bool = Field(
        False, description="Record the training in MLflow, where its own variables say (MLFLOW_TRACKING_URI)."
    )

    def resolve(self, n_rows: int, n_features: int, *, vectors: bool = False) -> "TrainConfig":
        """Return the settings with every value that follows from the shape of the data filled in.

        ``vectors`` says whether the rows are like embeddings, see :func:`cvae_dist.model.scaling.are_vectors`.
        ``likelihood`` and ``feature_normalization`` stay as they are: they follow from the statistics.
        """
        if n_rows == 0:
            raise InvalidInput("there are no rows to train on; ingest some rows first")
        split = self.train_valid_split or _train_valid_split(n_rows, n_features, self.dim_latent)
        n_train = n_rows - _validation_count(n_rows, split)
        batch_size = min(self.batch_size or _batch_size(n_rows), n_train)
        num_steps = self.num_steps or max(3000, min(50_000, _EPOCHS * math.ceil(n_train / batch_size)))
        return self.model_copy(
            update={
                "train_valid_split": split,
                "residual_blocks": self._residual_blocks(n_rows, vectors),
                "cells_encoder": self.cells_encoder or _cells_encoder(n_rows, n_features, self.dim_latent, vectors),
                "batch_size": batch_size,
                "num_steps": num_steps,
                "learning_rate": self.learning_rate or self._learning_rate(n_rows, batch_size),
                "encoder_decay": self._encoder_decay(n_rows, vectors),
                "ema_decay": (0.99 if num_steps < 5000 else 0.999) if self.ema_decay is None else self.ema_decay,
            }
        )

    def _learning_rate(self, n_rows: int, batch_size: int) -> float:
        gentle = self.dim_latent <= 2 and n_rows >= _MANY_ROWS
        return min(8e-3, (2e-3 if gentle else 3e-3) * math.sqrt(batch_size / 256))

    def _encoder_decay(self, n_rows: int, vectors: bool) -> float:
        """Return the one asked for, or the automatic one.

        Without it the encoder goes on to bend vectors while they are trained on. That gains hardly any likelihood, and
        costs neighbours: a tenth of them in 64 dimensions, 1 to 6 % in 8 and 16.
        """
        if self.encoder_decay is not None:
            return self.encoder_decay
        if not vectors or n_rows < _MANY_ROWS or self.dim_latent <= _FEW_DIMENSIONS:
            return WEIGHT_DECAY
        return 3.0 if self.dim_latent >= _MANY_DIMENSIONS else 1.0

    def _residual_blocks(self, n_rows: int, vectors: bool) -> int:
        """Return the number asked for, or the automatic one.

        Blocks bend the map. Images gain likelihood by it; vectors too, but they lose neighbours.
        """
        if self.residual_blocks is not None:
            return self.residual_blocks
        bends = self.dim_latent <= _FEW_DIMENSIONS or not vectors
        return 2 if bends and self.cells_encoder is None and n_rows >= _MANY_ROWS else 0

    def validation_count(self, n_rows: int) -> int:
        """Return how many rows validate: the share asked for or resolved, at most 10,000, and not all."""
        return _validation_count(n_rows, self.train_valid_split or _TRAIN_VALID_SPLIT)


MAX_VALIDATION_ROWS = 10_000
WEIGHT_DECAY = 1e-4  # of all weights
_TRAIN_VALID_SPLIT = 0.9
_FEWEST_TO_SPARE = 1000  # rows, a tenth of which can be missed where a latent could hold the whole row
_EPOCHS = 20  # of a long training: later ones improve little for their time
_MANY_ROWS = 10_000  # from which residual blocks gain more than they cost
_FEW_DIMENSIONS = 2  # of latents, which the networks must bend the rows to fit
_MANY_DIMENSIONS = 32  # in which hardly anything is left to bend: with 64 one layer is better, with 16 two

# These may differ between two runs on one model directory: they leave every weight as it is, ``device`` and ``compile``
# but for rounding. The order of the rows, which depends on ``buffer_bytes``, stays that of the first run, as the
# checkpoints hold it.
WITHOUT_EFFECT_ON_WEIGHTS = frozenset(
    {
        *("buffer_bytes", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "max_time"),
        *("compile", "device", "mlflow_logging", "tb_logging"),
    }
)


def _train_valid_split(n_rows: int, n_features: int, dim_latent: int) -> float:
    """Return the automatic share to train on.

    A latent as wide as a row leaves nothing to fold or to leave out, so few rows are not overfitted; and rows held out
    would be missed: the mean of 90 of 100 rows differs from that of all by a thirtieth of their standard deviation.
    """
    everything = dim_latent >= n_features and n_rows < _FEWEST_TO_SPARE
    return 1.0 if everything else _TRAIN_VALID_SPLIT


def _validation_count(n_rows: int, split: float) -> int:
    return min(round(n_rows * (1 - split)), MAX_VALIDATION_ROWS, max(n_rows - 1, 0))


def _batch_size(n_rows: int) -> int:
    return 256 if n_rows >= 2560 else max(16, n_rows // 10)


def _cells_encoder(n_rows: int, n_features: int, dim_latent: int, vectors: bool) -> tuple[int, ...]:
    """Return automatic widths: the next power of two from 16 sqrt(n_features), less for few rows.

    Vectors spend their variance on many more directions than images do: the power below would be narrower than a row of
    300 to 500 features, and cost an embedding a tenth of its neighbours. Many latent dimensions find more of them
    behind a single layer, twice as wide, which takes less time than two layers and blocks.
    """
    exponent = min(max(math.ceil(math.log2(16 * math.sqrt(n_features))), 8), 10)
    width = min(2**exponent, max(64, n_rows // 4))
    if vectors and n_rows >= _MANY_ROWS and dim_latent >= _MANY_DIMENSIONS:
        return (2 * width,)
    second = max(width // 2, 64, min(4 * dim_latent, width))
    return (width, second, width // 2) if n_rows > 1_000_000 else (width, second)


Config = TypeVar("Config", bound=ModelConfig)


def make_config(kind: type[Config], settings: Mapping[str, Any]) -> Config:
    """Build a config from plain values.

    Raises
    ------
    InvalidInput
        An option is unknown or a value is out of its range; all of them are named.
    """
    try:
        return kind(**settings)
    except ValidationError as error:
        raise invalid_settings(error, kind) from None


def invalid_settings(
    error: ValidationError, kind: type[BaseModel], sources: Mapping[str, str] | None = None
) -> InvalidInput:
    """Turn pydantic's error into one readable line per setting, after what gave it where ``sources`` names that."""
    details: dict[str, str] = {}
    for detail in error.errors():
        name = str(detail["loc"][0]) if detail["loc"] else "settings"
        source = (sources or {}).get(name)
        details.setdefault(name, (f"{source}: " if source else "") + _explain(name, detail, kind))
    return InvalidInput("\n".join(details.values()))


def named_as_arguments(options: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the options of a file by the names of their arguments: ``dim-latent`` there is ``dim_latent``.

    Raises
    ------
    InvalidInput
        An option is there in both spellings.
    """
    named: dict[str, Any] = {}
    for spelling, value in options.items():
        name = str(spelling).replace("-", "_")
        if name in named:
            raise InvalidInput(f"{name!r} is given twice, also as {name.replace('_', '-')!r}; keep one of them")
        named[name] = value
    return named


def _explain(name: str, detail: ErrorDetails, kind: type[BaseModel]) -> str:
    if not detail["loc"]:
        return detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        return f"unknown option {name!r}: {suggestion(name, kind.model_fields)}"
    if detail["type"] == "missing":
        return f"{name!r} is missing"
    reason = detail["msg"][0].lower() + detail["msg"][1:]
    field = kind.model_fields.get(name)
    about = f" ({field.description.rstrip('.')})" if field and field.description else ""
    value = "..." if name.endswith("storage_options") else repr(detail["input"])  # it may hold a secret
    return f"{name}={value} cannot be used: {reason}{about}"
