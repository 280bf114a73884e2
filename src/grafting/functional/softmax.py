"""Softmax attention over all keys, but those that a mask leaves out."""

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

HIDDEN_SCORE = -1000.0
"""A score that is lowered by this much or more gives a weight of zero in every precision; models use -10,000 and less."""


def softmax_attention(
    q: Float[Tensor, "b heads m k"],
    k: Float[Tensor, "b heads l k"],
    v: Float[Tensor, "b heads l v"],
    *,
    key_mask: Bool[Tensor, "b l"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b heads m v"]:
    """softmax(scale q k^T) v.

    Args:
        key_mask: False at keys that no query sees.
        scale: multiplies q k^T; 1/sqrt(K) when None.
    """
    mask = None if key_mask is None else key_mask[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
