"""The rules of ADM's suite, against what the original evaluator's own functions gave (see tests/golden/README.md)."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file

from grafting.metrics.adm import adm_precision_recall
from grafting.metrics.frechet import FeatureStatistics, Gaussian, frechet_distance
from grafting.metrics.inception_score import adm_inception_score

GOLDEN = Path(__file__).parents[1] / "golden"
FEATURES = load_file(GOLDEN / "adm.safetensors")
NUMBERS = json.loads((GOLDEN / "adm.json").read_text())


def statistics(name):
    return FeatureStatistics.of(FEATURES[name])


@pytest.mark.parametrize(("features", "figure"), [("pooled", "fid"), ("spatial", "sfid")])
def test_frechet_distance_is_the_original(features, figure):
    generated, reference = statistics(f"{features}.generated"), statistics(f"{features}.reference")
    assert frechet_distance(generated, reference) == pytest.approx(NUMBERS[figure], rel=1e-6)
    moments = Gaussian(reference.mean, reference.covariance)
    assert frechet_distance(generated, moments) == frechet_distance(generated, reference)


def test_the_root_is_scipys():
    a, b = (statistics(f"pooled.{name}") for name in ("generated", "reference"))
    root = scipy.linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy())
    want = (a.mean - b.mean).square().sum() + (a.covariance + b.covariance).trace() - 2 * np.trace(root).real
    assert frechet_distance(a, b) == pytest.approx(float(want), rel=1e-12)


def test_singular_covariances_need_no_epsilon():
    # fewer rows than features and a feature that is always 0: the original warns, or adds 1e-6 to the diagonals
    a, b = (statistics(f"singular.{name}") for name in ("generated", "reference"))
    singular = NUMBERS["singular"]
    got = frechet_distance(a, b)
    assert singular["warned"]
    assert got == pytest.approx(singular["fid"], rel=1e-4)
    # what the epsilon adds to the root: its trace falls below ours by more than nothing, by less than sqrt(eps) a feature
    added = (got - singular["with eps"]) / 2
    assert (
        0
        < added
        < len(a.mean) * singular["eps"] ** 0.5 * float(a.covariance.trace() + b.covariance.trace()) ** 0.5
    )
    # where directions of one are missing in the other, the exact answer is known
    u, v = (
        torch.diag(torch.tensor([4.0, 9.0, 0.0])).double(),
        torch.diag(torch.tensor([1.0, 0.0, 0.0])).double(),
    )
    zero = torch.zeros(3).double()
    assert frechet_distance(Gaussian(zero, u), Gaussian(zero, v)) == pytest.approx(
        (2 - 1) ** 2 + 9, abs=1e-12
    )


@pytest.mark.parametrize("split_size", [17, 60, 5000])
def test_inception_score_is_the_original(split_size):
    logits = FEATURES["pooled.generated"] @ FEATURES["weights"]
    want = NUMBERS["inception_score"][str(split_size)]
    assert adm_inception_score(logits, split_size=split_size) == pytest.approx(want, rel=1e-6)


def test_inception_score_knows_its_bounds_and_its_order():
    sure = torch.eye(7).repeat(30, 1) * 200  # the softmax of what is not 200 underflows in float32
    assert adm_inception_score(sure, split_size=70) == pytest.approx(7, rel=1e-9)
    assert adm_inception_score(torch.zeros(50, 7)) == pytest.approx(1, rel=1e-9)
    sorted_by_class = torch.eye(7).repeat_interleave(30, 0) * 200
    assert adm_inception_score(sorted_by_class, split_size=30) == pytest.approx(1, rel=1e-9)
    with pytest.raises(ValueError, match="at least one row"):
        adm_inception_score(torch.zeros(0, 7))


CASES = [
    (features, rule, want)
    for features, figures in (
        ("pooled", NUMBERS["precision_recall"]),
        ("close", NUMBERS["close"]),
        ("loud", NUMBERS["loud"]),
    )
    for rule, want in figures.items()
]


@pytest.mark.parametrize(("features", "rule", "want"), CASES, ids=lambda value: str(value))
def test_precision_and_recall_are_the_original(features, rule, want):
    precision, *words = rule.split(", ")
    options = dict(word.rsplit(" ", 1) for word in words)
    got = adm_precision_recall(
        FEATURES[f"{features}.reference"],
        FEATURES[f"{features}.generated"],
        distances=precision,
        k=int(options.get("k =", 3)),
        block=int(options.get("blocks of", 10_000)),
    )
    assert list(got[:2]) == pytest.approx(want, abs=1e-12)
    assert [float(rows.double().mean()) for rows in got[2:]] == pytest.approx(want, abs=1e-12)


def test_the_golden_cases_tell_the_rules_apart():
    assert NUMBERS["close"]["float16"] != NUMBERS["close"]["float32"]
    assert (
        NUMBERS["loud"]["float16, blocks of 20"] != NUMBERS["loud"]["float16"] == NUMBERS["loud"]["float32"]
    )


def test_an_edge_is_inside():
    # balls of radius 1 around 0, 1, 2 ... and one row exactly on the edge of the last
    line = torch.arange(8.0)[:, None]
    assert adm_precision_recall(line, torch.tensor([[8.0], [8.0], [8.0]]), k=1).precision == 1
    assert adm_precision_recall(line, torch.tensor([[8.5], [8.5], [8.5]]), k=1).precision == 0


def test_too_few_rows_are_an_error():
    with pytest.raises(ValueError, match="k = 3 needs more than 3 feature rows; there are 3"):
        adm_precision_recall(torch.randn(9, 4), torch.randn(3, 4))
