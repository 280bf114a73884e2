"""Test-time training equals its form with autograd inside, learns what it is shown, and keys are normed over tokens."""

import pytest
import torch
import torch.nn.functional as F

from closeness import assert_close
from grafting.functional.ttt import key_norm, ttt, ttt_reference


def inputs(num_tokens, *, value_dim=6, hidden_dim=5, dtype=torch.float64):
    tokens = [torch.randn(2, 3, num_tokens, d, dtype=dtype) for d in (6, 6, value_dim)]
    weights = [torch.randn(3, 6, hidden_dim, dtype=dtype), torch.randn(3, hidden_dim, value_dim, dtype=dtype)]
    return [x.requires_grad_() for x in (*tokens, *weights, torch.rand(3, dtype=dtype) + 0.5)]


def call(function, tensors, scale=None):
    *tensors, step_size = tensors
    return function(*tensors, step_size=step_size, scale=scale)


@pytest.mark.parametrize("num_tokens", [1, 63, 100])
@pytest.mark.parametrize(("scale", "value_dim"), [(None, 6), (0.2, 10)])
def test_equals_its_reference(num_tokens, scale, value_dim):
    tensors = inputs(num_tokens, value_dim=value_dim)
    got, want = call(ttt, tensors, scale), call(ttt_reference, tensors, scale)
    assert_close("output", got, want, 1e-10)
    weight = torch.randn_like(want)
    pairs = zip(*(torch.autograd.grad((y * weight).sum(), tensors) for y in (got, want)), strict=True)
    for name, (got_grad, want_grad) in zip(("q", "k", "v", "w1", "w2", "step"), pairs, strict=True):
        assert_close(f"gradient of {name}", got_grad, want_grad, 1e-8)


def test_no_step_is_the_mlp_itself():
    q, k, v, w1, w2, step_size = inputs(20)
    got = ttt(q, k, v, w1, w2, step_size=0 * step_size)
    assert_close("output", got, F.silu(q @ w1) @ w2, 1e-12)


def test_a_small_step_brings_keys_closer_to_their_values():
    _, k, v, w1, w2, step_size = inputs(20)
    error = (F.silu(k @ w1) @ w2 - v).square().mean((2, 3))
    after = (ttt(k, k, v, w1, w2, step_size=0.1 * step_size) - v).square().mean((2, 3))
    assert (after < error).all()


def test_the_order_of_the_tokens_that_are_learned_does_not_matter():
    q, k, v, w1, w2, step_size = inputs(20)
    order = torch.randperm(20)
    got = ttt(q, k[:, :, order], v[:, :, order], w1, w2, step_size=step_size)
    assert_close("output", got, ttt(q, k, v, w1, w2, step_size=step_size), 1e-12)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_keeps_sums_over_thousands_of_tokens(autocast):
    tensors = [x.requires_grad_() for x in inputs(4096, dtype=torch.bfloat16)]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = call(ttt, tensors)
    want = call(ttt, exact)
    assert got.dtype == torch.bfloat16
    assert_close("output", got.double(), want, 8e-3)
    weight = torch.randn_like(want)
    gradients = torch.autograd.grad(got, tensors, weight.bfloat16())
    for name, x, y in zip(
        ["q", "k", "v", "w1", "w2", "step"], gradients, torch.autograd.grad(want, exact, weight), strict=True
    ):
        assert_close(f"gradient of {name}", x.double(), y, 3e-2)


def test_float16_is_summed_up_in_float32():
    tensors = inputs(4096, dtype=torch.float16)
    want = call(ttt, [x.double() for x in tensors])
    assert_close("output", call(ttt, tensors).double(), want, 1e-3)


def test_keys_are_normed_over_tokens_as_torch_norms_instances():
    k = 3 * torch.randn(2, 3, 20, 6) + 5
    want = F.instance_norm(k.transpose(2, 3).flatten(1, 2), eps=1.0).unflatten(1, (3, 6)).transpose(2, 3)
    assert_close("keys", key_norm(k), want, 1e-5)
    assert_close("keys of another mean", key_norm(k + 7), key_norm(k), 1e-5)
    assert key_norm(k.bfloat16()).dtype == torch.bfloat16


def test_the_only_key_is_normed_to_zero():
    assert not key_norm(torch.randn(2, 3, 1, 6)).any()
