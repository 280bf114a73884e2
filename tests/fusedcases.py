"""Calls that the Triton kernels take, and what they must equal: the plain definitions in float64, outputs and gradients."""

from functools import partial

import torch

from closeness import assert_close
from grafting.contract import Grid, TokenLayout
from grafting.functional import _triton
from grafting.functional.gated_conv import (
    Filter,
    gated_channels,
    gated_channels_plain,
    gated_conv,
    gated_conv_plain,
    silu_conv,
    silu_conv_plain,
)
from grafting.functional.gated_norm import gated_norm, gated_norm_plain
from grafting.functional.linear import linear_attention, linear_attention_reference
from grafting.functional.modulated_norm import modulated_norm, modulated_norm_plain
from grafting.functional.ssd import MAX_WIDE_STATE, ssd, ssd_plain
from grafting.functional.window import (
    window_1d,
    window_1d_reference,
    window_2d,
    window_2d_reference,
    window_3d,
    window_3d_reference,
)

GATED = {  # taps of the short filter and the inner one, axes, taps before the token
    "se": (4, 4, 1, 2),
    "se-causal": (4, 4, 1, 3),
    "se-2d": (3, 3, 2, 1),
    "se-2d-even": (4, 4, 2, 2),
    "x": (4, None, 1, 2),
    "x-2d": (3, None, 2, 1),
    "x-long": (25, None, 1, 24),
    "y": (None, 4, 1, 2),
    "y-2d": (None, 3, 2, 1),
    "y-kernel": (1, 3, 2, 1),
}
GATED_LAYOUTS = [
    TokenLayout(Grid(16, 16)),
    TokenLayout(Grid(3, 5), before=2, after=1),
    TokenLayout(Grid(9, 7, frames=2), after=70),
    TokenLayout(Grid(1, 33)),
    TokenLayout(Grid(1, 1)),
]
WINDOWS = {
    "1d": (window_1d, window_1d_reference, {"window": 4}),
    "1d-wide": (window_1d, window_1d_reference, {"window": 50}),
    "2d": (window_2d, window_2d_reference, {"radius": 3}),
    "2d-shifted": (window_2d, window_2d_reference, {"radius": 2, "border": "shifted", "scale": 0.3}),
    "3d": (window_3d, window_3d_reference, {"radius": 1, "frames": 1}),
    "3d-shifted": (window_3d, window_3d_reference, {"radius": 2, "frames": 1, "border": "shifted"}),
}
WINDOW_LAYOUTS = [
    TokenLayout(Grid(7, 9), before=2, after=3),
    TokenLayout(Grid(16, 16)),
    TokenLayout(Grid(33, 27), after=130),
    TokenLayout(Grid(5, 6, frames=4), before=1),
    TokenLayout(Grid(5, 23), before=70, image_queries=True),
]


def filters(name, dim, device, dtype=torch.float32):
    short_taps, inner_taps, axes, before = GATED[name]

    def make(taps, channels):
        if taps is None:
            return None
        weight = torch.randn(channels, 1, *[taps] * axes, device=device, dtype=dtype)
        bias = torch.randn(channels, device=device, dtype=dtype)
        return Filter(
            weight.requires_grad_(), bias.requires_grad_(), min(before, taps // 2 if axes == 2 else before)
        )

    return make(short_taps, 3 * dim), make(inner_taps, dim)


def leaves(x, short, inner):
    return [x, *(t for f in (short, inner) if f is not None for t in f[:2])]


def exact(own):
    return (
        None if own is None else Filter(*(t.detach().double().requires_grad_() for t in own[:2]), own.before)
    )


def assert_gated(name, layout, *, dim, device, dtype=torch.float32, batch=2, ratio=1e-5):
    torch.manual_seed(0)
    short, inner = filters(name, dim, device)
    x = torch.randn(batch, layout.num_tokens, 3 * dim, device=device).to(dtype).requires_grad_()
    got = gated_conv(x, short, inner, layout)
    assert ("grafting_gated_conv" in got.grad_fn.name()) == _triton.can_fuse(x)
    assert got.dtype == dtype
    # a gradient as of a sum, which no memory backs
    grad = torch.randn(dim, device=device).to(dtype).expand_as(got)
    got_grads = torch.autograd.grad(got, leaves(x, short, inner), grad)
    of_exact = x.detach().double().requires_grad_(), exact(short), exact(inner)
    want = gated_conv_plain(*of_exact, layout)
    want_grads = torch.autograd.grad(want, leaves(*of_exact), grad.double())
    assert_close("output", got, want, ratio)
    for place, (got_grad, want_grad, leaf) in enumerate(
        zip(got_grads, want_grads, leaves(x, short, inner), strict=True)
    ):
        assert got_grad.dtype == leaf.dtype
        assert_close(f"gradient {place}", got_grad, want_grad, ratio)


CHANNELS = {  # taps, filters for 9 tokens, channels of q
    "shared": (4, 1, 200),
    "per-token": (4, 9, 30),
    "one-tap": (1, 1, 5),
    "long": (25, 9, 7),
}


def assert_channels(name, *, device, num_tokens=9, dtype=torch.float32, batch=2, ratio=1e-5):
    torch.manual_seed(0)
    taps, num_filters, dim = CHANNELS[name]
    qkv = torch.randn(batch, num_tokens, 3 * dim, device=device).to(dtype)
    own = [torch.randn(num_filters, 1, taps, device=device), torch.randn(num_filters, device=device)]
    assert_call(gated_channels, gated_channels_plain, [qkv, *own], "grafting_gated_channels", ratio)


def assert_call(fused, plain, inputs, name, ratio, *, fuses=True):
    """Outputs and gradients, also of a sum, which no memory backs; `name` is in that of the output's node."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    got, want = fused(*inputs), plain(*exact_inputs)
    assert (name in got.grad_fn.name()) == (fuses and _triton.can_fuse(inputs[0]))
    assert got.dtype == inputs[0].dtype
    assert_close("output", got, want, ratio)
    grad = torch.randn(got.shape[-1], device=got.device).to(got.dtype)
    got_grads = torch.autograd.grad(got, inputs, grad.expand_as(got))
    want_grads = torch.autograd.grad(want, exact_inputs, grad.double().expand_as(want))
    for place, (got_grad, want_grad, leaf) in enumerate(zip(got_grads, want_grads, inputs, strict=True)):
        assert got_grad.dtype == leaf.dtype
        assert_close(f"gradient {place}", got_grad, want_grad, ratio)


def assert_norm(*, both, device, dtype=torch.float32, ratio=1e-5, shape=(2, 5, 70)):
    """Of a gate that is a part of longer rows."""
    torch.manual_seed(0)
    y, back = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    gate = torch.randn(*shape[:2], shape[2] + 9, device=device).to(dtype)[..., 4:-5]
    weight = torch.randn(shape[2], device=device, dtype=dtype)

    def call(of, y, gate, weight, *rest):
        return of(y, rest[0] if rest else None, gate, weight, 1e-5)

    fused, plain = (partial(call, f) for f in (gated_norm, gated_norm_plain))
    assert_call(fused, plain, [y, gate, weight, *[back] * both], "grafting_gated_norm", ratio)


def assert_modulated(*, device, dtype=torch.float32, of_condition=None, ratio=1e-5, shape=(3, 5, 70)):
    """Shift and scale are parts of longer rows, as one linear makes them; in a precision of their own under autocast."""
    torch.manual_seed(0)
    x = (torch.randn(shape, device=device) + 2).to(dtype)
    made = torch.randn(shape[0], 1, 2 * shape[2] + 3, device=device).to(of_condition or dtype)
    shift, scale = made[..., : shape[2]], made[..., shape[2] + 3 :]
    fused, plain = (partial(f, eps=1e-6) for f in (modulated_norm, modulated_norm_plain))
    assert_call(fused, plain, [x, shift, scale], "grafting_modulated_norm", ratio)


def assert_silu(before, *, device, dtype=torch.float32, ratio=1e-5, shape=(2, 37, 70)):
    """Of a part of longer rows."""
    torch.manual_seed(0)
    x = torch.randn(*shape[:2], shape[2] + 10, device=device).to(dtype)[..., 3:-7]
    own = [torch.randn(shape[2], 1, 4, device=device), torch.randn(shape[2], device=device)]
    fused, plain = (partial(f, before=before) for f in (silu_conv, silu_conv_plain))
    assert_call(fused, plain, [x, *own], "grafting_silu_conv", ratio)


SCANS = {  # tokens, heads, P, N
    "short": (1, 1, 3, 4),
    "odd": (70, 18, 5, 6),
    "whole": (128, 2, 16, 64),
    "wide": (200, 3, 64, 128),
}


def assert_scan(name, *, device, reverse, dtype=torch.float32, ratio=1e-5):
    torch.manual_seed(0)
    length, heads, p, n = SCANS[name]
    x = torch.randn(2, length, heads, p, device=device).to(dtype)
    dt, A = torch.rand(2, length, heads, device=device), -torch.linspace(0.1, 3, heads, device=device)
    B, C = (torch.randn(2, length, n, device=device).to(dtype) for _ in "BC")
    inputs = [x, dt, A, B, C, torch.randn(heads, device=device)]
    fused, plain = (partial(f, reverse=reverse) for f in (ssd, ssd_plain))
    fuses = dtype != torch.float32 or n <= MAX_WIDE_STATE
    assert_call(fused, plain, inputs, "grafting_ssd", ratio, fuses=fuses)


def key_mask(layout, batch, device):
    mask = torch.rand(batch, layout.num_tokens, device=device) < 0.8
    mask[:, layout.image_slice] |= torch.arange(layout.grid.num_tokens, device=device) % 3 > 0
    return mask


def assert_window(name, layout, *, device, dtype=torch.float32, dims=(6, 10), batch=2, heads=2, ratio=1e-5):
    torch.manual_seed(0)
    fused, plain, settings = WINDOWS[name]
    shapes = [(layout.num_queries, dims[0]), (layout.num_tokens, dims[0]), (layout.num_tokens, dims[1])]
    qkv = [
        torch.randn(batch, n, heads, d, device=device).to(dtype).transpose(1, 2).requires_grad_()
        for n, d in shapes
    ]
    got = fused(*qkv, layout, **settings)
    grad = torch.randn_like(got)
    got_grads = torch.autograd.grad(got, qkv, grad)
    of_exact = [x.detach().double().requires_grad_() for x in qkv]
    want = plain(*of_exact, layout, **settings)
    want_grads = torch.autograd.grad(want, of_exact, grad.double())
    assert got.dtype == dtype
    assert_close("output", got, want, ratio)
    for letter, got_grad, want_grad in zip("qkv", got_grads, want_grads, strict=True):
        assert_close(f"gradient of {letter}", got_grad, want_grad, ratio)


LINEAR = ["elu", "relu", "softmax"]
LINEAR_LENGTHS = [(70, 300), (1, 1), (257, 256), (2049, 700)]  # queries and keys


def assert_linear(
    feature_map, lengths, *, device, dtype, ratios, dims=(6, 10), batch=2, heads=2, masked=False, mean=0.0
):
    """The kernels on fp32 too, which `linear_attention` sends another way; `mean` is that of values."""
    from grafting.functional._triton.linear import linear_attention as fused

    torch.manual_seed(0)
    shapes = [(lengths[0], dims[0]), (lengths[1], dims[0]), (lengths[1], dims[1])]
    drawn = [torch.randn(batch, n, heads, d, device=device).transpose(1, 2) for n, d in shapes]
    drawn[2] += mean
    qkv = [x.to(dtype).requires_grad_() for x in drawn]
    mask = None
    if masked:
        mask = torch.rand(batch, lengths[1], device=device) < 0.7
        mask[:, 0] = True
    if dtype == torch.float32:
        got, _ = fused(*qkv, mask, feature_map, 0.3)
    else:
        got = linear_attention(*qkv, feature_map=feature_map, scale=0.3, key_mask=mask)
        assert ("grafting_linear_attention" in got.grad_fn.name()) == _triton.can_fuse(*qkv)
    assert got.dtype == dtype
    grad = torch.randn_like(got)
    got_grads = torch.autograd.grad(got, qkv, grad)
    of_exact = [x.detach().double().requires_grad_() for x in qkv]
    want = linear_attention_reference(*of_exact, feature_map=feature_map, scale=0.3, key_mask=mask)
    want_grads = torch.autograd.grad(want, of_exact, grad.double())
    assert_close("output", got, want, ratios[0])
    for letter, got_grad, want_grad in zip("qkv", got_grads, want_grads, strict=True):
        assert got_grad.dtype == dtype
        # with one key the weights are 1 whatever q and k are, up to the epsilon
        if lengths[1] > 1 or letter == "v":
            assert_close(f"gradient of {letter}", got_grad, want_grad, ratios[1])


def fits(name, layout):
    reach = WINDOWS[name][2].get("radius", 0)
    grid = layout.grid
    has_frames = "3d" not in name or grid.frames >= 3
    return "shifted" not in name or (2 * reach + 1 <= min(grid.rows, grid.cols) and has_frames)


def assert_compiles(device, backend):
    layout = TokenLayout(Grid(2, 3))
    short, _ = filters("x", 2, device)
    x = torch.randn(1, 6, 6, device=device, requires_grad=True)
    q = torch.randn(1, 1, 6, 16, device=device, requires_grad=True)

    def both(x, q):
        seen = window_2d(q, q, q, layout, radius=1)
        half = q.to(torch.float16)
        summed = linear_attention(half, half, half).float()
        return gated_conv(x, short, None, layout).sum() + seen.square().sum() + summed.square().sum()

    got, want = torch.compile(both, backend=backend, fullgraph=True)(x, q), both(x, q)
    assert_close("output", got, want, 1e-5)
    grads = torch.autograd.grad(got, [x, q]), torch.autograd.grad(want, [x, q])
    for got_grad, want_grad in zip(*grads, strict=True):
        assert_close("gradient", got_grad, want_grad, 1e-5)
