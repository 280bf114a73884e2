"""Gated short convolutions as kernels: Hyena-SE, -X and -Y on the host's own q, k and v, so on every host.

The mixers of `hyena.py` bring their own projections; here the host's stay, with their norms and rotary positions, and filters of each
channel stand between them: q' * inner(k' * v') with q', k', v' = short(q, k, v). On a host without norms and positions that is
the mixer with the host's projections. Text tokens stay global, as beside windows.

Source: arXiv:2506.05340 (Hyena-SE, -X, -Y).
"""

from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..contract import ANY_CALL, Kernel, KernelConfig, Site, TokenLayout, softmax_attention_flops
from ..functional.softmax import softmax_attention
from ._filters import GATE_SPREAD, FilterSettings, Geometry, TokenFilter, gated


class _GatedConvConfig(FilterSettings, KernelConfig):
    """Settings common to all three. `name` has no default here, so that this is not an operator itself."""

    honours = ANY_CALL

    def build(self, site: Site) -> "GatedConv":
        return GatedConv(
            site.dim,
            kernel_size=self.kernel_size,
            geometry=self.geometry,
            has_short_filter=self.has_short_filter,
            has_inner_filter=self.has_inner_filter,
            others_of_heads=site.num_heads if site.num_text or site.attention.order != ("image",) else 0,
        )

    def mixing_flops(self, site: Site) -> int:
        taps = self.num_taps
        of_filters = 2 * (3 * (taps if self.has_short_filter else 1) + (taps if self.has_inner_filter else 0))
        # two gates, and a multiply-accumulate a tap
        image = (2 + of_filters) * site.grid.num_tokens * site.dim
        num_pairs = site.num_text * (site.grid.num_tokens + site.num_tokens)
        return image + softmax_attention_flops(site, num_pairs)


class GatedConvSEConfig(_GatedConvConfig):
    """Hyena-SE as a kernel: filters on q, k and v and on the gated values."""

    has_short_filter: ClassVar[bool] = True
    has_inner_filter: ClassVar[bool] = True
    name: Literal["gated-conv-se"] = "gated-conv-se"


class GatedConvXConfig(_GatedConvConfig):
    """Hyena-X as a kernel: filters on q, k and v only."""

    has_short_filter: ClassVar[bool] = True
    has_inner_filter: ClassVar[bool] = False
    name: Literal["gated-conv-x"] = "gated-conv-x"


class GatedConvYConfig(_GatedConvConfig):
    """Hyena-Y as a kernel: a filter on the gated values only; q, k and v have a scale and a bias for each channel."""

    has_short_filter: ClassVar[bool] = False
    has_inner_filter: ClassVar[bool] = True
    name: Literal["gated-conv-y"] = "gated-conv-y"


class GatedConv(Kernel):
    """q' * inner(k' * v') over the image, with q', k', v' = short(q, k, v), channel by channel.

    Softmax attention returns averages of v, and the product of three projections is another thing of another size. So it starts
    as the mixers do: v blurred over its neighbours, times gates that are 1 +- 0.1 or so where q and k have unit variance.

    Text and other tokens attend to everything by softmax. The image attends to them by softmax too, and adds that to its own part
    with a weight for each head, which starts at a half.

    Args:
        dim: channels of q, k and v over all heads, D.
        kernel_size: filter taps, along each axis of the geometry.
        geometry: where the taps lie.
        has_short_filter: filter q, k and v (SE, X); else they have a scale and a bias for each channel.
        has_inner_filter: filter k * v (SE, Y).
        others_of_heads: heads, where other tokens than the image's take part in the attention; 0 where none do.
    """

    def __init__(
        self,
        dim: int,
        *,
        kernel_size: int,
        geometry: Geometry,
        has_short_filter: bool,
        has_inner_filter: bool,
        others_of_heads: int,
    ):
        super().__init__()
        self.short_filter = TokenFilter(3 * dim, kernel_size if has_short_filter else 1, geometry)
        self.inner_filter = TokenFilter(dim, kernel_size, geometry) if has_inner_filter else None
        self.others_weight = nn.Parameter(torch.full((others_of_heads,), 0.5)) if others_of_heads else None
        values = slice(2 * dim, 3 * dim)
        self.short_filter.set_identity()
        with torch.no_grad():
            self.short_filter.weight[: 2 * dim] *= GATE_SPREAD
            self.short_filter.bias[: 2 * dim] = 1
        if self.inner_filter is not None:
            self.inner_filter.set_identity()
        if has_short_filter:
            self.short_filter.blur(values)
        elif self.inner_filter is not None:
            self.inner_filter.blur(slice(dim))

    def forward(
        self,
        q: Float[Tensor, "b heads m k"],
        k: Float[Tensor, "b heads l k"],
        v: Float[Tensor, "b heads l v"],
        layout: TokenLayout,
        *,
        scale: float | None = None,
    ) -> Float[Tensor, "b heads m v"]:
        if layout.key_mask is not None:
            # what no query sees is nothing to its neighbours either
            is_key = layout.key_mask[:, None, :, None]
            seen_k, seen_v = k * is_key, v * is_key
        else:
            seen_k, seen_v = k, v
        image_q, others_q = layout.of_queries.split(q)
        image_k, image_v = layout.split(seen_k)[0], layout.split(seen_v)[0]
        mixed = self._convolved(image_q, image_k, image_v, TokenLayout(layout.grid))
        if not layout.num_others:
            return mixed
        if self.others_weight is None:
            raise ValueError(f"built for image tokens alone; the layout has {layout.num_others} others")
        of_others = _of_others(image_q, k, v, layout, scale)
        mixed = mixed + self.others_weight.to(v.dtype)[:, None, None] * of_others
        if layout.image_queries:
            return mixed
        return layout.join(mixed, softmax_attention(others_q, k, v, key_mask=layout.key_mask, scale=scale))

    def _convolved(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        """The gated convolution of image tokens [B, H, N, K]."""
        heads = q.shape[1]
        qkv = torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], dim=-1)
        mixed = gated(qkv, self.short_filter, self.inner_filter, layout)
        return mixed.unflatten(2, (heads, -1)).transpose(1, 2)


def _of_others(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, scale: float | None) -> Tensor:
    """Softmax attention of the image's queries to the other tokens; 0 where all of these are masked."""
    (_, k), (_, v) = layout.split(k), layout.split(v)
    if layout.key_mask is None:
        return softmax_attention(q, k, v, scale=scale)
    is_key = layout.split(layout.key_mask[:, None, :, None])[1][:, 0, :, 0]  # [B, T]
    has_any = is_key.any(1, keepdim=True)
    return has_any[:, None, :, None] * softmax_attention(q, k, v, key_mask=is_key | ~has_any, scale=scale)
