"""How well an operator fits: its loss and R^2, as sums over held-out batches."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Measured:
    """Running loss and R^2 of one site over held-out batches, as sums that stay on the device: of losses, batches, squared
    errors and squared deviations of the target."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)

    def update(self, loss: Tensor, output: Any, target: Any) -> None:
        error = variation = torch.zeros_like(self.sums[0])
        for y, want in zip(tensors_of(output), tensors_of(target), strict=True):
            want = want.double()
            error = error + (y.double() - want).square().sum()
            variation = variation + (want - want.mean(dim=tuple(range(want.ndim - 1)))).square().sum()
        self.sums += torch.stack([loss.double(), torch.ones_like(error), error, variation])


class Found(NamedTuple):
    """The sums of one site over all held-out batches."""

    losses: float
    batches: float
    error: float
    variation: float

    @property
    def loss(self) -> float:
        return self.losses / self.batches

    @property
    def r2(self) -> float:
        return 1 - self.error / max(self.variation, 1e-30)


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors of a module's output: one, or those of a tuple (joint attention)."""
    return [output] if isinstance(output, Tensor) else [o for o in output if o is not None]
