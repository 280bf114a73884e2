"""A root-mean-square norm of gated tokens, as Mamba-2 has it before its last linear.

The plain path is the definition; on a GPU the kernels of `_triton/` do the same, where they take the call.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ._triton import can_fuse

MAX_FUSED_WIDTH = 16_384
"""Wider tokens go the plain way on a GPU too: a program holds a whole one."""


def gated_norm(
    y: Float[Tensor, "b l d"],
    back: Float[Tensor, "b l d"] | None,
    gate: Float[Tensor, "b l d"],
    weight: Float[Tensor, " d"],
    eps: float,
) -> Float[Tensor, "b l d"]:
    """weight * u / rms(u), where u = y silu(gate), with the mean of y and `back` for y where that is there.

    In the dtype of the weight: under autocast that is more exact than the input's. Kernels are as exact within, and give what the
    linear after it takes.
    """
    tensors = [x for x in (y, back, gate) if x is not None]
    if y.shape[-1] <= MAX_FUSED_WIDTH and can_fuse(*tensors, weight) and len({x.dtype for x in tensors}) == 1:
        from ._triton.gated_norm import gated_norm as fused  # needs triton

        kind = y.device.type
        casts = torch.is_autocast_enabled(kind)
        return fused(y, back, gate, weight, eps, torch.get_autocast_dtype(kind) if casts else weight.dtype)[0]
    return gated_norm_plain(y, back, gate, weight, eps)


def gated_norm_plain(
    y: Tensor, back: Tensor | None, gate: Tensor, weight: Tensor, eps: float
) -> Float[Tensor, "b l d"]:
    """The definition of `gated_norm`."""
    y = y if back is None else (y + back) / 2
    return F.rms_norm((y * F.silu(gate)).to(weight.dtype), weight.shape, weight, eps)
