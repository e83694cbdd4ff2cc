import itertools

import pytest

from cvae_dist.training.schedule import is_hopeless, kl_weight, learning_rate, next_test


def test_learning_rate_warms_up_peaks_and_falls_to_one_percent() -> None:
    rates = [learning_rate(step, 1000, 0.5) for step in range(1001)]
    assert rates[0] == pytest.approx(0.5 / 20)
    assert max(rates) == rates[20] == pytest.approx(0.5)
    assert rates[510] == pytest.approx(0.5 * 0.505)
    assert rates[1000] == pytest.approx(0.005)
    assert all(a < b for a, b in itertools.pairwise(rates[:20]))
    assert all(a > b for a, b in itertools.pairwise(rates[20:]))


def test_a_rate_that_does_not_fall_stays_at_its_peak() -> None:
    assert [learning_rate(step, 100, 0.5, falls=False) for step in (0, 1, 50, 99)] == [0.25, 0.5, 0.5, 0.5]


def test_a_training_that_goes_on_warms_up_again_below_the_same_cosine() -> None:
    whole = [learning_rate(step, 1000, 0.5) for step in range(1000)]
    more = [learning_rate(step, 1000, 0.5, begun=600) for step in range(600, 1000)]
    assert more[19:] == whole[619:]
    assert more[0] == pytest.approx(whole[600] / 20)


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_the_shortest_trainings_have_a_rate(num_steps: int) -> None:
    assert all(0 < learning_rate(step, num_steps, 1.0) <= 1 for step in range(num_steps))


def test_kl_weight_grows_to_one_and_stays() -> None:
    weights = [kl_weight(step, 100, 0.2) for step in range(100)]
    assert weights[:20] == pytest.approx([step / 20 for step in range(1, 21)])
    assert set(weights[20:]) == {1.0}
    assert kl_weight(0, 100, 0.0) == 1.0


def test_tests_grow_rarer_and_stay_cheap() -> None:
    assert next_test(7, 0, 10) == 17
    assert next_test(0, 0, None) == 50
    assert next_test(10_000, 0, None) == 10_200
    assert next_test(0, 39.1, None) == 548
    steps = [0]
    while steps[-1] < 50_000:
        steps.append(next_test(steps[-1], 0, None))
    assert 100 < len(steps) < 300


def test_giving_up_takes_tests_steps_and_an_epoch() -> None:
    assert is_hopeless(4000, since=1000, tests=6, steps_per_epoch=10)
    assert not is_hopeless(4000, since=1000, tests=4, steps_per_epoch=10)
    assert not is_hopeless(2999, since=1000, tests=6, steps_per_epoch=10)
    assert not is_hopeless(4000, since=1000, tests=6, steps_per_epoch=3001)
