"""TTT as a kernel: its definition from q, k and v on, the window beside it, text tokens, start and cost."""

import pytest
import torch
import torch.nn.functional as F

from closeness import assert_close
from grafting.contract import Grid, Site, TokenLayout
from grafting.functional.ttt import key_norm, ttt_reference
from grafting.operators import parse_operator
from grafting.operators.ttt import TTTConfig

HEADS, HEAD_DIM = 3, 4


def site(grid, num_text=0):
    dim = HEADS * HEAD_DIM
    return Site(
        role="attention", block=0, path="attn", dim=dim, num_heads=HEADS, grid=grid, num_text=num_text
    )


def inputs(num_tokens):
    return [torch.randn(2, HEADS, num_tokens, HEAD_DIM, requires_grad=True) for _ in range(3)]


def built(grid):
    kernel = TTTConfig().build(site(grid))
    for parameter in kernel.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return kernel


def convolved(x, weight, grid):
    """x plus the correlation of its image with a filter for each channel, on [B, D, R, C]."""
    image = x.transpose(2, 3).flatten(1, 2).unflatten(2, (grid.rows, grid.cols))
    image = image + F.conv2d(image, weight, padding=1, groups=weight.shape[0])
    return image.flatten(2).unflatten(1, (HEADS, HEAD_DIM)).transpose(2, 3)


@pytest.mark.parametrize("grid", [Grid(1, 1), Grid(1, 9), Grid(5, 7)])
@pytest.mark.parametrize("scale", [None, 0.2])
def test_equals_its_definition(grid, scale):
    kernel, (q, k, v) = built(grid), inputs(grid.num_tokens)
    got = kernel(q, k, v, TokenLayout(grid), scale=scale)
    centred = k - k.mean(2, keepdim=True)
    k_normed = centred / (centred.square().mean(2, keepdim=True) + 1).sqrt()
    q_conv, k_conv = convolved(q, kernel.q_conv, grid), convolved(k_normed, kernel.k_conv, grid)
    want = ttt_reference(q_conv, k_conv, v, kernel.w1, kernel.w2, step_size=kernel.step_size, scale=scale)
    assert_close("output", got, want, 1e-5)
    tensors = {"q": q, "v": v, **dict(kernel.named_parameters())}
    if grid.num_tokens > 1:
        tensors["k"] = k
    pairs = zip(
        *(torch.autograd.grad(y.square().sum(), list(tensors.values())) for y in (got, want)), strict=True
    )
    for name, (got_grad, want_grad) in zip(tensors, pairs, strict=True):
        assert_close(f"gradient of {name}", got_grad, want_grad, 1e-4)


@pytest.mark.parametrize("text_first", [True, False])
def test_text_tokens_are_learned_and_asked_but_not_convolved(text_first):
    """With text at either end the image is filtered on its own grid, and its filters do not reach the text."""
    layout = TokenLayout(Grid(3, 5), **{"before" if text_first else "after": 4})
    kernel, (q, k, v) = built(layout.grid), inputs(19)
    order = torch.arange(19).roll(4 if text_first else -4)
    other = TokenLayout(Grid(3, 5), **{"after" if text_first else "before": 4})
    moved = kernel(*(x[:, :, order.argsort()] for x in (q, k, v)), other)
    assert_close("output", kernel(q, k, v, layout), moved[:, :, order], 1e-5)
    changed = v.detach().clone()
    changed[:, :, layout.num_tokens - 1 if not text_first else 0] += 1
    difference = kernel(q, k, changed, layout) - kernel(q, k, v, layout)
    assert (difference.abs().amax((0, 1, 3)) > 1e-4).all()


def test_a_constant_added_to_all_keys_changes_nothing():
    kernel, (q, k, v) = TTTConfig().build(site(Grid(5, 7))), inputs(35)
    layout = TokenLayout(Grid(5, 7))
    assert_close("output", kernel(q, k + 5, v, layout), kernel(q, k, v, layout), 1e-4)


def test_starts_as_linear_attention_with_features_of_silu():
    kernel, (q, k, v) = TTTConfig().build(site(Grid(5, 7))), inputs(35)
    assert_close("rows", kernel.w1 @ kernel.w1.mT, torch.eye(HEAD_DIM).expand(HEADS, -1, -1), 1e-5)
    weights = F.silu(q @ kernel.w1) @ F.silu(key_norm(k) @ kernel.w1).mT  # [B, H, L, L]
    assert_close("output", kernel(q, k, v, TokenLayout(Grid(5, 7))), weights @ v / 35 / 2, 1e-5)


def test_at_the_start_every_parameter_learns():
    kernel = TTTConfig().build(site(Grid(5, 7)))
    kernel(*inputs(35), TokenLayout(Grid(5, 7))).sum().backward()
    for name, parameter in kernel.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_a_window_makes_it_a_hybrid():
    config, hybrid = (
        TTTConfig(window=2),
        parse_operator({"name": "hybrid", "first": {"name": "window-2d", "radius": 2}, "second": "ttt"}),
    )
    where = site(Grid(5, 7))
    kernel, same = config.build(where), hybrid.build(where)
    same.load_state_dict(kernel.state_dict())
    qkv = inputs(35)
    assert torch.equal(
        kernel(*qkv, TokenLayout(where.grid, where.num_text)),
        same(*qkv, TokenLayout(where.grid, where.num_text)),
    )
    assert config.mixing_flops(where) == hybrid.mixing_flops(where)


def test_faults_of_the_window():
    config = TTTConfig(window=3)
    assert config.faults(site(Grid(7, 7))) == []
    assert config.faults(site(Grid(5, 7))) == [
        "window: radius 3 spans 2 * 3 + 1 = 7 > 5 rows; use radius 2 or less"
    ]


def test_cost_grows_with_the_number_of_tokens():
    flops = [TTTConfig().mixing_flops(site(Grid(n, n))) for n in (8, 16)]
    assert flops[1] == 4 * flops[0]
    # seven products with a 4 x 4 matrix a head, and nine taps on each of q and k
    assert flops[0] == 64 * (7 * 2 * 12 * 4 + 2 * 2 * 12 * 9)
