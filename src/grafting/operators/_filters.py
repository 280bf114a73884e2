"""Short filters over tokens, which gated convolutions are made of; their arithmetic is in `functional/gated_conv.py`."""

from abc import ABC
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from ..contract import OperatorConfig, TokenLayout
from ..functional.gated_conv import Filter, filtered, gated_conv, kernels_take, own_tap

Geometry = Literal["centred", "causal", "2d", "3d"]
_NUM_AXES = {"centred": 1, "causal": 1, "2d": 2, "3d": 3}

# spread of inherited gates around 1, for inputs of unit variance
GATE_SPREAD = 0.1


class FilterSettings(OperatorConfig, ABC):
    """Settings of operators that are made of filters on the projections (short) and on the gated values (inner)."""

    has_short_filter: ClassVar[bool]
    has_inner_filter: ClassVar[bool]

    kernel_size: int = Field(default=4, ge=1, le=4096)
    """Taps of each filter; along each axis for `geometry: 2d` and `3d`, where 3 is a good choice."""
    geometry: Geometry = "centred"
    """Position of the taps.

    `centred`: K // 2 before the token and the rest after it, in raster order (K = 4: two before, itself, one after).
    `causal`: all before it or on it, as in the published weights; no token sees a later one.
    `2d`: K x K taps on the rows and columns of each frame, K // 2 of them above and to the left.
    `3d`: K x K x K taps on frames, rows and columns of a video.
    """

    @property
    def num_taps(self) -> int:
        """Taps of a filter."""
        return self.kernel_size ** _NUM_AXES[self.geometry]


class TokenFilter(nn.Module):
    """A depthwise filter over tokens, one for each channel, with a bias; initialised as torch's convolutions are.

    In the 1-D geometries the sequence is filtered as it is, text tokens included. In `2d` the image tokens are filtered
    on their grid, each frame by itself, in `3d` with its neighbours; text tokens, which have no neighbours there, see the centre
    tap only.

    Args:
        dim: channels, D.
        kernel_size: taps, K; weight is [D, 1, K], [D, 1, K, K] for `2d`, [D, 1, K, K, K] for `3d`.
        geometry: where the taps lie.
    """

    def __init__(self, dim: int, kernel_size: int, geometry: Geometry):
        super().__init__()
        self.geometry = geometry
        self.before = kernel_size - 1 if geometry == "causal" else kernel_size // 2
        num_axes = _NUM_AXES[geometry]
        bound = kernel_size ** (-num_axes / 2)
        self.weight = nn.Parameter(torch.empty(dim, 1, *[kernel_size] * num_axes).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(dim).uniform_(-bound, bound))

    def forward(self, x: Float[Tensor, "b l d"], layout: TokenLayout) -> Float[Tensor, "b l d"]:
        return filtered(x, self.taps, layout)

    @property
    def taps(self) -> Filter:
        """The filter as a value, for functions."""
        return Filter(self.weight, self.bias, self.before)

    @torch.no_grad()
    def set_identity(self) -> None:
        """Weight 1 at the token's own tap and 0 elsewhere, bias 0: the output is the input."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        own_tap(self.taps).fill_(1)

    @torch.no_grad()
    def blur(self, channels: slice) -> None:
        """For these channels, half the weight at the token's own tap and half spread evenly over the others."""
        num_others = self.weight[0].numel() - 1
        if num_others > 0:
            self.weight[channels] = 0.5 / num_others
            own_tap(self.taps)[channels] = 0.5


def gated(
    qkv: Float[Tensor, "b l d3"], short: TokenFilter | None, inner: TokenFilter | None, layout: TokenLayout
) -> Float[Tensor, "b l d"]:
    """q' * inner(k' * v') with q', k', v' = short(qkv); either filter may be absent."""
    filters = [x for x in (short, inner) if x is not None]
    of_short, of_inner = (None if x is None else x.taps for x in (short, inner))
    # filters that are watched may have their weights only while they are called, as those that are offloaded
    if kernels_take(qkv, of_short, of_inner) and not any(is_watched(x) for x in filters):
        return gated_conv(qkv, of_short, of_inner, layout)
    q, k, v = (qkv if short is None else short(qkv, layout)).chunk(3, dim=-1)
    return q * (k * v if inner is None else inner(k * v, layout))


def is_watched(module: nn.Module) -> bool:
    """Whether something waits for the module to be called."""
    if module._forward_pre_hooks or module._forward_hooks:
        return True
    return hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook")
