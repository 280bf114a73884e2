"""Further tiny pipelines, without autoencoders: they make latents, of an eighth of the asked height and width."""

from collections.abc import Callable
from typing import Any

import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler as Euler

from latents.textpipelines import DIM, clip, flux, language_model, t5, tokenizer, transformer

HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}


def pixart_alpha() -> Any:
    """Of 1,024 pixels, whose transformer is told the size."""
    sizes = {"sample_size": 128, "num_layers": 1, "cross_attention_dim": 48, "caption_channels": DIM}
    heads = {"attention_head_dim": 16, "num_attention_heads": 3}
    model = transformer("PixArtTransformer2DModel", in_channels=4, out_channels=8, **sizes, **heads)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_start=0.0001, beta_end=0.02, beta_schedule="linear"
    )
    return diffusers.PixArtAlphaPipeline(tokenizer(), t5(), None, model, scheduler)


def schnell() -> Any:
    pipe = flux()
    sizes = {"num_layers": 1, "num_single_layers": 1, "joint_attention_dim": DIM, "pooled_projection_dim": 12}
    pipe.transformer = transformer(
        "FluxTransformer2DModel", in_channels=16, axes_dims_rope=(4, 6, 6), **sizes, **HEADS
    )
    pipe.scheduler = Euler(shift=1.0)
    return pipe


def qwen() -> Any:
    model = transformer(
        "QwenImageTransformer2DModel",
        in_channels=16,
        out_channels=4,
        num_layers=1,
        joint_attention_dim=DIM,
        axes_dims_rope=(4, 6, 6),
        **HEADS,
    )
    line = {"base_shift": 0.5, "max_shift": 0.9, "base_image_seq_len": 256, "max_image_seq_len": 8192}
    scheduler = Euler(use_dynamic_shifting=True, shift_terminal=0.02, **line)
    pipe = diffusers.QwenImagePipeline(scheduler, None, language_model("Qwen3"), tokenizer(64), model)
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "a picture of {} on the mat", 3
    return pipe


def ltx() -> Any:
    sizes = {"num_layers": 1, "cross_attention_dim": 32, "caption_channels": DIM}
    model = transformer("LTXVideoTransformer3DModel", in_channels=8, out_channels=8, **sizes, **HEADS)
    line = {"base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024, "max_image_seq_len": 4096}
    scheduler = Euler(use_dynamic_shifting=True, shift_terminal=0.1, **line)
    return diffusers.LTXPipeline(scheduler, None, t5(), tokenizer(), model)


def hunyuan() -> Any:
    sizes = {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "rope_axes_dim": (4, 6, 6)}
    model = transformer(
        "HunyuanVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        text_embed_dim=DIM,
        pooled_projection_dim=12,
        **sizes,
        **HEADS,
    )
    encoders = [clip(), tokenizer()]
    return diffusers.HunyuanVideoPipeline(
        language_model("Llama"), tokenizer(64), model, None, Euler(shift=7.0), *encoders
    )


def auraflow() -> Any:
    sizes = {"sample_size": 16, "num_mmdit_layers": 1, "num_single_dit_layers": 1, "pos_embed_max_size": 256}
    model = transformer(
        "AuraFlowTransformer2DModel", joint_attention_dim=DIM, caption_projection_dim=32, **sizes, **HEADS
    )
    return diffusers.AuraFlowPipeline(tokenizer(), t5("UMT5"), None, model, Euler(shift=1.73))


def hidream() -> Any:
    sizes = {"num_layers": 1, "num_single_layers": 1, "max_resolution": (16, 16), "axes_dims_rope": (4, 6, 6)}
    model = transformer(
        "HiDreamImageTransformer2DModel",
        patch_size=2,
        in_channels=4,
        out_channels=4,
        caption_channels=[DIM, DIM],
        text_emb_dim=DIM,
        num_routed_experts=2,
        num_activated_experts=1,
        llama_layers=[0, 1],
        force_inference_output=True,
        **sizes,
        **HEADS,
    )
    encoders = [clip(projects=True), tokenizer(), clip(projects=True), tokenizer(), t5(), tokenizer()]
    llama = [language_model("Llama", heads=True), tokenizer()]
    pipe = diffusers.HiDreamImagePipeline(Euler(shift=3.0), None, *encoders, *llama, model)
    pipe.default_sample_size = 16
    return pipe


MORE: dict[str, Callable[[], Any]] = {
    "pixart-alpha": pixart_alpha, "schnell": schnell, "qwen": qwen, "ltx": ltx, "hunyuan": hunyuan,
    "auraflow": auraflow, "hidream": hidream,
}  # fmt: skip
