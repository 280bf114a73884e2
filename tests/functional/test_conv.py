"""The depthwise filters against their definitions, in outputs and gradients."""

import pytest
import torch

from closeness import assert_close
from grafting.functional.conv import (
    depthwise_1d,
    depthwise_1d_reference,
    depthwise_2d,
    depthwise_2d_reference,
    depthwise_3d,
    depthwise_3d_reference,
)


def gradients(function, *inputs, **settings):
    """Output, and gradients of a weighted sum of it, for fresh copies of the inputs."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    y = function(*leaves, **settings)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    return y, torch.autograd.grad((y * weights).sum(), leaves)


def assert_same(name, got, want, ratio):
    assert_close(name, got[0], want[0], ratio)
    for part, a, b in zip(("x", "weight", "bias"), got[1], want[1], strict=False):
        assert_close(f"{name}: gradient of {part}", a, b, ratio)


@pytest.mark.parametrize("length", [1, 2, 7, 63])
@pytest.mark.parametrize(("kernel_size", "before"), [(1, 0), (3, 1), (4, 2), (4, 3), (4, 0), (5, 2), (9, 8)])
def test_1d_equals_its_definition(length, kernel_size, before):
    inputs = torch.randn(3, length, 10), torch.randn(10, 1, kernel_size), torch.randn(10)
    got = gradients(depthwise_1d, *inputs, before=before)
    assert_same("1d", got, gradients(depthwise_1d_reference, *inputs, before=before), 1e-5)


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (7, 2)])
@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4, 5])
def test_2d_equals_its_definition(grid, kernel_size):
    inputs = torch.randn(2, *grid, 10), torch.randn(10, 1, kernel_size, kernel_size), torch.randn(10)
    got = gradients(depthwise_2d, *inputs)
    assert_same("2d", got, gradients(depthwise_2d_reference, *inputs), 1e-5)


@pytest.mark.parametrize("grid", [(1, 1, 1), (2, 3, 5), (4, 3, 2)])
@pytest.mark.parametrize("kernel_size", [1, 2, 3])
def test_3d_equals_its_definition(grid, kernel_size):
    inputs = torch.randn(2, *grid, 6), torch.randn(6, 1, *[kernel_size] * 3), torch.randn(6)
    got = gradients(depthwise_3d, *inputs)
    assert_same("3d", got, gradients(depthwise_3d_reference, *inputs), 1e-5)


def test_1d_is_a_causal_convolution_of_torch():
    x, weight, bias = torch.randn(2, 9, 6), torch.randn(6, 1, 4), torch.randn(6)
    padded = torch.nn.functional.pad(x.transpose(1, 2), (3, 0))
    want = torch.nn.functional.conv1d(padded, weight, bias, groups=6).transpose(1, 2)
    assert_close("causal", depthwise_1d(x, weight, bias, before=3), want, 1e-6)


def test_1d_without_bias_and_of_a_slice_of_channels():
    x, weight = torch.randn(2, 9, 18)[..., 6:12], torch.randn(6, 1, 4)
    got = gradients(depthwise_1d, x, weight, before=2)
    assert_same("slice", got, gradients(depthwise_1d_reference, x, weight, before=2), 1e-5)


def test_1d_gradients_pass_the_numeric_check_twice():
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 1, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda *a: depthwise_1d(*a, before=2), (x, weight))
    torch.autograd.gradgradcheck(lambda *a: depthwise_1d(*a, before=2), (x, weight))


@pytest.mark.parametrize("frozen", [0, 1])
def test_1d_with_one_input_frozen(frozen):
    leaves = [torch.randn(2, 5, 3), torch.randn(3, 1, 4)]
    leaves[1 - frozen].requires_grad_()
    depthwise_1d(*leaves, before=2).sum().backward()
    assert leaves[frozen].grad is None
    assert leaves[1 - frozen].grad.isfinite().all()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_1d_mixed_precision(autocast, x_dtype):
    inputs = torch.randn(2, 33, 8), torch.randn(8, 1, 4), torch.randn(8)
    want = gradients(depthwise_1d_reference, *inputs, before=2)
    x, weight, bias = (tensor.clone().requires_grad_() for tensor in inputs)
    low = x.to(x_dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = depthwise_1d(low, weight, bias, before=2)
    assert y.dtype == (torch.bfloat16 if autocast else x_dtype)
    got = torch.autograd.grad((y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum(), (x, weight, bias))
    assert_same("mixed", (y.float(), got), want, 2e-2)
