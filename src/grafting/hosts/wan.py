"""Host: Wan 2.1 and 2.2, diffusers' `WanTransformer3DModel`, described as data for the generic host.

Tokens are those of a video, frame after frame. The text is seen by a second attention, which stays as it is.
"""

from typing import Any

import torch
from torch import nn

from ..contract import Grid, Kwargs
from ._host import randomise
from ._sdpa import BlockList, LatentTokens, SdpaHost, SdpaSpec

_TOKENS = ("hidden_states",)

_WAN = SdpaSpec(
    name="wan",
    model_class="diffusers:WanTransformer3DModel",
    blocks=(BlockList(path="blocks", attention="attn1", arguments=_TOKENS, returns=_TOKENS),),
    image=LatentTokens(),
    native_grid=Grid(rows=30, cols=52, frames=21),  # 81 frames of 480 x 832 pixels
    shift=3.0,
)


class WanHost(SdpaHost):
    """Self-attention over space and time; the steps are flow times in 0..1000.

    The condition is a mapping of `encoder_hidden_states` [B, T, C] and, for models that start from an image,
    `encoder_hidden_states_image`.
    """

    def __init__(self, *, grid: Grid | None = None):
        super().__init__(_WAN, grid=grid)

    def tiny(self) -> nn.Module:
        model = self.model_class(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            text_dim=24,
            freq_dim=16,
            ffn_dim=64,
            num_layers=3,
            rope_max_seq_len=16,
        )
        return randomise(model)

    def example(
        self, model: nn.Module, *, rows: int, cols: int, batch_size: int, frames: int = 1, num_text: int = 5
    ) -> Kwargs:
        config: Any = model.config
        _, height, width = config.patch_size
        return {
            "hidden_states": torch.randn(batch_size, config.in_channels, frames, height * rows, width * cols),
            "timestep": 1000 * torch.rand(batch_size),
            "encoder_hidden_states": torch.randn(batch_size, num_text, config.text_dim),
        }
