"""A model class that grafting does not know, and its spec."""

from diffusers import PixArtTransformer2DModel

from grafting.contract import Grid, ModuleCall
from grafting.hosts import BlockList, Input, SdpaHost, SdpaSpec
from grafting.hosts._host import randomise
from grafting.hosts._spec import Output


class ForeignTransformer(PixArtTransformer2DModel):
    """PixArt by another name."""


SPEC = SdpaSpec(
    name="foreign",
    model_class="foreignmodel:ForeignTransformer",
    blocks=(
        BlockList(
            path="transformer_blocks",
            attention="attn1",
            mixers=ModuleCall(must_be_none=("encoder_hidden_states", "attention_mask")),
        ),
    ),
    native_grid=Grid(8, 8),
    inputs={
        "encoder_hidden_states": ("batch", "text", "config.caption_channels"),
        "encoder_attention_mask": Input(shape=("batch", "text"), value=1),
    },
    output=Output(half=True),
    projections=("to_q", "to_k", "to_v", "to_out.0"),
)


def tiny():
    import torch

    torch.manual_seed(0)
    settings = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
    widths = {"in_channels": 4, "out_channels": 8, "cross_attention_dim": 32, "caption_channels": 24}
    return randomise(ForeignTransformer(sample_size=16, patch_size=2, **settings, **widths)).eval()


def host():
    return SdpaHost(SPEC)
