"""Window attention on a GPU: the kernels of `window_kernels.py` as operators of torch, with their gradients.

Queries are the image's, [B, H, N, K]; keys and values are of all tokens. `grid` is (tokens before the image, frames, rows, columns),
`reach` (frames, rows, columns) to each side.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...contract import Grid, TokenLayout
from ..window import Window, in_tiles
from . import differentiable_gradients
from .heads import block_of, bytes_of, empty_heads, strides_of, with_rows
from .window_kernels import forward_kernel, key_backward_kernel, query_backward_kernel

_ARGUMENTS = "Tensor? is_key, int[] grid, int[] reach, bool shifted, float scale"


@torch.library.custom_op(
    "grafting::window_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_ARGUMENTS}) -> (Tensor, Tensor)",
)
def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_key: Tensor | None,
    grid: Sequence[int],
    reach: Sequence[int],
    shifted: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention [B, H, N, V], and the logarithms of what its weights are divided by [B, H, N]."""
    q, k, v = map(with_rows, (q, k, v))
    out, lse = _empty_outputs(q, v)
    unit, strides = strides_of(q, k, v, out)
    constants = _constants(q, v, is_key, grid, shifted) | {"UNIT": unit}
    with torch.cuda.device_of(q):
        forward_kernel[q.shape[1], _num_tiles(grid, constants), q.shape[0]](
            q, k, v, bytes_of(is_key), out, lse, *strides, *_sizes(k, grid, reach), scale * math.log2(math.e),
            **constants, BLOCK_N=_run(q),
        )  # fmt: skip
    return out, lse


@window_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, is_key: Tensor | None, grid: Any, reach: Any, shifted: bool, scale: float
) -> tuple[Tensor, Tensor]:
    return _empty_outputs(q, v)


@torch.library.custom_op(
    "grafting::window_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
)
def window_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    is_key: Tensor | None,
    grid: Sequence[int],
    reach: Sequence[int],
    shifted: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    grad, q, k, v, out = map(with_rows, (grad, q, k, v, out))
    dq, dk, dv = map(empty_heads, (q, k, v))
    delta = torch.empty_like(lse)
    sizes, key_bytes = _sizes(k, grid, reach), bytes_of(is_key)
    constants = _constants(q, v, is_key, grid, shifted)
    batch, heads, tiles = q.shape[0], q.shape[1], _num_tiles(grid, constants)
    scales = scale * math.log2(math.e), scale
    num_others = k.shape[2] - q.shape[2]
    runs_of_others = triton.cdiv(num_others, constants["TILE_R"] * constants["TILE_C"])
    with torch.cuda.device_of(q):
        unit, strides = strides_of(q, k, v, out, grad, dq)
        query_backward_kernel[heads, tiles, batch](
            q, k, v, key_bytes, out, grad, lse, delta, dq, *strides, *sizes, *scales,
            **constants, UNIT=unit, BLOCK_N=_run(q),
        )  # fmt: skip
        unit, strides = strides_of(q, k, v, grad, dk, dv)
        for of_others, programs in ((False, tiles), (True, runs_of_others)):
            if programs:
                key_backward_kernel[heads, programs, batch](
                    q, k, v, key_bytes, grad, lse, delta, dk, dv, *strides, *sizes, *scales,
                    OF_OTHERS=of_others, **constants, UNIT=unit, BLOCK_M=32,
                )  # fmt: skip
    return dq, dk, dv


@window_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_heads(q), empty_heads(k), empty_heads(v)


def _empty_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = q.shape
    return empty_heads(q, v.shape[3]), q.new_empty((batch, heads, length), dtype=torch.float32)


def _sizes(k: Tensor, grid: Sequence[int], reach: Sequence[int]) -> tuple[int, ...]:
    return k.shape[1], k.shape[2], *grid, *reach


def _constants(
    q: Tensor, v: Tensor, is_key: Tensor | None, grid: Sequence[int], shifted: bool
) -> dict[str, int]:
    """What kernels are compiled for. Tiles are squares of 64 queries, of which a grid's few rows leave a strip."""
    tile_rows = min(8, triton.next_power_of_2(grid[2]))
    is_wide = q.dtype == torch.float32  # twice as large in registers, and no work for tensor cores
    tile = 32 if is_wide else 64
    return {
        "SHIFTED": shifted,
        "HAS_MASK": is_key is not None,
        "K": q.shape[3],
        "V": v.shape[3],
        "BLOCK_K": block_of(q),
        "BLOCK_V": block_of(v),
        "TILE_R": tile_rows,
        "TILE_C": tile // tile_rows,
        "num_warps": 8 if is_wide else 4,
        "num_stages": 1 if is_wide else 2,
    }


def _num_tiles(grid: Sequence[int], constants: dict[str, int]) -> int:
    _, frames, rows, cols = grid
    down, across = triton.cdiv(rows, constants["TILE_R"]), triton.cdiv(cols, constants["TILE_C"])
    return frames * down * across


def _run(q: Tensor) -> int:
    """Keys that a program takes at a time."""
    return 32 if q.dtype == torch.float32 else 64


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, is_key, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, is_key, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_key: Tensor | None,
    grid: Sequence[int],
    reach: Sequence[int],
    shifted: bool,
    scale: float,
) -> Tensor:
    """The plain path for the arguments of the kernels, as torch's own products, whose gradients have gradients."""
    before, frames, rows, cols = grid
    layout = TokenLayout(Grid(rows, cols, frames), before, k.shape[2] - before - q.shape[2], is_key)
    window = Window((frames, rows, cols), (reach[1], reach[2]), "shifted" if shifted else "clipped", reach[0])
    with sdpa_kernel(SDPBackend.MATH):
        return in_tiles(q, k, v, layout, window, scale)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, is_key, out, lse = ctx.saved_tensors
    if torch.is_grad_enabled():  # a gradient of this gradient is asked for
        plain = _plain(q, k, v, is_key, *ctx.settings)
        grads = differentiable_gradients(plain, (q, k, v), grad)
    else:
        grads = window_attention_backward(grad, q, k, v, out, lse, is_key, *ctx.settings)
    return *grads, *[None] * 5


window_attention.register_autograd(_backward, setup_context=_setup_context)
