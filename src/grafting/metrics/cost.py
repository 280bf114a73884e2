"""What operators cost: FLOPs from their own declarations, parameters from the model.

Counted an image and forward pass at the model's native size, as in arXiv:2506.05340 Table 4.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..contract import OperatorConfig, Role, Site, softmax_attention_flops


@dataclass(frozen=True)
class Flops:
    """FLOPs an image; a multiply-accumulate is two."""

    mixing: int  # what replaces softmax(QK^T)V, or an MLP's layers
    projections: int  # q, k, v, output projections and featurizers

    @property
    def total(self) -> int:
        return self.mixing + self.projections

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.mixing + other.mixing, self.projections + other.projections)


def role_flops(sites: Sequence[Site], chosen: Mapping[Site, OperatorConfig], role: Role) -> Flops:
    """The cost of all sites of one role, with operators where `chosen` has them and the host's own elsewhere."""
    total = Flops(0, 0)
    for site in sites:
        if site.role == role:
            total += operator_flops(chosen[site], site) if site in chosen else host_flops(site)
    return total


def operator_flops(operator: OperatorConfig, site: Site) -> Flops:
    """The cost of an operator at a site."""
    return Flops(operator.mixing_flops(site), operator.projection_flops(site))


def host_flops(site: Site) -> Flops:
    """The cost of the host's own softmax attention or two-layer MLP."""
    if site.role == "attention":
        mixing = softmax_attention_flops(site, site.num_tokens**2)
        return Flops(mixing, 8 * site.num_tokens * site.dim**2)
    return Flops(4 * site.num_tokens * site.dim * site.hidden_dim, 0)


def count_parameters(model: nn.Module) -> int:
    """All parameters, trained or fixed."""
    return sum(p.numel() for p in model.parameters())
