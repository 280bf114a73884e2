"""Tokens of one call of an attention: the image's grid, and the others before and after it."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Image tokens in raster order: frames, then rows, then columns."""

    rows: int
    cols: int
    frames: int = 1

    @property
    def num_tokens(self) -> int:
        return self.frames * self.rows * self.cols


@dataclass(frozen=True)
class TokenLayout:
    """Layout of one call: a grid of image tokens, and others (text, registers, history) before and after it.

    It is that of the keys. Queries have the same, or are the image alone. Kernels treat image tokens by their rule and keep
    the others global: they see all and are seen by all.
    """

    grid: Grid
    before: int = 0
    """Other tokens that stand before the image."""
    after: int = 0
    """Other tokens that stand after it."""
    key_mask: Bool[Tensor, "b l"] | None = field(default=None, compare=False)
    """False at tokens that no query sees, such as padding of a prompt; None where all are seen."""
    image_queries: bool = False
    """True if the queries are those of the image alone."""

    @property
    def num_others(self) -> int:
        return self.before + self.after

    @property
    def num_tokens(self) -> int:
        """Keys, L."""
        return self.grid.num_tokens + self.num_others

    @property
    def num_queries(self) -> int:
        return self.grid.num_tokens if self.image_queries else self.num_tokens

    @property
    def image_slice(self) -> slice:
        """The image among the keys."""
        return slice(self.before, self.before + self.grid.num_tokens)

    @property
    def of_queries(self) -> "TokenLayout":
        """The layout of the queries."""
        return TokenLayout(self.grid) if self.image_queries else self

    def split(self, x: Shaped[Tensor, "b heads l k"]) -> tuple[Tensor, Tensor]:
        """The image tokens of x, and all others in their order. For queries, of `of_queries`."""
        before, image, after = x.split((self.before, self.grid.num_tokens, self.after), dim=2)
        if self.before and self.after:
            return image, torch.cat([before, after], dim=2)
        return image, before if self.before else after

    def join(self, image: Shaped[Tensor, "b heads n k"], others: Shaped[Tensor, "b heads m k"]) -> Tensor:
        """Undo `split`."""
        if not self.num_others:
            return image
        return torch.cat([others[:, :, : self.before], image, others[:, :, self.before :]], dim=2)
