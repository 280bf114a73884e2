"""Losses by how noisy the inputs were: sums that stay on the device until a step's other figures are read."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from ..contract import NoiseProcess

NUM_LEVELS = 5


class NoiseLevels:
    """Equal parts of the way from clean to noise.

    Args:
        process: how inputs are noised.
        device: of the steps that inputs are noised to.
    """

    def __init__(self, process: NoiseProcess, device: torch.device):
        # made on the CPU, as steps are drawn
        shares = torch.arange(1, NUM_LEVELS) / NUM_LEVELS
        self._edges = process.steps_at(shares).to(device)
        self._numbers = torch.arange(NUM_LEVELS, device=device)[:, None]

    def sums(self, losses: Float[Tensor, " b"], t: Tensor) -> Float[Tensor, "2 levels"]:
        """For each level the sum of the losses of its inputs, and their number; t [B] are their steps."""
        inside = (torch.bucketize(t.contiguous(), self._edges, right=True) == self._numbers).to(losses.dtype)
        return torch.stack([inside @ losses, inside.sum(1)])


def level_means(sums: Sequence[float]) -> dict[str, float]:
    """The mean losses of those levels that had inputs, from `NoiseLevels.sums` in one row: `loss_at_noise/0-20` is the first of 5."""
    ends = [100 * number // NUM_LEVELS for number in range(NUM_LEVELS + 1)]
    names = [f"loss_at_noise/{low}-{high}" for low, high in pairwise(ends)]
    parts = zip(names, sums[:NUM_LEVELS], sums[NUM_LEVELS:], strict=True)
    return {name: total / count for name, total, count in parts if count}
