"""Host: Stable Diffusion 3 and 3.5, diffusers' `SD3Transformer2DModel`, described as data for the generic host.

Attention is joint: the image tokens stand before the text tokens. The first blocks of 3.5 medium have a second attention,
of the image tokens alone, which stays as it is.
"""

from typing import Any

import torch
from torch import nn

from ..contract import Grid, Kwargs, Site
from ._host import randomise
from ._sdpa import BlockList, LatentTokens, SdpaHost, SdpaSpec

_STREAMS = ("hidden_states", "encoder_hidden_states")

_SD3 = SdpaSpec(
    name="sd3",
    model_class="diffusers:SD3Transformer2DModel",
    blocks=(
        BlockList(path="transformer_blocks", attention="attn", arguments=_STREAMS, returns=_STREAMS[::-1]),
    ),
    image=LatentTokens(),
    text="encoder_hidden_states",
    text_first=False,
    native_grid=Grid(64, 64),  # 1024 x 1024 pixels
    native_num_text=333,  # 77 of CLIP and 256 of T5
    shift=3.0,
)


class Sd3Host(SdpaHost):
    """Blocks of two streams; the steps are flow times in 0..1000.

    The condition is a mapping of `encoder_hidden_states` [B, T, C] and `pooled_projections` [B, P].
    """

    def __init__(self, *, grid: Grid | None = None):
        super().__init__(_SD3, grid=grid)

    def blocks(self, model: nn.Module) -> tuple[Site, ...]:
        """All but the last, which returns no text."""
        return super().blocks(model)[:-1]

    def tiny(self) -> nn.Module:
        model = self.model_class(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            num_layers=4,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            caption_projection_dim=32,
            pooled_projection_dim=12,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )
        return randomise(model)

    def example(
        self, model: nn.Module, *, rows: int, cols: int, batch_size: int, frames: int = 1, num_text: int = 5
    ) -> Kwargs:
        config: Any = model.config
        side = config.patch_size
        return {
            "hidden_states": torch.randn(batch_size, config.in_channels, side * rows, side * cols),
            "encoder_hidden_states": torch.randn(batch_size, num_text, config.joint_attention_dim),
            "pooled_projections": torch.randn(batch_size, config.pooled_projection_dim),
            "timestep": 1000 * torch.rand(batch_size),
        }
