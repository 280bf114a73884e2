"""Test-time training as a kernel: fast weights for each head and image, learned from its keys and values in one step.

The arithmetic is in `functional/ttt.py`.
"""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from ..contract import ANY_CALL, Kernel, KernelConfig, OperatorConfig, Site, TokenLayout
from ..functional.linear import depthwise_conv
from ..functional.ttt import key_norm, ttt
from ._registry import parse_operator

# side of the depthwise filters of q and k
CONV_SIZE = 3


class TTTConfig(KernelConfig):
    """Two-layer fast weights, one gradient step from their start, over all tokens, both ways, text included; O(L)."""

    honours = ANY_CALL
    name: Literal["ttt"] = "ttt"
    window: int | None = Field(default=None, gt=0, le=65536)
    """Radius of a `window-2d` that is added to it with learned weights, as in `hybrid`; none by default."""

    def parts(self) -> tuple[OperatorConfig, ...]:
        return () if self.window is None else (self._with_window,)

    def faults(self, site: Site) -> list[str]:
        if self.window is None:
            return []
        return [f"window: {fault}" for fault in parse_operator(self._local).faults(site)]

    def build(self, site: Site) -> Kernel:
        if self.window is None:
            return TTT(site.num_heads, site.head_dim)
        operator = self._with_window.build(site)
        assert isinstance(operator, Kernel)
        return operator

    def mixing_flops(self, site: Site) -> int:
        if self.window is not None:
            return self._with_window.mixing_flops(site)
        # seven products of all tokens with a K x K matrix: two to guess the values, three for the gradients, two for q
        fast_weights = 7 * 2 * site.num_tokens * site.dim * site.head_dim
        convs = 2 * 2 * site.grid.num_tokens * site.dim * CONV_SIZE**2
        return fast_weights + convs

    @property
    def _local(self) -> dict[str, str | int | None]:
        return {"name": "window-2d", "radius": self.window}

    @property
    def _with_window(self) -> OperatorConfig:
        return parse_operator({"name": "hybrid", "first": self._local, "second": self.name})


class TTT(Kernel):
    """silu(q w1') w2', where w1' and w2' are one step from w1 and w2 towards giving the values for the keys.

    Keys are normed over tokens; q and k have a depthwise 3 x 3 convolution over the image added to them. What the step starts
    from and its size are learned, for each head. Filters and w2 start at zero, w1 orthogonal: at first this is linear attention
    with features silu(x w1), not normalised.

    Measured on blocks 2 and 5 of the testbed's DiT (64 tokens, head dim 32), squared error over the variance of the
    attention's output, at the start and after 100 steps of L1 fit with the host's projections: this start 0.61, 0.58 and
    0.14, 0.10; the published one (w1 and w2 normal, 0.02) 1.06, 1.04 and 0.20, 0.18; `linear` 0.86, 0.82 and 0.32, 0.28.

    Args:
        num_heads: heads, H.
        head_dim: channels of a head, K; also the width between the two layers.

    Source:
        arXiv:2605.02772; in its code, LeapLabTHU/Transformer-to-TTT DiT5/models.py, the step size is 1 and not learned, and
        convolutions have a bias and start at random.
    """

    def __init__(self, num_heads: int, head_dim: int):
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(num_heads, head_dim, head_dim))
        self.w2 = nn.Parameter(torch.zeros(num_heads, head_dim, head_dim))
        self.step_size = nn.Parameter(torch.ones(num_heads))
        for head in self.w1:
            nn.init.orthogonal_(head)
        filters = (num_heads * head_dim, 1, CONV_SIZE, CONV_SIZE)
        self.q_conv = nn.Parameter(torch.zeros(filters))
        self.k_conv = nn.Parameter(torch.zeros(filters))

    def forward(
        self,
        q: Float[Tensor, "b heads m k"],
        k: Float[Tensor, "b heads l k"],
        v: Float[Tensor, "b heads l v"],
        layout: TokenLayout,
        *,
        scale: float | None = None,
    ) -> Float[Tensor, "b heads m v"]:
        k = key_norm(k, layout.key_mask)
        q = q + depthwise_conv(q, self.q_conv, layout.of_queries)
        k = k + depthwise_conv(k, self.k_conv, layout)
        return ttt(q, k, v, self.w1, self.w2, step_size=self.step_size, scale=scale, key_mask=layout.key_mask)
