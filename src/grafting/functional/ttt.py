"""Test-time training: a small MLP for each head and image takes one step of learning keys -> values, and maps the queries.

Every token sees every other (no past, no future), at O(L). The step is of the whole batch of tokens, and its gradient is
written out, so that nothing here runs autograd inside a forward pass. Sums are kept in float32 whatever the inputs' dtype.

Source: arXiv:2605.02772; equations checked against its code, LeapLabTHU/Transformer-to-TTT DiT5/models.py.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

# variance that is added to each channel of k, so that one that hardly varies is not blown up
KEY_NORM_EPS = 1.0


def ttt(
    q: Float[Tensor, "b heads l k"],
    k: Float[Tensor, "b heads l k"],
    v: Float[Tensor, "b heads l v"],
    w1: Float[Tensor, "heads k m"],
    w2: Float[Tensor, "heads m v"],
    *,
    step_size: Float[Tensor, " heads"],
    scale: float | None = None,
) -> Float[Tensor, "b heads l v"]:
    """silu(q w1') w2', in the dtype of v, where w1' and w2' are one gradient step from w1 and w2.

    The step goes down scale / 2 * mean over tokens of |silu(k w1) w2 - v|^2, for each image and head.

    Args:
        w1: first layer before the step.
        w2: second layer before the step.
        step_size: of each head.
        scale: multiplies the loss, as softmax's multiplies q k^T; 1/sqrt(K) when None.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = torch.promote_types(v.dtype, torch.float32)
    # autocast would round the sums over all tokens to the inputs' dtype
    with torch.autocast(q.device.type, enabled=False):
        q, k, target, w1, w2 = (x.to(dtype) for x in (q, k, v, w1, w2))
        before = k @ w1  # [B, H, L, M]
        gate = before.sigmoid()
        hidden = before * gate
        error = (hidden @ w2 - target) * (scale / k.shape[2])  # gradient of the loss in the values
        slope = gate * (1 + before - hidden)  # derivative of silu
        step = step_size.to(dtype)[:, None, None]
        new_w1 = w1 - step * (k.mT @ (error @ w2.mT * slope))  # [B, H, K, M]
        new_w2 = w2 - step * (hidden.mT @ error)  # [B, H, M, V]
        return (F.silu(q @ new_w1) @ new_w2).to(v.dtype)


def ttt_reference(
    q: Float[Tensor, "b heads l k"],
    k: Float[Tensor, "b heads l k"],
    v: Float[Tensor, "b heads l v"],
    w1: Float[Tensor, "heads k m"],
    w2: Float[Tensor, "heads m v"],
    *,
    step_size: Float[Tensor, " heads"],
    scale: float | None = None,
) -> Float[Tensor, "b heads l v"]:
    """Reference for `ttt` that takes the step's gradient from autograd, per image and head."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.stack(
        [
            torch.stack(
                [_one_head(*head, scale=scale) for head in zip(*image, w1, w2, step_size, strict=True)]
            )
            for image in zip(q, k, v, strict=True)
        ]
    )


def _one_head(
    q: Tensor, k: Tensor, v: Tensor, w1: Tensor, w2: Tensor, step_size: Tensor, *, scale: float
) -> Tensor:
    with torch.enable_grad():
        loss = scale / 2 * (F.silu(k @ w1) @ w2 - v).square().sum(-1).mean()
        g1, g2 = torch.autograd.grad(loss, (w1, w2), create_graph=True)
    return F.silu(q @ (w1 - step_size * g1)) @ (w2 - step_size * g2)


def key_norm(k: Float[Tensor, "b heads l k"]) -> Float[Tensor, "b heads l k"]:
    """Each channel of k less its mean over the tokens, over the root of its variance plus 1.

    A constant that is added to all keys changes nothing, as in softmax attention.
    """
    dtype = torch.promote_types(k.dtype, torch.float32)
    variance, mean = torch.var_mean(k.to(dtype), dim=2, correction=0, keepdim=True)
    return ((k - mean) * (variance + KEY_NORM_EPS).rsqrt()).to(k.dtype)
