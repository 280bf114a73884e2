"""A filter along tokens with silu after it on a GPU: the kernels of `silu_kernels.py` as operators of torch, with their gradients.

What they compute is `silu_conv_plain` of `functional/gated_conv.py`. The filter comes as one matrix [taps + 1, channels], the bias last.
"""

from typing import Any

import torch
from torch import Tensor

from ..gated_conv import silu_conv_plain
from . import differentiable_gradients
from .conv import _blocks, _programs, _sums, _taps_of
from .conv_kernels import short_backward_kernel
from .silu_kernels import silu_kernel


@torch.library.custom_op(
    "grafting::silu_conv", mutates_args=(), schema="(Tensor x, Tensor own, int before) -> Tensor"
)
def silu_conv(x: Tensor, own: Tensor, before: int) -> Tensor:
    """silu of x [B, L, D], filtered; x may be a part of longer rows."""
    out = x.new_empty(x.shape)
    with torch.cuda.device_of(x):
        _launch(x, own.contiguous(), out, out, before, backward=False)
    return out


@silu_conv.register_fake
def _(x: Tensor, own: Tensor, before: int) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "grafting::silu_conv_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor own, int before) -> (Tensor, Tensor)",
)
def silu_conv_backward(grad: Tensor, x: Tensor, own: Tensor, before: int) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the filter."""
    grad, x, own = grad.contiguous(), x.contiguous(), own.contiguous()
    dfiltered, dx = torch.empty_like(x), torch.empty_like(x)
    taps = _taps_of([1, len(own) - 1, 0, before])
    with torch.cuda.device_of(x):
        _launch(x, own, grad, dfiltered, before, backward=True)
        programs, partial, sums = _sums(x, own)
        length, dim = x.shape[1:]
        short_backward_kernel[programs](
            dfiltered, x, own, dx, partial, length, dim, 0, length, 1, length, **taps, **sums
        )
    return dx, partial.sum(0).to(own.dtype)


@silu_conv_backward.register_fake
def _(grad: Tensor, x: Tensor, own: Tensor, before: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), own.new_empty(own.shape)


def _launch(x: Tensor, own: Tensor, grad: Tensor, out: Tensor, before: int, *, backward: bool) -> None:
    x = x if x.stride(-1) == 1 else x.contiguous()
    blocks = _blocks(x.shape[2], rows=1)
    silu_kernel[_programs(x, blocks["BLOCK_T"])](
        x, own, grad, out, x.stride(0), x.stride(1), *x.shape[1:],
        BACKWARD=backward, K=len(own) - 1, BEFORE=before, **blocks,
    )  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    x, own, ctx.before = inputs
    ctx.save_for_backward(x, own)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, own = ctx.saved_tensors
    if torch.is_grad_enabled():  # a gradient of this gradient is asked for
        plain = silu_conv_plain(x, own[:-1].mT[:, None], own[-1], before=ctx.before)
        return *differentiable_gradients(plain, (x, own), grad), None
    return *silu_conv_backward(grad, x, own, ctx.before), None


silu_conv.register_autograd(_backward, setup_context=_setup_context)
