"""Tokens of heads [B, H, N, dim] in Triton: what the launches and the kernels of attention share.

Strides are of items, heads and tokens, in units of UNIT elements, so that the compiler knows how far loads are aligned.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
@no_type_check
def load_tokens(x, token_stride, token, exists, SIZE: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr):
    """Vectors of these tokens [tokens, BLOCK], zero beyond SIZE and for tokens outside the sequence."""
    place = token.to(tl.int64) * token_stride * UNIT
    d = tl.arange(0, BLOCK)
    return tl.load(x + place[:, None] + d[None, :], mask=exists[:, None] & (d < SIZE)[None, :], other=0.0)


@triton.jit
@no_type_check
def store_tokens(
    x, y, token_stride, token, exists, SIZE: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr
):
    place = token.to(tl.int64) * token_stride * UNIT
    d = tl.arange(0, BLOCK)
    mask = exists[:, None] & (d < SIZE)[None, :]
    tl.store(x + place[:, None] + d[None, :], y.to(x.dtype.element_ty), mask=mask)


def stride_names(*tensors: str) -> list[str]:
    """Arguments that hold strides, whose values do not trigger a recompile: UNIT tells their alignment."""
    return [f"{x}_{of}" for x in tensors for of in ("item", "head", "token")]


def strides_of(*tensors: Tensor) -> tuple[int, list[int]]:
    """A unit that divides every stride of items, heads and tokens, 8 or 1, and these in that unit."""
    strides = [s for x in tensors for s in x.stride()[:3]]
    unit = 1 if any(s % 8 for s in strides) else 8
    return unit, [s // unit for s in strides]


def block_of(x: Tensor) -> int:
    """Numbers of a vector in a kernel: a power of two, and enough for a matrix product."""
    return max(16, triton.next_power_of_2(x.shape[3]))


def with_rows(x: Tensor) -> Tensor:
    """With the numbers of each vector beside each other."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def bytes_of(is_key: Tensor | None) -> Tensor | None:
    return None if is_key is None else is_key.contiguous().view(torch.uint8)


def empty_heads(x: Tensor, dim: int | None = None) -> Tensor:
    """Memory for [B, H, N, dim] with a token's heads beside each other, as what follows attention reads it."""
    batch, heads, length, own = x.shape
    return x.new_empty((batch, length, heads, own if dim is None else dim)).transpose(1, 2)
