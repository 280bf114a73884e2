"""Linear attention on a GPU: the kernels of `linear_kernels.py` as operators of torch, with their gradients.

Keys and values are read once and summed up, run by run; queries are read once and meet the sums. Both again in the backward pass.
"""

import math
from typing import Any

import torch
import triton
from torch import Tensor

from ..linear import EPSILON, FeatureMap, linear_attention_plain
from . import differentiable_gradients, has_wide_products
from .heads import block_of, bytes_of, empty_heads, strides_of, with_rows
from .linear_kernels import key_backward_kernel, key_kernel, query_backward_kernel, query_kernel

BLOCK_N = 64

# programs that fill a GPU several times over, and tokens below which one would be busy with its sums alone
MANY_PROGRAMS, LEAST_RUN = 1024, 256

# bytes of shared memory that large heads need, where loads are ahead of the products that wait for them
_ROOMY = 160 * 1024

_ARGUMENTS = "Tensor? is_key, str feature_map, float scale"


@torch.library.custom_op(
    "grafting::linear_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_ARGUMENTS}) -> (Tensor, Tensor)",
)
def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, is_key: Tensor | None, feature_map: str, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention [B, H, M, V], and the sums over all keys that it is made of [B, H, V + 1, K], over the number of keys."""
    q, k, v = map(with_rows, (q, k, v))
    out, sums = _empty_outputs(q, v)
    constants = _constants(k, v, feature_map)
    root, num_keys, num_queries = math.sqrt(scale), k.shape[2], q.shape[2]
    with torch.cuda.device_of(v):
        grid, run = _runs(k)
        partial = _partial(sums, grid)
        unit, strides = strides_of(k, v)
        key_kernel[grid](
            k, v, bytes_of(is_key), partial, *strides, num_keys, run, 1 / num_keys, root,
            **constants, HAS_MASK=is_key is not None, UNIT=unit,
        )  # fmt: skip
        _add_up(partial, sums)
        grid, run = _runs(q)
        unit, strides = strides_of(q, out)
        query_kernel[grid](
            q, sums, out, *strides, num_queries, run, EPSILON / num_keys, root, **constants, UNIT=unit
        )
    return out, sums


@linear_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, is_key: Tensor | None, feature_map: str, scale: float
) -> tuple[Tensor, Tensor]:
    return _empty_outputs(q, v)


@torch.library.custom_op(
    "grafting::linear_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor sums, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
)
def linear_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sums: Tensor,
    is_key: Tensor | None,
    feature_map: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    grad, q, k, v = map(with_rows, (grad, q, k, v))
    dq, dk, dv = map(empty_heads, (q, k, v))
    d_sums = torch.empty_like(sums)
    constants = _constants(k, v, feature_map)
    root, num_keys, num_queries = math.sqrt(scale), k.shape[2], q.shape[2]
    with torch.cuda.device_of(v):
        grid, run = _runs(q)
        partial = _partial(d_sums, grid)
        unit, strides = strides_of(q, grad, dq)
        query_backward_kernel[grid](
            q, grad, sums, dq, partial, *strides, num_queries, run, EPSILON / num_keys, root,
            **constants | _fewer_at_a_time(constants, v.device), UNIT=unit,
        )  # fmt: skip
        _add_up(partial, d_sums)
        grid, run = _runs(k)
        unit, strides = strides_of(k, v, dk, dv)
        key_backward_kernel[grid](
            k, v, bytes_of(is_key), d_sums, dk, dv, *strides, num_keys, run, 1 / num_keys, root,
            **constants, HAS_MASK=is_key is not None, UNIT=unit,
        )  # fmt: skip
    return dq, dk, dv


@linear_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_heads(q), empty_heads(k), empty_heads(v)


def _empty_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, length, dim = q.shape
    out = v.new_empty((batch, length, heads, v.shape[3])).transpose(1, 2)
    return out, v.new_empty((batch, heads, v.shape[3] + 1, dim), dtype=torch.float32)


def _runs(x: Tensor) -> tuple[tuple[int, int, int], int]:
    """Programs for the heads, runs of tokens and items of x, and the tokens of a run."""
    batch, heads, length, _ = x.shape
    runs = min(triton.cdiv(MANY_PROGRAMS, batch * heads), triton.cdiv(length, LEAST_RUN))
    run = triton.cdiv(triton.cdiv(length, runs), BLOCK_N) * BLOCK_N
    return (heads, triton.cdiv(length, run), batch), run


def _partial(sums: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Memory for the sums of each run: their own, if there is one."""
    return sums[None] if grid[1] == 1 else sums.new_empty((grid[1], *sums.shape))


def _add_up(partial: Tensor, sums: Tensor) -> None:
    if len(partial) > 1:
        torch.sum(partial, 0, out=sums)


def _constants(k: Tensor, v: Tensor, feature_map: str) -> dict[str, Any]:
    """What kernels are compiled for."""
    block_k, block_v = block_of(k), block_of(v)
    is_large = _is_large(block_k, block_v)
    return {
        "FEATURE_MAP": feature_map,
        "K": k.shape[3],
        "V": v.shape[3],
        "BLOCK_K": block_k,
        "BLOCK_V": block_v,
        "BLOCK_N": BLOCK_N,
        "num_warps": 8 if is_large else 4,
        "num_stages": 1 if is_large and not _is_roomy(v.device) else 2,
    }


def _is_large(block_k: int, block_v: int) -> bool:
    """Whether a head's sums are more than a program of 4 warps holds."""
    return block_k * block_v > 64 * 64


def _fewer_at_a_time(constants: dict[str, Any], device: torch.device) -> dict[str, int]:
    """For gradients of queries, whose threads hold large sums and, on most cards, the products' operands too."""
    is_large = _is_large(constants["BLOCK_K"], constants["BLOCK_V"])
    return {"BLOCK_N": 16, "num_stages": 2} if is_large and not has_wide_products(device) else {}


def _is_roomy(device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor >= _ROOMY
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, is_key, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, is_key, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _plain(
    q: Tensor, k: Tensor, v: Tensor, is_key: Tensor | None, feature_map: FeatureMap, scale: float
) -> Tensor:
    return linear_attention_plain(q, k, v, feature_map=feature_map, scale=scale, key_mask=is_key)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, is_key, sums = ctx.saved_tensors
    if torch.is_grad_enabled():  # a gradient of this gradient is asked for
        grads = differentiable_gradients(_plain(q, k, v, is_key, *ctx.settings), (q, k, v), grad)
    else:
        grads = linear_attention_backward(grad, q, k, v, sums, is_key, *ctx.settings)
    return *grads, *[None] * 3


linear_attention.register_autograd(_backward, setup_context=_setup_context)
