"""Classifier-free guidance: where it is on, what it leads away from, and how the two predictions become one."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ..contract import Conditions

Length = Literal["norm", "norm-2x2", "norm-rows"]
"""What keeps its length: each place's channels, each square of 2 x 2 places (FLUX's and Qwen's tokens), each channel's rows."""


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """null + scale * (conditional - null), on the first channels of a prediction.

    Args:
        scale: of the step away from the null prediction.
        interval: shares, in 0..1, of the way from clean to noise between which it is on.
        channels: how many of the first channels it moves; all of an input's when None.
        negative: the number of the condition to lead away from, in the place of the null.
        rescale: share in which the result is given back the spread of the conditional prediction (arXiv:2305.08891 Eq. 15
            and 16). `norm` gives it back its length at every place, `norm-2x2` in every square of 2 x 2 places, as Qwen-Image's
            pipeline does, and `norm-rows` in every row of every channel, as Lumina 2's.
    """

    scale: int | float
    interval: tuple[float, float] = (0.0, 1.0)
    channels: int | None = None
    negative: int | None = None
    rescale: float | Length = 0.0

    def is_on(self, share: int | float) -> bool:
        """True if guidance is on at this share of the way from clean to noise."""
        low, high = self.interval
        return low <= share <= high

    def nulls(self, conditions: Conditions, numbers: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """For each condition, the number of what it is led away from."""
        if self.negative is not None:
            return torch.full_like(numbers, self.negative)
        nulls = conditions.nulls(numbers)
        assert nulls is not None, "checked before any work"
        return nulls

    def __call__(
        self, conditional: Float[Tensor, "b c2 *hw"], null: Float[Tensor, "b c2 *hw"], *, channels: int
    ) -> Float[Tensor, "b c2 *hw"]:
        """The guided prediction; channels that are not guided, such as a variance, are the conditional ones.

        Args:
            channels: of an input, C: a prediction may have more.

        Source: facebookresearch/DiT `DiT.forward_with_cfg`.
        """
        moved = self.channels or channels
        eps, null_eps = conditional[:, :moved], null[:, :moved]
        guided = self._rescaled(null_eps + self.scale * (eps - null_eps), eps)
        return torch.cat([guided, conditional[:, moved:]], dim=1)

    def _rescaled(self, guided: Tensor, conditional: Tensor) -> Tensor:
        if isinstance(self.rescale, str):
            wanted, found = (_lengths(x, self.rescale) for x in (conditional, guided))
            return guided * (wanted / found.clamp(min=1e-12))
        if not self.rescale:
            return guided
        axes = tuple(range(1, guided.ndim))
        factor = conditional.std(axes, keepdim=True) / guided.std(axes, keepdim=True).clamp(min=1e-12)
        return guided * (self.rescale * factor + (1 - self.rescale))


def _lengths(x: Float[Tensor, "b c *hw"], kind: Length) -> Tensor:
    """Lengths of x, each where it is divided by: x's shape, or one that expands to it."""
    if kind == "norm-rows":
        return torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    lengths = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    if kind == "norm":
        return lengths
    # what is over at an odd edge makes smaller squares
    rows, cols = x.shape[-2:]
    squares = (
        F.pad(lengths.square(), (0, cols % 2, 0, rows % 2)).unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))
    )
    sums = squares.sum((-3, -1)).repeat_interleave(2, -2).repeat_interleave(2, -1)
    return sums[..., :rows, :cols].sqrt()
