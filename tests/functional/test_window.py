"""Window attention: tiles equal the dense masked form, in outputs and gradients, on any grid and beside text."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from closeness import assert_close
from grafting.contract import Grid, TokenLayout
from grafting.functional.window import window_1d, window_1d_reference, window_2d, window_2d_reference

LAYOUTS = [
    TokenLayout(Grid(1, 1)),
    TokenLayout(Grid(7, 9)),
    TokenLayout(Grid(5, 20), before=5),
    TokenLayout(Grid(20, 5), after=5),
    TokenLayout(Grid(33, 27)),
    TokenLayout(Grid(29, 23, frames=2), before=3),
]
SPANS = [(1, "clipped"), (3, "clipped"), (1, "shifted"), (2, "shifted"), (3, "shifted")]


def inputs(layout, *, key_dim=6, value_dim=6, dtype=torch.float64, batch=2, heads=2):
    shapes = [(batch, layout.num_tokens, heads, d) for d in (key_dim, key_dim, value_dim)]
    # heads beside tokens in memory, as a host's projections leave them
    return [torch.randn(s, dtype=dtype).transpose(1, 2).requires_grad_() for s in shapes]


def assert_same_function(fast, plain, layout, ratio=1e-10, **sizes):
    qkv = inputs(layout, **sizes)
    got, want = fast(*qkv), plain(*qkv)
    assert_close("output", got, want, ratio)
    weight = torch.randn_like(want)
    got_grads = torch.autograd.grad((got * weight).sum(), qkv)
    want_grads = torch.autograd.grad((want * weight).sum(), qkv)
    for name, got_grad, want_grad in zip("qkv", got_grads, want_grads, strict=True):
        # one token alone: q and k have no gradient, both forms leave rounding only
        if layout.num_tokens > 1 or name == "v":
            assert_close(f"gradient of {name}", got_grad, want_grad, ratio)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("window", [1, 4, 50])
def test_window_1d_equals_its_reference(layout, window):
    settings = {"window": window, "scale": 0.3}
    assert_same_function(
        lambda *qkv: window_1d(*qkv, layout, **settings),
        lambda *qkv: window_1d_reference(*qkv, layout, **settings),
        layout,
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("radius", "border"), SPANS)
def test_window_2d_equals_its_reference(layout, radius, border):
    if border == "shifted" and 2 * radius + 1 > min(layout.grid.rows, layout.grid.cols):
        pytest.skip("a shifted window needs 2 * radius + 1 rows and columns")
    settings = {"radius": radius, "border": border}
    assert_same_function(
        lambda *qkv: window_2d(*qkv, layout, **settings),
        lambda *qkv: window_2d_reference(*qkv, layout, **settings),
        layout,
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 45),
    cols=st.integers(1, 45),
    radius=st.integers(1, 6),
    border=st.sampled_from(["clipped", "shifted"]),
)
def test_window_2d_equals_its_reference_on_any_grid(rows, cols, radius, border):
    if border == "shifted":
        radius = min(radius, (min(rows, cols) - 1) // 2)
    layout = TokenLayout(Grid(rows, cols))
    q, k, v = inputs(layout, batch=1, heads=1, key_dim=2, value_dim=2)
    got = window_2d(q, k, v, layout, radius=radius, border=border)
    assert_close("output", got, window_2d_reference(q, k, v, layout, radius=radius, border=border), 1e-10)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(num_tokens=st.integers(1, 700), window=st.integers(1, 90), num_text=st.integers(0, 3))
def test_window_1d_equals_its_reference_at_any_length(num_tokens, window, num_text):
    layout = TokenLayout(Grid(1, num_tokens), num_text)
    q, k, v = inputs(layout, batch=1, heads=1, key_dim=2, value_dim=2)
    got = window_1d(q, k, v, layout, window=window)
    assert_close("output", got, window_1d_reference(q, k, v, layout, window=window), 1e-10)


def test_values_may_be_wider_than_keys():
    layout = TokenLayout(Grid(31, 33), before=5)
    assert_same_function(
        lambda *qkv: window_2d(*qkv, layout, radius=2),
        lambda *qkv: window_2d_reference(*qkv, layout, radius=2),
        layout,
        value_dim=10,
    )
    assert_same_function(
        lambda *qkv: window_1d(*qkv, layout, window=5),
        lambda *qkv: window_1d_reference(*qkv, layout, window=5),
        layout,
        value_dim=10,
    )


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_bf16_stays_close_to_the_exact_result(layout):
    q, k, v = inputs(layout, dtype=torch.bfloat16)
    exact = [x.double() for x in (q, k, v)]
    got = window_2d(q, k, v, layout, radius=2)
    assert got.dtype == torch.bfloat16
    assert_close("2-D", got, window_2d_reference(*exact, layout, radius=2), 1e-2)
    got = window_1d(q, k, v, layout, window=4)
    assert_close("1-D", got, window_1d_reference(*exact, layout, window=4), 1e-2)
    for gradient in torch.autograd.grad(got.sum(), (q, k, v)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("border", "corner", "edge"),
    [("clipped", [0, 1, 5, 6], [0, 1, 2, 5, 6, 7]), ("shifted", [0, 1, 2, 5, 6, 7, 10, 11, 12], None)],
)
def test_neighbours_at_the_border_counted_by_hand(border, corner, edge):
    """Equal scores make each output the mean of the tokens seen; on 4 x 5, token 0 is a corner and 1 an edge."""
    layout = TokenLayout(Grid(4, 5))
    q = torch.zeros(1, 1, 20, 2)
    v = torch.eye(20)[None, None]
    for attend in (window_2d, window_2d_reference):
        mixed = attend(q, q, v, layout, radius=1, border=border)[0, 0]
        assert mixed[0].nonzero().flatten().tolist() == corner
        assert mixed[1].nonzero().flatten().tolist() == (edge or corner)
        assert mixed[7].nonzero().flatten().tolist() == [1, 2, 3, 6, 7, 8, 11, 12, 13]


def test_text_sees_and_is_seen_by_all_image_tokens_see_their_window():
    layout = TokenLayout(Grid(8, 32), after=2)
    q = torch.zeros(1, 1, 258, 2)
    mixed = window_1d(q, q, torch.eye(258)[None, None], layout, window=3)[0, 0]
    assert (mixed[256:] > 0).all()
    assert mixed[100].nonzero().flatten().tolist() == [*range(97, 104), 256, 257]


def num_flops(attend, layout):
    q, k, v = inputs(layout, batch=1, dtype=torch.float32, key_dim=8, value_dim=8)
    # the counter knows the multiplications of the plain implementation, not the CPU's fused one
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        attend(q, k, v, layout).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "attend",
    [lambda *x: window_1d(*x, window=4), lambda *x: window_2d(*x, radius=3, border="shifted")],
    ids=["1d", "2d"],
)
def test_work_grows_with_the_number_of_tokens(attend):
    small, large = (num_flops(attend, TokenLayout(Grid(side, 64))) for side in (32, 64))
    assert large == 2 * small > 0


def test_a_shifted_window_larger_than_the_grid_is_refused():
    layout = TokenLayout(Grid(4, 9))
    with pytest.raises(ValueError, match="radius 2 needs 5 rows and columns, the grid is 4 x 9"):
        window_2d(*inputs(layout), layout, radius=2, border="shifted")


def test_a_layout_of_other_tokens_is_refused():
    qkv = inputs(TokenLayout(Grid(4, 4)))
    with pytest.raises(ValueError, match=r"the layout has 20 tokens .* q has 16 and k has 16"):
        window_1d(*qkv, TokenLayout(Grid(4, 5)), window=2)
