"""Linear attention: softmax's exp(q k^T) replaced by phi(q) phi(k)^T, so that keys and values are summed once.

Every token sees every other (no past, no future), at O(L). Sums are kept in float32 whatever the inputs' dtype. On a GPU
the kernels of `_triton/` do the same for values in half precision, without the copies. Also here: the depthwise convolution of v over the image that gives back some locality.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ..contract import TokenLayout
from ._triton import can_fuse

FeatureMap = Literal["elu", "relu", "softmax"]

# relu can leave a query without a single key, hence with a zero sum of weights
EPSILON = 1e-6

# a GPU program cannot hold the sums of longer vectors
_MAX_FUSED_HEAD_DIM = 128


def features(
    x: Float[Tensor, "*dims k"], feature_map: FeatureMap, root: float = 1.0
) -> Float[Tensor, "*dims k"]:
    """phi(root x), not negative: elu(x) + 1, relu(x), or softmax over the K features of each token.

    Source:
        elu: arXiv:2006.16236. relu: arXiv:2205.14756. softmax over features: arXiv:1812.01243 uses it for q.
    """
    x = x * root
    if feature_map == "elu":
        # in place, gradients come from the result, with no exponential of their own
        return F.elu(x, inplace=True) + 1
    if feature_map == "relu":
        return F.relu(x, inplace=True)
    return x.softmax(-1)


def linear_attention(
    q: Float[Tensor, "b heads m k"],
    k: Float[Tensor, "b heads l k"],
    v: Float[Tensor, "b heads l v"],
    *,
    feature_map: FeatureMap = "elu",
    scale: float | None = None,
    key_mask: Bool[Tensor, "b l"] | None = None,
) -> Float[Tensor, "b heads m v"]:
    """phi(q) (phi(k)^T v) / (phi(q) sum phi(k)), in the dtype of v.

    Args:
        feature_map: phi, see `features`.
        scale: multiplies q k^T, half of it (its root) on q and half on k before phi; not negative;
            1/sqrt(K) when None.
        key_mask: False at keys that no query sees.
    """
    if _kernels_take(q, k, v):
        from ._triton.linear import linear_attention as fused  # needs triton

        is_key = None if key_mask is None else key_mask.expand(len(k), -1)
        return fused(q, k, v, is_key, feature_map, q.shape[-1] ** -0.5 if scale is None else float(scale))[0]
    return linear_attention_plain(q, k, v, feature_map=feature_map, scale=scale, key_mask=key_mask)


def linear_attention_plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: FeatureMap,
    scale: float | None,
    key_mask: Tensor | None,
) -> Tensor:
    """The definition of `linear_attention`."""
    # autocast would round the sums over all tokens to the inputs' dtype
    with torch.autocast(q.device.type, enabled=False):
        q, k, values = _features_of_both(q, k, v, feature_map, scale)
        k = k if key_mask is None else k * key_mask[:, None, :, None]
        sums = torch.cat([k.mT @ values, k.sum(2)[..., None]], dim=-1)  # [B, H, K, V + 1]
        mixed, weight = (q @ sums).split([v.shape[-1], 1], dim=-1)
        return (mixed * (weight + EPSILON).reciprocal()).to(v.dtype)


def linear_attention_reference(
    q: Float[Tensor, "b heads m k"],
    k: Float[Tensor, "b heads l k"],
    v: Float[Tensor, "b heads l v"],
    *,
    feature_map: FeatureMap = "elu",
    scale: float | None = None,
    key_mask: Bool[Tensor, "b l"] | None = None,
) -> Float[Tensor, "b heads m v"]:
    """Reference for `linear_attention` that computes all M x L weights."""
    q, k, values = _features_of_both(q, k, v, feature_map, scale)
    weights = q @ k.mT  # [B, H, M, L]
    weights = weights if key_mask is None else weights * key_mask[:, None, None]
    return (weights / (weights.sum(-1, keepdim=True) + EPSILON) @ values).to(v.dtype)


def depthwise_conv(
    v: Float[Tensor, "b heads l v"], weight: Float[Tensor, "d 1 size size"], layout: TokenLayout
) -> Float[Tensor, "b heads l v"]:
    """Each channel of the image tokens convolved over its frame's rows and columns; zero at others and where keys are masked.

    Args:
        weight: one filter of odd side for each of the D = H * V channels; the image is padded with zeros.
    """
    grid = layout.grid
    v = v if layout.key_mask is None else v * layout.key_mask[:, None, :, None]
    heads, channels = v.shape[1], v.shape[1] * v.shape[3]
    image = v[:, :, layout.image_slice].unflatten(2, (grid.frames, grid.rows, grid.cols))
    image = image.permute(0, 2, 1, 5, 3, 4).flatten(2, 3).flatten(0, 1)  # [B * F, D, R, C]
    mixed = F.conv2d(image, weight, padding=weight.shape[-1] // 2, groups=channels)
    mixed = mixed.unflatten(0, (-1, grid.frames)).unflatten(2, (heads, -1))
    mixed = mixed.permute(0, 2, 1, 4, 5, 3).flatten(2, 4)
    return F.pad(mixed, (0, 0, layout.before, layout.after))


def _kernels_take(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether kernels do it; in float32, without a GPU's units for products, they would take longer than the copies."""
    return (
        v.dtype != torch.float32
        and max(q.shape[-1], v.shape[-1]) <= _MAX_FUSED_HEAD_DIM
        and can_fuse(v, q, k)
    )


def _features_of_both(
    q: Tensor, k: Tensor, v: Tensor, feature_map: FeatureMap, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """phi of scaled q and k, and v, all in float32 or better."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    root = math.sqrt(q.shape[-1] ** -0.5 if scale is None else scale)
    return features(q.to(dtype), feature_map, root), features(k.to(dtype), feature_map, root), v.to(dtype)
