"""Windows over several frames: as the dense masked form, in outputs and gradients, with masks and beside text."""

import pytest
import torch

from closeness import assert_close
from grafting.contract import Grid, TokenLayout
from grafting.functional.window import window_2d, window_3d, window_3d_reference


def inputs(layout):
    shape = (2, 2, layout.num_tokens, 6)
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for _ in range(3)]


def assert_same_function(fast, plain, layout):
    qkv = inputs(layout)
    got, want = fast(*qkv), plain(*qkv)
    assert_close("output", got, want, 1e-10)
    weight = torch.randn_like(want)
    got_grads, want_grads = (torch.autograd.grad((y * weight).sum(), qkv) for y in (got, want))
    for name, got_grad, want_grad in zip("qkv", got_grads, want_grads, strict=True):
        assert_close(f"gradient of {name}", got_grad, want_grad, 1e-10)


@pytest.mark.parametrize(
    "layout",
    [
        TokenLayout(Grid(7, 9, frames=4)),
        TokenLayout(Grid(19, 23, frames=3), before=3, after=2),
        TokenLayout(Grid(5, 6, frames=2), after=2),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("radius", "frames", "border"), [(1, 1, "clipped"), (2, 2, "clipped"), (2, 1, "shifted")]
)
def test_window_3d_equals_its_reference(layout, radius, frames, border):
    if border == "shifted" and 2 * frames + 1 > layout.grid.frames:
        with pytest.raises(ValueError, match="needs 3 frames, the grid is 2"):
            window_3d(*inputs(layout), layout, radius=radius, frames=frames, border=border)
        return
    settings = {"radius": radius, "frames": frames, "border": border}
    assert_same_function(
        lambda *qkv: window_3d(*qkv, layout, **settings),
        lambda *qkv: window_3d_reference(*qkv, layout, **settings),
        layout,
    )


def test_window_3d_honours_key_masks():
    grid = Grid(5, 6, frames=3)
    key_mask = torch.rand(2, grid.num_tokens + 4) > 0.3
    layout = TokenLayout(grid, before=4, key_mask=key_mask)
    settings = {"radius": 1, "frames": 1}
    assert_same_function(
        lambda *qkv: window_3d(*qkv, layout, **settings),
        lambda *qkv: window_3d_reference(*qkv, layout, **settings),
        layout,
    )


def test_window_3d_of_its_own_frame_is_window_2d():
    layout = TokenLayout(Grid(7, 9, frames=2))
    qkv = inputs(layout)
    assert_close(
        "output", window_3d(*qkv, layout, radius=2, frames=0), window_2d(*qkv, layout, radius=2), 1e-12
    )
