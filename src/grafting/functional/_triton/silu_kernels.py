"""Triton kernels of a filter along tokens with silu after it; `silu.py` beside this launches them. Filters are as in `taps.py`."""

from typing import no_type_check

import triton
import triton.language as tl

from .taps import _filtered, _is_channel, _room


@triton.jit(do_not_specialize=["length"])
@no_type_check
def silu_kernel(
    x,
    weight,
    grad,
    out,
    x_item,
    x_token,
    length,
    dim,
    BACKWARD: tl.constexpr,
    K: tl.constexpr,
    BEFORE: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out = silu(z) of z, the filtered x; or BACKWARD the gradient of z."""
    c = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    item = tl.program_id(2).to(tl.int64)
    is_channel = _is_channel(c, dim, WHOLE)
    inside = (t < length)[:, None] & is_channel[None, :]
    above, below, left, right = _room(t, length, 0, length, 1, length, 1)
    here = x + item * x_item + t.to(tl.int64)[:, None] * x_token + c[None, :]
    z = _filtered(
        here, x_token, weight + c, dim, is_channel, above, below, left, right, length, 1, K, 0, BEFORE, False
    )
    y = 1 / (1 + tl.exp(-z))
    place = (item * length + t)[:, None] * dim + c[None, :]
    if BACKWARD:
        dy = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        y = dy * y * (1 + z * (1 - y))
    else:
        y = z * y
    tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)
