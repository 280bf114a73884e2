"""Triton kernels of products of filtered channels; `channels.py` beside this launches them.

A program takes BLOCK_T tokens of all items together, and BLOCK_D channels at a time. A token has its q, k and v joined, WIDTH = 3 dim
channels, and a filter along them: K taps, the last of which is the channel itself, and a bias, a row of K + 1 numbers. Token t has row
t % num_filters. Places before the first channel are zero. Taps begin at any channel, so that wide loads would not be aligned: sizes are not
specialised, and neighbouring threads load neighbouring channels. What is added up is held in float32.
"""

from typing import no_type_check

import triton
import triton.language as tl

_SIZES = ["num_tokens", "dim", "num_filters"]


@triton.jit
@no_type_check
def _tokens(num_tokens, num_filters, K: tl.constexpr, BLOCK_T: tl.constexpr):
    """A program's tokens, whether they exist, and where their filters begin."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    return t.to(tl.int64), t < num_tokens, (t % num_filters) * (K + 1)


@triton.jit
@no_type_check
def _channels(x, width, t, exists, c):
    """Channels c of tokens t, in float32; zero where there are none."""
    inside = exists[:, None] & ((c >= 0) & (c < width))[None, :]
    return tl.load(x + t[:, None] * width + c[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def _filtered(x, width, filters, t, exists, own, c, K: tl.constexpr):
    bias = tl.load(filters + own + K).to(tl.float32)
    y = tl.zeros([t.shape[0], c.shape[0]], tl.float32) + bias[:, None]
    # a few taps at a time: all at once would take more registers than there are
    GROUP: tl.constexpr = K if K <= 5 else 4
    for group in range((K + GROUP - 1) // GROUP):
        for place in tl.static_range(GROUP):
            tap = group * GROUP + place
            factor = tl.load(filters + own + tap, mask=own + tap < own + K, other=0.0).to(tl.float32)
            y += factor[:, None] * _channels(x, width, t, exists, c + tap - (K - 1))
    return y


@triton.jit(do_not_specialize=_SIZES)
@no_type_check
def product_kernel(
    qkv,
    filters,
    out,
    num_tokens,
    dim,
    num_filters,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out = q' k' v' of filtered q, k and v."""
    t, exists, own = _tokens(num_tokens, num_filters, K, BLOCK_T)
    c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    y = _filtered(qkv, 3 * dim, filters, t, exists, own, c + dim, K)
    y *= _filtered(qkv, 3 * dim, filters, t, exists, own, c + 2 * dim, K)
    y *= _filtered(qkv, 3 * dim, filters, t, exists, own, c, K)
    inside = exists[:, None] & (c < dim)[None, :]
    tl.store(out + t[:, None] * dim + c[None, :], y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
@no_type_check
def product_backward_kernel(
    grad,
    qkv,
    filters,
    dfiltered,
    num_tokens,
    dim,
    num_filters,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of q', k' and v'."""
    t, exists, own = _tokens(num_tokens, num_filters, K, BLOCK_T)
    c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    query = _filtered(qkv, 3 * dim, filters, t, exists, own, c, K)
    key = _filtered(qkv, 3 * dim, filters, t, exists, own, c + dim, K)
    value = _filtered(qkv, 3 * dim, filters, t, exists, own, c + 2 * dim, K)
    dy = _channels(grad, dim, t, exists, c)
    inside = exists[:, None] & (c < dim)[None, :]
    dfiltered += t[:, None] * 3 * dim + c[None, :]
    tl.store(dfiltered, (dy * key * value).to(dfiltered.dtype.element_ty), mask=inside)
    tl.store(dfiltered + dim, (dy * query * value).to(dfiltered.dtype.element_ty), mask=inside)
    tl.store(dfiltered + 2 * dim, (dy * query * key).to(dfiltered.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
@no_type_check
def filter_backward_kernel(
    dfiltered,
    qkv,
    filters,
    dqkv,
    dfilters,
    num_tokens,
    dim,
    num_filters,
    K: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of q, k and v, and of each token's filter, `dfilters` [tokens, K + 1]. Channel c was read by those up to K - 1 after it.

    Each thread adds up what is its own, for each tap, from one block of channels to the next, and shares it at the end.
    """
    t, exists, own = _tokens(num_tokens, num_filters, K, BLOCK_T)
    width = 3 * dim
    tap = tl.arange(0, TAPS)
    is_tap = exists[:, None] & (tap < K)[None, :]
    factor = tl.load(filters + own[:, None] + tap[None, :], mask=is_tap, other=0.0).to(tl.float32)
    of_taps = tl.zeros([BLOCK_T, TAPS, BLOCK_D], tl.float32)
    of_bias = tl.zeros([BLOCK_T, 1, BLOCK_D], tl.float32)
    row = t[:, None, None] * width
    is_tap, exists = is_tap[:, :, None], exists[:, None, None]
    for start in range(0, width, BLOCK_D):
        c = start + tl.arange(0, BLOCK_D)[None, None, :]
        inside = exists & (c < width)
        x = tl.load(qkv + row + c, mask=inside, other=0.0).to(tl.float32)
        of_bias += tl.load(dfiltered + row + c, mask=inside, other=0.0).to(tl.float32)
        reader = c + (K - 1) - tap[None, :, None]
        dy = tl.load(dfiltered + row + reader, mask=is_tap & (reader < width), other=0.0).to(tl.float32)
        of_taps += x * dy
        dx = tl.sum(factor[:, :, None] * dy, axis=1, keep_dims=True)
        tl.store(dqkv + row + c, dx.to(dqkv.dtype.element_ty), mask=inside)
    dfilters += t[:, None] * (K + 1)
    exists = t[:, None] < num_tokens
    tl.store(dfilters + tap[None, :], tl.sum(of_taps, axis=2), mask=exists & (tap < K)[None, :])
    tl.store(dfilters + K, tl.sum(of_bias, axis=2), mask=exists)
