"""Scales, curves and words: the parts of the report that compute."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grafting.report._charts import smooth, thin
from grafting.report._plan_picture import operator_keys, plan_picture
from grafting.report._svg import Scale, element, spans_decade
from grafting.report._words import replaced

POSITIVE = st.floats(1e-9, 1e9)


@given(st.lists(POSITIVE, min_size=1, max_size=6), st.booleans())
def test_a_scale_holds_its_values_and_has_round_ticks_inside(values, log):
    scale = Scale.around(values, start=10.0, end=200.0, log=log)
    assert all(10 <= scale(value) <= 200 for value in values)
    assert scale(scale.low) == pytest.approx(10)
    assert scale(scale.high) == pytest.approx(200)
    ticks = scale.ticks()
    assert len(ticks) <= 13
    room = 1e-6 * (scale.high - scale.low)
    assert all(scale.low - room <= tick <= scale.high + room for tick in ticks)
    assert ticks == sorted(ticks)


@pytest.mark.parametrize(
    ("values", "log", "ticks"),
    [
        ([0.0, 1.0], False, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        ([5.0, 600.0], True, [10, 30, 100, 300]),
        ([], True, None),
    ],
)
def test_ticks(values, log, ticks):
    found = Scale.around(values, start=0.0, end=1.0, log=log).ticks()
    assert found
    assert ticks is None or found == pytest.approx(ticks)


def test_values_outside_a_scale_are_clipped():
    scale = Scale(0.0, 1.0, 8.0, 192.0)
    assert scale(-5.0) == 8
    assert scale(2.0) == 192
    assert Scale(1.0, 10.0, 0.0, 1.0, log=True)(0.0) == 0


def test_an_axis_is_logarithmic_over_a_decade():
    assert spans_decade([4.6, 613.0])
    assert not spans_decade([4.6, 5.1])
    assert not spans_decade([0.0, 100.0])
    assert not spans_decade([])


def test_elements_escape_what_they_hold():
    made = element("text", "<b>", x=1.23456, aria_label='"><b>')
    assert str(made) == '<text x="1.23" aria-label="&#34;&gt;&lt;b&gt;">&lt;b&gt;</text>'


def test_a_smoothed_constant_is_itself_and_noise_shrinks():
    assert smooth(np.full(100, 2.0)) == pytest.approx(np.full(100, 2.0))
    noise = np.random.default_rng(0).normal(size=1000)
    assert smooth(noise).std() < 0.3 * noise.std()
    assert smooth(np.array([3.0])) == pytest.approx([3.0])
    line = np.arange(200.0)
    assert smooth(line)[50:150] == pytest.approx(line[50:150])


def test_thinned_curves_keep_their_extremes():
    values = np.random.default_rng(0).normal(size=5000)
    kept = thin(values, 300)
    assert len(kept) <= 300
    assert (np.diff(kept) > 0).all()
    assert values[kept].max() == values.max()
    assert values[kept].min() == values.min()
    assert thin(values[:10], 300).tolist() == list(range(10))


def _site(block: int, role: str, name: str | None) -> dict:
    operator = name and {"name": name, "kernel_size": 4}
    return {"block": block, "role": role, "path": f"{role}.{block}", "operator": operator}


def test_plans_in_words():
    attention = [
        _site(b, "attention", name) for b, name in enumerate(["hyena-x", "window-2d", "hyena-x", None])
    ]
    mlp = [_site(b, "mlp", "mlp") for b in range(4)]
    assert replaced(attention) == "3 of 4 attention operators replaced by hyena-x (2), window-2d (1)"
    assert replaced(attention[:1] + attention[3:] + mlp) == (
        "1 of 2 attention operators replaced by hyena-x and 4 of 4 mlp operators replaced by mlp"
    )
    assert replaced([_site(b, "attention", f"op{b}") for b in range(5)]).endswith(
        "replaced by 5 kinds of operator"
    )
    assert replaced(attention[3:]) == "no operator replaced"


def test_the_plan_picture_has_a_cell_a_site_and_a_letter_an_operator():
    sites = [_site(b, "attention", f"op{b}" if b % 2 else None) for b in range(60)]
    keys = list(operator_keys(sites).values())
    assert [key.letter for key in keys[:2]] == ["A", "B"]
    assert keys[26].letter == "A1"
    assert len({key.letter for key in keys}) == len(keys) == 30
    drawn = str(plan_picture(sites))
    assert drawn.count("<rect") == 60
    assert "block 1, attention: op1 (kernel_size 4) (attention.1)" in drawn
    assert "block 0, attention: unchanged" in drawn


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("value", [1.7e308, 5e-324, math.inf, math.nan])
def test_numbers_that_no_arithmetic_can_hold_leave_the_others_a_scale(value, log):
    scale = Scale.around([0.2, 0.9, value], start=0.0, end=1.0, log=log)
    assert scale.ticks()
    assert 0 <= scale(0.2) < scale(0.9) <= 1
    assert Scale.around([value], start=0.0, end=1.0, log=log).ticks()
