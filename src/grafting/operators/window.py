"""Window attention as kernels: `window-1d` along the raster order, `window-2d` in a square of rows and columns, `window-3d` in
a square of several frames.

Tokens beside the image stay global. The arithmetic is in `functional/window.py`.
"""

from functools import partial
from typing import Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from ..contract import ANY_CALL, Kernel, KernelConfig, Site, TokenLayout, softmax_attention_flops
from ..functional.window import Border, window_1d, window_2d, window_3d


class Window1dConfig(KernelConfig):
    """Softmax attention to the nearest image tokens in raster order, clipped at the two ends; not causal.

    With `window: 4` and `projections: random` this is the SWA of arXiv:2506.05340.
    """

    honours = ANY_CALL
    name: Literal["window-1d"] = "window-1d"
    window: int = Field(default=4, gt=0, le=65536)
    """Image tokens seen on each side, so 2 * window + 1 in all."""

    def faults(self, site: Site) -> list[str]:
        seen, num_image = 2 * self.window + 1, site.grid.num_tokens
        if seen <= num_image:
            return []
        return [
            f"window {self.window} spans 2 * {self.window} + 1 = {seen} > {num_image} image tokens; "
            f"{_at_most('window', (num_image - 1) // 2)}"
        ]

    def build(self, site: Site) -> "Window":
        return Window(partial(window_1d, window=self.window))

    def mixing_flops(self, site: Site) -> int:
        return _local_flops(site, 2 * self.window + 1)


class Window2dConfig(KernelConfig):
    """Softmax attention to the image tokens in a square around each, within its frame; not causal."""

    honours = ANY_CALL
    name: Literal["window-2d"] = "window-2d"
    radius: int = Field(default=1, gt=0, le=4096)
    """Rows and columns seen on each side, so a square of side 2 * radius + 1."""
    border: Border = "clipped"
    """At the image's edge: `clipped` cuts the square, `shifted` moves it inside (NATTEN's rule)."""

    def faults(self, site: Site) -> list[str]:
        return _too_wide("radius", self.radius, {"rows": site.grid.rows, "columns": site.grid.cols})

    def build(self, site: Site) -> "Window":
        return Window(partial(window_2d, radius=self.radius, border=self.border))

    def mixing_flops(self, site: Site) -> int:
        return _local_flops(site, (2 * self.radius + 1) ** 2)


class Window3dConfig(KernelConfig):
    """Softmax attention to the image tokens in a square around each, in its frame of a video and in those near it; not causal."""

    name: Literal["window-3d"] = "window-3d"
    honours = ANY_CALL
    radius: int = Field(default=1, gt=0)
    """Rows and columns seen on each side, so a square of side 2 * radius + 1."""
    frames: int = Field(default=1, gt=0)
    """Frames seen before and after a token's own."""
    border: Border = "clipped"
    """At the edges, first and last frame among them: `clipped` cuts the window, `shifted` moves it inside (NATTEN's rule)."""

    def faults(self, site: Site) -> list[str]:
        if site.grid.frames == 1:
            return ["there is one frame: use window-2d"]
        sides = {"rows": site.grid.rows, "columns": site.grid.cols}
        return _too_wide("radius", self.radius, sides) + _too_wide(
            "frames", self.frames, {"frames": site.grid.frames}
        )

    def build(self, site: Site) -> "Window":
        return Window(partial(window_3d, radius=self.radius, frames=self.frames, border=self.border))

    def mixing_flops(self, site: Site) -> int:
        return _local_flops(site, (2 * self.frames + 1) * (2 * self.radius + 1) ** 2)


class Window(Kernel):
    """Softmax attention of each image token to the image tokens near it.

    Args:
        attend: the window's function, with how far it reaches and what happens at the edges.
    """

    def __init__(self, attend: "partial[Tensor]"):
        super().__init__()
        self.attend = attend

    def forward(
        self,
        q: Float[Tensor, "b heads m k"],
        k: Float[Tensor, "b heads l k"],
        v: Float[Tensor, "b heads l v"],
        layout: TokenLayout,
        *,
        scale: float | None = None,
    ) -> Float[Tensor, "b heads m v"]:
        return self.attend(q, k, v, layout, scale=scale)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.attend.keywords.items())


def _too_wide(setting: str, reach: int, sizes: dict[str, int]) -> list[str]:
    """A fault for each axis that is shorter than a window that reaches so far."""
    side, largest = 2 * reach + 1, (min(sizes.values()) - 1) // 2
    return [
        f"{setting} {reach} spans 2 * {reach} + 1 = {side} > {size} {axis}; {_at_most(setting, largest)}"
        for axis, size in sizes.items()
        if side > size
    ]


def _at_most(setting: str, largest: int) -> str:
    if largest < 1:
        return "the grid is too small for a window"
    return f"use {setting} {largest} or less"


def _local_flops(site: Site, num_seen: int) -> int:
    """Scores and weighted sums: `num_seen` image tokens and all text for an image token, everything for text."""
    num_image, num_text = site.grid.num_tokens, site.num_text
    num_pairs = num_image * (num_seen + num_text) + num_text * site.num_tokens
    return softmax_attention_flops(site, num_pairs)
