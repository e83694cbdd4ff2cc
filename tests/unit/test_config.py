import pytest
from pydantic import ValidationError

from cvae_dist.config import ModelConfig, TrainConfig, make_config
from cvae_dist.errors import InvalidInput


def test_unknown_option_suggests_the_nearest_name() -> None:
    with pytest.raises(InvalidInput, match=r"unknown option 'dim_latnt': did you mean 'dim_latent'\?"):
        make_config(TrainConfig, {"dim_latnt": 3})


def test_unknown_option_far_from_all_lists_them() -> None:
    with pytest.raises(InvalidInput, match=r"unknown option 'zzz': known: batch_size, buffer_bytes, "):
        make_config(TrainConfig, {"zzz": 3})


def test_every_bad_value_is_named_with_its_value_on_its_own_line() -> None:
    with pytest.raises(InvalidInput) as caught:
        make_config(TrainConfig, {"dim_latent": 0, "cells_encoder": [0], "learning_rate": "fast"})
    lines = str(caught.value).splitlines()
    assert [line.split(" cannot be used")[0] for line in lines] == [
        "dim_latent=0",
        "cells_encoder=0",
        "learning_rate='fast'",
    ]


def test_configs_are_frozen() -> None:
    with pytest.raises(ValidationError):
        ModelConfig().dim_latent = 3  # type: ignore[misc]


def test_every_field_is_described_for_the_command_line() -> None:
    assert all(field.description for field in TrainConfig.model_fields.values())


@pytest.mark.parametrize(
    ("features", "cells"),
    [
        (1, (256, 128)),
        (64, (256, 128)),
        (256, (256, 128)),
        (384, (512, 256)),
        (784, (512, 256)),
        (1024, (512, 256)),
        (1536, (1024, 512)),
        (10_000, (1024, 512)),
    ],
)
def test_widths_follow_the_number_of_features(features: int, cells: tuple[int, ...]) -> None:
    assert TrainConfig().resolve(60_000, features).cells_encoder == cells


def test_widths_shrink_for_few_rows_and_deepen_for_many() -> None:
    assert TrainConfig().resolve(100, 784).cells_encoder == (64, 64)
    assert TrainConfig().resolve(2_000_000, 784).cells_encoder == (512, 256, 256)


@pytest.mark.parametrize(
    ("dim_latent", "rows", "cells", "blocks"),
    [
        (2, 60_000, (512, 256), 2),
        (16, 60_000, (512, 256), 0),
        (64, 60_000, (1024,), 0),
        (64, 2_000_000, (1024,), 0),
        (64, 9_999, (512, 256), 0),
    ],
)
def test_vectors_are_bent_less(dim_latent: int, rows: int, cells: tuple[int, ...], blocks: int) -> None:
    config = TrainConfig(dim_latent=dim_latent).resolve(rows, 384, vectors=True)
    assert (config.cells_encoder, config.residual_blocks) == (cells, blocks)


def test_vectors_get_the_network_that_is_asked_for() -> None:
    asked = TrainConfig(dim_latent=64, cells_encoder=(8, 4), residual_blocks=3)
    config = asked.resolve(60_000, 384, vectors=True)
    assert (config.cells_encoder, config.residual_blocks) == ((8, 4), 3)


def test_automatic_training_settings() -> None:
    few, many = TrainConfig().resolve(500, 10), TrainConfig().resolve(60_000, 784)
    assert (few.batch_size, few.num_steps, few.ema_decay) == (50, 3000, 0.99)
    assert (many.batch_size, many.num_steps, many.ema_decay) == (256, 20 * 211, 0.99)
    assert many.learning_rate == pytest.approx(2e-3)
    assert TrainConfig(dim_latent=3).resolve(60_000, 784).learning_rate == pytest.approx(3e-3)
    assert few.learning_rate == pytest.approx(3e-3 * (50 / 256) ** 0.5)
    assert (few.residual_blocks, many.residual_blocks) == (0, 2)
    assert TrainConfig(residual_blocks=1).resolve(500, 10).residual_blocks == 1
    assert TrainConfig(cells_encoder=(8,)).resolve(60_000, 784).residual_blocks == 0
    assert TrainConfig(batch_size=10_000).resolve(10**6, 784).learning_rate == 8e-3


def test_given_values_are_kept() -> None:
    given = TrainConfig(cells_encoder=(7,), batch_size=9, num_steps=11, learning_rate=0.1, ema_decay=0.0)
    given = given.model_copy(update={"train_valid_split": 0.8})
    assert given.resolve(1000, 10) == given.model_copy(update={"residual_blocks": 0, "encoder_decay": 1e-4})


@pytest.mark.parametrize(
    ("dim_latent", "rows", "vectors", "decay"),
    [
        *((64, 40_000, True, 3.0), (16, 40_000, True, 1.0), (3, 40_000, True, 1.0), (2, 40_000, True, 1e-4)),
        *((64, 40_000, False, 1e-4), (64, 5_000, True, 1e-4), (16, 5_000, True, 1e-4)),
    ],
)
def test_only_many_vectors_lie_flat(dim_latent: int, rows: int, vectors: bool, decay: float) -> None:
    assert TrainConfig(dim_latent=dim_latent).resolve(rows, 384, vectors=vectors).encoder_decay == decay
    assert (
        TrainConfig(dim_latent=dim_latent, encoder_decay=0.5).resolve(rows, 384, vectors=vectors).encoder_decay == 0.5
    )


@pytest.mark.parametrize("rows", [1, 2, 3, 10, 100])
def test_few_rows_leave_some_to_train_on(rows: int) -> None:
    config = TrainConfig().resolve(rows, 3)
    assert config.batch_size is not None
    assert 1 <= config.batch_size <= rows - config.validation_count(rows)


def test_validation_is_a_share_with_a_ceiling() -> None:
    assert TrainConfig().validation_count(1000) == 100
    assert TrainConfig().validation_count(10**9) == 10_000
    assert TrainConfig(train_valid_split=1).validation_count(1000) == 0


def test_a_loss_names_its_likelihood() -> None:
    assert make_config(TrainConfig, {"loss": "bce"}).likelihood == "bernoulli"
    assert make_config(TrainConfig, {"loss": "mse", "likelihood": "gaussian_unit"}).likelihood == "gaussian_unit"
    with pytest.raises(InvalidInput, match="^loss='bce' and likelihood='gaussian' cannot be used together: "):
        make_config(TrainConfig, {"loss": "bce", "likelihood": "gaussian"})
    with pytest.raises(InvalidInput, match="loss='hinge' .*loss='bce' is likelihood='bernoulli' and loss='mse'"):
        make_config(TrainConfig, {"loss": "hinge"})


@pytest.mark.parametrize(
    ("rows", "features", "given", "expected", "held_out"),
    [
        (100, 1, None, 1.0, 0),
        (999, 2, None, 1.0, 0),
        (1000, 1, None, 0.9, 100),
        (100, 3, None, 0.9, 10),
        (5, 3, None, 0.9, 0),
        (100, 1, 0.9, 0.9, 10),
        (1, 1, 0.5, 0.5, 0),
    ],
)
def test_few_rows_that_a_latent_can_hold_are_all_trained_on_unless_asked_otherwise(
    rows: int, features: int, given: float | None, expected: float, held_out: int
) -> None:
    config = TrainConfig(train_valid_split=given).resolve(rows, features)
    assert (config.train_valid_split, config.validation_count(rows)) == (expected, held_out)
