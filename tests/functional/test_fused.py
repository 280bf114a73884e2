"""The Triton kernels equal the plain definitions in float64, outputs and gradients: on a GPU, and by Triton's interpreter.

The interpreter's tests, which need no GPU, run by

    pip install 'triton>=3.7'    # with torch for CPU it is not there
    TRITON_INTERPRET=1 pytest tests/functional/test_fused.py -m slow
"""

from contextlib import contextmanager
from dataclasses import replace

import jaxtyping
import pytest
import torch

from closeness import assert_close
from grafting.contract import Grid, TokenLayout
from grafting.functional import _triton
from grafting.functional.gated_conv import Filter, gated_conv, gated_conv_plain
from grafting.functional.window import (
    window_1d,
    window_1d_reference,
    window_2d,
    window_2d_reference,
    window_3d,
    window_3d_reference,
)

on_gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and _triton.ENABLED), reason="needs CUDA and triton"
)
interpreted = pytest.mark.skipif(
    not (_triton.INTERPRETED and _triton.ENABLED),
    reason="needs triton (pip install 'triton>=3.7') and TRITON_INTERPRET=1",
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


@contextmanager
def plainly():
    """As the plain paths run at a user's: libraries may add in any order."""
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


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
    assert "grafting_gated_conv" in got.grad_fn.name()
    assert got.dtype == dtype
    # a gradient as of a sum, which no memory backs
    grad = torch.randn(dim, device=device).to(dtype).expand_as(got)
    got_grads = torch.autograd.grad(got, leaves(x, short, inner), grad)
    with plainly():
        of_exact = x.detach().double().requires_grad_(), exact(short), exact(inner)
        want = gated_conv_plain(*of_exact, layout)
        want_grads = torch.autograd.grad(want, leaves(*of_exact), grad.double())
    assert_close("output", got, want, ratio)
    for place, (got_grad, want_grad, leaf) in enumerate(
        zip(got_grads, want_grads, leaves(x, short, inner), strict=True)
    ):
        assert got_grad.dtype == leaf.dtype
        assert_close(f"gradient {place}", got_grad, want_grad, ratio)


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
    with plainly():
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


def fits(name, layout):
    reach = WINDOWS[name][2].get("radius", 0)
    grid = layout.grid
    has_frames = "3d" not in name or grid.frames >= 3
    return "shifted" not in name or (2 * reach + 1 <= min(grid.rows, grid.cols) and has_frames)


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


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("layout", GATED_LAYOUTS, ids=str)
@pytest.mark.parametrize("name", GATED)
def test_gated_convolutions_on_a_gpu(name, layout):
    for dim in (5, 72, 128):
        assert_gated(name, layout, dim=dim, device="cuda", batch=1 if dim == 5 else 3)
        assert_gated(name, layout, dim=dim, device="cuda", dtype=torch.bfloat16, ratio=2e-2)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("name", ["se-2d", "x", "y"])
def test_gated_convolutions_of_real_size_on_a_gpu(name):
    assert_gated(name, TokenLayout(Grid(32, 32)), dim=1152, device="cuda", batch=4, ratio=2e-5)
    assert_gated(
        name, TokenLayout(Grid(128, 128)), dim=64, device="cuda", batch=1, dtype=torch.bfloat16, ratio=2e-2
    )


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", WINDOW_LAYOUTS, ids=str)
@pytest.mark.parametrize("name", WINDOWS)
def test_windows_on_a_gpu(name, layout, masked):
    if not fits(name, layout):
        pytest.skip("a shifted window is larger than the grid")
    layout = replace(layout, key_mask=key_mask(layout, 2, "cuda") if masked else None)
    assert_window(name, layout, device="cuda")
    assert_window(name, layout, device="cuda", dims=(72, 72), ratio=2e-5)
    for dims in ((72, 72), (64, 128), (20, 33)):
        assert_window(name, layout, device="cuda", dims=dims, dtype=torch.bfloat16, ratio=2e-2)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(("window", "settings"), [(window_2d, {"radius": 3}), (window_1d, {"window": 4})])
def test_windows_of_real_size_on_a_gpu(window, settings, monkeypatch):
    layout = TokenLayout(Grid(128, 128))
    qkv = [
        torch.randn(1, 128 * 128, 4, 72, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for _ in "qkv"
    ]
    grad = torch.randn_like(qkv[0])
    found = []
    with plainly():
        for enabled in (True, False):
            monkeypatch.setattr(_triton, "ENABLED", enabled)
            output = window(*qkv, layout, **settings)
            found.append([output, *torch.autograd.grad(output, qkv, grad)])
    for got, want in zip(*found, strict=True):
        assert_close("with and without the kernels", got, want, 2e-2)


@pytest.mark.gpu
@on_gpu
def test_a_call_can_be_repeated_bit_for_bit():
    layout = TokenLayout(Grid(29, 23), before=3)
    short, inner = filters("se-2d", 72, "cuda")
    x = torch.randn(4, layout.num_tokens, 216, device="cuda", requires_grad=True)
    qkv = [torch.randn(2, 2, n, 72, device="cuda", requires_grad=True) for n in (667, 670, 670)]
    of_image = replace(layout, image_queries=True)
    runs = []
    for _ in range(2):
        mixed, seen = gated_conv(x, short, inner, layout), window_2d(*qkv, of_image, radius=2)
        loss = mixed.square().sum() + seen.square().sum()
        runs.append([mixed, seen, *torch.autograd.grad(loss, [*leaves(x, short, inner), *qkv])])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.gpu
@on_gpu
def test_only_some_inputs_may_need_gradients_and_inputs_may_be_views():
    layout = TokenLayout(Grid(4, 5))
    short, inner = filters("se", 8, "cuda")
    x = torch.randn(20, 2, 24, device="cuda").transpose(0, 1)
    got = gated_conv(x, short, inner, layout)
    (of_bias,) = torch.autograd.grad(got.sum(), [inner.bias])
    with plainly():
        want = gated_conv_plain(x.double(), exact(short), inner_exact := exact(inner), layout)
        assert_close("gradient", of_bias, torch.autograd.grad(want.sum(), [inner_exact.bias])[0], 1e-5)
    q = torch.randn(2, 20, 16, 3, device="cuda").permute(0, 3, 1, 2)  # nothing beside a vector's numbers
    k = q.clone().requires_grad_()
    (grad,) = torch.autograd.grad(window_1d(q, k, q, layout, window=2).square().sum(), [k])
    with plainly():
        k64 = k.detach().double().requires_grad_()
        want = window_1d_reference(q.double(), k64, q.double(), layout, window=2).square().sum()
        assert_close("gradient", grad, torch.autograd.grad(want, [k64])[0], 1e-5)


@pytest.mark.gpu
@on_gpu
def test_autocast_gives_what_a_product_gives():
    layout = TokenLayout(Grid(4, 5))
    short, inner = filters("se", 8, "cuda")
    x, q = torch.randn(1, 20, 24, device="cuda"), torch.randn(1, 2, 20, 16, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        assert gated_conv(x, short, inner, layout).dtype == torch.bfloat16
        seen = window_2d(q, q, q, layout, radius=1)
    assert seen.dtype == torch.bfloat16
    assert torch.autograd.grad(seen.sum(), q)[0].dtype == torch.float32


@pytest.fixture
def _untyped():
    """Shape checks are Python that torch.compile cannot trace whole."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def assert_compiles(device, backend):
    layout = TokenLayout(Grid(2, 3))
    short, _ = filters("x", 2, device)
    x = torch.randn(1, 6, 6, device=device, requires_grad=True)
    q = torch.randn(1, 1, 6, 16, device=device, requires_grad=True)

    def both(x, q):
        seen = window_2d(q, q, q, layout, radius=1)
        return gated_conv(x, short, None, layout).sum() + seen.square().sum()

    with plainly():
        got, want = torch.compile(both, backend=backend, fullgraph=True)(x, q), both(x, q)
        assert_close("output", got, want, 1e-5)
        grads = torch.autograd.grad(got, [x, q]), torch.autograd.grad(want, [x, q])
    for got_grad, want_grad in zip(*grads, strict=True):
        assert_close("gradient", got_grad, want_grad, 1e-5)


@pytest.mark.slow
@interpreted
@pytest.mark.usefixtures("_untyped")
def test_a_compiler_calls_the_kernels_as_they_are():
    assert_compiles("cpu", "aot_eager")


@pytest.mark.gpu
@on_gpu
@pytest.mark.usefixtures("_untyped")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiles_on_a_gpu():
    assert_compiles("cuda", "inductor")
