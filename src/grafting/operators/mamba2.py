"""Mamba-2 in the place of attention: a state for each head, written and read token by token, in both directions by default.

Work and memory grow with the number of tokens, not with its square. The scan itself is in `functional/ssd.py`; here are
the projections, the short filter, the gated norm and what the two directions share. Text tokens are part of the sequence.

Source: arXiv:2405.21060 (Mamba-2). In the causal form parameters have mamba_ssm's names, shapes and starting values
(state-spaces/mamba, mamba_ssm/modules/mamba2.py: one group, one D a head, norm after the gate, no biases but the filter's),
so that the weights of arXiv:2506.05340 fit.
"""

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from ..contract import AttentionWeights, Mixer, MixerConfig, MlpWeights, Role, Site, TokenLayout
from ..functional.gated_conv import silu_conv
from ..functional.gated_norm import gated_norm
from ..functional.ssd import ssd

# steps at the start, drawn log-uniformly, and rates, drawn uniformly (mamba_ssm's)
_STEP_RANGE = (1e-3, 0.1)
_STEP_FLOOR = 1e-4
_RATE_RANGE = (1.0, 16.0)
_NORM_EPS = 1e-5

# of what is inherited, for inputs of unit variance: spread before silu of values, of gates, of B and C around their bias
_VALUE_SPREAD = 0.3
_GATE_SPREAD = 2.0  # of what all channels share; each adds its random row
_STATE_SPREAD = 0.3
# a token's own share beside the scan's, and the size of averaged values over that of v
_OWN_SHARE = 2.0
_SHRINK = 0.5
_SILU_OF_ONE = 1 / (1 + math.exp(-1))


class Mamba2Config(MixerConfig):
    """Mamba-2, over the raster order and back."""

    roles: ClassVar[frozenset[Role]] = frozenset({"attention"})
    name: Literal["mamba2"] = "mamba2"
    state_dim: int = Field(default=64, ge=1, le=4096)
    """Size of the state of each channel, N."""
    head_dim: int = Field(default=16, ge=1, le=4096)
    """Channels of a head, which decay at one rate."""
    expand: int = Field(default=2, ge=1, le=64)
    """Inner channels for each channel of the model."""
    conv_size: int = Field(default=4, ge=1, le=4096)
    """Taps of the short filter before the scan: the token and those before it in the direction of the scan."""
    direction: Literal["bidirectional", "causal"] = "bidirectional"
    """Filter and scan over the raster order and back, averaged; or only forward, as in the published weights."""
    weights: Literal["shared", "separate"] = "shared"
    """Share the filter, step biases, rates and skips between both directions, or not; projections are always shared."""

    def faults(self, site: Site) -> list[str]:
        faults = []
        inner = self._inner_dim(site)
        if inner % self.head_dim:
            faults.append(
                f"expand {self.expand} x width {site.dim} = {inner} is not a multiple of head_dim {self.head_dim}"
            )
        if self.direction == "causal" and self.weights == "separate":
            faults.append(
                "weights: separate is for two directions, and direction: causal has one; use weights: shared"
            )
        return faults

    def build(self, site: Site) -> "Mamba2":
        return Mamba2(
            site.dim,
            state_dim=self.state_dim,
            head_dim=self.head_dim,
            inner_dim=self._inner_dim(site),
            conv_size=self.conv_size,
            bidirectional=self.direction == "bidirectional",
            separate=self.weights == "separate",
        )

    def mixing_flops(self, site: Site) -> int:
        """The recurrence in each direction: decay, write and read of a state, 5 N a channel, and the skip; then the gate.

        In chunks of 32 tokens the same is done with as many, in products of matrices.
        """
        scan = (5 * self.state_dim + 2) * self._num_directions
        return site.num_tokens * self._inner_dim(site) * (scan + 1)

    def projection_flops(self, site: Site) -> int:
        inner = self._inner_dim(site)
        projections = 2 * site.dim * (3 * inner + 2 * self.state_dim + inner // self.head_dim)
        filters = 2 * self.conv_size * (inner + 2 * self.state_dim) * self._num_directions
        return site.num_tokens * (projections + filters)

    def table4_flops(self, site: Site) -> tuple[int, int]:
        """Costs that reproduce Table 4's changes, -75.17 % and +155.77 % of DiT-XL/2's attention, in either direction setting.

        Two parts of this are deductions from the published figures. The scan is counted as one multiply-accumulate for each
        entry of the states. The projections' published change is Mamba-2's whole cost, 12 D^2 + 532 D a token, over
        attention's 8 D^2, which is not taken off: this function adds it. The change by `projection_flops` is about +56 %.
        """
        inner, state = self._inner_dim(site), self.state_dim
        filters_and_gate = 2 * self.conv_size * inner + 2 * inner
        whole = 6 * site.dim * inner + filters_and_gate + 4 * inner * state
        return 2 * site.num_tokens * inner * state, site.num_tokens * (8 * site.dim**2 + whole)

    def _inner_dim(self, site: Site) -> int:
        return self.expand * site.dim

    @property
    def _num_directions(self) -> int:
        return 2 if self.direction == "bidirectional" else 1


class Mamba2(Mixer):
    """out(norm(scan(filter(x, B, C), dt) * silu(z))), where z, x, B, C, dt = in(tokens).

    Both ways, the tokens are filtered and scanned as they are and in reverse, and the two results averaged: with shared
    weights, reversed tokens give the reversed output.

    Args:
        dim: channels in and out, D.
        state_dim: size of a channel's state, N.
        head_dim: channels of a head, P; must divide `inner_dim`.
        inner_dim: channels of all heads.
        conv_size: taps of the filter.
        bidirectional: filter and scan both ways.
        separate: the way back has a filter, step biases, rates and skips of its own.

    Shapes:
        x [B, L, D] -> [B, L, D], for any L.
    """

    def __init__(
        self,
        dim: int,
        *,
        state_dim: int,
        head_dim: int,
        inner_dim: int,
        conv_size: int,
        bidirectional: bool,
        separate: bool,
    ):
        super().__init__()
        self.state_dim, self.head_dim, self.inner_dim = state_dim, head_dim, inner_dim
        self.sizes = [inner_dim, state_dim, state_dim]  # of x, B and C
        num_heads = inner_dim // head_dim
        self.in_proj = nn.Linear(dim, inner_dim + sum(self.sizes) + num_heads, bias=False)
        forward = Direction(self.sizes, num_heads, conv_size)
        # kept flat, as mamba_ssm has them
        self.conv1d, self.dt_bias, self.A_log, self.D = (
            forward.conv1d,
            forward.dt_bias,
            forward.A_log,
            forward.D,
        )
        self.reverse = Direction(self.sizes, num_heads, conv_size) if separate else None
        self.bidirectional = bidirectional
        self.norm = GatedNorm(inner_dim)
        self.out_proj = nn.Linear(inner_dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "b l d"], layout: TokenLayout) -> Float[Tensor, "b l d"]:
        projected = self.in_proj(x)
        gate, tokens = projected.split([self.inner_dim, projected.shape[-1] - self.inner_dim], dim=-1)
        y, back = _scan(self, tokens), None
        if self.bidirectional:
            back = _scan(self, tokens, reverse=True) if self.reverse is None else self.reverse(tokens)
        return self.out_proj(self.norm(y, back, gate))

    @property
    def output_layer(self) -> nn.Linear:
        return self.out_proj

    @torch.no_grad()
    def inherit(self, weights: AttentionWeights | MlpWeights) -> None:
        """Start as a fixed attention that decays with distance: out(v averaged over neighbours near and far).

        Copies of v, small enough that silu is linear, are summed in states whose reads and writes are close to constant:
        B and C have a bias, and around it the leading directions of the host's q^T k, all heads together, since there is
        one group. Rates are 1 and steps take over the random rates, so that heads see from one token to a thousand and
        none is louder. Copies of v are gated in turn by silu(z) and silu(-z), with much the same z for all channels: their sum
        is positive, and the norm takes its size out. The filter starts as the identity, and the bias of the host's output
        is lost: there is none here. With `expand` 1 gates stay random.

        Measured on three blocks of the testbed's DiT (64 tokens), squared error over the variance of the attention's
        output, at the start and after 100 steps of L1 fit at batch 8: this rule 0.93 and 0.24; mamba_ssm's random start
        2.57 and 0.26; q, k, v and out in the places of C, B, x and out, averaged over heads, 3.30 and 0.25.
        """
        assert isinstance(weights, AttentionWeights)
        inner, state = self.inner_dim, self.state_dim
        (q, _), (k, _), (v, v_bias), (out, _) = (
            (w.float(), None if bias is None else bias.float()) for w, bias in weights
        )
        copies = inner // len(v)
        gate, values, write, read, _ = self.in_proj.weight.split(
            [inner, inner, state, state, inner // self.head_dim]
        )
        size = v.norm(dim=1).mean()
        values.copy_(_VALUE_SPREAD / size * v.repeat(copies, 1))
        scores = q.mT @ k
        # on the CPU, whatever the device: signs of directions are the library's choice
        left, _, right = torch.linalg.svd(scores if scores.is_meta else scores.cpu())
        for rows, directions in ((read, left.mT), (write, right)):
            rows.zero_()
            rows[: len(directions)] = _STATE_SPREAD * directions[:state]
        if copies > 1:
            signs = torch.ones(copies, device=gate.device)
            signs[1::2] = -1
            rows = _GATE_SPREAD * F.normalize(gate[0].float(), dim=0) + gate[: len(v)].float()
            gate.copy_(signs.repeat_interleave(len(v))[:, None] * rows.repeat(copies, 1))
        self.out_proj.weight.copy_(out.repeat(1, copies) * (math.sqrt(2) / copies))
        self.norm.weight.fill_(_SHRINK * size)
        for direction in (self, self.reverse) if self.reverse is not None else (self,):
            direction.conv1d.weight.zero_()[..., -1] = 1
            bias = direction.conv1d.bias
            assert bias is not None
            bias.fill_(1)
            bias[:inner] = 0 if v_bias is None else _VALUE_SPREAD / size * v_bias.repeat(copies)
            steps = F.softplus(direction.dt_bias.float()) * direction.A_log.float().exp()
            direction.dt_bias.copy_(_inverse_softplus(steps))
            direction.A_log.zero_()
            direction.D.fill_(_OWN_SHARE * state * _SILU_OF_ONE**2)


class Direction(nn.Module):
    """One direction: the filter, and each head's step bias, rate and skip; initialised as in mamba_ssm."""

    def __init__(self, sizes: list[int], num_heads: int, conv_size: int):
        super().__init__()
        self.sizes, num_filtered = sizes, sum(sizes)
        self.conv1d = ShortFilter(num_filtered, num_filtered, conv_size, groups=num_filtered)
        low, high = (math.log(step) for step in _STEP_RANGE)
        steps = torch.empty(num_heads).uniform_(low, high).exp().clamp(min=_STEP_FLOOR)
        self.dt_bias = nn.Parameter(_inverse_softplus(steps))
        self.A_log = nn.Parameter(torch.empty(num_heads).uniform_(*_RATE_RANGE).log())
        self.D = nn.Parameter(torch.ones(num_heads))

    def forward(self, tokens: Float[Tensor, "b l xbcdt"]) -> Float[Tensor, "b l inner"]:
        """The way back."""
        return _scan(self, tokens, reverse=True)


def _scan(direction: Mamba2 | Direction, tokens: Tensor, *, reverse: bool = False) -> Tensor:
    """Filter and scan of x, B, C, dt, forward or from the last token to the first, with the parameters of the module that is running."""
    num_heads = len(direction.D)
    xBC, dt = tokens.split([tokens.shape[-1] - num_heads, num_heads], dim=-1)
    x, B, C = direction.conv1d(xBC, reverse=reverse).split(direction.sizes, dim=-1)
    x = x.unflatten(-1, (num_heads, -1))  # [B, L, H, P]
    exact = torch.promote_types(dt.dtype, torch.float32)
    dt = F.softplus(dt.to(exact) + direction.dt_bias.to(exact))
    rates = -direction.A_log.to(exact).exp()
    return ssd(x, dt, rates, B, C, direction.D, reverse=reverse).flatten(2)


class ShortFilter(nn.Conv1d):
    """silu of a causal depthwise filter over tokens, x [B, L, D] -> [B, L, D], in the dtype of x; mamba_ssm's `conv1d`."""

    def forward(self, x: Float[Tensor, "b l d"], *, reverse: bool = False) -> Float[Tensor, "b l d"]:
        """Filtered forward, or as if the tokens stood in reverse."""
        assert self.bias is not None
        if reverse:
            return silu_conv(x, self.weight.flip(-1), self.bias, before=0)
        return silu_conv(x, self.weight, self.bias, before=self.kernel_size[0] - 1)


class GatedNorm(nn.Module):
    """Root-mean-square norm of what both directions made, averaged and gated; see `gated_norm`."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(
        self, y: Float[Tensor, "b l d"], back: Float[Tensor, "b l d"] | None, gate: Float[Tensor, "b l d"]
    ) -> Float[Tensor, "b l d"]:
        return gated_norm(y, back, gate, self.weight, _NORM_EPS)


def _inverse_softplus(x: Tensor) -> Tensor:
    return x + torch.log(-torch.expm1(-x))
