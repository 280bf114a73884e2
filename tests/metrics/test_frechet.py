import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from closeness import assert_close
from grafting.metrics.frechet import FeatureStatistics, FrechetInfluences, frechet_distance


def gaussian(n, f, *, shift=0.0, scale=1.0):
    """n rows with a decaying spectrum."""
    spectrum = torch.arange(1, f + 1) ** -0.5
    return (torch.randn(n, f) * scale + shift) * spectrum


@settings(deadline=None, max_examples=30)
@given(cuts=st.lists(st.integers(0, 200), max_size=6), offset=st.sampled_from([0.0, 1e3]))
def test_any_batching_gives_the_same_statistics(cuts, offset):
    features = gaussian(200, 7) + offset
    want = FeatureStatistics.of(features)
    got = FeatureStatistics.of(features[:0])
    edges = [0, *sorted(cuts), 200]
    for start, end in pairwise(edges):
        got = got.update(features[start:end])
    assert got.count == 200
    assert_close("mean", got.mean, features.double().mean(0), 1e-12)
    assert_close("scatter", got.scatter, want.scatter, 1e-10)
    assert_close("covariance", got.covariance, features.double().T.cov(), 1e-10)


@settings(deadline=None, max_examples=30)
@given(sizes=st.tuples(*[st.integers(0, 40)] * 3))
def test_merging_is_associative_and_commutative(sizes):
    a, b, c = (FeatureStatistics.of(gaussian(n, 5, shift=i)) for i, n in enumerate(sizes))
    for got in (a.merge(b.merge(c)), c.merge(a).merge(b)):
        want = a.merge(b).merge(c)
        assert got.count == want.count
        assert_close("mean", got.mean, want.mean, 1e-12)
        assert_close("scatter", got.scatter, want.scatter, 1e-12)


def test_statistics_survive_as_tensors():
    statistics = FeatureStatistics.of(gaussian(50, 5))
    again = FeatureStatistics.from_tensors(statistics.to_tensors())
    assert again.count == 50
    assert torch.equal(again.covariance, statistics.covariance)


def test_closed_form_of_commuting_covariances():
    a = FeatureStatistics(
        101, torch.zeros(3).double(), torch.diag(torch.tensor([1.0, 4.0, 0.0])).double() * 100
    )
    b = FeatureStatistics(11, torch.ones(3).double(), torch.diag(torch.tensor([9.0, 4.0, 1.0])).double() * 10)
    want = 3 + (3 - 1) ** 2 + 0 + 1
    assert frechet_distance(a, b) == pytest.approx(want, abs=1e-12)
    assert frechet_distance(b, a) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("n", [10, 64, 500])
@pytest.mark.parametrize("size", [1.0, 1e3])
def test_a_set_is_at_distance_zero_from_itself(n, size):
    statistics = FeatureStatistics.of(gaussian(n, 64) * size)
    assert frechet_distance(statistics, statistics) <= 1e-6


def test_rank_deficient_sets_keep_their_rotation_invariant_distance():
    a, b = gaussian(10, 32).double(), gaussian(20, 32, shift=0.5).double()
    rotation = torch.linalg.qr(torch.randn(32, 32).double()).Q
    distances = [
        frechet_distance(FeatureStatistics.of(x), FeatureStatistics.of(y))
        for x, y in ((a, b), (b, a), (a @ rotation, b @ rotation))
    ]
    assert distances == pytest.approx([distances[0]] * 3, rel=1e-9)


def test_constant_features_are_at_the_distance_of_their_means():
    a, b = FeatureStatistics.of(torch.zeros(5, 4)), FeatureStatistics.of(torch.ones(5, 4))
    assert frechet_distance(a, b) == pytest.approx(4)
    assert FrechetInfluences.of(torch.ones(5, 4), a).estimate() == (4, 0, 4, 4)


@pytest.mark.parametrize("num_generated", [40, 300])
def test_equals_torchmetrics(num_generated):
    real, generated = gaussian(400, 32).double(), gaussian(num_generated, 32, shift=0.3).double()
    oracle = FrechetInceptionDistance(feature=Rows(32))
    oracle.set_dtype(torch.float64)
    oracle.update(real, real=True)
    oracle.update(generated, real=False)
    reference = FeatureStatistics.of(real)
    got = frechet_distance(FeatureStatistics.of(generated), reference)
    assert got == pytest.approx(float(oracle.compute()), rel=1e-6)
    assert FrechetInfluences.of(generated, reference).value == pytest.approx(got, rel=1e-9)


class Rows(nn.Module):
    """A feature network whose images are their features."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("n", "shift", "scale"),
    [(100, 0.3, 1.3), (500, 0.3, 1.3), (500, 0.02, 1.02)],
    ids=["few", "far", "near"],
)
def test_the_interval_covers_the_mean_over_draws(n, shift, scale):
    reference = FeatureStatistics.of(gaussian(10_000, 24))
    estimates = [
        FrechetInfluences.of(gaussian(n, 24, shift=shift, scale=scale), reference).estimate()
        for _ in range(200)
    ]
    mean = math.fsum(e.value for e in estimates) / len(estimates)
    deviation = torch.tensor([e.value for e in estimates]).std()
    width = math.fsum(e.high - e.value for e in estimates) / len(estimates) / 1.96
    coverage = sum(e.low <= mean <= e.high for e in estimates) / len(estimates)
    assert 0.90 <= coverage <= 1
    # an interval that covers by being wide would be of no use
    assert 0.85 <= width / deviation <= 1.6


def test_higher_confidence_is_a_wider_interval():
    features, reference = gaussian(300, 8, shift=0.5), FeatureStatistics.of(gaussian(1000, 8))
    usual, wide = (FrechetInfluences.of(features, reference).estimate(confidence=c) for c in (0.95, 0.99))
    assert wide.low < usual.low < usual.value < usual.high < wide.high


def test_the_bias_of_few_rows_is_found():
    # far more rows than features: their statistics are the truth
    reference = FeatureStatistics.of(gaussian(200_000, 16))
    truth = frechet_distance(FeatureStatistics.of(gaussian(200_000, 16, scale=1.2)), reference)
    draws = [gaussian(200, 16, scale=1.2) for _ in range(60)]
    bias = math.fsum(frechet_distance(FeatureStatistics.of(d), reference) for d in draws) / 60 - truth
    estimate = math.fsum(FrechetInfluences.of(d, reference).bias for d in draws) / 60
    assert estimate == pytest.approx(bias, rel=0.3)


def test_refuses_one_row_and_other_widths():
    one, many, wide = (FeatureStatistics.of(torch.randn(n, f)) for n, f in ((1, 4), (9, 4), (9, 5)))
    with pytest.raises(ValueError, match="at least 2 feature rows; there are 1"):
        frechet_distance(many, one)
    with pytest.raises(ValueError, match="of 4 and of 5 features"):
        frechet_distance(many, wide)
    with pytest.raises(ValueError, match="of 4 and of 5 features"):
        FrechetInfluences.of(torch.randn(9, 4), wide)
