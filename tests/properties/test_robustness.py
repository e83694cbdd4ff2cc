"""No training gives a value that is not finite, whatever the scale of its data, nor at ten times the learning rate."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from cvae_dist.config import TrainConfig
from cvae_dist.store import Moments
from cvae_dist.store.reader import ArrayRows
from cvae_dist.training.fit import fit
from cvae_dist.training.loop import Trained
from cvae_dist.training.prepare import TrainingData

Rng = np.random.Generator


def images(rng: Rng) -> np.ndarray:
    """Bytes: blobs on a black ground, and pixels at the border that are lit in one row of all."""
    place, grid = rng.uniform(6, 22, (400, 2, 1)), np.arange(28)
    blobs = np.exp(-np.square((grid - place) / 3))
    rows = (255 * blobs[:, 0, :, None] * blobs[:, 1, None, :]).astype(np.uint8).reshape(400, -1)
    rows[np.arange(20), np.arange(20)] = 255
    return rows


def heavy_tails(rng: Rng) -> np.ndarray:
    return rng.normal(size=(400, 3)) @ rng.normal(size=(3, 50)) + rng.standard_t(1.5, (400, 50))


def scales(rng: Rng) -> np.ndarray:
    return rng.normal(size=(400, 3)) @ rng.normal(size=(3, 25)) * np.geomspace(1e-6, 1e6, 25)


def constants(rng: Rng) -> np.ndarray:
    rows = np.full((400, 21), 3.7)
    rows[:, 7] = 1e6 + rng.normal(size=400)
    return rows


def binary(rng: Rng) -> np.ndarray:
    return (rng.random((400, 30)) < rng.random(30) ** 4).astype(np.uint8)


DATA: dict[str, Callable[[Rng], np.ndarray]] = {
    "images": images,
    "images scaled per feature": images,
    "images raw": images,
    "heavy tails": heavy_tails,
    "heavy tails raw": heavy_tails,
    "scales": scales,
    "scales raw": scales,
    "constants": constants,
    "only constants": lambda rng: np.full((400, 5), 7.0),
    "one outlier": lambda rng: np.where(np.arange(400)[:, None] == 3, 1e12, rng.normal(size=(400, 6))),
    "binary": binary,
    "100 rows": lambda rng: rng.normal(size=(100, 3)) @ rng.normal(size=(3, 50)),
    "one feature": lambda rng: rng.normal(100, 10, (100, 1)),
    "3 rows": lambda rng: rng.normal(size=(3, 4)),
    "10,000 features": lambda rng: rng.normal(size=(100, 5)) @ rng.normal(size=(5, 10_000)),
}
LARGE: dict[str, Callable[[Rng], np.ndarray]] = {
    "500 x 10,000": lambda rng: rng.normal(size=(500, 5)) @ rng.normal(size=(5, 10_000)),
}
NORMALIZATION = {"images scaled per feature": True, "images raw": False, "heavy tails raw": False, "scales raw": False}
LIKELIHOODS = ["gaussian", "gaussian_per_feature", "gaussian_unit", "student_t", "bernoulli", "continuous_bernoulli"]


def train_at(
    rows: np.ndarray,
    factor: float,
    steps: int,
    seed: int = 0,
    cells: tuple[int, ...] | None = None,
    likelihood: str = "auto",
    normalization: bool | str = "auto",
) -> Trained:
    """Train two latent dimensions at ``factor`` times the automatic learning rate."""
    asked = TrainConfig(
        dim_latent=2,
        cells_encoder=cells,
        num_steps=steps,
        seed=seed,
        likelihood=likelihood,
        feature_normalization=normalization,
    )
    rate = asked.resolve(*rows.shape).learning_rate
    assert rate is not None
    config = asked.model_copy(update={"learning_rate": factor * rate})
    return fit(TrainingData.in_memory(ArrayRows(rows), Moments.of(rows), rows.shape[1:]), config)


def flaws(trained: Trained, rows: np.ndarray) -> list[str]:
    """Return what of a training, and of its latents and decoded rows, is not finite, and whether it had to go back."""
    vae, history = trained.vae, trained.history
    latents = vae.embed_rows(rows)
    found = {
        "a step left out": not history or history[-1]["skipped_steps"] > 0,
        "a test missing": any("loss" not in record for record in history),
        "a figure": not all(np.isfinite(value) for record in history for value in record.values()),
        "a weight": not all(weight.isfinite().all() for weight in vae.parameters()),
        "a latent": not np.isfinite(latents).all(),
        "a decoded row": not np.isfinite(vae.decode_rows(latents)).all(),
    }
    return [name for name, is_flawed in found.items() if is_flawed]


def assert_stays_finite(
    data: str, factor: float, steps: int, cells: tuple[int, ...] | None, seed: int = 0, likelihood: str = "auto"
) -> None:
    rows = (DATA | LARGE)[data](np.random.default_rng(seed))
    trained = train_at(rows, factor, steps, seed, cells, likelihood, NORMALIZATION.get(data, "auto"))
    assert trained.history[-1]["step"] == steps
    assert flaws(trained, rows) == []


# by default ten times the learning rate, and the rate itself for a few
AS_IT_IS = ("images", "scales", "3 rows")
RATES = [
    pytest.param(data, factor, marks=() if factor == 10 or data in AS_IT_IS else pytest.mark.heavy)
    for data, factor in itertools.product(DATA, (1, 10))
]


@pytest.mark.parametrize(("data", "factor"), RATES)
def test_any_data_train_without_a_value_that_is_not_finite(data: str, factor: float) -> None:
    assert_stays_finite(data, factor, 60, (64, 32))


SCALES = [
    "images raw",
    "scales",
    *(pytest.param(data, marks=pytest.mark.heavy) for data in ("heavy tails", "constants")),
]


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("data", SCALES)
def test_any_likelihood_trains_without_a_value_that_is_not_finite(data: str, likelihood: str) -> None:
    assert_stays_finite(data, 10, 60, (64, 32), likelihood=likelihood)


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("factor", [1, 10])
@pytest.mark.parametrize("data", [*DATA, *LARGE])
def test_the_whole_matrix_with_default_networks(data: str, factor: float, seed: int) -> None:
    assert_stays_finite(data, factor, 250, None, seed)
