"""The modulated norm on a GPU: the kernels of `modulated_norm_kernels.py` as operators of torch, with their gradients.

What they compute is `modulated_norm_plain` of `functional/modulated_norm.py`. Of the forward only the inputs are kept.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from ..modulated_norm import modulated_norm_plain
from . import differentiable_gradients
from .modulated_norm_kernels import norm_backward_kernel, norm_kernel

# programs that fill a GPU several times over; beyond them each takes more tokens, so that there are fewer sums to add
MANY_PROGRAMS = 1024

_ARGUMENTS = "Tensor x, Tensor shift, Tensor scale, float eps"


@torch.library.custom_op("grafting::modulated_norm", mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor")
def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """The modulated tokens [B, L, D], in the precision that x, shift and scale have together."""
    x, shift, scale = x.contiguous(), _rows(shift), _rows(scale)
    out = _empty_output(x, shift, scale)
    items, length, dim = x.shape
    with torch.cuda.device_of(x):
        norm_kernel[length, items](
            x, shift, scale, out, shift.stride(0), scale.stride(0), length, dim, eps, **_constants(dim)
        )
    return out


@modulated_norm.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return _empty_output(x, shift, scale)


@torch.library.custom_op(
    "grafting::modulated_norm_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor scale, float eps) -> (Tensor, Tensor, Tensor)",
)
def modulated_norm_backward(
    grad: Tensor, x: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, and in float32 of shift and scale [B, 1, D]."""
    grad, x, scale = grad.contiguous(), x.contiguous(), _rows(scale)
    dx = torch.empty_like(x)
    items, length, dim = x.shape
    num_rows = triton.cdiv(items * length, MANY_PROGRAMS)
    programs = triton.cdiv(length, num_rows)
    partial = x.new_empty((2, items, programs, dim), dtype=torch.float32)
    with torch.cuda.device_of(x):
        norm_backward_kernel[programs, items](
            grad, x, scale, dx, partial, scale.stride(0), length, num_rows, dim, eps, **_constants(dim)
        )
    dshift, dscale = partial.sum(2, keepdim=True).unbind()
    return dx, dshift.clone(), dscale.clone()


@modulated_norm_backward.register_fake
def _(grad: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    dshift, dscale = (x.new_empty(scale.shape, dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), dshift, dscale


def _empty_output(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(x.dtype, shift.dtype), scale.dtype)
    return x.new_empty(x.shape, dtype=dtype)


def _rows(x: Tensor) -> Tensor:
    """A row for each item, which may be a part of a longer one."""
    return x if x.stride(2) == 1 else x.contiguous()


def _constants(dim: int) -> dict[str, Any]:
    block = triton.next_power_of_2(dim)
    return {"BLOCK_D": block, "num_warps": 4 if block <= 2048 else 16}


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, shift, scale, ctx.eps = inputs
    ctx.save_for_backward(x, shift, scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, shift, scale = ctx.saved_tensors
    if torch.is_grad_enabled():  # a gradient of this gradient is asked for
        plain = modulated_norm_plain(x, shift, scale, ctx.eps).to(grad.dtype)
        return *differentiable_gradients(plain, (x, shift, scale), grad), None
    dx, dshift, dscale = modulated_norm_backward(grad, x, scale, ctx.eps)
    return dx, dshift.to(shift.dtype), dscale.to(scale.dtype), None


modulated_norm.register_autograd(_backward, setup_context=_setup_context)
