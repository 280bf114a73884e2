"""Gated short convolutions in the place of attention: Hyena-SE, Hyena-X and Hyena-Y, one class with or without its filters.

No softmax, norm, activation or position: a token's projections gate each other, and the filters bring in its neighbours.
Work and memory grow with the number of tokens, not with its square. The filters themselves are in `functional/gated_conv.py`.

Source: arXiv:2506.05340 (Hyena-SE, -X, -Y), where the filters are causal; parameters are laid out as in its weights.
"""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..contract import AttentionWeights, Mixer, MixerConfig, MlpWeights, Role, Site, TokenLayout
from ._filters import GATE_SPREAD, FilterSettings, Geometry, TokenFilter, gated


class _HyenaConfig(FilterSettings, MixerConfig):
    """Settings common to all three. `name` has no default here, so that this is not an operator itself."""

    roles: ClassVar[frozenset[Role]] = frozenset({"attention"})

    def build(self, site: Site) -> "Hyena":
        return Hyena(
            site.dim,
            kernel_size=self.kernel_size,
            geometry=self.geometry,
            has_short_filter=self.has_short_filter,
            has_inner_filter=self.has_inner_filter,
        )

    def mixing_flops(self, site: Site) -> int:
        taps = self.num_taps if self.has_inner_filter else 0
        return (2 + 2 * taps) * site.num_tokens * site.dim  # two gates, and a multiply-accumulate a tap

    def projection_flops(self, site: Site) -> int:
        taps = 3 * self.num_taps if self.has_short_filter else 0
        return site.num_tokens * (8 * site.dim**2 + 2 * taps * site.dim)


class HyenaSEConfig(_HyenaConfig):
    """Hyena-SE: filters on the projections and on the gated values."""

    has_short_filter: ClassVar[bool] = True
    has_inner_filter: ClassVar[bool] = True
    kernel: ClassVar[str | None] = "gated-conv-se"
    name: Literal["hyena-se"] = "hyena-se"


class HyenaXConfig(_HyenaConfig):
    """Hyena-X: filters on the projections only."""

    has_short_filter: ClassVar[bool] = True
    has_inner_filter: ClassVar[bool] = False
    kernel: ClassVar[str | None] = "gated-conv-x"
    name: Literal["hyena-x"] = "hyena-x"


class HyenaYConfig(_HyenaConfig):
    """Hyena-Y: a filter on the gated values only."""

    has_short_filter: ClassVar[bool] = False
    has_inner_filter: ClassVar[bool] = True
    kernel: ClassVar[str | None] = "gated-conv-y"
    name: Literal["hyena-y"] = "hyena-y"


class Hyena(Mixer):
    """out(q * inner(k * v)), where q, k, v = short(in(x)); either filter may be absent.

    At random, the linears and the short filter start as torch's do, and the inner filter as the identity.

    Args:
        dim: channels in and out, D.
        kernel_size: filter taps, along each axis of the geometry.
        geometry: where the taps lie, see `HyenaXConfig.geometry`.
        has_short_filter: filter q, k and v (SE, X).
        has_inner_filter: filter k * v (SE, Y).

    Shapes:
        x [B, L, D] -> [B, L, D], for any L.
    """

    def __init__(
        self,
        dim: int,
        *,
        kernel_size: int,
        geometry: Geometry,
        has_short_filter: bool,
        has_inner_filter: bool,
    ):
        super().__init__()
        self.in_proj = nn.Linear(dim, 3 * dim)
        self.short_filter = TokenFilter(3 * dim, kernel_size, geometry) if has_short_filter else None
        self.inner_filter = TokenFilter(dim, kernel_size, geometry) if has_inner_filter else None
        self.out_proj = nn.Linear(dim, dim)
        if self.inner_filter is not None:
            self.inner_filter.set_identity()

    def forward(self, x: Float[Tensor, "b l d"], layout: TokenLayout) -> Float[Tensor, "b l d"]:
        return self.out_proj(gated(self.in_proj(x), self.short_filter, self.inner_filter, layout))

    @property
    def output_layer(self) -> nn.Linear:
        return self.out_proj

    @torch.no_grad()
    def inherit(self, weights: AttentionWeights | MlpWeights) -> None:
        """Start as a narrow, fixed attention: out(v blurred over its neighbours), with both gates close to 1.

        Softmax attention returns averages of v; the product of three of the host's projections is another thing, and of
        another size. So v and out are the host's as they are, and the first filter that v goes through blurs it: half
        the weight on the token, half on its neighbours. Rows of q and k keep the host's direction with norm
        `GATE_SPREAD`, and bias 1: on layer-normed tokens a gate is 1 +- 0.1 or so, so that nothing is shut out and
        every parameter learns from the first step. All else in the filters starts as the identity. Text tokens, which see
        one tap only in `2d` and `3d`, start with half their v there.

        Measured for Hyena-X on four blocks of a small DiT in the middle of its pretraining (64 tokens), squared error
        over the variance of the attention's output, at the start and after 150 steps of L1 fit: this rule 3.2 and 0.33;
        without the blur 8.0 and 0.35; torch's random start 6.3 and 0.47; all of the host's projections as they are 11 and 0.54.
        """
        assert isinstance(weights, AttentionWeights)
        q, k, v = self.in_proj.weight.chunk(3)
        dim = len(v)
        q.copy_(GATE_SPREAD * F.normalize(weights.q[0].float(), dim=1))
        k.copy_(GATE_SPREAD * F.normalize(weights.k[0].float(), dim=1))
        v.copy_(weights.v[0])
        self.out_proj.weight.copy_(weights.out[0])
        gate_biases, v_bias = self.in_proj.bias.tensor_split([2 * dim])
        gate_biases.fill_(1)
        for own, (_, bias) in ((v_bias, weights.v), (self.out_proj.bias, weights.out)):
            own.copy_(torch.zeros_like(own) if bias is None else bias)
        if self.short_filter is not None:
            self.short_filter.set_identity()
            self.short_filter.blur(slice(2 * dim, 3 * dim))
        if self.inner_filter is not None:
            self.inner_filter.set_identity()
            if self.short_filter is None:
                self.inner_filter.blur(slice(dim))
