"""Test-time training: a small MLP for each head and image takes one step of learning keys -> values, and maps the queries.

Every token sees every other (no past, no future), at O(L). The step is of the whole batch of tokens, and its gradient is
written out, so that nothing here runs autograd inside a forward pass. bfloat16 inputs are multiplied as they are, with sums
added up in float32 and rounded once; what is float16, whose range is too small for these sums, is computed in float32.

Source: arXiv:2605.02772; equations checked against its code, LeapLabTHU/Transformer-to-TTT DiT5/models.py.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

# variance that is added to each channel of k, so that one that hardly varies is not blown up
KEY_NORM_EPS = 1.0


def ttt(
    q: Float[Tensor, "b heads m k"],
    k: Float[Tensor, "b heads l k"],
    v: Float[Tensor, "b heads l v"],
    w1: Float[Tensor, "heads k n"],
    w2: Float[Tensor, "heads n v"],
    *,
    step_size: Float[Tensor, " heads"],
    scale: float | None = None,
    key_mask: Bool[Tensor, "b l"] | None = None,
) -> Float[Tensor, "b heads m v"]:
    """silu(q w1') w2', in the dtype of v, where w1' and w2' are one gradient step from w1 and w2.

    The step goes down scale / 2 * mean over tokens of |silu(k w1) w2 - v|^2, for each image and head.

    Args:
        w1: first layer before the step.
        w2: second layer before the step.
        step_size: of each head.
        scale: multiplies the loss, as softmax's multiplies q k^T; 1/sqrt(K) when None.
        key_mask: False at keys that the step leaves out.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.promote_types(v.dtype, torch.float32)
    dtype = v.dtype if v.dtype == torch.bfloat16 else wide
    # autocast would take float32 inputs for what they are not
    with torch.autocast(q.device.type, enabled=False):
        q, k, target = (x.to(dtype) for x in (q, k, v))
        first, second = w1.to(dtype), w2.to(dtype)
        before = k @ first  # [B, H, L, N]
        gate = before.sigmoid()
        hidden = before * gate
        share = scale / k.shape[2] if key_mask is None else (scale * _shares(key_mask, dtype)).to(dtype)
        error = (hidden @ second - target) * share  # gradient of the loss in the values
        slope = gate * (1 + before - hidden)  # derivative of silu
        step = step_size.to(wide)[:, None, None]
        new_w1 = w1 - step * (k.mT @ (error @ second.mT * slope))  # [B, H, K, N]
        new_w2 = w2 - step * (hidden.mT @ error)  # [B, H, N, V]
        return (F.silu(q @ new_w1.to(dtype)) @ new_w2.to(dtype)).to(v.dtype)


def ttt_reference(
    q: Float[Tensor, "b heads m k"],
    k: Float[Tensor, "b heads l k"],
    v: Float[Tensor, "b heads l v"],
    w1: Float[Tensor, "heads k n"],
    w2: Float[Tensor, "heads n v"],
    *,
    step_size: Float[Tensor, " heads"],
    scale: float | None = None,
    key_mask: Bool[Tensor, "b l"] | None = None,
) -> Float[Tensor, "b heads m v"]:
    """Reference for `ttt` that takes the step's gradient from autograd, per image and head."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    seen = k.new_ones(k[:, 0, :, 0].shape).bool() if key_mask is None else key_mask
    return torch.stack(
        [
            torch.stack(
                [
                    _one_head(one_q, one_k[is_key], one_v[is_key], *weights, scale=scale)
                    for one_q, one_k, one_v, *weights in zip(*image, w1, w2, step_size, strict=True)
                ]
            )
            for *image, is_key in zip(q, k, v, seen, strict=True)
        ]
    )


def _one_head(
    q: Tensor, k: Tensor, v: Tensor, w1: Tensor, w2: Tensor, step_size: Tensor, *, scale: float
) -> Tensor:
    with torch.enable_grad():
        loss = scale / 2 * (F.silu(k @ w1) @ w2 - v).square().sum(-1).mean()
        g1, g2 = torch.autograd.grad(loss, (w1, w2), create_graph=True)
    return F.silu(q @ (w1 - step_size * g1)) @ (w2 - step_size * g2)


def key_norm(
    k: Float[Tensor, "b heads l k"], key_mask: Bool[Tensor, "b l"] | None = None
) -> Float[Tensor, "b heads l k"]:
    """Each channel of k less its mean over the tokens that are seen, over the root of its variance plus 1.

    A constant that is added to all keys changes nothing, as in softmax attention.
    """
    dtype = torch.promote_types(k.dtype, torch.float32)
    # not `var_mean`, whose backward pass takes longer than these two
    if key_mask is None:
        mean = k.to(dtype).mean(2, keepdim=True)
        varied = k - mean
        variance = varied.square().mean(2, keepdim=True)
    else:
        share = _shares(key_mask, dtype)
        mean = (k * share).sum(2, keepdim=True)
        varied = k - mean
        variance = (varied.square() * share).sum(2, keepdim=True)
    return (varied * (variance + KEY_NORM_EPS).rsqrt()).to(k.dtype)


def _shares(key_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Each key's share of the mean over those that are seen, [B, 1, L, 1]."""
    counted = key_mask.to(dtype)
    return (counted / counted.sum(1, keepdim=True))[:, None, :, None]
