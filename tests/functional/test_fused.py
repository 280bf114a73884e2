"""The Triton kernels equal the plain definitions, by Triton's interpreter: without a GPU, and slow. `tests/gpu/test_fused.py` has more.

pip install 'triton>=3.7'    # of torch's builds only those for CUDA come with it
TRITON_INTERPRET=1 pytest tests/functional/test_fused.py -m slow
"""

from dataclasses import replace

import jaxtyping
import pytest
import torch

from closeness import assert_close
from fusedcases import (
    CHANNELS,
    GATED_LAYOUTS,
    LINEAR,
    WINDOW_LAYOUTS,
    assert_channels,
    assert_compiles,
    assert_gated,
    assert_linear,
    assert_modulated,
    assert_norm,
    assert_scan,
    assert_silu,
    assert_window,
    filters,
    key_mask,
)
from grafting.contract import Grid, TokenLayout
from grafting.functional import _triton
from grafting.functional.gated_conv import gated_conv, gated_conv_plain
from grafting.functional.linear import linear_attention, linear_attention_reference
from grafting.functional.window import window_2d, window_2d_reference

interpreted = pytest.mark.skipif(
    not (_triton.INTERPRETED and _triton.ENABLED),
    reason="needs triton (pip install 'triton>=3.7') and TRITON_INTERPRET=1",
)


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("name", ["se-2d", "x", "x-long", "y-2d", "y-kernel"])
def test_gated_convolutions_by_the_interpreter(name):
    assert_gated(name, GATED_LAYOUTS[1], dim=5, device="cpu")


@pytest.mark.slow
@interpreted
def test_gated_convolutions_of_many_channels_by_the_interpreter():
    assert_gated("se-causal", GATED_LAYOUTS[3], dim=70, device="cpu", dtype=torch.float16, ratio=1e-2)


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("name", CHANNELS)
def test_filters_along_channels_by_the_interpreter(name):
    assert_channels(name, device="cpu")
    assert_channels(name, device="cpu", dtype=torch.float16, ratio=1e-2)


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("before", [0, 3])
def test_filters_with_silu_by_the_interpreter(before):
    assert_silu(before, device="cpu")
    assert_silu(before, device="cpu", dtype=torch.float16, ratio=1e-2)


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("both", [False, True])
def test_gated_norms_by_the_interpreter(both):
    assert_norm(both=both, device="cpu")
    assert_norm(both=both, device="cpu", dtype=torch.float16, ratio=1e-2)


@pytest.mark.slow
@interpreted
def test_modulated_norms_by_the_interpreter():
    assert_modulated(device="cpu")
    assert_modulated(device="cpu", dtype=torch.float16, ratio=2e-2)
    assert_modulated(device="cpu", of_condition=torch.float16, ratio=2e-3)


@pytest.mark.slow
@interpreted
def test_modulated_norms_of_many_tokens_by_the_interpreter(monkeypatch):
    """A program takes several tokens of an item, of which there is no whole number of its programs'."""
    from grafting.functional._triton import modulated_norm

    monkeypatch.setattr(modulated_norm, "MANY_PROGRAMS", 4)
    assert_modulated(device="cpu", shape=(2, 7, 16))


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", ["short", "odd", "whole"])
def test_scans_by_the_interpreter(name, reverse):
    assert_scan(name, reverse=reverse, device="cpu")
    assert_scan(name, reverse=reverse, device="cpu", dtype=torch.float16, ratio=2e-2)


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("name", ["1d", "2d-shifted"])
@pytest.mark.parametrize("masked", [False, True])
def test_windows_by_the_interpreter(name, masked):
    layout = WINDOW_LAYOUTS[0]
    layout = replace(layout, key_mask=key_mask(layout, 2, "cpu") if masked else None)
    assert_window(name, layout, device="cpu", heads=1)


@pytest.mark.slow
@interpreted
def test_windows_of_a_video_by_the_interpreter():
    assert_window("3d-shifted", WINDOW_LAYOUTS[3], device="cpu", batch=1, heads=1)


@pytest.mark.slow
@interpreted
def test_windows_of_the_image_alone_by_the_interpreter():
    layout = TokenLayout(Grid(3, 11), before=4, image_queries=True)
    assert_window("2d", layout, device="cpu", batch=1, dtype=torch.float16, ratio=1e-2)


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("feature_map", LINEAR)
def test_linear_attention_by_the_interpreter(feature_map, masked):
    ratios = 5e-7, 2e-6
    assert_linear(
        feature_map, (70, 300), device="cpu", dtype=torch.float32, ratios=ratios, heads=1, masked=masked
    )


@pytest.mark.slow
@interpreted
def test_linear_attention_in_half_precision_by_the_interpreter():
    """Of fp16: the interpreter multiplies bf16's bits. Values far from zero leave their gradients exact."""
    settings = {"device": "cpu", "dtype": torch.float16, "batch": 1, "heads": 1}
    for feature_map in LINEAR:
        assert_linear(feature_map, (70, 40), dims=(72, 64), mean=5.0, ratios=(1e-3, 4e-3), **settings)


@pytest.mark.slow
@interpreted
def test_linear_attention_takes_views_and_a_precision_of_values_alone():
    q = torch.randn(1, 20, 16, 3).permute(0, 3, 1, 2).requires_grad_()  # nothing beside a vector's numbers
    k = torch.randn(1, 3, 16, 20, dtype=torch.float16).mT.requires_grad_()
    v = torch.randn(1, 3, 1, 8, dtype=torch.float16).expand(-1, -1, 20, -1).requires_grad_()
    mask = torch.arange(20)[None] < 11
    got = linear_attention(q, k, v, key_mask=mask)
    assert "grafting_linear_attention" in got.grad_fn.name()
    assert got.dtype == torch.float16
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = linear_attention_reference(*exact, key_mask=mask)
    assert_close("output", got, want, 1e-3)
    # a gradient as of a sum, which no memory backs
    got_grads = torch.autograd.grad((got * torch.ones(8, dtype=got.dtype)).sum(), (q, k, v))
    want_grads = torch.autograd.grad(want.sum(), exact)
    assert [x.dtype for x in got_grads] == [x.dtype for x in (q, k, v)]
    assert_close("gradient of v", got_grads[2], want_grads[2], 2e-3)


@pytest.mark.slow
@interpreted
def test_linear_attention_without_a_key_or_a_feature_is_zero():
    q, k, v = (torch.randn(1, 1, 5, 16, dtype=torch.float16, requires_grad=True) for _ in "qkv")
    for got in (
        linear_attention(q, k, v, key_mask=torch.zeros(1, 5, dtype=torch.bool)),
        linear_attention(-q.abs(), k, v, feature_map="relu"),
        linear_attention(q.abs(), -k.abs(), v, feature_map="relu"),
    ):
        assert (got == 0).all()
        for gradient in torch.autograd.grad(got.sum(), (k, v), retain_graph=True):
            assert (gradient == 0).all()


@pytest.mark.slow
@interpreted
def test_gradients_have_gradients_of_their_own_by_the_plain_path():
    layout = TokenLayout(Grid(2, 3))
    x = torch.randn(1, 6, 6, requires_grad=True)
    short, inner = filters("se", 2, "cpu")
    found = []
    for function in (gated_conv, gated_conv_plain):
        (once,) = torch.autograd.grad(function(x, short, inner, layout).square().sum(), x, create_graph=True)
        found += [once, *torch.autograd.grad(once.square().sum(), [x, short.weight])]
    for got, want in zip(found[:3], found[3:], strict=True):
        assert_close("gradient", got, want, 1e-5)
    qkv = [torch.randn(1, 1, 6, 4, requires_grad=True) for _ in "qkv"]
    found = []
    for function in (window_2d, window_2d_reference):
        once = torch.autograd.grad(function(*qkv, layout, radius=1).square().sum(), qkv, create_graph=True)
        found += [*once, *torch.autograd.grad(sum(x.square().sum() for x in once), qkv)]
    for got, want in zip(found[:6], found[6:], strict=True):
        assert_close("gradient", got, want, 1e-5)
    qkv = [torch.randn(1, 1, 6, 4, dtype=torch.float16, requires_grad=True) for _ in "qkv"]
    found = []
    for function in (linear_attention, linear_attention_reference):
        once = torch.autograd.grad(function(*qkv).float().square().sum(), qkv, create_graph=True)
        found += [*once, *torch.autograd.grad(sum(x.float().square().sum() for x in once), qkv)]
    for got, want in zip(found[:6], found[6:], strict=True):
        assert_close("gradient", got, want, 2e-2)


def test_what_the_kernels_do_not_take(monkeypatch):
    monkeypatch.setattr(_triton, "ENABLED", True)
    monkeypatch.setattr(_triton, "INTERPRETED", True)
    x = torch.ones(2, 3)
    assert _triton.can_fuse(x, x)
    assert not _triton.can_fuse(x.double())
    assert not _triton.can_fuse(x, torch.ones(3, device="meta"))
    assert not _triton.can_fuse(x[:0])
    told = []
    torch.func.vmap(lambda row: told.append(_triton.can_fuse(row)) or row)(x)
    torch.func.jvp(lambda row: told.append(_triton.can_fuse(row)) or row, (x,), (x,))
    assert told == [False, False]
    monkeypatch.setattr(_triton, "ENABLED", False)
    assert not _triton.can_fuse(x)
    monkeypatch.setattr(_triton, "ENABLED", True)
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    assert not _triton.can_fuse(x), "a CPU's tensors"


@pytest.fixture
def _untyped():
    """Shape checks are Python that torch.compile cannot trace whole."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.slow
@interpreted
@pytest.mark.usefixtures("_untyped")
def test_a_compiler_calls_the_kernels_as_they_are():
    assert_compiles("cpu", "aot_eager")
