"""A LayerNorm that is shifted and scaled by a condition (adaLN), as blocks of DiT have it before attention and MLP.

The plain path is the definition; on a GPU the kernels of `_triton/` do the same, where they take the call.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ._triton import can_fuse

MAX_FUSED_WIDTH = 16_384
"""Wider tokens go the plain way on a GPU too: a program holds a whole one."""


def modulated_norm(
    x: Float[Tensor, "b l d"], shift: Float[Tensor, "b 1 d"], scale: Float[Tensor, "b 1 d"], eps: float
) -> Float[Tensor, "b l d"]:
    """norm(x) (1 + scale) + shift, where norm takes a token's mean away and divides by its standard deviation.

    A compiled model goes the plain way, which torch.compile makes into one kernel with what stands around it.

    Source: arXiv:2212.09748, section 3.2, adaLN.
    """
    if x.shape[-1] <= MAX_FUSED_WIDTH and not torch.compiler.is_compiling() and can_fuse(x, shift, scale):
        from ._triton.modulated_norm import modulated_norm as fused  # needs triton

        return fused(x, shift, scale, eps)
    return modulated_norm_plain(x, shift, scale, eps)


def modulated_norm_plain(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Float[Tensor, "b l d"]:
    """The definition of `modulated_norm`."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift
