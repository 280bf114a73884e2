"""The Triton kernels equal the plain definitions on a GPU: odd and real sizes, in fp32 and bf16, outputs and gradients."""

from dataclasses import replace

import jaxtyping
import pytest
import torch

from closeness import assert_close
from fusedcases import (
    CHANNELS,
    GATED,
    GATED_LAYOUTS,
    LINEAR,
    LINEAR_LENGTHS,
    SCANS,
    WINDOW_LAYOUTS,
    WINDOWS,
    assert_channels,
    assert_compiles,
    assert_gated,
    assert_linear,
    assert_modulated,
    assert_norm,
    assert_scan,
    assert_silu,
    assert_window,
    exact,
    filters,
    fits,
    key_mask,
    leaves,
)
from grafting.contract import Grid, TokenLayout
from grafting.functional import _triton
from grafting.functional.gated_conv import gated_conv, gated_conv_plain
from grafting.functional.linear import linear_attention
from grafting.functional.ssd import ssd
from grafting.functional.window import window_1d, window_1d_reference, window_2d

pytestmark = pytest.mark.gpu


@pytest.fixture
def _untyped():
    """Shape checks are Python that torch.compile cannot trace whole."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_a_gpu_has_the_kernels(device):
    assert _triton.can_fuse(torch.ones(1, device=device)) == (device.type == "cuda")


@pytest.mark.parametrize("layout", GATED_LAYOUTS, ids=str)
@pytest.mark.parametrize("name", GATED)
def test_gated_convolutions_on_a_gpu(name, layout, device):
    assert_gated(name, layout, dim=5, device=device, batch=1)
    for dim in (72, 128):
        assert_gated(name, layout, dim=dim, device=device, batch=3, dtype=torch.bfloat16, ratio=2e-2)


@pytest.mark.parametrize("name", ["se-2d", "x", "y"])
def test_gated_convolutions_of_real_size_on_a_gpu(name, device):
    assert_gated(name, TokenLayout(Grid(32, 32)), dim=1152, device=device, batch=4, ratio=2e-5)
    assert_gated(
        name, TokenLayout(Grid(128, 128)), dim=64, device=device, batch=1, dtype=torch.bfloat16, ratio=2e-2
    )


@pytest.mark.parametrize("name", CHANNELS)
def test_filters_along_channels_on_a_gpu(name, device):
    assert_channels(name, device=device)
    assert_channels(name, device=device, dtype=torch.bfloat16, ratio=2e-2)
    if CHANNELS[name][1] == 1:
        assert_channels(name, device=device, num_tokens=1024, batch=9, dtype=torch.bfloat16, ratio=2e-2)


@pytest.mark.parametrize("before", [0, 3])
def test_filters_with_silu_on_a_gpu(before, device):
    assert_silu(before, device=device)
    shape = (3, 300, 200)
    assert_silu(before, device=device, dtype=torch.bfloat16, ratio=2e-2, shape=shape)


@pytest.mark.parametrize("both", [False, True])
def test_gated_norms_on_a_gpu(both, device):
    assert_norm(both=both, device=device)
    assert_norm(both=both, device=device, dtype=torch.bfloat16, ratio=2e-2, shape=(2, 3000, 2304))


def test_modulated_norms_on_a_gpu(device):
    """In the precisions of fp32, of autocast, whose conditions are linears' outputs, and of models held in bf16."""
    assert_modulated(device=device)
    assert_modulated(device=device, of_condition=torch.bfloat16, ratio=1e-2)
    for shape in ((9, 256, 1152), (2, 3000, 4096)):
        assert_modulated(device=device, shape=shape, dtype=torch.bfloat16, ratio=2e-2)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", SCANS)
def test_scans_on_a_gpu(name, reverse, device):
    assert_scan(name, reverse=reverse, device=device)
    assert_scan(name, reverse=reverse, device=device, dtype=torch.bfloat16, ratio=2e-2)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", WINDOW_LAYOUTS, ids=str)
@pytest.mark.parametrize("name", WINDOWS)
def test_windows_on_a_gpu(name, layout, masked, device):
    if not fits(name, layout):
        pytest.skip("a shifted window is larger than the grid")
    layout = replace(layout, key_mask=key_mask(layout, 2, device) if masked else None)
    assert_window(name, layout, device=device)
    assert_window(name, layout, device=device, dims=(72, 72), dtype=torch.bfloat16, ratio=2e-2)


def test_windows_of_any_head_dim_on_a_gpu(device):
    layout = WINDOW_LAYOUTS[0]
    assert_window("2d", layout, device=device, dims=(72, 72), ratio=2e-5)
    assert_window("2d", layout, device=device, dims=(129, 5))
    for dims in ((64, 128), (20, 33)):
        assert_window("2d", layout, device=device, dims=dims, dtype=torch.bfloat16, ratio=2e-2)


@pytest.mark.parametrize(("window", "settings"), [(window_2d, {"radius": 3}), (window_1d, {"window": 4})])
def test_windows_of_real_size_on_a_gpu(window, settings, monkeypatch, device):
    layout = TokenLayout(Grid(128, 128))
    qkv = [
        torch.randn(1, 128 * 128, 4, 72, device=device, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for _ in "qkv"
    ]
    grad = torch.randn_like(qkv[0])
    found = []
    for enabled in (True, False):
        monkeypatch.setattr(_triton, "ENABLED", enabled)
        output = window(*qkv, layout, **settings)
        found.append([output, *torch.autograd.grad(output, qkv, grad)])
    for got, want in zip(*found, strict=True):
        assert_close("with and without the kernels", got, want, 2e-2)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lengths", LINEAR_LENGTHS)
@pytest.mark.parametrize("feature_map", LINEAR)
def test_linear_attention_on_a_gpu(feature_map, lengths, masked, device):
    settings = {"device": device, "dtype": torch.bfloat16, "masked": masked, "ratios": (7e-3, 3e-2)}
    assert_linear(feature_map, lengths, **settings)
    assert_linear(feature_map, lengths, dims=(72, 72), **settings)


@pytest.mark.parametrize("dims", [(32, 32), (64, 64), (128, 128), (20, 33), (64, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_attention_of_any_head_dim_on_a_gpu(dims, dtype, device):
    assert_linear("elu", (300, 300), dims=dims, device=device, dtype=dtype, ratios=(7e-3, 3e-2))
    assert_linear("softmax", (300, 300), dims=dims, device=device, dtype=dtype, ratios=(7e-3, 3e-2), mean=3.0)


@pytest.mark.parametrize(("batch", "length"), [(1, 128 * 128), (64, 256)])
def test_linear_attention_of_real_size_on_a_gpu(batch, length, monkeypatch, device):
    qkv = [
        torch.randn(batch, length, 16, 72, device=device, dtype=torch.bfloat16)
        .transpose(1, 2)
        .requires_grad_()
        for _ in "qkv"
    ]
    grad = torch.randn_like(qkv[0])
    found = []
    for enabled in (True, False):
        monkeypatch.setattr(_triton, "ENABLED", enabled)
        output = linear_attention(*qkv)
        found.append([output, *torch.autograd.grad(output, qkv, grad)])
    for got, want in zip(*found, strict=True):
        assert_close("with and without the kernels", got, want, 2e-2)


def test_a_call_can_be_repeated_bit_for_bit(device):
    layout = TokenLayout(Grid(29, 23), before=3)
    short, inner = filters("se-2d", 72, device)
    x = torch.randn(4, layout.num_tokens, 216, device=device, requires_grad=True)
    qkv = [torch.randn(2, 2, n, 72, device=device, requires_grad=True) for n in (667, 670, 670)]
    of_image = replace(layout, image_queries=True)
    runs = []
    for _ in range(2):
        mixed, seen = gated_conv(x, short, inner, layout), window_2d(*qkv, of_image, radius=2)
        summed = linear_attention(*(x.to(torch.bfloat16) for x in qkv))
        loss = mixed.square().sum() + seen.square().sum() + summed.float().square().sum()
        runs.append([mixed, seen, summed, *torch.autograd.grad(loss, [*leaves(x, short, inner), *qkv])])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_only_some_inputs_may_need_gradients_and_inputs_may_be_views(device):
    layout = TokenLayout(Grid(4, 5))
    short, inner = filters("se", 8, device)
    x = torch.randn(20, 2, 24, device=device).transpose(0, 1)
    got = gated_conv(x, short, inner, layout)
    (of_bias,) = torch.autograd.grad(got.sum(), [inner.bias])
    want = gated_conv_plain(x.double(), exact(short), inner_exact := exact(inner), layout)
    assert_close("gradient", of_bias, torch.autograd.grad(want.sum(), [inner_exact.bias])[0], 1e-5)
    q = torch.randn(2, 20, 16, 3, device=device).permute(0, 3, 1, 2)  # nothing beside a vector's numbers
    k = q.clone().requires_grad_()
    (grad,) = torch.autograd.grad(window_1d(q, k, q, layout, window=2).square().sum(), [k])
    k64 = k.detach().double().requires_grad_()
    want = window_1d_reference(q.double(), k64, q.double(), layout, window=2).square().sum()
    assert_close("gradient", grad, torch.autograd.grad(want, [k64])[0], 1e-5)


def test_autocast_gives_what_a_product_gives(device):
    layout = TokenLayout(Grid(4, 5))
    short, inner = filters("se", 8, device)
    x, q = torch.randn(1, 20, 24, device=device), torch.randn(1, 2, 20, 16, device=device, requires_grad=True)
    with torch.autocast(device.type, torch.bfloat16):
        assert gated_conv(x, short, inner, layout).dtype == torch.bfloat16
        seen = window_2d(q, q, q, layout, radius=1)
    assert seen.dtype == torch.bfloat16
    assert torch.autograd.grad(seen.sum(), q)[0].dtype == torch.float32


def test_scans_of_real_size_can_be_repeated_bit_for_bit(device):
    for dtype, ratio in ((torch.float32, 2e-5), (torch.bfloat16, 2e-2)):
        assert_scan("wide", reverse=True, device=device, dtype=dtype, ratio=ratio)
    x = torch.randn(2, 1000, 20, 16, device=device, dtype=torch.bfloat16, requires_grad=True)
    dt = torch.rand(2, 1000, 20, device=device, requires_grad=True)
    A = -torch.rand(20, device=device).requires_grad_()
    B = torch.randn(2, 1000, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    runs = [torch.autograd.grad(ssd(x, dt, A, B, B).float().square().sum(), [x, dt, B]) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.usefixtures("_untyped")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiles_on_a_gpu(device):
    assert_compiles(device, "inductor")
