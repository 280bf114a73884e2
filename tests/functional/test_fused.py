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
    WINDOW_LAYOUTS,
    assert_channels,
    assert_compiles,
    assert_gated,
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
