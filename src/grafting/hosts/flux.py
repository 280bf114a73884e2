"""Host: Flux, diffusers' `FluxTransformer2DModel`, described as data for the generic host.

Attention is joint: the text tokens stand before the image tokens, in double blocks and in single blocks alike.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..contract import Grid, Kwargs
from ._host import randomise
from ._sdpa import BlockList, PackedTokens, SdpaHost, SdpaSpec

_STREAMS = ("hidden_states", "encoder_hidden_states")

_FLUX = SdpaSpec(
    name="flux",
    model_class="diffusers:FluxTransformer2DModel",
    blocks=(
        BlockList(path="transformer_blocks", attention="attn", arguments=_STREAMS, returns=_STREAMS[::-1]),
        BlockList(
            path="single_transformer_blocks", attention="attn", arguments=_STREAMS, returns=_STREAMS[::-1]
        ),
    ),
    image=PackedTokens(positions="img_ids"),
    text="encoder_hidden_states",
    native_grid=Grid(64, 64),  # 1024 x 1024 pixels
    native_num_text=512,
    time_scale=1.0,
    shift=3.16,  # exp(1.15): what its pipeline's dynamic shift is at 1024 x 1024 pixels
    distilled=True,
)


class FluxHost(SdpaHost):
    """Double blocks, then single blocks. The steps are flow times in 0..1.

    The condition is a mapping of `encoder_hidden_states` [B, T, C], `pooled_projections` [B, P] and, for models
    distilled with guidance, `guidance` [B].
    """

    def __init__(self, *, grid: Grid | None = None):
        super().__init__(_FLUX, grid=grid)

    def predict(self, model: nn.Module, x_t: Tensor, t: Tensor, condition: Mapping[str, Any]) -> Tensor:
        rows, cols = x_t.shape[2] // 2, x_t.shape[3] // 2
        text = condition["encoder_hidden_states"]
        packed = model(
            _pack(x_t),
            timestep=t,
            img_ids=_positions(rows, cols).to(x_t),
            txt_ids=torch.zeros(text.shape[1], 3).to(x_t),
            return_dict=False,
            **condition,
        )[0]
        return _unpack(packed, rows, cols)

    def shape(self, model: nn.Module) -> tuple[int, ...]:
        grid, config = self.grid or self.spec.native_grid, cast(Any, model.config)
        return (config.in_channels // 4, 2 * grid.rows, 2 * grid.cols)

    def tiny(self) -> nn.Module:
        model = self.model_class(
            in_channels=16,
            num_layers=2,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=12,
            axes_dims_rope=(4, 6, 6),
        )
        return randomise(model)

    def example(
        self, model: nn.Module, *, rows: int, cols: int, batch_size: int, frames: int = 1, num_text: int = 5
    ) -> Kwargs:
        config: Any = model.config
        guidance = {"guidance": torch.ones(batch_size)} if config.guidance_embeds else {}
        return {
            "hidden_states": torch.randn(batch_size, rows * cols, config.in_channels),
            "encoder_hidden_states": torch.randn(batch_size, num_text, config.joint_attention_dim),
            "pooled_projections": torch.randn(batch_size, config.pooled_projection_dim),
            "timestep": torch.rand(batch_size),
            "img_ids": _positions(rows, cols),
            "txt_ids": torch.zeros(num_text, 3),
            **guidance,
        }


def _pack(x: Tensor) -> Tensor:
    """Patches of 2 x 2 as tokens: [B, C, H, W] -> [B, L, 4 C]."""
    x = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # [B, C, rows, 2, cols, 2]
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _unpack(tokens: Tensor, rows: int, cols: int) -> Tensor:
    """Undo `_pack`: [B, L, 4 C] -> [B, C, H, W]."""
    x = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (rows, cols))  # [B, rows, cols, C, 2, 2]
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def _positions(rows: int, cols: int) -> Tensor:
    """A place for every token of a grid, as the pipeline numbers them: [L, 3] of (0, row, column)."""
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(cols))
    return torch.cat([torch.zeros(len(places), 1), places], dim=1)
