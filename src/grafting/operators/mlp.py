"""A two-layer MLP of any width in the place of the host's: the paper's `MLP r`."""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from ..contract import AttentionWeights, MixerConfig, MlpWeights, NeuronMixer, Role, Site, TokenLayout


class MLPConfig(MixerConfig):
    """Two linears with GELU (tanh form) between them, `ratio` times as wide inside as outside."""

    roles: ClassVar[frozenset[Role]] = frozenset({"mlp"})
    name: Literal["mlp"] = "mlp"
    ratio: float = Field(default=4.0, gt=0, le=256)
    """Hidden width over D, the expansion ratio r; the width is rounded down."""

    def faults(self, site: Site) -> list[str]:
        if self._hidden_dim(site) < 1:
            return [f"ratio {self.ratio} of width {site.dim} leaves no hidden neuron"]
        return []

    def build(self, site: Site) -> "MLP":
        return MLP(site.dim, hidden_dim=self._hidden_dim(site))

    def mixing_flops(self, site: Site) -> int:
        return 4 * site.num_tokens * site.dim * self._hidden_dim(site)

    def projection_flops(self, site: Site) -> int:
        return 0

    def _hidden_dim(self, site: Site) -> int:
        return int(self.ratio * site.dim)


class MLP(NeuronMixer):
    """fc2(gelu(fc1(x))) on each token by itself, x [B, L, D] -> [B, L, D]; initialised as torch's linears are.

    Args:
        dim: channels in and out, D.
        hidden_dim: neurons between the two linears.

    Source:
        arXiv:2506.05340 Table 4 (r = 3 and 6); GELU's tanh form as in facebookresearch/DiT.
    """

    def __init__(self, dim: int, *, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Float[Tensor, "b l d"], layout: TokenLayout) -> Float[Tensor, "b l d"]:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))

    @property
    def output_layer(self) -> nn.Linear:
        return self.fc2

    def inherit(self, weights: AttentionWeights | MlpWeights) -> None:
        """The host's neurons: the strongest of them if this MLP is narrower, all of them if it is as wide or wider.

        A neuron's strength is |row of fc1| * |column of fc2|, a bound on what it can add, known without data. Kept neurons
        stay in the host's order. Neurons that the host has not got start with a zero column in fc2: a wider MLP starts
        as the host's exactly, and learns their columns first. The activation stays GELU whatever the host's is.
        """
        assert isinstance(weights, MlpWeights)
        up, down = weights.up[0], weights.down[0]
        self.inherit_neurons(weights, strongest(up, down, num=min(len(self.fc1.weight), len(up))))

    @torch.no_grad()
    def inherit_neurons(self, weights: MlpWeights, kept: Int[Tensor, " kept"]) -> None:
        (up, up_bias), (down, down_bias) = weights.up, weights.down
        self.num_inherited_neurons = len(kept)
        self.fc1.weight[: len(kept)] = up[kept].to(self.fc1.weight)
        self.fc1.bias[: len(kept)] = 0 if up_bias is None else up_bias[kept].to(self.fc1.bias)
        nn.init.zeros_(self.fc2.weight)
        self.fc2.weight[:, : len(kept)] = down[:, kept].to(self.fc2.weight)
        self.fc2.bias.copy_(torch.zeros_like(self.fc2.bias) if down_bias is None else down_bias)


def strongest(up: Float[Tensor, "hidden d"], down: Float[Tensor, "d hidden"], *, num: int) -> Tensor:
    """Indices, in ascending order, of the `num` neurons with the largest |row of up| * |column of down|."""
    strength = up.float().norm(dim=1) * down.float().norm(dim=0)
    return strength.topk(num).indices.sort().values
