"""Closed forms from sums against least squares on the rows themselves, and neurons against exhaustive search."""

import itertools

import pytest
import torch

from closeness import assert_close
from grafting.functional.ridge import (
    error_removed,
    error_without,
    hardest_to_replace,
    moments,
    most_varying,
    ridge_correction,
    ridge_correction_reference,
    with_ones,
)


def _rows(num=200, features=6, outputs=3):
    h = (
        torch.randn(num, features, dtype=torch.float64) @ torch.randn(features, features, dtype=torch.float64)
        + 2
    )
    return h, torch.randn(num, outputs, dtype=torch.float64)


def _sums(h, residual):
    rows = with_ones(h)
    return rows.T @ rows, rows.T @ residual


@pytest.mark.parametrize("strength", [1e-6, 1e-2, 1.0])
def test_equals_least_squares_on_the_rows(strength):
    h, residual = _rows()
    got = ridge_correction(*_sums(h, residual), strength=strength)
    want = ridge_correction_reference(h, residual, strength=strength)
    assert_close("weight", got[0], want[0], 1e-8)
    assert_close("bias", got[1], want[1], 1e-8)


def test_a_linear_map_is_recovered_and_its_error_removed():
    h, _ = _rows()
    weight, bias = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    residual = h @ weight.T + bias
    gram, cross = _sums(h, residual)
    got = ridge_correction(gram, cross, strength=1e-12)
    assert_close("weight", got[0], weight, 1e-6)
    assert_close("bias", got[1], bias, 1e-6)
    assert error_removed(gram, cross, got) == pytest.approx(residual.square().sum().item(), rel=1e-9)


def test_error_removed_is_that_of_the_rows():
    h, residual = _rows()
    gram, cross = _sums(h, residual)
    weight, bias = correction = ridge_correction(gram, cross, strength=0.1)
    after = (residual - h @ weight.T - bias).square().sum()
    removed = error_removed(gram, cross, correction)
    assert removed == pytest.approx((residual.square().sum() - after).item())
    assert removed > 0


def test_features_that_never_change_leave_the_bias_to_it():
    h, residual = torch.full((50, 4), 3.0, dtype=torch.float64), torch.ones(50, 2, dtype=torch.float64)
    weight, bias = ridge_correction(*_sums(h, residual), strength=1e-4)
    assert_close("correction", h[0] @ weight.T + bias, residual[0], 1e-9)


def test_moments_are_those_of_the_rows():
    h, residual = _rows()
    covariance, mean = moments(_sums(h, residual)[0])
    assert_close("covariance", covariance, torch.cov(h.T, correction=0), 1e-10)
    assert_close("mean", mean, h.mean(0), 1e-10)


def test_sums_are_float64_whatever_the_rows():
    assert with_ones(torch.ones(2, 3, dtype=torch.bfloat16)).tolist() == [[1.0] * 4] * 2
    assert with_ones(torch.ones(2, 3)).dtype == torch.float64


def test_error_without_neurons_is_that_of_a_layer_fitted_to_the_others():
    h, _ = _rows()
    down, kept = torch.randn(3, 6, dtype=torch.float64), torch.tensor([0, 2, 5])
    covariance, _ = moments(_sums(h, h)[0])
    rows, target = with_ones(h[:, kept]), h @ down.T
    error = (target - rows @ torch.linalg.lstsq(rows, target).solution).square().sum() / len(h)
    assert error_without(covariance, down, kept) == pytest.approx(error.item(), rel=1e-3)


def test_most_varying_neurons():
    covariance = torch.diag(torch.tensor([1.0, 4.0, 0.1, 2.0], dtype=torch.float64))
    down = torch.tensor([[1.0, 0.1, 9.0, 1.0]], dtype=torch.float64)
    assert most_varying(covariance, down, num=2).tolist() == [2, 3]


def test_a_neuron_that_others_stand_for_is_replaceable():
    """Of twins one is taken out, although each varies most by itself."""
    h, _ = _rows(features=4)
    h = torch.cat([h, 5 * h[:, :1]], dim=1)
    covariance, _ = moments(_sums(h, h)[0])
    down = torch.ones(2, 5, dtype=torch.float64)
    kept = hardest_to_replace(covariance, down, num=4)
    assert set(range(1, 4)) <= set(kept.tolist())
    assert error_without(covariance, down, kept) < 1e-3 * error_without(covariance, down, torch.arange(4)[1:])


@pytest.mark.parametrize("num", [7, 5])
def test_one_neuron_less_is_the_best_choice_and_more_are_close(num):
    h, _ = _rows(features=8)
    down = torch.randn(4, 8, dtype=torch.float64)
    covariance, _ = moments(_sums(h, h)[0])
    errors = [
        error_without(covariance, down, torch.tensor(kept)) for kept in itertools.combinations(range(8), num)
    ]
    kept = hardest_to_replace(covariance, down, num=num)
    assert kept.tolist() == sorted(kept.tolist())
    got = error_without(covariance, down, kept)
    if num == 7:
        assert got == pytest.approx(min(errors), rel=1e-6)
    assert got < sorted(errors)[len(errors) // 4]
