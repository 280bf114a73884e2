"""A gated product in the place of an MLP: `mlp-hyena-x`. Each token by itself; the filter runs along its channels.

No activation: three projections of a token are filtered and multiplied.

Source: arXiv:2506.05340 (MLP Hyena-X); parameters are laid out as in its weights.
"""

from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.polynomial.hermite_e import hermegauss
from pydantic import Field
from torch import Tensor, nn

from ..contract import AttentionWeights, Mixer, MixerConfig, MlpWeights, Role, Site, TokenLayout
from ..errors import HostError
from ..functional.gated_conv import channel_kernels_take, filtered_channels, gated_channels
from ._filters import is_watched

# width of q, k and v over D, with which the linears cost what those of an MLP of ratio 4 do
EXPANSION = 2

# points at which an activation is looked at to find its parabola
NUM_QUADRATURE_POINTS = 40


class MLPHyenaXConfig(MixerConfig):
    """Two gates and a short filter along the channels of each token, as large as an MLP of ratio 4.

    With `filters: per-token` and `init: random` this is the MLP Hyena-X of arXiv:2506.05340.
    """

    roles: ClassVar[frozenset[Role]] = frozenset({"mlp"})
    name: Literal["mlp-hyena-x"] = "mlp-hyena-x"
    kernel_size: int = Field(default=4, ge=1, le=4096)
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
        return self.out_proj(self._gated(self.in_proj(x)))

    def _gated(self, qkv: Tensor) -> Tensor:
        own = self.short_filter
        # a filter that is watched may have its weights only while it is called, as one that is offloaded
        if channel_kernels_take(qkv, own.weight) and not is_watched(own):
            own.check(qkv.shape[1])
            return gated_channels(qkv, own.weight, own.bias)
        q, k, v = own(qkv).chunk(3, dim=-1)
        return q * (k * v)

    @property
    def output_layer(self) -> nn.Linear:
        return self.out_proj

    @torch.no_grad()
    def inherit(self, weights: AttentionWeights | MlpWeights) -> None:
        """Start as the host's strongest neurons, each with the parabola that is closest to its activation.

        Two factors that are linear in a token make a parabola: v is the neuron's input, q = slope + curvature * input, k is 1,
        the filter the identity. Constants, and the means of the neurons that found no place, go to the last bias. Closest
        means on layer-normed tokens taken as normal, where a neuron's input has the mean of its bias and the spread of its row. A
        host with fewer neurons leaves channels at random, with zero columns in the last linear.

        Measured on blocks 1, 4 and 7 of the testbed's DiT (64 tokens, width 128), squared error over the variance of the MLP's
        output, at the start and after 100 steps of L2 fit: this rule 1.4, 1.2, 8.9 and 0.03, 0.07, 0.12; torch's random start
        1.2, 1.4, 12.2 and 0.13, 0.20, 0.39; all neurons' linear part in half of the channels and the parabolas of as many
        neurons in the rest 0.9, 1.4, 3.9 and 0.04, 0.10, 0.12. At the start far tokens find the parabolas too steep.
        """
        assert isinstance(weights, MlpWeights)
        up, up_bias = _float_layer(weights.up)
        down, down_bias = _float_layer(weights.down)
        fit = _parabolas(up, up_bias, weights.activation)
        strength = down.norm(dim=0) * fit.size
        kept = strength.topk(min(self.out_proj.in_features, len(up))).indices.sort().values
        inputs, size, num = F.normalize(up, dim=1)[kept], fit.size[kept, None], len(kept)
        q, k, v = self.in_proj.weight.chunk(3)
        q_bias, k_bias, v_bias = self.in_proj.bias.chunk(3)
        # v and the last linear share what a neuron adds evenly, so that gates are near 1 and both learn alike
        v[:num], v_bias[:num] = size.sqrt() * inputs, 0
        q[:num], q_bias[:num] = fit.curvature[kept, None] / size * inputs, fit.slope[kept] / size[:, 0]
        k[:num], k_bias[:num] = 0, 1
        nn.init.zeros_(self.out_proj.weight)
        self.out_proj.weight[:, :num] = down[:, kept] * size[:, 0].sqrt()
        constants = fit.mean.index_add(0, kept, -fit.curvature[kept])
        self.out_proj.bias.copy_(down_bias + down @ constants)
        self.short_filter.set_identity()


class _Parabolas(NamedTuple):
    """For each neuron: mean + slope z + curvature (z^2 - 1), where z is its input less its mean, over its spread."""

    mean: Tensor
    slope: Tensor
    curvature: Tensor

    @property
    def size(self) -> Tensor:
        """Root mean square of what varies; z and (z^2 - 1) / sqrt(2) have unit variance and do not correlate."""
        return (self.slope.square() + 2 * self.curvature.square()).sqrt().clamp(min=1e-8)


def _parabolas(
    up: Float[Tensor, "hidden d"], bias: Float[Tensor, " hidden"], activation: Callable[[Tensor], Tensor]
) -> _Parabolas:
    """The closest parabola to each neuron's activation, in squares, for normal inputs: its Hermite series cut short."""
    z, weight = (torch.tensor(x).to(up) for x in hermegauss(NUM_QUADRATURE_POINTS))
    values = activation(bias[:, None] + up.norm(dim=1, keepdim=True) * z)  # [hidden, points]
    mean, slope, second = (values @ (weight / weight.sum() * h) for h in (torch.ones_like(z), z, z**2 - 1))
    return _Parabolas(mean, slope, second / 2)


def _float_layer(layer: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
    """Weight and bias in float32; a bias that is not there is zero."""
    weight, bias = layer
    return weight.float(), torch.zeros_like(weight[:, 0]).float() if bias is None else bias.float()


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

    @torch.no_grad()
    def set_identity(self) -> None:
        """Weight 1 at the last tap and 0 elsewhere, bias 0: the output is the input."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        self.weight[..., -1] = 1

    def forward(self, x: Float[Tensor, "b l c"]) -> Float[Tensor, "b l c"]:
        self.check(x.shape[1])
        return filtered_channels(x, self.weight, self.bias)

    def check(self, num_tokens: int) -> None:
        """Raise a HostError if there are other tokens than filters."""
        num_filters = len(self.weight)
        if num_filters not in (1, num_tokens):
            raise HostError(
                f"mlp-hyena-x has a filter for each of {num_filters} tokens, and the model passes {num_tokens}: run it "
                "at its native size, or graft it with `filters: shared`, which takes any number"
            )
