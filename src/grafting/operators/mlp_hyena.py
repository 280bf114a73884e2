"""A gated product in the place of an MLP: `mlp-hyena-x`. Each token by itself; the filter runs along its channels.

No activation: three projections of a token are filtered and multiplied.

Source: arXiv:2506.05340 (MLP Hyena-X); parameters are laid out as in its weights.
"""

from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from ..contract import Mixer, MixerConfig, Role, Site, TokenLayout
from ..errors import HostError
from ..functional.conv import depthwise_1d

# width of q, k and v over D, with which the linears cost what those of an MLP of ratio 4 do
EXPANSION = 2


class MLPHyenaXConfig(MixerConfig):
    """Two gates and a short filter along the channels of each token, as large as an MLP of ratio 4.

    With `filters: per-token` and `init: random` this is the MLP Hyena-X of arXiv:2506.05340.
    """

    roles: ClassVar[frozenset[Role]] = frozenset({"mlp"})
    name: Literal["mlp-hyena-x"] = "mlp-hyena-x"
    kernel_size: int = Field(default=4, ge=1)
    """Taps of a filter, over a channel and those before it."""
    filters: Literal["per-token", "shared"] = "shared"
    """One filter for each place in the sequence, as published, which fixes the number of tokens; or one for all."""

    def build(self, site: Site) -> "MLPHyenaX":
        num_filters = site.num_tokens if self.filters == "per-token" else 1
        return MLPHyenaX(site.dim, kernel_size=self.kernel_size, num_filters=num_filters)

    def mixing_flops(self, site: Site) -> int:
        filters = 2 * self.kernel_size * 3 * EXPANSION * site.dim
        return self.table4_flops(site)[0] + site.num_tokens * filters

    def projection_flops(self, site: Site) -> int:
        return 0

    def table4_flops(self, site: Site) -> tuple[int, int]:
        """Linears and the two gates: the paper's +0.02 % of an MLP's FLOPs. The filters, 48 D a token, would make it +0.28 %."""
        linears, gates = 8 * EXPANSION * site.dim**2, 2 * EXPANSION * site.dim
        return site.num_tokens * (linears + gates), 0


class MLPHyenaX(Mixer):
    """out(q * (k * v)), where q, k, v = filter(in(x)) are of width 2 D; initialised as torch's linears and convolutions.

    The filter is causal along the channels of q, k and v joined: the first channels of k also see the last of q.

    Args:
        dim: channels in and out, D.
        kernel_size: filter taps, K; the last is the channel itself.
        num_filters: one for each token, which are then as many as this; or 1 for any number of tokens.

    Shapes:
        x [B, L, D] -> [B, L, D], for L = `num_filters`, or any L where that is 1.

    Raises:
        HostError: there are other tokens than filters.
    """

    def __init__(self, dim: int, *, kernel_size: int, num_filters: int):
        super().__init__()
        self.in_proj = nn.Linear(dim, 3 * EXPANSION * dim)
        self.short_filter = ChannelFilter(num_filters, kernel_size)
        self.out_proj = nn.Linear(EXPANSION * dim, dim)

    def forward(self, x: Float[Tensor, "b l d"], layout: TokenLayout) -> Float[Tensor, "b l d"]:
        q, k, v = self.short_filter(self.in_proj(x)).chunk(3, dim=-1)
        return self.out_proj(q * (k * v))

    @property
    def output_layer(self) -> nn.Linear:
        return self.out_proj


class ChannelFilter(nn.Module):
    """A causal filter along the channels of each token, with a bias; initialised as torch's convolutions are.

    Args:
        num_filters: one for each token, or 1 for all of them.
        kernel_size: taps, K; weight is [num_filters, 1, K].
    """

    def __init__(self, num_filters: int, kernel_size: int):
        super().__init__()
        bound = kernel_size**-0.5
        self.weight = nn.Parameter(torch.empty(num_filters, 1, kernel_size).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num_filters).uniform_(-bound, bound))

    def forward(self, x: Float[Tensor, "b l c"]) -> Float[Tensor, "b l c"]:
        num_filters, num_tokens = len(self.weight), x.shape[1]
        if num_filters not in (1, num_tokens):
            raise HostError(
                f"mlp-hyena-x has a filter for each of {num_filters} tokens, and the model passes {num_tokens}: run it "
                "at its native size, or graft it with `filters: shared`, which takes any number"
            )
        # tokens take the place of channels; one filter for all is a view, so nothing is copied
        weight, bias = self.weight.expand(num_tokens, -1, -1), self.bias.expand(num_tokens)
        return depthwise_1d(x.mT, weight, bias, before=self.weight.shape[-1] - 1).mT
