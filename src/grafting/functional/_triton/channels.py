"""Products of filtered channels on a GPU: the kernels of `channels_kernels.py` as operators of torch, with their gradients.

What they compute is `gated_channels_plain` of `functional/gated_conv.py`. Filters come as one matrix [filters, taps + 1], the bias last.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from ..gated_conv import gated_channels_plain
from . import differentiable_gradients
from .channels_kernels import filter_backward_kernel, product_backward_kernel, product_kernel

# a warp's threads side by side along the channels, so that sums over them stay within a warp
BLOCK_T, BLOCK_D = 8, 128

# where filters' gradients are summed
SUMS_T, SUMS_D = 4, 256


@torch.library.custom_op(
    "grafting::gated_channels", mutates_args=(), schema="(Tensor qkv, Tensor filters) -> Tensor"
)
def gated_channels(qkv: Tensor, filters: Tensor) -> Tensor:
    """q' k' v' [B, L, D], where q', k', v' are qkv [B, L, 3 D] filtered along its channels."""
    qkv, filters = qkv.contiguous(), filters.contiguous()
    out = _empty_output(qkv)
    with torch.cuda.device_of(qkv):
        product_kernel[_programs(out)](qkv, filters, out, *_sizes(qkv, filters), **_constants(filters))
    return out


@gated_channels.register_fake
def _(qkv: Tensor, filters: Tensor) -> Tensor:
    return _empty_output(qkv)


@torch.library.custom_op(
    "grafting::gated_channels_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor qkv, Tensor filters) -> (Tensor, Tensor)",
)
def gated_channels_backward(grad: Tensor, qkv: Tensor, filters: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of qkv and of the filters."""
    grad, qkv, filters = grad.contiguous(), qkv.contiguous(), filters.contiguous()
    sizes, constants = _sizes(qkv, filters), _constants(filters)
    dfiltered, dqkv = torch.empty_like(qkv), torch.empty_like(qkv)
    of_tokens = qkv.new_empty(sizes[0], filters.shape[1], dtype=torch.float32)
    with torch.cuda.device_of(qkv):
        product_backward_kernel[_programs(grad)](grad, qkv, filters, dfiltered, *sizes, **constants)
        sums = _sums(constants["K"])
        filter_backward_kernel[(triton.cdiv(sizes[0], sums["BLOCK_T"]),)](
            dfiltered, qkv, filters, dqkv, of_tokens, *sizes, **(constants | sums)
        )
    dfilters = of_tokens.unflatten(0, (-1, len(filters))).sum(0)
    return dqkv, dfilters.to(filters.dtype)


@gated_channels_backward.register_fake
def _(grad: Tensor, qkv: Tensor, filters: Tensor) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), filters.new_empty(filters.shape)


def _empty_output(qkv: Tensor) -> Tensor:
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)


def _sizes(qkv: Tensor, filters: Tensor) -> tuple[int, int, int]:
    return qkv.shape[0] * qkv.shape[1], qkv.shape[2] // 3, len(filters)


def _constants(filters: Tensor) -> dict[str, int]:
    return {"K": filters.shape[1] - 1, "BLOCK_T": BLOCK_T, "BLOCK_D": BLOCK_D}


def _sums(num_taps: int) -> dict[str, int]:
    """Blocks as small as lets each thread hold a sum for each tap of its tokens and channels."""
    taps = triton.next_power_of_2(num_taps)
    return {"TAPS": taps, "BLOCK_T": SUMS_T, "BLOCK_D": max(SUMS_D // max(taps // 4, 1), 32)}


def _programs(x: Tensor) -> tuple[int, int]:
    return triton.cdiv(x.shape[0] * x.shape[1], BLOCK_T), triton.cdiv(x.shape[2], BLOCK_D)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    qkv, filters = ctx.saved_tensors
    if torch.is_grad_enabled():  # a gradient of this gradient is asked for
        plain = gated_channels_plain(qkv, filters[:, None, :-1], filters[:, -1])
        return differentiable_gradients(plain, (qkv, filters), grad)
    return gated_channels_backward(grad, qkv, filters)


gated_channels.register_autograd(_backward, setup_context=_setup_context)
