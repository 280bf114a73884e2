"""Depthwise filters over tokens, and their gradients, as Triton functions that the kernels of this folder share.

A filter of R x S taps is a matrix [R S + 1, channels], its bias in the last row. Its tap (i, j) reads the token i - BI rows and
j - BJ columns on; along a sequence there is one row. Places outside of a token's frame are zero; tokens beside the grid, from
`start` of `num_image` tokens, see their own tap alone. What is added up is held in float32.

The gradient of a filter's tap is a sum over tokens. A program holds BLOCK_T sums for each tap and channel from one block of tokens to
the next, so that threads add what is their own, and adds those up at its end alone. TAPS is a power of two no smaller than the number
of taps without a token's own.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _room(t, length, start, num_image, rows, cols, R: tl.constexpr):
    """How many rows above and below tokens t, and columns left and right, are of their frame: none beside the grid.

    Where there is no token, less than none is above: no tap is seen, not its own either. Filters of one row ask for no rows.
    """
    is_image = (t >= start) & (t < start + num_image)
    above, below = tl.where(t < length, 0, -1), tl.zeros_like(t)
    if R > 1:
        row = ((t - start) // cols) % rows
        above, below = tl.where(is_image, row, above), tl.where(is_image, rows - 1 - row, 0)
    col = (t - start) % cols
    return above, below, tl.where(is_image, col, 0), tl.where(is_image, cols - 1 - col, 0)


@triton.jit
@no_type_check
def _is_channel(c, dim, WHOLE: tl.constexpr):
    """Whether channels are any: where blocks of them are WHOLE, which needs no test, all."""
    is_channel = c < dim
    if WHOLE:
        is_channel = tl.full(c.shape, 1, tl.int1)
    return is_channel


@triton.jit
@no_type_check
def _tap(here, width, is_channel, above, below, left, right, cols, down, on):
    """What lies `down` rows and `on` columns from the places `here`, in float32; zero outside the grid."""
    seen = (above + down >= 0) & (below >= down) & (left + on >= 0) & (right >= on)
    away = tl.cast(down * cols + on, tl.int64) * width
    return tl.load(here + away, mask=seen[:, None] & is_channel[None, :], other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def _filtered(
    here,
    width,
    weight,
    weight_width,
    is_channel,
    above,
    below,
    left,
    right,
    cols,
    R: tl.constexpr,
    S: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    OF_PRODUCT: tl.constexpr,
):
    """The filter of what is at the places `here`, or of its product with what is `weight_width` channels on; `weight` of its channels."""
    bias = tl.load(weight + R * S * weight_width, mask=is_channel, other=0.0).to(tl.float32)
    y = tl.zeros(here.shape, tl.float32) + bias[None, :]
    # a few taps at a time: all at once would take more registers than there are
    GROUP: tl.constexpr = S if S <= 5 else 4
    for group in range((R * S + GROUP - 1) // GROUP):
        for place in tl.static_range(GROUP):
            tap = group * GROUP + place
            if S <= 5:
                down, on, is_tap = group - BI, place - BJ, is_channel
            else:
                down, on = tap // S - BI, tap % S - BJ
                is_tap = is_channel & (tl.zeros(is_channel.shape, tl.int32) + tap < R * S)
            value = _tap(here, width, is_tap, above, below, left, right, cols, down, on)
            if OF_PRODUCT:
                value *= _tap(here + weight_width, width, is_tap, above, below, left, right, cols, down, on)
            factor = tl.load(weight + tap * weight_width, mask=is_tap, other=0.0)
            y += factor.to(tl.float32)[None, :] * value
    return y


@triton.jit
@no_type_check
def _row(weight, is_channel):
    return tl.load(weight, mask=is_channel, other=0.0).to(tl.float32)[None, :]


@triton.jit
@no_type_check
def _filtered_qkv(
    here,
    dim,
    weight,
    is_channel,
    above,
    below,
    left,
    right,
    cols,
    R: tl.constexpr,
    S: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
):
    """q', k' and v' of the same channels at once: what a tap sees, and where, is found for all three together."""
    bias, width = weight + R * S * 3 * dim, 3 * dim
    zero = tl.zeros(here.shape, tl.float32)
    q, k, v = (
        zero + _row(bias, is_channel),
        zero + _row(bias + dim, is_channel),
        zero + _row(bias + 2 * dim, is_channel),
    )
    GROUP: tl.constexpr = S if S <= 5 else 4
    for group in range((R * S + GROUP - 1) // GROUP):
        for place in tl.static_range(GROUP):
            if S <= 5:
                down, on, is_tap = group - BI, place - BJ, is_channel
            else:
                tap = group * GROUP + place
                down, on = tap // S - BI, tap % S - BJ
                is_tap = is_channel & (tl.zeros(is_channel.shape, tl.int32) + tap < R * S)
            own = weight + (group * GROUP + place) * width
            q += _row(own, is_tap) * _tap(here, width, is_tap, above, below, left, right, cols, down, on)
            k += _row(own + dim, is_tap) * _tap(
                here + dim, width, is_tap, above, below, left, right, cols, down, on
            )
            v += _row(own + 2 * dim, is_tap) * _tap(
                here + 2 * dim, width, is_tap, above, below, left, right, cols, down, on
            )
    return q, k, v


@triton.jit
@no_type_check
def _other_taps(OWN: tl.constexpr, TAPS: tl.constexpr):
    """Numbers of a filter's taps without that of a token itself."""
    number = tl.arange(0, TAPS)
    return number + (number >= OWN).to(tl.int32)


@triton.jit
@no_type_check
def _weights(weight, width, is_channel, num_taps: tl.constexpr, OWN: tl.constexpr, TAPS: tl.constexpr):
    """Weights of the other taps [1, TAPS, channels], and of a token's own [1, 1, channels]."""
    tap = _other_taps(OWN, TAPS)[None, :, None]
    is_channel = is_channel[None, None, :]
    others = tl.load(weight[None, None, :] + tap * width, mask=(tap < num_taps) & is_channel, other=0.0)
    own = tl.load(weight[None, None, :] + OWN * width, mask=is_channel, other=0.0)
    return others.to(tl.float32), own.to(tl.float32)


@triton.jit
@no_type_check
def _unfiltered(
    here,
    x,
    inside,
    width,
    others,
    own,
    of_others,
    of_own,
    of_bias,
    above,
    below,
    left,
    right,
    cols,
    R: tl.constexpr,
    S: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    TAPS: tl.constexpr,
):
    """Gradient of a filter's input x [tokens, 1, channels], and of the filter: the sums of `_no_sums` with this block added.

    That of the output is at the places `here`. Token t was read by tap (i, j) of the token i - BI rows and j - BJ columns back.
    """
    tap = _other_taps(BI * S + BJ, TAPS)[None, :]
    down, on = BI - tap // S, BJ - tap % S
    seen = (above[:, None] + down >= 0) & (below[:, None] >= down) & (tap < R * S)
    seen &= (left[:, None] + on >= 0) & (right[:, None] >= on)
    away = (down * cols + on).to(tl.int64) * width
    dy_own = tl.load(here, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(here + away[:, :, None], mask=seen[:, :, None] & inside, other=0.0).to(tl.float32)
    dx = own * dy_own + tl.sum(others * dy, axis=1, keep_dims=True)
    return dx, of_others + x * dy, of_own + x * dy_own, of_bias + dy_own


@triton.jit
@no_type_check
def _no_sums(TAPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sums of a filter's gradient, for other taps, a token's own and the bias: one for each token of a block."""
    zero = tl.zeros([BLOCK_T, 1, BLOCK_D], tl.float32)
    return tl.zeros([BLOCK_T, TAPS, BLOCK_D], tl.float32), zero, zero


@triton.jit
@no_type_check
def _store_sums(
    partial,
    of_others,
    of_own,
    of_bias,
    dim,
    c,
    is_channel,
    num_taps: tl.constexpr,
    OWN: tl.constexpr,
    TAPS: tl.constexpr,
):
    """Write a program's sums to its own matrix [num_taps + 1, dim] of `partial`."""
    program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    partial += program * (num_taps + 1) * dim
    tap = _other_taps(OWN, TAPS)[:, None]
    mask = (tap < num_taps) & is_channel[None, :]
    tl.store(partial + tap * dim + c[None, :], tl.sum(of_others, axis=0), mask=mask)
    tl.store(partial + OWN * dim + c[None, :], tl.sum(of_own, axis=0), mask=is_channel[None, :])
    tl.store(partial + num_taps * dim + c[None, :], tl.sum(of_bias, axis=0), mask=is_channel[None, :])
