"""Linear attention equals its L x L form, keeps its sums in float32, and its convolution is one over the image."""

import pytest
import torch
import torch.nn.functional as F

from closeness import assert_close
from grafting.contract import Grid, TokenLayout
from grafting.functional.linear import depthwise_conv, features, linear_attention, linear_attention_reference

FEATURE_MAPS = ["elu", "relu", "softmax"]


def inputs(num_tokens, *, value_dim=6, dtype=torch.float64):
    shapes = [(2, 3, num_tokens, d) for d in (6, 6, value_dim)]
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("num_tokens", [1, 63, 100])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize(("scale", "value_dim"), [(None, 6), (0.2, 10)])
def test_equals_its_reference(num_tokens, feature_map, scale, value_dim):
    qkv = inputs(num_tokens, value_dim=value_dim)
    got = linear_attention(*qkv, feature_map=feature_map, scale=scale)
    want = linear_attention_reference(*qkv, feature_map=feature_map, scale=scale)
    assert_close("output", got, want, 1e-10)
    weight = torch.randn_like(want)
    got_grads = torch.autograd.grad((got * weight).sum(), qkv)
    want_grads = torch.autograd.grad((want * weight).sum(), qkv)
    for name, got_grad, want_grad in zip("qkv", got_grads, want_grads, strict=True):
        # with one token the weights are 1 whatever q and k are, up to the epsilon
        if num_tokens > 1 or name == "v":
            assert_close(f"gradient of {name}", got_grad, want_grad, 1e-8)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_features_are_not_negative(feature_map):
    assert (features(torch.randn(1000, 8) * 10, feature_map) >= 0).all()


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_equal_values_come_back_unchanged(feature_map):
    q, k, _ = inputs(50)
    v = torch.ones(2, 3, 50, 4, dtype=torch.float64)
    weights_exist = (features(q, feature_map) @ features(k, feature_map).sum(2)[..., None]) > 1e-2
    got = linear_attention(q, k, v, feature_map=feature_map)
    assert ((got - 1).abs() < 1e-3)[weights_exist.expand_as(got)].all()


def test_scale_multiplies_the_product_of_q_and_k():
    q, k, v = inputs(40)
    got = linear_attention(2 * q, 3 * k, v, feature_map="softmax", scale=1 / 4)
    want = linear_attention(3 * q, 2 * k, v, feature_map="softmax", scale=1 / 4)
    assert (
        got - want
    ).abs().max() > 1e-3  # the two factors are not interchangeable, but scale is split evenly:
    want = linear_attention(4 * q, 6 * k, v, feature_map="softmax", scale=1 / 16)
    assert_close("output", got, want, 1e-10)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_bf16_sums_are_kept_in_float32(feature_map):
    """Sums over 4,000 tokens in bf16 would be off by percents: it has eight bits."""
    q, k, v = inputs(4000, dtype=torch.bfloat16)
    exact = linear_attention(*(x.double() + 0 for x in (q, k, v)), feature_map=feature_map)
    got = linear_attention(q, k, v, feature_map=feature_map)
    assert got.dtype == torch.bfloat16
    assert_close("output", got, exact, 4e-3)
    for gradient in torch.autograd.grad(got.sum(), (q, k, v)):
        assert gradient.isfinite().all()


def test_autocast_does_not_round_the_sums():
    q, k, v = inputs(500, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_attention(q, k, v)
    assert torch.equal(got, linear_attention(q, k, v))


def test_relu_without_any_positive_feature_is_zero_not_nan():
    q, k, v = inputs(10)
    q = -q.abs()
    got = linear_attention(q, k, v, feature_map="relu")
    assert (got == 0).all()
    for gradient in torch.autograd.grad(got.sum(), (k, v)):
        assert (gradient == 0).all()


@pytest.mark.parametrize("text_first", [True, False])
def test_conv_filters_each_frame_and_leaves_text_alone(text_first):
    layout = TokenLayout(Grid(5, 7, frames=2), **{"before" if text_first else "after": 3})
    v = torch.randn(2, 3, layout.num_tokens, 4, dtype=torch.float64)
    weight = torch.randn(12, 1, 3, 3, dtype=torch.float64)
    got = depthwise_conv(v, weight, layout)
    want = torch.zeros_like(v)
    for frame in range(2):
        start = layout.image_slice.start + frame * 35
        for head in range(3):
            image = v[:, head, start : start + 35].transpose(1, 2).reshape(2, 4, 5, 7)
            filtered = F.conv2d(image, weight[4 * head : 4 * head + 4], padding=1, groups=4)
            want[:, head, start : start + 35] = filtered.flatten(2).transpose(1, 2)
    assert_close("convolution", got, want, 1e-10)
