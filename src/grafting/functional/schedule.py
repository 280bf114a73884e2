"""Learning rates over training."""

from collections.abc import Sequence


def learning_rate_factor(
    step: int, *, steps: int, warmup_steps: int, cooldown_steps: int, halve_at: Sequence[int] = ()
) -> float:
    """Linear warm-up, constant, linear cool-down to zero at the end; in (0, 1] for step 0..steps-1.

    From each step in `halve_at` on, all of it is half as large.
    """
    up = (step + 1) / warmup_steps if warmup_steps else 1.0
    down = (steps - step) / cooldown_steps if cooldown_steps else 1.0
    return min(up, down, 1.0) / 2 ** sum(step >= milestone for milestone in halve_at)
