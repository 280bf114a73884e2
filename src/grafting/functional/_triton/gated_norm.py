"""The norm of gated tokens on a GPU: the kernels of `gated_norm_kernels.py` as operators of torch, with their gradients.

What they compute is `gated_norm_plain` of `functional/gated_norm.py`.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from ..gated_norm import gated_norm_plain
from . import differentiable_gradients
from .gated_norm_kernels import norm_backward_kernel, norm_kernel

# programs that fill a GPU several times over; beyond them each takes more tokens, so that there are fewer sums to add
MANY_PROGRAMS = 1024

_ARGUMENTS = "Tensor y, Tensor? back, Tensor gate, Tensor weight"


@torch.library.custom_op(
    "grafting::gated_norm",
    mutates_args=(),
    schema=f"({_ARGUMENTS}, float eps, ScalarType dtype) -> (Tensor, Tensor)",
)
def gated_norm(
    y: Tensor, back: Tensor | None, gate: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The normed tokens [B, L, D] in a dtype, and the inverse of each one's root mean square [B, L]."""
    y, back, gate = y.contiguous(), None if back is None else back.contiguous(), _rows(gate)
    out, scale = _empty_outputs(y, dtype)
    with torch.cuda.device_of(y):
        norm_kernel[(scale.numel(),)](
            y, back, gate, weight.contiguous(), out, scale, gate.stride(1), y.shape[2], eps, **_constants(y, back)
        )  # fmt: skip
    return out, scale


@gated_norm.register_fake
def _(
    y: Tensor, back: Tensor | None, gate: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return _empty_outputs(y, dtype)


@torch.library.custom_op(
    "grafting::gated_norm_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_ARGUMENTS}, Tensor scale) -> (Tensor, Tensor, Tensor)",
)
def gated_norm_backward(
    grad: Tensor, y: Tensor, back: Tensor | None, gate: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y, or of y and `back` each, of the gate and of the weight."""
    y, back, gate = y.contiguous(), None if back is None else back.contiguous(), _rows(gate)
    dy, dgate = torch.empty_like(y), y.new_empty(y.shape)
    num_rows = triton.cdiv(scale.numel(), MANY_PROGRAMS)
    programs = triton.cdiv(scale.numel(), num_rows)
    partial = scale.new_empty(programs, y.shape[2])
    with torch.cuda.device_of(y):
        norm_backward_kernel[(programs,)](
            grad.contiguous(), y, back, gate, weight.contiguous(), scale, dy, dgate, partial,
            gate.stride(1), scale.numel(), num_rows, y.shape[2], **_constants(y, back),
        )  # fmt: skip
    return dy, dgate, partial.sum(0).to(weight.dtype)


@gated_norm_backward.register_fake
def _(
    grad: Tensor, y: Tensor, back: Tensor | None, gate: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return y.new_empty(y.shape), y.new_empty(y.shape), weight.new_empty(weight.shape)


def _empty_outputs(y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape, dtype=dtype), y.new_empty(y.shape[:2], dtype=torch.float32)


def _rows(gate: Tensor) -> Tensor:
    """Tokens at one distance from each other, as parts of longer rows are."""
    is_even = gate.stride(2) == 1 and gate.stride(0) == gate.shape[1] * gate.stride(1)
    return gate if is_even else gate.contiguous()


def _constants(y: Tensor, back: Tensor | None) -> dict[str, Any]:
    block = triton.next_power_of_2(y.shape[2])
    return {"HAS_BACK": back is not None, "BLOCK_D": block, "num_warps": 4 if block <= 4096 else 16}


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.eps, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, scale = ctx.saved_tensors
    if torch.is_grad_enabled():  # a gradient of this gradient is asked for
        y, back, gate, weight = tensors
        plain = gated_norm_plain(y, back, gate, weight, ctx.eps).to(grad.dtype)
        return *differentiable_gradients(plain, tensors, grad), None, None
    dy, dgate, dweight = gated_norm_backward(grad, *tensors, scale)
    return dy, None if tensors[1] is None else dy, dgate, dweight, None, None


gated_norm.register_autograd(_backward, setup_context=_setup_context)
