"""Learning rates: warm-up, cool-down, and steps at which they are halved."""

import pytest

from grafting.functional.schedule import learning_rate_factor


def test_warms_up_and_cools_down():
    factors = [learning_rate_factor(s, steps=10, warmup_steps=4, cooldown_steps=2) for s in range(10)]
    assert factors == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 0.5]
    assert learning_rate_factor(0, steps=1, warmup_steps=0, cooldown_steps=0) == 1


@pytest.mark.parametrize(("step", "factor"), [(74, 1), (75, 0.5), (149, 0.5), (150, 0.25), (199, 0.25)])
def test_is_halved_at_milestones(step, factor):
    assert (
        learning_rate_factor(step, steps=200, warmup_steps=0, cooldown_steps=0, halve_at=(75, 150)) == factor
    )
