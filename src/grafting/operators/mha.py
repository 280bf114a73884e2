"""Multi-head softmax attention as a mixer with projections of its own: the control for every other mixer."""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from ..contract import (
    AttentionWeights,
    Mixer,
    MixerConfig,
    MlpWeights,
    Role,
    Site,
    TokenLayout,
    softmax_attention_flops,
)


class MHAConfig(MixerConfig):
    """Softmax attention, projections included; at random this is the paper's self-grafting of MHA."""

    roles: ClassVar[frozenset[Role]] = frozenset({"attention"})
    kernel: ClassVar[str | None] = "softmax"
    name: Literal["mha"] = "mha"
    num_heads: int | None = Field(default=None, ge=1, le=4096)
    """Attention heads; by default as many as the site's attention has."""

    def faults(self, site: Site) -> list[str]:
        num_heads = self._num_heads(site)
        if num_heads < 1:
            return ["the site has no attention heads: give num_heads"]
        if site.dim % num_heads:
            return [f"width {site.dim} is not a multiple of num_heads {num_heads}"]
        return []

    def build(self, site: Site) -> "MHA":
        return MHA(site.dim, num_heads=self._num_heads(site))

    def mixing_flops(self, site: Site) -> int:
        return softmax_attention_flops(site, site.num_tokens**2, num_heads=self._num_heads(site))

    def projection_flops(self, site: Site) -> int:
        return 8 * site.num_tokens * site.dim**2

    def _num_heads(self, site: Site) -> int:
        return site.num_heads if self.num_heads is None else self.num_heads


class MHA(Mixer):
    """out(softmax(q k^T / sqrt(K)) v) with q, k, v = in(x), head by head, over all tokens.

    Args:
        dim: channels in and out, D.
        num_heads: heads, H; must divide D.

    Shapes:
        x [B, L, D] -> [B, L, D], for any L.
    """

    def __init__(self, dim: int, *, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.in_proj = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b l d"], layout: TokenLayout) -> Float[Tensor, "b l d"]:
        qkv = self.in_proj(x).unflatten(-1, (3, self.num_heads, -1))  # [B, L, 3, H, K]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, L, K]
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(y.transpose(1, 2).flatten(2))

    @property
    def output_layer(self) -> nn.Linear:
        return self.out_proj

    @torch.no_grad()
    def inherit(self, weights: AttentionWeights | MlpWeights) -> None:
        """All of the host's projections; a host without rotary positions or QK norm is then reproduced exactly."""
        assert isinstance(weights, AttentionWeights)
        rows_of = (*self.in_proj.weight.chunk(3), self.out_proj.weight)
        biases = (*self.in_proj.bias.chunk(3), self.out_proj.bias)
        for (weight, bias), own_weight, own_bias in zip(weights, rows_of, biases, strict=True):
            own_weight.copy_(weight)
            own_bias.copy_(torch.zeros_like(own_bias) if bias is None else bias)
