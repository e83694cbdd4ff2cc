"""What happens at which step: learning rate, KL weight, validation, giving up."""

import math

_WARMUP_SHARE = 0.02
_FINAL_SHARE = 0.01
_TEST_GROWTH = 0.02
_FEWEST_STEPS_BETWEEN_TESTS = 50
_TEST_COST = 14  # steps between tests for every validation batch: one costs 1/3 step, so tests take 2 to 3 %
_PATIENCE_TESTS = 5
_PATIENCE_STEPS = 2000


def learning_rate(step: int, num_steps: int, peak: float, begun: int = 0, falls: bool = True) -> float:
    """Return the rate of ``step``: linear warm-up over 2 % of the steps, then a cosine to 1 % of ``peak``.

    The warm-up starts at ``begun``, the first step of a fresh optimiser. The cosine does not move with it. A rate that
    does not fall stays at ``peak``.
    """
    warmup = max(1, round(_WARMUP_SHARE * num_steps))
    progress = max(0, step - warmup) / max(1, num_steps - warmup)
    share = _FINAL_SHARE + (1 - _FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * progress)) if falls else 1.0
    return peak * share * min(1.0, (step - begun + 1) / warmup)


def kl_weight(step: int, num_steps: int, warmup_share: float) -> float:
    """Return the weight of the KL term: linear up to 1 over the first ``warmup_share`` of the steps."""
    warmup = warmup_share * num_steps
    return min(1.0, (step + 1) / warmup) if warmup > 0 else 1.0


def next_test(step: int, batches: float, test_every: int | None) -> int:
    """Return the step of the next validation after ``step``.

    It is ``test_every`` steps away. By default it is 2 % of the steps done so far away, but at least 50 steps, and so
    many that ``batches`` batches of validation rows cost little.
    """
    if test_every is not None:
        return step + test_every
    return step + max(_FEWEST_STEPS_BETWEEN_TESTS, round(_TEST_GROWTH * step), math.ceil(_TEST_COST * batches))


def is_hopeless(step: int, since: int, tests: int, steps_per_epoch: int) -> bool:
    """Whether 5 tests, 1 epoch and 2,000 steps have passed since validation improved at step ``since``."""
    return tests >= _PATIENCE_TESTS and step - since >= max(steps_per_epoch, _PATIENCE_STEPS)
