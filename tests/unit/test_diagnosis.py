"""The diagnosis against scipy and scikit-learn, and its picture."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import mean_squared_error, r2_score

from cvae_dist import plot
from cvae_dist.errors import InvalidInput, NotFitted
from cvae_dist.estimator import CompressionVAE
from cvae_dist.model.sampling import posterior_moments

RANDOM = np.random.default_rng(0)
LINE = RANDOM.normal(size=(400, 1)) @ RANDOM.normal(size=(1, 6)) + RANDOM.normal(scale=0.1, size=(400, 6))
LINE[:, 5] = 3.0


@pytest.fixture(scope="module")
def model() -> CompressionVAE:
    settings = {"cells_encoder": (32,), "num_steps": 800, "likelihood": "gaussian", "iaf_flow_length": 0}
    return CompressionVAE(LINE, dim_latent=3, **settings).train()  # type: ignore[arg-type]


def test_figures(model: CompressionVAE) -> None:
    found = model.diagnose(LINE)
    mean, logvar = (moment.astype(np.float64) for moment in posterior_moments(model.model_, LINE))
    back = model.decode(model.embed(LINE))
    np.testing.assert_allclose(found.kl_per_dimension.sum(), found.rate, rtol=1e-5)
    one = 0.5 * (mean[:, 0] ** 2 + np.exp(logvar[:, 0]) - 1 - logvar[:, 0]).mean()
    assert found.kl_per_dimension[0] == pytest.approx(one, rel=1e-6)
    np.testing.assert_allclose(found.squared_error, mean_squared_error(LINE, back, multioutput="raw_values"))
    np.testing.assert_allclose(found.explained[:5], r2_score(LINE, back, multioutput="raw_values")[:5])
    assert np.isnan(found.explained[5])
    assert found.rate + found.distortion == pytest.approx(-model.score(LINE), rel=0.05)


def test_the_distortion_is_that_of_many_draws(model: CompressionVAE) -> None:
    noise = np.random.default_rng(1).standard_normal((200, len(LINE), 3), np.float32)
    each = np.array([model.model_.score_rows(LINE, one)[0].mean(dtype=float) for one in noise])
    expected = each.mean() + model.model_.likelihood.log_volume
    assert model.diagnose(LINE).distortion == pytest.approx(expected, abs=3 * each.std() / 2)  # of 4 draws


def test_a_line_needs_one_unit(model: CompressionVAE) -> None:
    found = model.diagnose(LINE)
    assert found.active_units == np.count_nonzero(model.embed(LINE).var(axis=0) > 0.01)
    assert 1 <= found.active_units <= 3
    assert np.argmax(found.kl_per_dimension) == np.argmax(found.latent_variance)
    assert found.explained[:5].min() > 0.8


def test_text(model: CompressionVAE) -> None:
    found = model.diagnose(LINE)
    text = str(found)
    assert f"active units     {found.active_units} of 3" in text
    assert f"{found.rate + found.distortion:.4g} nats" in text
    assert f"worst features   {np.nanargmin(found.explained)} (" in text


def test_text_of_a_feature_that_hardly_ever_varies(model: CompressionVAE) -> None:
    found = dataclasses.replace(model.diagnose(LINE), explained=np.array([0.5, -650.0, -0.25, 0.5, 0.5, np.nan]))
    assert "worst features   1 (below -100%), 2 (-25%), " in str(found)


def test_picture(model: CompressionVAE, tmp_path: Path) -> None:
    model.diagnose(LINE, str(tmp_path / "diagnosis.png"))
    assert (tmp_path / "diagnosis.png").stat().st_size > 10_000
    kl, active = np.array([0.1, 3.0, 0.0]), np.array([True, True, False])
    figure = plot.diagnosis_bars(kl, active, np.array([0.5, np.nan, 0.9]))
    bars, shares = ([bar.get_height() for bar in axes.patches] for axes in figure.axes)
    assert (bars, shares) == ([3.0, 0.1, 0.0], [0.9, 0.5])
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["z2", "z1", "z3"]
    assert plot.diagnosis_bars(np.ones(200), np.ones(200, bool), np.linspace(-3, 1, 500)).axes[1].get_ylim() == (-1, 1)


def test_one_row_and_refusals(model: CompressionVAE) -> None:
    assert np.isnan(model.diagnose(LINE[:1]).explained).all()
    assert "1 rows" in str(model.diagnose(LINE[:1]))
    with pytest.raises(InvalidInput, match="5 features.* 6 features"):
        model.diagnose(LINE[:, :5])
    with pytest.raises(NotFitted):
        CompressionVAE().diagnose(LINE)
