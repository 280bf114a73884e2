"""What operators cost: multiply-accumulates from their own declarations, parameters from the model.

Counted an image and forward pass at the model's native size, as in arXiv:2506.05340 Table 4.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..contract import OperatorConfig, Role, Site


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates an image; FLOPs are twice that."""

    mixing: int  # what replaces softmax(QK^T)V, or an MLP's layers
    projections: int  # q, k, v, output projections and featurizers

    @property
    def total(self) -> int:
        return self.mixing + self.projections

    def __add__(self, other: "Macs") -> "Macs":
        return Macs(self.mixing + other.mixing, self.projections + other.projections)


def role_macs(sites: Sequence[Site], chosen: Mapping[Site, OperatorConfig], role: Role) -> Macs:
    """The cost of all sites of one role, with operators where `chosen` has them and the host's own elsewhere."""
    total = Macs(0, 0)
    for site in sites:
        if site.role == role:
            total += operator_macs(chosen[site], site) if site in chosen else host_macs(site)
    return total


def operator_macs(operator: OperatorConfig, site: Site) -> Macs:
    """The cost of an operator at a site."""
    return Macs(operator.mixing_macs(site), operator.projection_macs(site))


def host_macs(site: Site) -> Macs:
    """The cost of the host's own softmax attention or two-layer MLP."""
    if site.role == "attention":
        return Macs(2 * site.num_tokens**2 * site.dim, 4 * site.num_tokens * site.dim**2)
    return Macs(2 * site.num_tokens * site.dim * site.hidden_dim, 0)


def count_parameters(model: nn.Module) -> int:
    """All parameters, trained or fixed."""
    return sum(p.numel() for p in model.parameters())
