import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from closeness import assert_close
from grafting.metrics.frechet import FeatureStatistics, FrechetInfluences, Gaussian, _Four, frechet_distance


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


# influences and paired comparisons


def distance_of(features, reference, *, without=None):
    kept = torch.ones(len(features), dtype=torch.bool)
    if without is not None:
        kept[without] = False
    return frechet_distance(FeatureStatistics.of(features[kept]), reference)


def test_influences_are_the_derivative():
    """A row's weight is raised a little: mean and covariance of the weighted rows, by finite difference."""
    features = gaussian(60, 5, shift=0.4, scale=1.2).double()
    reference = FeatureStatistics.of(gaussian(500, 5))
    found = FrechetInfluences.of(features, reference).influence
    step = 1e-6
    for row in (0, 7, 59):
        changes = []
        for sign in (1, -1):
            weights = torch.full((60,), (1 - sign * step) / 60, dtype=torch.float64)
            weights[row] += sign * step
            mean = weights @ features
            centred = features - mean
            moments = Gaussian(mean, centred.T @ (weights[:, None] * centred) * 60 / 59)
            changes.append(frechet_distance(moments, reference))
        derivative = (changes[0] - changes[1]) / (2 * step)
        got = found[row] - found.mean()
        assert float(got) == pytest.approx(derivative, rel=0.05, abs=0.02)


def test_influences_are_those_of_a_jackknife():
    features, reference = gaussian(400, 6, shift=0.3).double(), FeatureStatistics.of(gaussian(900, 6))
    found = FrechetInfluences.of(features, reference)
    left_out = torch.tensor([distance_of(features, reference, without=i) for i in range(400)])
    pseudo = 399 * (found.value - left_out)
    assert_close("influence", found.influence - found.influence.mean(), pseudo - pseudo.mean(), 0.05)


def test_curvature_is_the_second_derivative():
    features, reference = (
        gaussian(80, 4, shift=0.3, scale=1.3).double(),
        FeatureStatistics.of(gaussian(500, 4)),
    )
    strata = torch.arange(80) % 2
    found = FrechetInfluences.of(features, reference, strata=strata).curvature
    four = _Four.of(80, strata)
    assert bool((strata[four.left] == strata[four.left_partner]).all())
    step = 1e-3

    def at(up, down):
        weights = torch.full((80,), 1 / 80, dtype=torch.float64)
        for signs in (up, down):
            for row, sign in signs:
                weights[row] += sign * step
        mean = weights @ features
        return frechet_distance(
            Gaussian(mean, (features - mean).T @ (weights[:, None] * (features - mean)) * 80 / 79), reference
        )

    for place in (0, 11, 40):
        left = [(int(four.left[place]), 1), (int(four.left_partner[place]), -1)]
        right = [(int(four.right[place]), 1), (int(four.right_partner[place]), -1)]
        back = [(row, -sign) for row, sign in right]
        forth = [(row, -sign) for row, sign in left]
        want = (at(left, right) - at(left, back) - at(forth, right) + at(forth, back)) / (4 * step**2)
        assert float(found[place]) == pytest.approx(want, rel=0.05, abs=0.05)


def test_rows_that_are_dealt_in_turn_have_narrower_intervals():
    labels = torch.arange(400) % 10
    features = gaussian(400, 8) + 3 * torch.nn.functional.one_hot(labels, 10)[:, :8]
    reference = FeatureStatistics.of(features[torch.randperm(400)] + 0.3)
    even, plain = (FrechetInfluences.of(features, reference, strata=s).estimate() for s in (labels, None))
    assert even.value == plain.value
    assert even.error < 0.9 * plain.error


def test_few_rows_are_not_compared():
    a, b, reference = gaussian(31, 8), gaussian(31, 8), FeatureStatistics.of(gaussian(500, 8))
    few, others = (FrechetInfluences.of(x, reference) for x in (a, b))
    for compare in (few.ratio, few.difference):
        with pytest.raises(ValueError, match="31 images are too few for 8 features; 32 are enough"):
            compare(others)
    assert few.bias is None
    with pytest.raises(ValueError, match="there are 31 and 30"):
        few.ratio(FrechetInfluences.of(a[:30], reference))


class Draws:
    """Pairs of rows with conditions, near to each other or far apart, at some distance from the reference.

    Rows of one number have noise in common, as images of one seed have.
    """

    def __init__(self, *, n, f, near, dealt, num_conditions=10):
        self.n, self.near, self.dealt, self.num_conditions = n, near, dealt, num_conditions
        self.spectrum = torch.arange(1, f + 1).double() ** -0.5
        self.centres = torch.randn(num_conditions, f).double()
        labels = torch.arange(60_000) % num_conditions
        self.reference = FeatureStatistics.of(self.rows(torch.randn(60_000, f).double(), labels))

    def rows(self, noise, labels, *, shift=0.0, scale=1.0):
        return (self.centres[labels] + 0.7 * scale * noise + shift) * self.spectrum

    def pair(self):
        in_turn = torch.arange(self.n) % self.num_conditions
        labels = in_turn if self.dealt else torch.randint(self.num_conditions, (self.n,))
        noise, other = (torch.randn(self.n, len(self.spectrum)).double() for _ in range(2))
        b = self.rows(noise, labels, shift=0.15, scale=1.15)
        if self.near:
            a = self.rows(noise + 0.05 * other, labels, shift=0.152, scale=1.155)
        else:
            a = self.rows(0.6 * noise + 0.8 * other, labels, shift=0.35, scale=1.3)
        strata = labels if self.dealt else None
        return tuple(FrechetInfluences.of(x, self.reference, strata=strata) for x in (a, b))


def coverage(found, truth):
    return sum(e.low <= truth <= e.high for e in found) / len(found)


def paired_coverage(draws, count):
    """Share of intervals that hold the ratio of mean distances, and that hold the mean difference without bias."""
    pairs = [draws.pair() for _ in range(count)]
    ratios, differences = zip(*((a.ratio(b), a.difference(b)) for a, b in pairs), strict=True)
    ratio = math.fsum(a.value for a, _ in pairs) / math.fsum(b.value for _, b in pairs)
    difference = math.fsum(d.value for d in differences) / count
    return coverage(ratios, ratio), coverage(differences, difference)


@pytest.mark.parametrize("near", [True, False], ids=["near", "far"])
@pytest.mark.parametrize("dealt", [True, False], ids=["dealt", "drawn"])
def test_paired_intervals_cover(near, dealt):
    ratios, differences = paired_coverage(Draws(n=200, f=8, near=near, dealt=dealt), 150)
    assert ratios >= 0.88
    assert differences >= 0.88


# the fewest rows that are compared, and many
@pytest.mark.slow
@pytest.mark.parametrize(("n", "f"), [(128, 32), (400, 16)], ids=["few", "many"])
@pytest.mark.parametrize("near", [True, False], ids=["near", "far"])
@pytest.mark.parametrize("dealt", [True, False], ids=["dealt", "drawn"])
def test_paired_intervals_cover_as_often_as_they_say(n, f, near, dealt):
    torch.manual_seed(1)
    ratios, differences = paired_coverage(Draws(n=n, f=f, near=near, dealt=dealt), 2000)
    print(f"ratio {ratios:.4f}, difference {differences:.4f}")
    assert 0.93 <= ratios <= 0.97
    assert 0.93 <= differences <= 0.97
