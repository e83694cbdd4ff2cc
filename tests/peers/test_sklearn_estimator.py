"""scikit-learn's own suite for estimators, with nothing expected to fail."""

from typing import Any

import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from cvae_dist.estimator import CompressionVAE

EXPECTED_FAILURES: dict[str, str] = {}


@pytest.mark.filterwarnings("ignore:.*array_api.*:UserWarning")
@parametrize_with_checks(
    [CompressionVAE(num_steps=10, cells_encoder=(16,))],
    expected_failed_checks=lambda estimator: EXPECTED_FAILURES,
)
def test_sklearn_check(estimator: CompressionVAE, check: Any) -> None:
    check(estimator)
