"""Gated convolutions on a GPU: the kernels of `conv_kernels.py` as operators of torch, with their gradients.

What they compute is `gated_conv_plain` of `functional/gated_conv.py`. Filters come as one matrix [taps + 1, channels] each, the
bias in the last row. `grid` is (tokens before it, frames, rows, columns), and `taps` of a filter (rows, columns, rows before,
columns before).
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ...contract import Grid, TokenLayout
from ..gated_conv import Filter, gated_conv_plain
from . import differentiable_gradients
from .conv_kernels import gate_backward_kernel, gate_kernel, inner_backward_kernel, short_backward_kernel

# tokens of a program along a sequence, and on a grid, whose filters have more taps; rows of channels of a whole 128 bytes.
# Measured on an H200, as what follows: 8, 16, 64 tokens take 1.02, 1.11, 0.97 times as long; 16, 32, 64 on a grid 1.13, 1.08, 1.07 times
BLOCK_T, GRID_T, BLOCK_D = 32, 8, 64

# where a filter's gradient is summed: as few tokens as give each thread one, since it holds sums for all taps of it
SUMS_T, SUMS_WARPS = 8, 2

# programs that fill a GPU several times over; beyond them each takes more tokens, so that there are fewer sums to add, up to a number of blocks
MANY_PROGRAMS, MANY_BLOCKS = 2048, 32

_ARGUMENTS = "Tensor? short, Tensor? inner, int[] grid, int[] short_taps, int[] inner_taps"


@torch.library.custom_op(
    "grafting::gated_conv", mutates_args=(), schema=f"(Tensor qkv, {_ARGUMENTS}) -> (Tensor, Tensor)"
)
def gated_conv(
    qkv: Tensor,
    short: Tensor | None,
    inner: Tensor | None,
    grid: Sequence[int],
    short_taps: Sequence[int],
    inner_taps: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """q' * inner(k' * v') [B, L, D], with q', k', v' = short(qkv); and k' * v', kept for the gradient if there are both filters."""
    qkv, short, inner = qkv.contiguous(), _contiguous(short), _contiguous(inner)
    out, kv = _empty_outputs(qkv, short, inner)
    sizes = _sizes(qkv, grid)
    blocks = _blocks(out.shape[2], max(short_taps[0], inner_taps[0]))
    constants = {**_taps_of(short_taps, inner_taps), **_filters(short, inner), **blocks}
    launch = gate_kernel[_programs(out, blocks["BLOCK_T"])]
    with torch.cuda.device_of(qkv):
        if kv.numel():
            launch(qkv, kv, short, inner, kv, *sizes, **constants, PRODUCT_ALONE=True)
        launch(qkv, kv, short, inner, out, *sizes, **constants, PRODUCT_ALONE=False)
    return out, kv


@gated_conv.register_fake
def _(
    qkv: Tensor, short: Tensor | None, inner: Tensor | None, grid: Any, short_taps: Any, inner_taps: Any
) -> tuple[Tensor, Tensor]:
    return _empty_outputs(qkv, short, inner)


@torch.library.custom_op(
    "grafting::gated_conv_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor qkv, Tensor kv, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
)
def gated_conv_backward(
    grad: Tensor,
    qkv: Tensor,
    kv: Tensor,
    short: Tensor | None,
    inner: Tensor | None,
    grid: Sequence[int],
    short_taps: Sequence[int],
    inner_taps: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv, short and inner; that of a filter which is not there is empty."""
    grad, qkv, short, inner = grad.contiguous(), qkv.contiguous(), _contiguous(short), _contiguous(inner)
    sizes, taps, filters = _sizes(qkv, grid), _taps_of(short_taps, inner_taps), _filters(short, inner)
    blocks = _blocks(grad.shape[2], max(short_taps[0], inner_taps[0]))
    dqkv = torch.empty_like(qkv)
    dmixed = torch.empty_like(grad if inner is not None else grad[:0])
    dshort, dinner = qkv.new_empty(0), qkv.new_empty(0)
    with torch.cuda.device_of(qkv):
        gate_backward_kernel[_programs(grad, blocks["BLOCK_T"])](
            grad, qkv, kv, short, inner, dqkv, dmixed, *sizes, **taps, **filters, **blocks
        )
        if inner is not None:
            programs, partial, sums = _sums(grad, inner, of_product=True)
            inner_backward_kernel[programs](
                dmixed,
                qkv,
                short,
                inner,
                dqkv,
                partial,
                *sizes,
                **taps,
                **sums,
                HAS_SHORT=filters["HAS_SHORT"],
            )
            dinner = partial.sum(0).to(inner.dtype)
        if short is not None:
            dfiltered, dqkv = dqkv, torch.empty_like(qkv)
            programs, partial, sums = _sums(qkv, short)
            short_backward_kernel[programs](
                dfiltered,
                qkv,
                short,
                dqkv,
                partial,
                *qkv.shape[1:],
                *sizes[2:],
                **_taps_of(short_taps),
                **sums,
            )
            dshort = partial.sum(0).to(short.dtype)
    return dqkv, dshort, dinner


@gated_conv_backward.register_fake
def _(
    grad: Tensor,
    qkv: Tensor,
    kv: Tensor,
    short: Tensor | None,
    inner: Tensor | None,
    grid: Any,
    short_taps: Any,
    inner_taps: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    dshort, dinner = (qkv.new_empty(0) if w is None else w.new_empty(w.shape) for w in (short, inner))
    return qkv.new_empty(qkv.shape), dshort, dinner


def _empty_outputs(qkv: Tensor, short: Tensor | None, inner: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = (*qkv.shape[:2], qkv.shape[2] // 3)
    keeps_product = short is not None and inner is not None
    return qkv.new_empty(shape), qkv.new_empty(shape if keeps_product else 0)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _sizes(qkv: Tensor, grid: Sequence[int]) -> tuple[int, ...]:
    """Length, channels, and where the grid lies: what every kernel is told."""
    start, frames, rows, cols = grid
    return qkv.shape[1], qkv.shape[2] // 3, start, frames * rows * cols, rows, cols


def _taps_of(short: Sequence[int], inner: Sequence[int] = ()) -> dict[str, int]:
    names = ("R", "S", "BI", "BJ", "R2", "S2", "BI2", "BJ2")
    return dict(zip(names, (*short, *inner), strict=False))


def _blocks(dim: int, rows: int) -> dict[str, int]:
    """Blocks of tokens and channels for filters of so many rows, and whether the channels are whole blocks."""
    return {"BLOCK_T": BLOCK_T if rows == 1 else GRID_T, "BLOCK_D": BLOCK_D, "WHOLE": dim % BLOCK_D == 0}


def _filters(short: Tensor | None, inner: Tensor | None) -> dict[str, bool]:
    return {"HAS_SHORT": short is not None, "HAS_INNER": inner is not None}


def _programs(x: Tensor, num_tokens: int, num_channels: int | None = None) -> tuple[int, int, int]:
    """Programs for x [B, L, D]: blocks of channels, of tokens, and items."""
    return triton.cdiv(x.shape[2], num_channels or BLOCK_D), triton.cdiv(x.shape[1], num_tokens), x.shape[0]


def _sums(
    x: Tensor, weight: Tensor, *, of_product: bool = False
) -> tuple[tuple[int, int, int], Tensor, dict[str, int]]:
    """Programs that make the gradient of a filter of x's channels, memory for a sum of each, and what they are told of it."""
    taps = triton.next_power_of_2(max(len(weight) - 2, 1))  # without a token's own, and the bias
    held = 2 * taps if of_product else taps  # a filtered product's factors take registers beside its sums
    block_d = BLOCK_D if held <= 16 else BLOCK_D // 2
    channels, tokens, items = _programs(x, SUMS_T, block_d)
    num_blocks = min(max(channels * tokens * items // MANY_PROGRAMS, 1), MANY_BLOCKS, tokens)
    programs = _programs(x, SUMS_T * num_blocks, block_d)
    partial = x.new_empty(programs[1] * programs[2], *weight.shape, dtype=torch.float32)
    sums = {
        "num_blocks": num_blocks,
        "TAPS": taps,
        "WHOLE": x.shape[2] % block_d == 0,
        "BLOCK_T": SUMS_T,
        "BLOCK_D": block_d,
        "num_warps": SUMS_WARPS if held <= 8 else 2 * SUMS_WARPS,
    }
    return programs, partial, sums


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, short, inner, *ctx.settings = inputs
    ctx.save_for_backward(qkv, short, inner, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _plain(
    qkv: Tensor,
    short: Tensor | None,
    inner: Tensor | None,
    grid: Sequence[int],
    short_taps: Sequence[int],
    inner_taps: Sequence[int],
) -> Tensor:
    """`gated_conv_plain` for the arguments of the kernels."""
    before, frames, rows, cols = grid
    image = Grid(rows, cols, frames)
    layout = TokenLayout(image, before, qkv.shape[1] - before - image.num_tokens)
    return gated_conv_plain(qkv, _unpacked(short, short_taps), _unpacked(inner, inner_taps), layout)


def _unpacked(packed: Tensor | None, taps: Sequence[int]) -> Filter | None:
    if packed is None:
        return None
    rows, cols, _, before = taps
    shape = (1, cols) if rows == 1 else (1, rows, cols)
    return Filter(packed[:-1].mT.unflatten(1, shape), packed[-1], before)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    qkv, short, inner, kv = ctx.saved_tensors
    if torch.is_grad_enabled():  # a gradient of this gradient is asked for
        plain = _plain(qkv, short, inner, *ctx.settings)
        grads = differentiable_gradients(plain, (qkv, short, inner), grad)
    else:
        dqkv, *of_filters = gated_conv_backward(grad, qkv, kv, short, inner, *ctx.settings)
        grads = dqkv, *(d if d.numel() else None for d in of_filters)
    return *grads, None, None, None


gated_conv.register_autograd(_backward, setup_context=_setup_context)
