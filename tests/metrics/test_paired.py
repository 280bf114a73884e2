"""Paired comparisons: standard errors against plain formulas, quantiles against tables."""

import pytest
import torch

from grafting.metrics._interval import spread, student_quantile
from grafting.metrics.paired import (
    mean_estimate,
    paired_change,
    paired_difference,
    seeds_estimate,
    share_estimate,
)


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    # tables of Student's t, 0.975
    [
        (1, 12.706205),
        (2, 4.302653),
        (3, 3.182446),
        (7, 2.364624),
        (30, 2.042272),
        (41, 2.019541),
        (100, 1.983972),
    ],
)
def test_quantiles_of_student(degrees, quantile):
    assert student_quantile(0.975, degrees) == pytest.approx(quantile, rel=1e-6)


def test_an_unstratified_mean_has_the_usual_error():
    scores = torch.randn(50).double()
    found = mean_estimate(scores)
    error = float(scores.std() / 50**0.5)
    assert found.value == pytest.approx(float(scores.mean()))
    assert found.error == pytest.approx(error)
    assert found.high - found.value == pytest.approx(2.009575 * error, rel=1e-6)


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    # Wilson's interval by its formula with the normal quantile, which that of Student nears at such sizes
    [
        (0, 2000, 0.0, 0.001917),
        (2000, 2000, 0.998083, 1.0),
        (1000, 2000, 0.478103, 0.521897),
        (20, 2000, 0.006481, 0.015401),
    ],
)
def test_a_share_has_wilsons_interval(hits, count, low, high):
    scores = torch.zeros(count, dtype=torch.float64)
    scores[:hits] = 1
    found = share_estimate(scores)
    assert found.value == hits / count
    assert (found.low, found.high) == (pytest.approx(low, abs=2e-5), pytest.approx(high, abs=2e-5))
    assert (found.low == 0, found.high == 1) == (hits == 0, hits == count)  # without the dust of rounding


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_a_shares_interval_holds_as_often_as_it_says(share):
    draws = torch.rand(1000, 300, dtype=torch.float64) < share
    found = [share_estimate(scores.double()) for scores in draws]
    held = sum(estimate.low <= share <= estimate.high for estimate in found) / len(found)
    assert 0.93 < held < 0.98


def test_a_share_of_strata_that_are_all_alike_within_still_has_an_interval():
    scores, strata = torch.tensor([0.0, 0, 0, 1, 1, 1]), torch.tensor([0, 0, 0, 1, 1, 1])
    found = share_estimate(scores, strata=strata)
    assert found.error == 0
    assert 0 < found.low < 0.5 < found.high < 1


def test_strata_are_taken_out():
    strata = torch.arange(60) % 3
    scores = torch.randn(60).double() + 10 * strata
    parts = [scores[strata == h] for h in range(3)]
    want = (sum((len(p) / 60) ** 2 * p.var() / len(p) for p in parts)) ** 0.5
    assert mean_estimate(scores, strata=strata).error == pytest.approx(float(want))
    assert mean_estimate(scores).error > 5 * float(want)


def test_a_stratum_of_one_image_leaves_all_strata_aside():
    scores, strata = torch.randn(21), torch.arange(21) % 20
    assert mean_estimate(scores, strata=strata) == mean_estimate(scores)


def test_clusters_are_one_unit_each():
    prompts = torch.arange(40) // 4
    means = torch.randn(10).double()
    found = mean_estimate(means[prompts], clusters=prompts)
    assert found.error == pytest.approx(float(means.std() / 10**0.5))
    tasks = prompts % 2
    within = mean_estimate(means[prompts], strata=tasks, clusters=prompts)
    want = sum(means[task::2].var() / 5 / 4 for task in range(2)) ** 0.5
    assert within.error == pytest.approx(float(want))
    with pytest.raises(ValueError, match="a cluster has values of two strata"):
        mean_estimate(means[prompts], strata=torch.arange(40) % 2, clusters=prompts)


def test_images_that_do_not_count_are_left_out():
    a, b, strata = torch.randn(30), torch.randn(30), torch.arange(30) % 2
    masked = a.clone()
    masked[10:] = float("nan")
    got = paired_difference(masked, b, strata=strata)
    assert got == pytest.approx(paired_difference(a[:10], b[:10], strata=strata[:10]))


def test_what_is_common_cancels():
    common = 100 * torch.randn(200).double()
    found = paired_difference(common + 1, common)
    assert found.value == pytest.approx(1)
    assert found.error < 1e-12
    assert paired_change(3.0, 1.0, common, common) == (2, 0, 2, 2)


def test_seeds_have_students_interval():
    found = seeds_estimate([1.0, 2.0, 3.0])
    assert found.value == 2
    assert found.high - 2 == pytest.approx(4.302653 / 3**0.5, rel=1e-6)


def test_refusals():
    with pytest.raises(ValueError, match="at least 2 independent values; there are 1"):
        spread(torch.tensor([1.0, float("nan")]))
