"""The scan of a state-space model on a GPU: the kernels of `ssd_kernels.py` as operators of torch, with their gradients.

What they compute is `ssd_plain` of `functional/ssd.py`. Of the forward only the inputs are kept: the backward makes the states again.

Source: arXiv:2405.21060, section 6: states of chunks, their passing on, and outputs.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from ..ssd import ssd_plain
from . import differentiable_gradients, has_wide_products
from .ssd_kernels import backward_kernel, chunk_kernel, output_kernel, pass_kernel

# heads that a program takes: they share the products of B and C, and one sum of their gradients
GROUP = 16

# numbers of a state that a program passes on
BLOCK_PASSED = 1024

# on a chunk of 64 tokens the compiler of Triton 3.2, which comes with torch 2.6, ends the process for H100
_COMPILES_WIDE = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)

_ARGUMENTS = "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor D, bool reverse"


@torch.library.custom_op("grafting::ssd", mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor")
def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, reverse: bool) -> Tensor:
    """y[t] = C[t] h[t] + D x[t] [B, L, H, P]; dt, A and D are float32."""
    x, B, C, dt = _rows(x), _rows(B), _rows(C), dt.contiguous()
    y = _empty_like(x)
    constants = _constants(x, B, reverse)
    with torch.cuda.device_of(x):
        states = _states(x, B, dt, A, constants, of_gradient=False)
        output_kernel[_programs(x, constants)](
            x, dt, A, B, C, D, states, y, *_strides(x, B, C), *x.shape[1:3], **constants
        )
    return y


@ssd.register_fake
def _(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, reverse: bool) -> Tensor:
    return _empty_like(x)


@torch.library.custom_op(
    "grafting::ssd_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def ssd_backward(
    grad: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C and D."""
    grad, x, B, C, dt = _rows(grad), _rows(x), _rows(B), _rows(C), dt.contiguous()
    dx, ddt = _empty_like(x), torch.empty_like(dt)
    constants = _constants(x, B, reverse)
    if not (_COMPILES_WIDE and has_wide_products(x.device)):
        constants["BLOCK_T"] = 32
    programs = _programs(x, constants)
    groups, chunks, items = programs
    of_heads = dt.new_empty(2, items, chunks, x.shape[2])
    of_states = dt.new_empty(2, groups, *B.shape)
    with torch.cuda.device_of(x):
        states = _states(x, B, dt, A, constants, of_gradient=False)
        dstates = _states(grad, C, dt, A, constants, of_gradient=True)
        backward_kernel[programs](
            x, dt, A, B, C, D, states, dstates, grad, dx, ddt, of_heads, of_states,
            *_strides(x, B, C, grad), *x.shape[1:3], **constants | {"num_warps": 8},
        )  # fmt: skip
    dA, dD = (of_chunks.sum((0, 1)) for of_chunks in of_heads)
    dB, dC = (of_groups.sum(0).to(B.dtype) for of_groups in of_states)
    return dx, ddt, dA, dB, dC, dD


@ssd_backward.register_fake
def _(
    grad: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, reverse: bool
) -> tuple[Tensor, ...]:
    return tuple(_empty_like(t) for t in (x, dt, A, B, C, D))


def _states(
    x: Tensor, rows: Tensor, dt: Tensor, A: Tensor, constants: dict[str, Any], *, of_gradient: bool
) -> Tensor:
    """States before each chunk [B, chunks, H, N, P]; or gradients of those after each, from that of y and C."""
    heads, size = x.shape[2], rows.shape[2] * x.shape[3]
    groups, chunks, items = _programs(x, constants)
    states = x.new_empty((items, chunks, heads, rows.shape[2], x.shape[3]), dtype=torch.float32)
    totals = x.new_empty((items, chunks, heads), dtype=torch.float32)
    passed = torch.empty_like(states, dtype=x.dtype)
    chunk_kernel[groups, chunks, items](
        x,
        rows,
        dt,
        A,
        states,
        totals,
        *_strides(x, rows),
        *x.shape[1:3],
        OF_GRADIENT=of_gradient,
        **constants,
    )
    pass_kernel[heads, triton.cdiv(size, BLOCK_PASSED), items](
        states, totals, passed, chunks, heads, BACK=of_gradient, SIZE=size, BLOCK=BLOCK_PASSED
    )
    return passed


def _empty_like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _rows(x: Tensor) -> Tensor:
    """A tensor whose tokens each lie in one piece, as parts of a longer row do."""
    is_row = x.stride(-1) == 1 and (x.ndim == 3 or x.stride(2) == x.shape[3])
    return x if is_row else x.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [x.stride(axis) for x in tensors for axis in (0, 1)]


def _constants(x: Tensor, B: Tensor, reverse: bool) -> dict[str, Any]:
    n, p = B.shape[2], x.shape[3]
    return {
        "REVERSE": reverse,
        "N": n,
        "P": p,
        "BLOCK_N": max(triton.next_power_of_2(n), 16),
        "BLOCK_P": max(triton.next_power_of_2(p), 16),
        "BLOCK_T": 32 if x.dtype == torch.float32 else 64,
        "GROUP": GROUP,
        "num_warps": 4,
        "num_stages": 1 if n * p > 2048 else 2,
    }


def _programs(x: Tensor, constants: dict[str, Any]) -> tuple[int, int, int]:
    """Groups of heads, chunks and items."""
    items, length, heads, _ = x.shape
    return triton.cdiv(heads, GROUP), triton.cdiv(length, constants["BLOCK_T"]), items


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    if torch.is_grad_enabled():  # a gradient of this gradient is asked for
        plain = ssd_plain(*tensors, reverse=ctx.reverse)
        return *differentiable_gradients(plain, tensors, grad), None
    return *ssd_backward(grad, *tensors, ctx.reverse), None


ssd.register_autograd(_backward, setup_context=_setup_context)
