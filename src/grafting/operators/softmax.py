"""Softmax attention itself, as a kernel: the control. With kept projections it changes nothing, bit for bit."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from ..contract import ANY_CALL, Kernel, KernelConfig, Site, TokenLayout, softmax_attention_flops
from ..functional.softmax import softmax_attention


class SoftmaxConfig(KernelConfig):
    """Softmax attention. With `projections: random` this is the paper's self-grafting control."""

    honours = ANY_CALL
    name: Literal["softmax"] = "softmax"

    def build(self, site: Site) -> "Softmax":
        return Softmax()

    def mixing_flops(self, site: Site) -> int:
        return softmax_attention_flops(site, site.num_tokens**2)


class Softmax(Kernel):
    """softmax(scale q k^T) v over all tokens."""

    def forward(
        self,
        q: Float[Tensor, "b heads m k"],
        k: Float[Tensor, "b heads l k"],
        v: Float[Tensor, "b heads l v"],
        layout: TokenLayout,
        *,
        scale: float | None = None,
    ) -> Float[Tensor, "b heads m v"]:
        return softmax_attention(q, k, v, key_mask=layout.key_mask, scale=scale)
