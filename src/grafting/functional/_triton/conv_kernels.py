"""Triton kernels of gated convolutions, over tokens with channels last; `conv.py` beside this launches them.

A program takes BLOCK_T tokens at a time and BLOCK_D channels of one item. How filters are applied stands in `taps.py`.
"""

from typing import no_type_check

import triton
import triton.language as tl

from .taps import (
    _filtered,
    _filtered_qkv,
    _is_channel,
    _no_sums,
    _room,
    _store_sums,
    _tap,
    _unfiltered,
    _weights,
)

# sizes that change from call to call and do not trigger a recompile; channels decide how far loads are aligned
_SIZES = ["length", "start", "num_image", "rows", "cols", "num_blocks"]


@triton.jit(do_not_specialize=_SIZES[:-1])
@no_type_check
def gate_kernel(
    qkv,
    kv,
    short,
    inner,
    out,
    length,
    dim,
    start,
    num_image,
    rows,
    cols,
    HAS_SHORT: tl.constexpr,
    HAS_INNER: tl.constexpr,
    PRODUCT_ALONE: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    R2: tl.constexpr,
    S2: tl.constexpr,
    BI2: tl.constexpr,
    BJ2: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out = q' inner(k' v'), with q', k', v' = short(qkv); `kv` holds k' v' where there are both filters.

    With PRODUCT_ALONE, out = k' v'.
    """
    c = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    item = tl.program_id(2).to(tl.int64)
    width = 3 * dim
    is_channel = _is_channel(c, dim, WHOLE)
    above, below, left, right = _room(t, length, start, num_image, rows, cols, R if R > 1 else R2)
    place = (item * length + t)[:, None] * dim + c[None, :]
    here = qkv + (item * length + t)[:, None] * width + c[None, :]
    if HAS_INNER and not PRODUCT_ALONE:
        if HAS_SHORT:
            gate = _filtered(
                here,
                width,
                short + c,
                width,
                is_channel,
                above,
                below,
                left,
                right,
                cols,
                R,
                S,
                BI,
                BJ,
                False,
            )
            mixed = _filtered(
                kv + place, dim, inner + c, dim, is_channel, above, below, left, right, cols, R2, S2, BI2, BJ2, False
            )  # fmt: skip
        else:
            gate = _tap(here, width, is_channel, above, below, left, right, cols, 0, 0)
            mixed = _filtered(
                here + dim, width, inner + c, dim, is_channel, above, below, left, right, cols, R2, S2, BI2, BJ2, True
            )  # fmt: skip
        mixed *= gate
    else:
        gate, key, value = _filtered_qkv(
            here, dim, short + c, is_channel, above, below, left, right, cols, R, S, BI, BJ
        )
        mixed = key * value
        if not PRODUCT_ALONE:
            mixed *= gate
    tl.store(out + place, mixed.to(out.dtype.element_ty), mask=(t < length)[:, None] & is_channel[None, :])


@triton.jit(do_not_specialize=_SIZES[:-1])
@no_type_check
def gate_backward_kernel(
    grad,
    qkv,
    kv,
    short,
    inner,
    dqkv,
    dmixed,
    length,
    dim,
    start,
    num_image,
    rows,
    cols,
    HAS_SHORT: tl.constexpr,
    HAS_INNER: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    R2: tl.constexpr,
    S2: tl.constexpr,
    BI2: tl.constexpr,
    BJ2: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of the factors: of q', into `dqkv`, and of inner(k' v'), into `dmixed`; without inner of k' and v' into `dqkv`."""
    c = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    item = tl.program_id(2).to(tl.int64)
    width = 3 * dim
    is_channel = _is_channel(c, dim, WHOLE)
    above, below, left, right = _room(t, length, start, num_image, rows, cols, R if R > 1 else R2)
    inside = (t < length)[:, None] & is_channel[None, :]
    place = (item * length + t)[:, None] * dim + c[None, :]
    wide_place = (item * length + t)[:, None] * width + c[None, :]
    here = qkv + wide_place
    dy = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_INNER:
        if HAS_SHORT:
            gate = _filtered(
                here,
                width,
                short + c,
                width,
                is_channel,
                above,
                below,
                left,
                right,
                cols,
                R,
                S,
                BI,
                BJ,
                False,
            )
            mixed = _filtered(
                kv + place, dim, inner + c, dim, is_channel, above, below, left, right, cols, R2, S2, BI2, BJ2, False
            )  # fmt: skip
        else:
            gate = _tap(here, width, is_channel, above, below, left, right, cols, 0, 0)
            mixed = _filtered(
                here + dim, width, inner + c, dim, is_channel, above, below, left, right, cols, R2, S2, BI2, BJ2, True
            )  # fmt: skip
        tl.store(dmixed + place, (dy * gate).to(dmixed.dtype.element_ty), mask=inside)
    else:
        gate, key, value = _filtered_qkv(
            here, dim, short + c, is_channel, above, below, left, right, cols, R, S, BI, BJ
        )
        mixed = key * value
        tl.store(dqkv + wide_place + dim, (dy * gate * value).to(dqkv.dtype.element_ty), mask=inside)
        tl.store(dqkv + wide_place + 2 * dim, (dy * gate * key).to(dqkv.dtype.element_ty), mask=inside)
    tl.store(dqkv + wide_place, (dy * mixed).to(dqkv.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
@no_type_check
def inner_backward_kernel(
    dmixed,
    qkv,
    short,
    inner,
    dqkv,
    partial,
    length,
    dim,
    start,
    num_image,
    rows,
    cols,
    num_blocks,
    HAS_SHORT: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    R2: tl.constexpr,
    S2: tl.constexpr,
    BI2: tl.constexpr,
    BJ2: tl.constexpr,
    TAPS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """From the gradient of inner(k' v') those of k' and v', into `dqkv`, and of the filter, one sum a program into `partial`."""
    c = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    item = tl.program_id(2).to(tl.int64)
    width = 3 * dim
    is_channel = _is_channel(c, dim, WHOLE)
    others, own = _weights(inner + c, dim, is_channel, R2 * S2, BI2 * S2 + BJ2, TAPS)
    of_others, of_own, of_bias = _no_sums(TAPS, BLOCK_T, BLOCK_D)
    for block in range(num_blocks):
        t = (tl.program_id(1) * num_blocks + block) * BLOCK_T + tl.arange(0, BLOCK_T)
        above, below, left, right = _room(t, length, start, num_image, rows, cols, R if R > 1 else R2)
        place = (item * length + t)[:, None] * width + c[None, :]
        k, v = qkv + place + dim, qkv + place + 2 * dim
        if HAS_SHORT:
            key = _filtered(
                k, width, short + c + dim, width, is_channel, above, below, left, right, cols, R, S, BI, BJ, False
            )  # fmt: skip
            value = _filtered(
                v, width, short + c + 2 * dim, width, is_channel, above, below, left, right, cols, R, S, BI, BJ, False
            )  # fmt: skip
        else:
            key = _tap(k, width, is_channel, above, below, left, right, cols, 0, 0)
            value = _tap(v, width, is_channel, above, below, left, right, cols, 0, 0)
        key, value = key[:, None, :], value[:, None, :]
        inside = (t < length)[:, None, None] & is_channel[None, None, :]
        here = dmixed + (item * length + t)[:, None, None] * dim + c[None, None, :]
        dkv, of_others, of_own, of_bias = _unfiltered(
            here, key * value, inside, dim, others, own, of_others, of_own, of_bias, above, below, left, right, cols,
            R2, S2, BI2, BJ2, TAPS,
        )  # fmt: skip
        place = place[:, None, :]
        tl.store(dqkv + place + dim, (dkv * value).to(dqkv.dtype.element_ty), mask=inside)
        tl.store(dqkv + place + 2 * dim, (dkv * key).to(dqkv.dtype.element_ty), mask=inside)
    _store_sums(partial, of_others, of_own, of_bias, dim, c, is_channel, R2 * S2, BI2 * S2 + BJ2, TAPS)


@triton.jit(do_not_specialize=_SIZES)
@no_type_check
def short_backward_kernel(
    dy,
    x,
    weight,
    dx,
    partial,
    length,
    dim,
    start,
    num_image,
    rows,
    cols,
    num_blocks,
    R: tl.constexpr,
    S: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    TAPS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of a filter's input, into `dx`, and of the filter, one sum a program into `partial`."""
    c = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    item = tl.program_id(2).to(tl.int64)
    is_channel = _is_channel(c, dim, WHOLE)
    others, own = _weights(weight + c, dim, is_channel, R * S, BI * S + BJ, TAPS)
    of_others, of_own, of_bias = _no_sums(TAPS, BLOCK_T, BLOCK_D)
    for block in range(num_blocks):
        t = (tl.program_id(1) * num_blocks + block) * BLOCK_T + tl.arange(0, BLOCK_T)
        above, below, left, right = _room(t, length, start, num_image, rows, cols, R)
        place = (item * length + t)[:, None, None] * dim + c[None, None, :]
        inside = (t < length)[:, None, None] & is_channel[None, None, :]
        x_here = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        d_here, of_others, of_own, of_bias = _unfiltered(
            dy + place, x_here, inside, dim, others, own, of_others, of_own, of_bias, above, below, left, right, cols,
            R, S, BI, BJ, TAPS,
        )  # fmt: skip
        tl.store(dx + place, d_here.to(dx.dtype.element_ty), mask=inside)
    _store_sums(partial, of_others, of_own, of_bias, dim, c, is_channel, R * S, BI * S + BJ, TAPS)
