"""Tiny pipelines around the transformers of the zoo, given prompts as vectors: no text encoder, no weights of an autoencoder."""

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

from hosts.zoo import TEXT, Specimen, specimens

VIDEO_VAE: dict[str, Any] = {
    "base_dim": 4,
    "z_dim": 4,
    "dim_mult": [1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [True],
    "latents_mean": [0.0] * 4,
    "latents_std": [1.0] * 4,
}

Made = tuple[diffusers.DiffusionPipeline, dict[str, Any]]
"""A pipeline, and what it is called with."""

SIZE = {"height": 16, "width": 24}
"""Of images whose latents are half as large: 4 x 6 tokens of 2 x 2."""


def specimen(name: str) -> Specimen:
    return next(specimen for specimen in specimens() if specimen.name == name)


def image_vae() -> AutoencoderKL:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(
        **blocks, block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, sample_size=32
    )


def embeds(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def prompt(
    *, mask: torch.dtype | None = None, with_pooled: bool = False, with_negative: bool = True
) -> dict[str, Any]:
    """Vectors of a prompt, with a mask of this dtype, and of what it is to avoid."""
    call = {"prompt_embeds": embeds(1, TEXT, 24)}
    if with_pooled:
        call["pooled_prompt_embeds"] = embeds(1, 12)
    if mask is not None:
        call["prompt_attention_mask"] = torch.ones(1, TEXT, dtype=mask)
    return call | ({f"negative_{name}": tensor for name, tensor in call.items()} if with_negative else {})


def made(pipeline: str, transformer: str, call: dict[str, Any], **parts: Any) -> Made:
    """A pipeline of this class, with None for the parts that turn words into vectors."""
    cls = getattr(diffusers, pipeline)
    needed = dict.fromkeys(cls._get_signature_keys(cls)[0])
    given = {"vae": image_vae(), "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0), **parts}
    pipe = cls(**{**needed, **given, "transformer": specimen(transformer).model()})
    pipe.set_progress_bar_config(disable=True)
    return pipe, call


def flux() -> Made:
    call = {**prompt(with_pooled=True, with_negative=False), **SIZE}
    return made("FluxPipeline", "FluxTransformer2DModel", call)


def sd3() -> Made:
    call = {**prompt(with_pooled=True), **SIZE}
    return made("StableDiffusion3Pipeline", "SD3Transformer2DModel", call)


def pixart() -> Made:
    call = {**prompt(mask=torch.float), "negative_prompt": None, "use_resolution_binning": False, **SIZE}
    return made("PixArtSigmaPipeline", "PixArtTransformer2DModel", call, scheduler=diffusers.DDIMScheduler())


def wan() -> Made:
    vae = diffusers.AutoencoderKLWan(**VIDEO_VAE)
    call = {**prompt(), "num_frames": 5, "height": 32, "width": 48}
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return made("WanPipeline", "WanTransformer3DModel", call, vae=vae, scheduler=scheduler)


def qwen_image() -> Made:
    vae = diffusers.AutoencoderKLQwenImage(**VIDEO_VAE)
    call = {
        **prompt(with_negative=False),
        "prompt_embeds_mask": torch.ones(1, TEXT, dtype=torch.long),
        **SIZE,
    }
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
    return made("QwenImagePipeline", "QwenImageTransformer2DModel", call, vae=vae, scheduler=scheduler)


def chroma() -> Made:
    call = {**prompt(mask=torch.float), **SIZE}
    return made("ChromaPipeline", "ChromaTransformer2DModel", call)


def aura_flow() -> Made:
    call = {**prompt(mask=torch.float), **SIZE}
    return made("AuraFlowPipeline", "AuraFlowTransformer2DModel", call)


def lumina2() -> Made:
    call = {**prompt(mask=torch.bool), "height": 32, "width": 48}
    return made("Lumina2Pipeline", "Lumina2Transformer2DModel", call)


def z_image() -> Made:
    call = {
        "prompt_embeds": [embeds(TEXT, 24)],
        "negative_prompt_embeds": [embeds(TEXT, 24)],
        **SIZE,
    }
    return made("ZImagePipeline", "ZImageTransformer2DModel", call)


def flux2() -> Made:
    call = {**prompt(with_negative=False), **SIZE}
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    return made("Flux2Pipeline", "Flux2Transformer2DModel", call, vae=vae)


def ltx() -> Made:
    call = {**prompt(mask=torch.float), "height": 128, "width": 192, "num_frames": 9}
    return made("LTXPipeline", "LTXVideoTransformer3DModel", call, vae=None)


def cog_video_x() -> Made:
    call = {**prompt(), "num_frames": 5, "height": 64, "width": 96}
    scheduler = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    return made("CogVideoXPipeline", "CogVideoXTransformer3DModel", call, vae=None, scheduler=scheduler)


def hunyuan_video() -> Made:
    call = {
        **prompt(mask=torch.long, with_pooled=True, with_negative=False),
        "num_frames": 5,
        "height": 64,
        "width": 96,
    }
    return made("HunyuanVideoPipeline", "HunyuanVideoTransformer3DModel", call, vae=None)


def cog_view3() -> Made:
    call = {**prompt(), **SIZE}
    scheduler = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    return made("CogView3PlusPipeline", "CogView3PlusTransformer2DModel", call, scheduler=scheduler)


def cog_view4() -> Made:
    call = {**prompt(), "height": 32, "width": 48}
    scheduler = FlowMatchEulerDiscreteScheduler(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True)
    return made("CogView4Pipeline", "CogView4Transformer2DModel", call, scheduler=scheduler)


def latte() -> Made:
    call = {
        **prompt(),
        "negative_prompt": None,
        "mask_feature": False,
        "video_length": 3,
        "height": 16,
        "width": 16,
    }
    return made("LattePipeline", "LatteTransformer3DModel", call, scheduler=diffusers.DDIMScheduler())


def sky_reels() -> Made:
    like, call = wan()
    parts = {"vae": like.vae, "scheduler": like.scheduler}
    return made("SkyReelsV2Pipeline", "SkyReelsV2Transformer3DModel", call, **parts)


def mochi() -> Made:
    call = {**prompt(mask=torch.bool), "num_frames": 7, "height": 64, "width": 96}
    return made("MochiPipeline", "MochiTransformer3DModel", call, vae=None)


PIPELINES: dict[str, Callable[[], Made]] = {
    "FluxTransformer2DModel": flux,
    "SD3Transformer2DModel": sd3,
    "PixArtTransformer2DModel": pixart,
    "WanTransformer3DModel": wan,
    "QwenImageTransformer2DModel": qwen_image,
    "ChromaTransformer2DModel": chroma,
    "AuraFlowTransformer2DModel": aura_flow,
    "Lumina2Transformer2DModel": lumina2,
    "ZImageTransformer2DModel": z_image,
    "Flux2Transformer2DModel": flux2,
    "LTXVideoTransformer3DModel": ltx,
    "CogVideoXTransformer3DModel": cog_video_x,
    "HunyuanVideoTransformer3DModel": hunyuan_video,
    "CogView3PlusTransformer2DModel": cog_view3,
    "CogView4Transformer2DModel": cog_view4,
    "LatteTransformer3DModel": latte,
    "SkyReelsV2Transformer3DModel": sky_reels,
    "MochiTransformer3DModel": mochi,
}
