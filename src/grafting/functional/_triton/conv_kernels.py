"""Triton kernels of gated convolutions, over tokens with channels last; `conv.py` beside this launches them.

A program takes BLOCK_T tokens at a time and BLOCK_D channels of one item. A filter of R x S taps is a matrix [R S + 1, channels],
its bias in the last row. Its tap (i, j) reads the token i - BI rows and j - BJ columns on; along a sequence there is one
row. Places outside of a token's frame are zero; tokens beside the grid, from `start` of `num_image` tokens, see their own tap alone.
What is added up is held in float32.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _place(t, length, start, num_image, rows, cols):
    """Row and column of tokens t, whether they are of the image, and whether they are any; beside the grid both are 0."""
    is_image = (t >= start) & (t < start + num_image)
    row = tl.where(is_image, ((t - start) // cols) % rows, 0)
    col = tl.where(is_image, (t - start) % cols, 0)
    return row, col, is_image, t < length


@triton.jit
@no_type_check
def _neighbours(x, width, t, c, is_channel, row, col, is_image, exists, rows, cols, down, right):
    """Channels c of the tokens `down` rows below and `right` columns right of t, in float32; zero outside the grid."""
    inside = (row + down >= 0) & (row + down < rows) & (col + right >= 0) & (col + right < cols)
    is_own = (row + down == row) & (col + right == col)
    seen = exists & inside & (is_image | is_own)
    place = (t + down * cols + right).to(tl.int64) * width
    mask = seen[:, None] & is_channel[None, :]
    return tl.load(x + place[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def _filtered(
    x,
    width,
    weight,
    weight_width,
    t,
    c,
    weight_c,
    is_channel,
    row,
    col,
    is_image,
    exists,
    rows,
    cols,
    R: tl.constexpr,
    S: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    OF_PRODUCT: tl.constexpr,
):
    """The filter of channels c of x, or of their product with those that follow them by `weight_width`."""
    bias = tl.load(weight + R * S * weight_width + weight_c, mask=is_channel, other=0.0).to(tl.float32)
    y = tl.zeros([t.shape[0], c.shape[0]], tl.float32) + bias[None, :]
    # a few taps at a time: all at once would take more registers than there are
    GROUP: tl.constexpr = S if S <= 5 else 4
    for group in range((R * S + GROUP - 1) // GROUP):
        for place in tl.static_range(GROUP):
            tap = group * GROUP + place
            down, right = tap // S - BI, tap % S - BJ
            is_tap = is_channel & (tl.zeros_like(c) + tap < R * S)
            value = _neighbours(
                x, width, t, c, is_tap, row, col, is_image, exists, rows, cols, down, right
            )  # fmt: skip
            if OF_PRODUCT:
                other = c + weight_width
                value *= _neighbours(
                    x, width, t, other, is_tap, row, col, is_image, exists, rows, cols, down, right
                )  # fmt: skip
            factor = tl.load(weight + tap * weight_width + weight_c, mask=is_tap, other=0.0)
            y += factor.to(tl.float32)[None, :] * value
    return y


@triton.jit
@no_type_check
def _unfiltered(
    dy,
    x_here,
    sums,
    width,
    weight,
    t,
    c,
    is_channel,
    row,
    col,
    is_image,
    exists,
    rows,
    cols,
    R: tl.constexpr,
    S: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    NUM_SUMS: tl.constexpr,
):
    """Gradient of a filter's input, and `sums` [NUM_SUMS, channels] with the gradients of its taps and its bias added.

    Token t was read by tap (i, j) of the token i - BI rows and j - BJ columns back.
    """
    here = _neighbours(dy, width, t, c, is_channel, row, col, is_image, exists, rows, cols, 0, 0)
    numbers = tl.arange(0, NUM_SUMS)
    sums += tl.where(numbers[:, None] == R * S, tl.sum(here, axis=0)[None, :], 0.0)
    dx = tl.zeros([t.shape[0], c.shape[0]], tl.float32)
    GROUP: tl.constexpr = S if S <= 5 else 4
    for group in range((R * S + GROUP - 1) // GROUP):
        for place in tl.static_range(GROUP):
            tap = group * GROUP + place
            down, right = BI - tap // S, BJ - tap % S
            is_tap = is_channel & (tl.zeros_like(c) + tap < R * S)
            back = _neighbours(
                dy, width, t, c, is_tap, row, col, is_image, exists, rows, cols, down, right
            )  # fmt: skip
            factor = tl.load(weight + tap * width + c, mask=is_tap, other=0.0)
            dx += factor.to(tl.float32)[None, :] * back
            added = tl.sum(back * x_here, axis=0)
            sums += tl.where(numbers[:, None] == tap, added[None, :], 0.0)
    return dx, sums


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
    qkv += item * length * width
    is_channel = c < dim
    row, col, is_image, exists = _place(t, length, start, num_image, rows, cols)
    k, v = c + dim, c + 2 * dim
    if HAS_INNER and not PRODUCT_ALONE:
        if HAS_SHORT:
            kv += item * length * dim
            mixed = _filtered(
                kv, dim, inner, dim, t, c, c, is_channel, row, col, is_image, exists, rows, cols, R2, S2, BI2, BJ2, False
            )  # fmt: skip
        else:
            mixed = _filtered(
                qkv, width, inner, dim, t, k, c, is_channel, row, col, is_image, exists, rows, cols, R2, S2, BI2, BJ2, True
            )  # fmt: skip
    else:
        mixed = _filtered(
            qkv, width, short, width, t, k, k, is_channel, row, col, is_image, exists, rows, cols, R, S, BI, BJ, False
        )  # fmt: skip
        mixed *= _filtered(
            qkv, width, short, width, t, v, v, is_channel, row, col, is_image, exists, rows, cols, R, S, BI, BJ, False
        )  # fmt: skip
    if not PRODUCT_ALONE:
        if HAS_SHORT:
            mixed *= _filtered(
                qkv, width, short, width, t, c, c, is_channel, row, col, is_image, exists, rows, cols, R, S, BI, BJ, False
            )  # fmt: skip
        else:
            mixed *= _neighbours(qkv, width, t, c, is_channel, row, col, is_image, exists, rows, cols, 0, 0)
    place = (item * length + t)[:, None] * dim + c[None, :]
    tl.store(out + place, mixed.to(out.dtype.element_ty), mask=exists[:, None] & is_channel[None, :])


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
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of the factors: of q', into `dqkv`, and of inner(k' v'), into `dmixed`; without inner of k' and v' into `dqkv`."""
    c = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    item = tl.program_id(2).to(tl.int64)
    width = 3 * dim
    qkv += item * length * width
    dqkv += item * length * width
    is_channel = c < dim
    row, col, is_image, exists = _place(t, length, start, num_image, rows, cols)
    k, v = c + dim, c + 2 * dim
    inside = exists[:, None] & is_channel[None, :]
    place = t.to(tl.int64)[:, None] * dim + c[None, :]
    wide_place = t.to(tl.int64)[:, None] * width + c[None, :]
    dy = tl.load(grad + item * length * dim + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_SHORT:
        gate = _filtered(
            qkv, width, short, width, t, c, c, is_channel, row, col, is_image, exists, rows, cols, R, S, BI, BJ, False
        )  # fmt: skip
    else:
        gate = _neighbours(qkv, width, t, c, is_channel, row, col, is_image, exists, rows, cols, 0, 0)
    if HAS_INNER:
        if HAS_SHORT:
            kv += item * length * dim
            mixed = _filtered(
                kv, dim, inner, dim, t, c, c, is_channel, row, col, is_image, exists, rows, cols, R2, S2, BI2, BJ2, False
            )  # fmt: skip
        else:
            mixed = _filtered(
                qkv, width, inner, dim, t, k, c, is_channel, row, col, is_image, exists, rows, cols, R2, S2, BI2, BJ2, True
            )  # fmt: skip
        dmixed += item * length * dim
        tl.store(dmixed + place, (dy * gate).to(dmixed.dtype.element_ty), mask=inside)
    else:
        key = _filtered(
            qkv, width, short, width, t, k, k, is_channel, row, col, is_image, exists, rows, cols, R, S, BI, BJ, False
        )  # fmt: skip
        value = _filtered(
            qkv, width, short, width, t, v, v, is_channel, row, col, is_image, exists, rows, cols, R, S, BI, BJ, False
        )  # fmt: skip
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
    NUM_SUMS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """From the gradient of inner(k' v') those of k' and v', into `dqkv`, and of the filter, one sum a program into `partial`."""
    c = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    item = tl.program_id(2).to(tl.int64)
    width = 3 * dim
    qkv += item * length * width
    dqkv += item * length * width
    dmixed += item * length * dim
    is_channel = c < dim
    k, v = c + dim, c + 2 * dim
    sums = tl.zeros([NUM_SUMS, BLOCK_D], tl.float32)
    for block in range(num_blocks):
        t = (tl.program_id(1) * num_blocks + block) * BLOCK_T + tl.arange(0, BLOCK_T)
        row, col, is_image, exists = _place(t, length, start, num_image, rows, cols)
        if HAS_SHORT:
            key = _filtered(
                qkv, width, short, width, t, k, k, is_channel, row, col, is_image, exists, rows, cols, R, S, BI, BJ, False
            )  # fmt: skip
            value = _filtered(
                qkv, width, short, width, t, v, v, is_channel, row, col, is_image, exists, rows, cols, R, S, BI, BJ, False
            )  # fmt: skip
        else:
            key = _neighbours(qkv, width, t, k, is_channel, row, col, is_image, exists, rows, cols, 0, 0)
            value = _neighbours(qkv, width, t, v, is_channel, row, col, is_image, exists, rows, cols, 0, 0)
        dkv, sums = _unfiltered(
            dmixed, key * value, sums, dim, inner, t, c, is_channel, row, col, is_image, exists, rows, cols,
            R2, S2, BI2, BJ2, NUM_SUMS,
        )  # fmt: skip
        inside = exists[:, None] & is_channel[None, :]
        place = t.to(tl.int64)[:, None] * width + c[None, :]
        tl.store(dqkv + place + dim, (dkv * value).to(dqkv.dtype.element_ty), mask=inside)
        tl.store(dqkv + place + 2 * dim, (dkv * key).to(dqkv.dtype.element_ty), mask=inside)
    _store_sums(partial, sums, dim, c, is_channel, R2 * S2 + 1, NUM_SUMS)


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
    NUM_SUMS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of a filter's input, into `dx`, and of the filter, one sum a program into `partial`."""
    c = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    item = tl.program_id(2).to(tl.int64)
    x += item * length * dim
    dy += item * length * dim
    dx += item * length * dim
    is_channel = c < dim
    sums = tl.zeros([NUM_SUMS, BLOCK_D], tl.float32)
    for block in range(num_blocks):
        t = (tl.program_id(1) * num_blocks + block) * BLOCK_T + tl.arange(0, BLOCK_T)
        row, col, is_image, exists = _place(t, length, start, num_image, rows, cols)
        here = _neighbours(x, dim, t, c, is_channel, row, col, is_image, exists, rows, cols, 0, 0)
        d_here, sums = _unfiltered(
            dy, here, sums, dim, weight, t, c, is_channel, row, col, is_image, exists, rows, cols,
            R, S, BI, BJ, NUM_SUMS,
        )  # fmt: skip
        place = t.to(tl.int64)[:, None] * dim + c[None, :]
        tl.store(dx + place, d_here.to(dx.dtype.element_ty), mask=exists[:, None] & is_channel[None, :])
    _store_sums(partial, sums, dim, c, is_channel, R * S + 1, NUM_SUMS)


@triton.jit
@no_type_check
def _store_sums(partial, sums, dim, c, is_channel, num_rows, NUM_SUMS: tl.constexpr):
    """Write a program's sums to its own matrix [num_rows, dim] of `partial` [programs, num_rows, dim]."""
    numbers = tl.arange(0, NUM_SUMS)
    program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    place = (program * num_rows + numbers)[:, None] * dim + c[None, :]
    tl.store(partial + place, sums, mask=(numbers < num_rows)[:, None] & is_channel[None, :])
