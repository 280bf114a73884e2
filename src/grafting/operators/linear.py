"""Linear attention as a kernel, with an optional depthwise convolution of v over the image.

The arithmetic is in `functional/linear.py`.
"""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from ..contract import ANY_CALL, Kernel, KernelConfig, Site, TokenLayout
from ..functional.linear import FeatureMap, depthwise_conv, linear_attention


class LinearConfig(KernelConfig):
    """Linear attention over all tokens, both ways, text included: phi(q) (phi(k)^T v), normalised."""

    honours = ANY_CALL
    name: Literal["linear"] = "linear"
    feature_map: FeatureMap = "elu"
    """phi: `elu` is elu(x) + 1, `relu` is relu(x), `softmax` is a softmax over the features of each token of q and k."""
    conv: int | None = Field(default=None, gt=0, le=4096)
    """Side (odd) of a depthwise 2-D filter of v over the image, added to the output; none by default."""

    def faults(self, site: Site) -> list[str]:
        if self.conv is None or self.conv % 2:
            return []
        return [f"conv {self.conv} is even and has no centre: use {self.conv - 1} or {self.conv + 1}"]

    def build(self, site: Site) -> "Linear":
        return Linear(site.dim, self.feature_map, self.conv)

    def mixing_flops(self, site: Site) -> int:
        conv = 2 * site.grid.num_tokens * site.dim * self.conv**2 if self.conv else 0
        return 4 * site.num_tokens * site.dim * site.head_dim + conv


class Linear(Kernel):
    """phi(q) (phi(k)^T v) / (phi(q) sum phi(k)), plus a depthwise convolution of v over the image.

    The filters start at zero, so that a graft starts as linear attention alone: a random filter would add noise
    to the pretrained model's values. They learn from the first step, since their gradient does not vanish.

    Args:
        dim: channels of v over all heads, D.
        feature_map: phi.
        conv: side of the filters, odd; no convolution when None.

    Source:
        The convolution of v beside linear attention is that of LiT, arXiv:2501.12976.
    """

    def __init__(self, dim: int, feature_map: FeatureMap, conv: int | None):
        super().__init__()
        self.feature_map = feature_map
        self.conv_weight = nn.Parameter(torch.zeros(dim, 1, conv, conv)) if conv else None

    def forward(
        self,
        q: Float[Tensor, "b heads m k"],
        k: Float[Tensor, "b heads l k"],
        v: Float[Tensor, "b heads l v"],
        layout: TokenLayout,
        *,
        scale: float | None = None,
    ) -> Float[Tensor, "b heads m v"]:
        mixed = linear_attention(q, k, v, feature_map=self.feature_map, scale=scale, key_mask=layout.key_mask)
        if self.conv_weight is None:
            return mixed
        local = depthwise_conv(v, self.conv_weight, layout)
        return mixed + (local[:, :, layout.image_slice] if layout.image_queries else local)

    def extra_repr(self) -> str:
        conv = None if self.conv_weight is None else self.conv_weight.shape[-1]
        return f"feature_map={self.feature_map}, conv={conv}"
