"""A PixArt-Sigma pipeline of random parts, a few kilobytes each, given text as vectors; used here and in other processes."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, PixArtSigmaPipeline
from torch import Tensor, nn


def of(transformer: nn.Module) -> PixArtSigmaPipeline:
    """The pipeline around this transformer, which takes 4 channels and text of 24."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 8), "latent_channels": 4, "norm_num_groups": 4, "sample_size": 32}
    return PixArtSigmaPipeline(
        vae=AutoencoderKL(**blocks, **sizes),
        transformer=transformer,
        scheduler=DDIMScheduler(),
        tokenizer=None,
        text_encoder=None,
    )


def draw(pipeline: PixArtSigmaPipeline) -> Tensor:
    """An image that is not square, in two steps with guidance, always from the same noise and text."""
    generator, device = torch.Generator().manual_seed(7), pipeline._execution_device
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt_embeds=torch.randn(1, 5, 24, generator=generator),
        prompt_attention_mask=torch.ones(1, 5, device=device),
        negative_prompt=None,
        negative_prompt_embeds=torch.randn(1, 5, 24, generator=generator),
        negative_prompt_attention_mask=torch.ones(1, 5, device=device),
        num_inference_steps=2,
        height=16,
        width=24,
        use_resolution_binning=False,
        generator=generator,
        output_type="pt",
    ).images
