"""A tiny random instance of each transformer class of diffusers, and the inputs of a forward pass.

Image tokens form a grid of ROWS x COLS, in FRAMES frames where the class makes videos. Models have two blocks of a kind, so
that they can be merged; random weights, so that no gate or head is zero.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from grafting.hosts._host import randomise

ROWS, COLS, FRAMES, TEXT = 4, 6, 2, 5

Inputs = dict[str, Any]

# parameters that diffusers leaves as it finds the memory: of Lumina Next and Nucleus
_UNSET = ("pad_token", "gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Specimen:
    """A class by its name in diffusers, settings of a tiny instance, and inputs of a batch of two."""

    name: str
    config: dict[str, Any]
    inputs: Callable[[], Inputs]
    grid: tuple[int, ...] = (1, ROWS, COLS)
    """Frames, rows and columns of the image tokens; one length for sound."""
    prepare: Callable[[nn.Module], None] = field(default=lambda model: None)

    def model(self) -> nn.Module:
        """A random instance, the same at each call."""
        torch.manual_seed(0)
        model = getattr(importlib.import_module("diffusers.models.transformers"), self.name, None)
        model = model or getattr(importlib.import_module("diffusers"), self.name)
        instance = model(**self.config)
        for name, parameter in instance.named_parameters():
            if name.endswith(_UNSET):
                nn.init.zeros_(parameter)
        instance = randomise(instance, std=0.1).eval()
        self.prepare(instance)
        return instance

    def example(self) -> Inputs:
        torch.manual_seed(1)
        return self.inputs()


def specimens() -> Iterator[Specimen]:
    yield from _IMAGES
    yield from _PACKED
    yield from _VIDEOS
    yield from _SOUND


def latent(channels: int = 4, patch: int = 2, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, ROWS * patch, COLS * patch)


def video(channels: int = 4, patch: int = 2, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, FRAMES, ROWS * patch, COLS * patch)


def packed(channels: int = 16, frames: int = 1) -> Tensor:
    return torch.randn(2, frames * ROWS * COLS, channels)


def text(dim: int = 24, length: int = TEXT, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, dim)


def places(columns: int = 3, row: int = 1, frames: int = 1) -> Tensor:
    """[L, columns]: the frame, the row and the column of each token, from column `row` - 1 on."""
    grid = torch.cartesian_prod(torch.arange(frames), torch.arange(ROWS), torch.arange(COLS)).float()
    ids = torch.zeros(len(grid), columns)
    ids[:, row - 1 : row + 2] = grid
    return ids


def times(scale: float = 1000) -> Tensor:
    return scale * torch.tensor([0.7, 0.4])


def mask(length: int = TEXT, dtype: torch.dtype = torch.bool) -> Tensor:
    return torch.ones(2, length, dtype=dtype)


def asked(x: Tensor, timestep: Tensor, **more: Any) -> Inputs:
    """The inputs of most classes: a noised x with its step, and a text."""
    return {"hidden_states": x, "encoder_hidden_states": text(), "timestep": timestep, **more}


def sized() -> Inputs:
    """The inputs of classes that are told the sizes of the original and of the target, and what was cropped."""
    sizes, crop = torch.full((2, 2), 64.0), torch.zeros(2, 2)
    return asked(latent(), times(), original_size=sizes, target_size=sizes, crop_coords=crop)


_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
_CHANNELS = {"in_channels": 4, "out_channels": 4}
_SIZED = (
    _HEADS | _CHANNELS | {"num_layers": 2, "text_embed_dim": 24, "time_embed_dim": 16, "condition_dim": 8}
)
_SIZED |= {"pos_embed_max_size": 8, "sample_size": 8}
_ROPE = {"axes_dims_rope": (4, 6, 6)}

_IMAGES = (
    Specimen(
        "DiTTransformer2DModel",
        {**_HEADS, "num_layers": 3, "sample_size": 12, "num_embeds_ada_norm": 10, "norm_num_groups": 2},
        lambda: {
            "hidden_states": torch.randn(2, 4, 12, 12),
            "timestep": times().long(),
            "class_labels": torch.tensor([1, 2]),
        },
        grid=(1, 6, 6),
    ),
    Specimen(
        "PixArtTransformer2DModel",
        {
            **_HEADS,
            "sample_size": 16,
            "num_layers": 2,
            "cross_attention_dim": 32,
            "caption_channels": 24,
            "norm_num_groups": 2,
        },
        lambda: asked(latent(), times().long(), encoder_attention_mask=mask(dtype=torch.float)),
    ),
    Specimen(
        "SD3Transformer2DModel",
        {
            **_HEADS,
            "sample_size": 16,
            **_CHANNELS,
            "num_layers": 3,
            "joint_attention_dim": 24,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 12,
            "pos_embed_max_size": 16,
        },
        lambda: {
            "hidden_states": latent(),
            "timestep": times(),
            "encoder_hidden_states": text(),
            "pooled_projections": torch.randn(2, 12),
        },
    ),
    Specimen(
        "AuraFlowTransformer2DModel",
        {
            **_HEADS,
            "sample_size": 16,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            "joint_attention_dim": 24,
            "caption_projection_dim": 32,
            "pos_embed_max_size": 256,
        },
        lambda: asked(latent(), times(1)),
    ),
    Specimen(
        "HunyuanDiT2DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 8,
            "hidden_size": 32,
            "num_layers": 4,
            "cross_attention_dim": 24,
            "cross_attention_dim_t5": 16,
            "pooled_projection_dim": 12,
            "text_len": 5,
            "text_len_t5": 3,
            "use_style_cond_and_image_meta_size": False,
        },
        lambda: {
            "hidden_states": latent(),
            "timestep": times(),
            "encoder_hidden_states": text(24, 5),
            "text_embedding_mask": mask(5),
            "encoder_hidden_states_t5": text(16, 3),
            "text_embedding_mask_t5": mask(3),
            "image_rotary_emb": (torch.randn(ROWS * COLS, 16), torch.randn(ROWS * COLS, 16)),
        },
    ),
    Specimen(
        "LuminaNextDiT2DModel",
        {
            "sample_size": 16,
            "hidden_size": 32,
            "num_layers": 2,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "cross_attention_dim": 24,
        },
        lambda: {
            "hidden_states": latent(),
            "timestep": times(1),
            "encoder_hidden_states": text(),
            "encoder_mask": mask(),
            "image_rotary_emb": torch.polar(torch.ones(ROWS, COLS, 8), torch.randn(ROWS, COLS, 8)),
            "cross_attention_kwargs": {},
        },
    ),
    Specimen(
        "SanaTransformer2DModel",
        {
            **_HEADS,
            **_CHANNELS,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 32,
            "caption_channels": 24,
            "sample_size": 8,
        },
        lambda: asked(latent(patch=1), times(), encoder_attention_mask=mask(dtype=torch.float)),
    ),
    Specimen(
        "Transformer2DModel",
        {
            **_HEADS,
            **_CHANNELS,
            "patch_size": 2,
            "sample_size": 16,
            "num_layers": 2,
            "cross_attention_dim": 24,
            "norm_type": "ada_norm_single",
            "num_embeds_ada_norm": 10,
            "norm_num_groups": 2,
            "norm_elementwise_affine": False,
            "use_additional_conditions": False,
        },
        lambda: asked(latent(), times().long(), added_cond_kwargs={"resolution": None, "aspect_ratio": None}),
    ),
    Specimen(
        "DreamLiteTransformer2DModel",
        {**_HEADS, "in_channels": 32, "num_layers": 2, "cross_attention_dim": 24, "norm_num_groups": 2},
        lambda: {"hidden_states": latent(32, 1), "encoder_hidden_states": text()},
    ),
    Specimen(
        "CogView3PlusTransformer2DModel",
        {
            **_SIZED,
        },
        sized,
    ),
    Specimen(
        "CogView4Transformer2DModel",
        {
            **_SIZED,
            "rope_axes_dim": (16, 16),
        },
        sized,
    ),
    Specimen(
        "GlmImageTransformer2DModel",
        {
            **_HEADS,
            **_CHANNELS,
            "num_layers": 2,
            "text_embed_dim": 24,
            "time_embed_dim": 16,
            "condition_dim": 8,
            "prior_vq_quantizer_codebook_size": 10,
        },
        lambda: {
            "hidden_states": latent(),
            "encoder_hidden_states": text(),
            "prior_token_id": torch.randint(0, 10, (2, ROWS * COLS)),
            "prior_token_drop": torch.zeros(2, dtype=torch.bool),
            "timestep": times(),
            "target_size": torch.full((2, 2), 64.0),
            "crop_coords": torch.zeros(2, 2),
        },
    ),
    Specimen(
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_layers": 2,
            "ffn_hidden_size": 48,
            **_CHANNELS,
            "text_in_dim": 24,
            "rope_axes_dim": (4, 6, 6),
        },
        lambda: {
            "hidden_states": latent(patch=1),
            "timestep": times(),
            "text_bth": text(),
            "text_lens": torch.tensor([TEXT, TEXT]),
        },
    ),
    Specimen(
        "HiDreamImageTransformer2DModel",
        {
            **_HEADS,
            "patch_size": 2,
            **_CHANNELS,
            "num_layers": 2,
            "num_single_layers": 2,
            "caption_channels": [24, 20],
            "text_emb_dim": 12,
            "num_routed_experts": 2,
            "num_activated_experts": 1,
            "axes_dims_rope": (4, 6, 6),
            "max_resolution": (16, 16),
            "llama_layers": [0, 1, 1, 1],
            "force_inference_output": True,
        },
        lambda: {
            "hidden_states": latent(),
            "timesteps": times(),
            "encoder_hidden_states_t5": text(24),
            "encoder_hidden_states_llama3": torch.randn(2, 2, 5, 20),
            "pooled_embeds": torch.randn(2, 12),
        },
    ),
    Specimen(
        "HunyuanImageTransformer2DModel",
        {
            **_HEADS,
            **_CHANNELS,
            "num_layers": 2,
            "num_single_layers": 2,
            "num_refiner_layers": 1,
            "text_embed_dim": 24,
            "rope_axes_dim": (8, 8),
        },
        lambda: asked(latent(patch=1), times(), encoder_attention_mask=mask(dtype=torch.long)),
    ),
    Specimen(
        "Lumina2Transformer2DModel",
        {
            "sample_size": 16,
            "in_channels": 4,
            "hidden_size": 32,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "axes_dim_rope": (4, 6, 6),
            "axes_lens": (64, 32, 32),
            "cap_feat_dim": 24,
        },
        lambda: asked(latent(), times(1), encoder_attention_mask=mask()),
    ),
    Specimen(
        "OmniGenTransformer2DModel",
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "num_layers": 2,
            "pad_token_id": 0,
            "vocab_size": 32,
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 64,
            "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
            "pos_embed_max_size": 16,
            "time_step_dim": 16,
        },
        lambda: {
            "hidden_states": latent(),
            "timestep": times(1),
            "input_ids": torch.randint(1, 30, (2, TEXT)),
            "input_img_latents": [],
            "input_image_sizes": {},
            "attention_mask": torch.ones(
                2, 1, TEXT + 1 + ROWS * COLS, TEXT + 1 + ROWS * COLS, dtype=torch.bool
            ),
            "position_ids": torch.arange(TEXT + 1 + ROWS * COLS).expand(2, -1),
        },
    ),
    Specimen(
        "PRXTransformer2DModel",
        {
            "in_channels": 4,
            "context_in_dim": 24,
            "hidden_size": 32,
            "num_heads": 2,
            "depth": 2,
            "axes_dim": [8, 8],
        },
        lambda: asked(latent(), times(1)),
    ),
    Specimen(
        "BriaFibo2Transformer2DModel",
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 3,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "cap_feat_dim": 24,
            "injection_layer_ids": (2,),
            "perceiver_num_layers": 1,
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 2,
            "gist_min_text_len": 4,
            "gist_max_text_len": 8,
            "axes_dims": (4, 6, 6),
            "axes_lens": (64, 32, 32),
        },
        lambda: {
            "hidden_states": latent(),
            "timestep": times(1),
            "encoder_hidden_states": torch.randn(2, 2, TEXT, 24),
            "encoder_attention_mask": mask(),
        },
    ),
    Specimen(
        "ZImageTransformer2DModel",
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 24,
            "axes_dims": [4, 6, 6],
            "axes_lens": [128, 32, 32],
        },
        lambda: {
            "x": [torch.randn(4, 1, 2 * ROWS, 2 * COLS) for _ in range(2)],
            "t": times(1),
            "cap_feats": [torch.randn(TEXT, 24) for _ in range(2)],
        },
    ),
)

_PACKED = (
    Specimen(
        "FluxTransformer2DModel",
        {
            **_HEADS,
            **_ROPE,
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "joint_attention_dim": 24,
            "pooled_projection_dim": 12,
        },
        lambda: {
            "hidden_states": packed(),
            "encoder_hidden_states": text(),
            "pooled_projections": torch.randn(2, 12),
            "timestep": times(1),
            "img_ids": places(),
            "txt_ids": torch.zeros(TEXT, 3),
        },
    ),
    Specimen(
        "Flux2Transformer2DModel",
        {
            **_HEADS,
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "joint_attention_dim": 24,
            "timestep_guidance_channels": 16,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        lambda: asked(
            packed(),
            times(1),
            img_ids=places(4).expand(2, -1, -1),
            txt_ids=torch.zeros(2, TEXT, 4),
            guidance=torch.full((2,), 4.0),
        ),
    ),
    Specimen(
        "Flux3Transformer2DModel",
        {
            **_HEADS,
            "in_channels": 16,
            "cond_in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "joint_attention_dim": 24,
            "timestep_channels": 16,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        lambda: asked(packed(), times(1), img_ids=places(4), txt_ids=torch.zeros(TEXT, 4)),
    ),
    Specimen(
        "BriaTransformer2DModel",
        {
            **_HEADS,
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "joint_attention_dim": 24,
            "axes_dims_rope": [4, 6, 6],
        },
        lambda: asked(packed(), times(1), img_ids=places(), txt_ids=torch.zeros(TEXT, 3)),
    ),
    Specimen(
        "BriaFiboTransformer2DModel",
        {
            **_HEADS,
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "joint_attention_dim": 24,
            "axes_dims_rope": [4, 6, 6],
            "text_encoder_dim": 16,
        },
        lambda: {
            "hidden_states": packed(),
            "encoder_hidden_states": text(),
            "text_encoder_layers": [text(16) for _ in range(4)],
            "timestep": times(1),
            "img_ids": places(),
            "txt_ids": torch.zeros(TEXT, 3),
        },
    ),
    Specimen(
        "ChromaTransformer2DModel",
        {
            **_HEADS,
            **_ROPE,
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "joint_attention_dim": 24,
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 16,
            "approximator_layers": 1,
        },
        lambda: asked(packed(), times(1), img_ids=places(), txt_ids=torch.zeros(TEXT, 3)),
    ),
    Specimen(
        "LongCatImageTransformer2DModel",
        {
            **_HEADS,
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "joint_attention_dim": 24,
            "pooled_projection_dim": 24,
            "axes_dims_rope": [4, 6, 6],
        },
        lambda: asked(packed(), times(1), img_ids=places(), txt_ids=torch.zeros(TEXT, 3)),
    ),
    Specimen(
        "OvisImageTransformer2DModel",
        {
            **_HEADS,
            **_ROPE,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "joint_attention_dim": 24,
        },
        lambda: asked(packed(), times(1), img_ids=places(), txt_ids=torch.zeros(TEXT, 3)),
    ),
    Specimen(
        "Krea2Transformer2DModel",
        {
            **_HEADS,
            **_ROPE,
            "in_channels": 16,
            "num_layers": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 48,
            "timestep_embed_dim": 16,
            "text_hidden_dim": 24,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 32,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
        },
        lambda: {
            "hidden_states": packed(),
            "encoder_hidden_states": torch.randn(2, TEXT, 2, 24),
            "timestep": times(1),
            "position_ids": torch.cat([torch.zeros(TEXT, 3), places()]),
        },
    ),
    Specimen(
        "QwenImageTransformer2DModel",
        {
            **_HEADS,
            **_ROPE,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "joint_attention_dim": 24,
        },
        lambda: asked(packed(), times(1), img_shapes=[[(1, ROWS, COLS)]] * 2),
    ),
    Specimen(
        "QwenImage21Transformer2DModel",
        {
            **_HEADS,
            **_ROPE,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 2,
            "context_in_dim": 24,
        },
        lambda: asked(
            packed(),
            times(1),
            img_shapes=[[(1, ROWS, COLS)]] * 2,
            img_mask=torch.tensor([[False] * TEXT + [True] * (ROWS * COLS // 4)] * 2),
        ),
    ),
    Specimen(
        "NucleusMoEImageTransformer2DModel",
        {
            **_HEADS,
            **_ROPE,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "joint_attention_dim": 24,
            "mlp_ratio": 8.0,
            "moe_enabled": False,
        },
        lambda: asked(
            packed(), times(1), img_shapes=[(1, ROWS, COLS)] * 2, encoder_hidden_states_mask=mask()
        ),
    ),
    Specimen(
        "Ideogram4Transformer2DModel",
        {
            **_HEADS,
            "in_channels": 16,
            "num_layers": 2,
            "intermediate_size": 48,
            "adaln_dim": 16,
            "llm_features_dim": 24,
            "mrope_section": (3, 3, 2),
        },
        lambda: {
            "hidden_states": torch.randn(2, TEXT + ROWS * COLS, 16),
            "timestep": times(1),
            "encoder_hidden_states": text(length=TEXT + ROWS * COLS),
            "position_ids": torch.cat([torch.zeros(TEXT, 3), places()]).expand(2, -1, -1),
            "segment_ids": torch.ones(2, TEXT + ROWS * COLS, dtype=torch.long),
            "indicator": torch.tensor([3] * TEXT + [2] * ROWS * COLS).expand(2, -1),
        },
    ),
)

_WAN = {
    **_HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 24,
    "freq_dim": 16,
    "ffn_dim": 48,
    "num_layers": 2,
}
_VIDEO_GRID = (FRAMES, ROWS, COLS)


def wan() -> Inputs:
    return {"hidden_states": video(), "timestep": times(), "encoder_hidden_states": text()}


_VIDEOS = (
    Specimen("WanTransformer3DModel", {**_WAN, "rope_max_seq_len": 32}, wan, grid=_VIDEO_GRID),
    Specimen("SkyReelsV2Transformer3DModel", {**_WAN, "rope_max_seq_len": 32}, wan, grid=_VIDEO_GRID),
    Specimen("ChronoEditTransformer3DModel", {**_WAN, "rope_max_seq_len": 32}, wan, grid=_VIDEO_GRID),
    Specimen(
        "WanVACETransformer3DModel",
        {**_WAN, "rope_max_seq_len": 32, "vace_layers": [0, 1], "vace_in_channels": 6},
        lambda: wan() | {"control_hidden_states": video(6)},
        grid=_VIDEO_GRID,
    ),
    Specimen(
        "WanAnimateTransformer3DModel",
        {
            **_WAN,
            "in_channels": 12,
            "latent_channels": 4,
            "rope_max_seq_len": 32,
            "image_dim": 24,
            "added_kv_proj_dim": 32,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 8,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        lambda: {
            "hidden_states": torch.randn(2, 12, FRAMES + 1, 2 * ROWS, 2 * COLS),
            "timestep": times(),
            "encoder_hidden_states": text(),
            "encoder_hidden_states_image": text(24, 3),
            "pose_hidden_states": torch.randn(2, 4, FRAMES, 2 * ROWS, 2 * COLS),
            "face_pixel_values": torch.randn(2, 3, 5, 16, 16),
        },
        grid=(FRAMES + 1, ROWS, COLS),
    ),
    Specimen(
        "AnyFlowTransformer3DModel",
        {**_WAN, "rope_max_seq_len": 32},
        lambda: asked(
            video().transpose(1, 2),
            times()[:, None].expand(2, FRAMES),
            r_timestep=times()[:, None].expand(2, FRAMES) / 2,
        ),
        grid=_VIDEO_GRID,
    ),
    Specimen(
        "HeliosTransformer3DModel",
        {**_WAN, "rope_dim": (4, 6, 6)},
        lambda: {
            **wan(),
            "indices_hidden_states": torch.arange(FRAMES).expand(2, -1),
            "indices_latents_history_short": torch.arange(1).expand(2, -1),
            "indices_latents_history_mid": torch.arange(2).expand(2, -1),
            "indices_latents_history_long": torch.arange(4).expand(2, -1),
            "latents_history_short": torch.randn(2, 4, 1, 2 * ROWS, 2 * COLS),
            "latents_history_mid": torch.randn(2, 4, 2, 2 * ROWS, 2 * COLS),
            "latents_history_long": torch.randn(2, 4, 4, 2 * ROWS, 2 * COLS),
        },
        grid=_VIDEO_GRID,
    ),
    Specimen(
        "AllegroTransformer3DModel",
        {
            "num_attention_heads": 2,
            "num_layers": 2,
            "caption_channels": 24,
            "sample_height": 8,
            "sample_width": 12,
            "sample_frames": 2,
            "attention_head_dim": 24,
            "cross_attention_dim": 48,
        },
        lambda: {
            "hidden_states": video(),
            "encoder_hidden_states": text(),
            "timestep": times().long(),
            "attention_mask": torch.ones(2, FRAMES, 2 * ROWS, 2 * COLS),
            "encoder_attention_mask": mask(),
            "image_rotary_emb": (
                tuple(torch.randn(2, FRAMES * ROWS * COLS, 8) for _ in range(3)),
                tuple(places(3, 1, FRAMES).long().T.unsqueeze(1)),
            ),
        },
        grid=_VIDEO_GRID,
    ),
    Specimen(
        "CogVideoXTransformer3DModel",
        {
            **_HEADS,
            **_CHANNELS,
            "time_embed_dim": 16,
            "text_embed_dim": 24,
            "num_layers": 2,
            "sample_width": 12,
            "sample_height": 8,
            "sample_frames": 5,
            "max_text_seq_length": TEXT,
        },
        lambda: asked(video().transpose(1, 2), times().long()),
        grid=_VIDEO_GRID,
    ),
    Specimen(
        "ConsisIDTransformer3DModel",
        {
            **_HEADS,
            **_CHANNELS,
            "time_embed_dim": 16,
            "text_embed_dim": 24,
            "num_layers": 2,
            "sample_width": 12,
            "sample_height": 8,
            "sample_frames": 5,
            "max_text_seq_length": TEXT,
        },
        lambda: asked(video().transpose(1, 2), times().long()),
        grid=_VIDEO_GRID,
    ),
    Specimen(
        "EasyAnimateTransformer3DModel",
        {
            **_HEADS,
            **_CHANNELS,
            "patch_size": 2,
            "sample_width": 12,
            "sample_height": 8,
            "num_layers": 3,
            "mmdit_layers": 2,
            "time_embed_dim": 16,
            "text_embed_dim": 24,
        },
        lambda: asked(video(), times()),
        grid=_VIDEO_GRID,
    ),
    Specimen(
        "CosmosTransformer3DModel",
        {
            **_HEADS,
            **_CHANNELS,
            "num_layers": 2,
            "text_embed_dim": 24,
            "adaln_lora_dim": 4,
            "max_size": (4, 16, 16),
            "concat_padding_mask": False,
            "extra_pos_embed_type": None,
        },
        lambda: asked(video(), times()),
        grid=_VIDEO_GRID,
    ),
    Specimen(
        "HunyuanVideoTransformer3DModel",
        {
            **_HEADS,
            **_CHANNELS,
            "num_layers": 2,
            "num_single_layers": 2,
            "num_refiner_layers": 1,
            "text_embed_dim": 24,
            "pooled_projection_dim": 12,
            "rope_axes_dim": (4, 6, 6),
        },
        lambda: {
            "hidden_states": video(),
            "timestep": times(),
            "encoder_hidden_states": text(),
            "encoder_attention_mask": mask(dtype=torch.long),
            "pooled_projections": torch.randn(2, 12),
            "guidance": torch.full((2,), 6000.0),
        },
        grid=_VIDEO_GRID,
    ),
    Specimen(
        "HunyuanVideo15Transformer3DModel",
        {
            **_HEADS,
            **_CHANNELS,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "text_embed_dim": 24,
            "text_embed_2_dim": 20,
            "image_embed_dim": 12,
            "rope_axes_dim": (4, 6, 6),
            "target_size": 16,
        },
        lambda: {
            "hidden_states": video(patch=1),
            "timestep": times(),
            "encoder_hidden_states": text(),
            "encoder_attention_mask": mask(),
            "encoder_hidden_states_2": text(20, 3),
            "encoder_attention_mask_2": mask(3),
            "image_embeds": text(12, 4),
        },
        grid=_VIDEO_GRID,
    ),
    Specimen(
        "HunyuanVideoFramepackTransformer3DModel",
        {
            **_HEADS,
            **_CHANNELS,
            "num_layers": 2,
            "num_single_layers": 2,
            "num_refiner_layers": 1,
            "text_embed_dim": 24,
            "pooled_projection_dim": 12,
            "rope_axes_dim": (4, 6, 6),
            "has_image_proj": True,
            "image_proj_dim": 12,
            "has_clean_x_embedder": True,
        },
        lambda: {
            "hidden_states": video(),
            "timestep": times(),
            "encoder_hidden_states": text(),
            "encoder_attention_mask": mask(dtype=torch.long),
            "pooled_projections": torch.randn(2, 12),
            "image_embeds": text(12, 3),
            "indices_latents": torch.arange(FRAMES),
            "guidance": torch.full((2,), 6000.0),
            "latents_clean": torch.randn(2, 4, 1, 2 * ROWS, 2 * COLS),
            "indices_latents_clean": torch.arange(1),
            "latents_history_2x": torch.randn(2, 4, 2, 2 * ROWS, 2 * COLS),
            "indices_latents_history_2x": torch.arange(2),
            "latents_history_4x": torch.randn(2, 4, 4, 2 * ROWS, 2 * COLS),
            "indices_latents_history_4x": torch.arange(4),
        },
        grid=_VIDEO_GRID,
    ),
    Specimen(
        "JoyImageEditTransformer3DModel",
        {
            **_CHANNELS,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "text_dim": 24,
            "num_layers": 2,
            "rope_dim_list": [4, 6, 6],
        },
        lambda: asked(video(), times()),
        grid=_VIDEO_GRID,
    ),
    Specimen(
        "JoyImageEditPlusTransformer3DModel",
        {
            **_CHANNELS,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "text_dim": 24,
            "num_layers": 2,
            "rope_dim_list": [4, 6, 6],
        },
        lambda: asked(
            torch.randn(2, ROWS * COLS, 4, 1, 2, 2),
            times(),
            encoder_hidden_states_mask=mask(),
            shape_list=[[(1, ROWS, COLS)]] * 2,
        ),
    ),
    Specimen(
        "Kandinsky5Transformer3DModel",
        {
            "in_text_dim": 24,
            "in_text_dim2": 12,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 48,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 6, 6),
        },
        lambda: {
            "hidden_states": torch.randn(1, FRAMES, 2 * ROWS, 2 * COLS, 4),
            "encoder_hidden_states": text(batch=1),
            "timestep": times()[:1],
            "pooled_projections": torch.randn(1, 12),
            "visual_rope_pos": [torch.arange(n) for n in (FRAMES, ROWS, COLS)],
            "text_rope_pos": torch.arange(TEXT),
        },
        grid=_VIDEO_GRID,
    ),
    Specimen(
        "Kandinsky6Transformer3DModel",
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 24,
            "in_text_dim2": 12,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 48,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 6, 6),
            "visual_cond": False,
        },
        lambda: {
            "hidden_states": torch.randn(1, FRAMES, 2 * ROWS, 2 * COLS, 4),
            "encoder_hidden_states": text(batch=1),
            "pooled_projections": torch.randn(1, 12),
            "timestep": times()[:1],
        },
        grid=_VIDEO_GRID,
    ),
    Specimen(
        "LatteTransformer3DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "cross_attention_dim": 32,
            "caption_channels": 24,
            "sample_size": 8,
            "patch_size": 2,
            "norm_type": "ada_norm_single",
            "num_embeds_ada_norm": 10,
            "video_length": 3,
            "norm_elementwise_affine": False,
        },
        lambda: asked(torch.randn(2, 4, 3, 8, 8), times().long()),
        grid=(1, 4, 4),
    ),
    Specimen(
        "LTXVideoTransformer3DModel",
        {
            **_HEADS,
            "in_channels": 8,
            "out_channels": 8,
            "cross_attention_dim": 32,
            "num_layers": 2,
            "caption_channels": 24,
        },
        lambda: asked(
            packed(8, FRAMES),
            times(),
            encoder_attention_mask=mask(),
            num_frames=FRAMES,
            height=ROWS,
            width=COLS,
        ),
        grid=_VIDEO_GRID,
    ),
    Specimen(
        "LTX2VideoTransformer3DModel",
        {
            **_HEADS,
            "in_channels": 8,
            "out_channels": 8,
            "cross_attention_dim": 32,
            "num_layers": 2,
            "caption_channels": 24,
            "audio_in_channels": 6,
            "audio_out_channels": 6,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 8,
            "audio_cross_attention_dim": 16,
        },
        lambda: {
            "hidden_states": packed(8, FRAMES),
            "audio_hidden_states": torch.randn(2, 7, 6),
            "encoder_hidden_states": text(),
            "audio_encoder_hidden_states": text(),
            "timestep": times(),
            "encoder_attention_mask": mask(),
            "audio_encoder_attention_mask": mask(),
            "num_frames": FRAMES,
            "height": ROWS,
            "width": COLS,
            "audio_num_frames": 7,
        },
        grid=_VIDEO_GRID,
    ),
    Specimen(
        "MochiTransformer3DModel",
        {
            **_HEADS,
            "num_layers": 3,
            "pooled_projection_dim": 32,
            "in_channels": 4,
            "text_embed_dim": 24,
            "time_embed_dim": 16,
            "max_sequence_length": TEXT,
        },
        lambda: asked(video(), times(), encoder_attention_mask=mask()),
        grid=_VIDEO_GRID,
    ),
    Specimen(
        "MotifVideoTransformer3DModel",
        {
            **_HEADS,
            **_CHANNELS,
            "num_layers": 2,
            "num_single_layers": 2,
            "text_embed_dim": 24,
            "rope_axes_dim": (4, 6, 6),
        },
        lambda: asked(video(), times()),
        grid=_VIDEO_GRID,
    ),
    Specimen(
        "SanaVideoTransformer3DModel",
        {
            **_HEADS,
            **_CHANNELS,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 32,
            "caption_channels": 24,
            "rope_max_seq_len": 32,
        },
        lambda: asked(video(), times()),
        grid=_VIDEO_GRID,
    ),
    Specimen(
        "TransformerTemporalModel",
        {**_HEADS, "in_channels": 32, "num_layers": 2, "norm_num_groups": 2},
        lambda: {"hidden_states": latent(32, 1, batch=6), "num_frames": 3},
    ),
    Specimen(
        "MiniMaxH3Transformer3DModel",
        {
            **_HEADS,
            "hidden_size": 32,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "ffn_dim": 48,
            "in_channels": 4,
            "audio_in_channels": 6,
            "text_dim": 24,
            "freq_dim": 16,
            "time_embed_hidden_dim": 32,
            "time_embed_dim": 16,
            "rope_freq_dim": 2,
        },
        lambda: {
            "hidden_states": packed(16, FRAMES),
            "audio_hidden_states": torch.randn(2, 7, 6),
            "encoder_hidden_states": text(),
            "timestep": torch.tensor([0.7]),
            "timestep_indices": torch.zeros(TEXT + 7 + FRAMES * ROWS * COLS, dtype=torch.long),
            "token_tags": torch.tensor([1] * TEXT + [0] * FRAMES * ROWS * COLS + [2] * 7),
            "position_ids": torch.cat([torch.zeros(TEXT, 3), places(3, 1, FRAMES), torch.zeros(7, 3)]),
            "video_indices": TEXT + torch.arange(FRAMES * ROWS * COLS),
            "audio_indices": TEXT + FRAMES * ROWS * COLS + torch.arange(7),
            "text_indices": torch.arange(TEXT),
        },
        grid=_VIDEO_GRID,
    ),
)

_SOUND = (
    Specimen(
        "StableAudioDiTModel",
        {
            "sample_size": 10,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "num_key_value_attention_heads": 1,
            "out_channels": 4,
            "cross_attention_dim": 32,
            "time_proj_dim": 8,
            "global_states_input_dim": 12,
            "cross_attention_input_dim": 24,
        },
        lambda: {
            "hidden_states": torch.randn(2, 4, 10),
            "timestep": times(1),
            "encoder_hidden_states": text(),
            "global_hidden_states": torch.randn(2, 1, 12),
            "rotary_embedding": (torch.randn(11, 8), torch.randn(11, 8)),
        },
        grid=(10,),
    ),
    Specimen(
        "StableAudio3DiTModel",
        {
            "io_channels": 4,
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 2,
            "cond_token_dim": 24,
            "global_cond_dim": 12,
            "local_add_cond_dim": 6,
            "timestep_features_dim": 16,
            "num_memory_tokens": 3,
        },
        lambda: {
            "hidden_states": torch.randn(2, 4, 10),
            "timestep": times(1),
            "encoder_hidden_states": text(),
            "global_hidden_states": torch.randn(2, 12),
        },
        grid=(10,),
    ),
    Specimen(
        "AceStepTransformer1DModel",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "in_channels": 12,
            "audio_acoustic_hidden_dim": 4,
            "sliding_window": 4,
        },
        lambda: {
            "hidden_states": torch.randn(2, 20, 4),
            "timestep": times(1),
            "timestep_r": times(1),
            "encoder_hidden_states": text(32),
            "context_latents": torch.randn(2, 20, 8),
        },
        grid=(10,),
    ),
    Specimen(
        "LongCatAudioDiTTransformer",
        {
            "dit_dim": 32,
            "dit_depth": 2,
            "dit_heads": 2,
            "dit_text_dim": 24,
            "latent_dim": 4,
            "use_latent_condition": False,
        },
        lambda: asked(torch.randn(2, 10, 4), times(1), encoder_attention_mask=mask()),
        grid=(10,),
    ),
    Specimen(
        "MiniMaxMusic3Transformer1DModel",
        {
            "in_channels": 4,
            "condition_dim": 6,
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "ff_inner_dim": 48,
            "rotary_dim": 8,
            "fourier_embedding_dim": 16,
        },
        lambda: {
            "hidden_states": torch.randn(2, 4, 10),
            "timestep": times(1),
            "encoder_hidden_states": text(6, 10),
        },
        grid=(10,),
    ),
    Specimen(
        "MiniMaxMusic3RVQDepthDecoder",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "audio_vocab_size": 16,
            "num_codebooks": 2,
        },
        lambda: {"inputs_embeds": torch.randn(2, 4, 32)},
        grid=(4,),
    ),
)

NOT_TRIED = {
    "AnyFlowFARTransformer3DModel": "its self-attention is flex_attention",
    "Cosmos3OmniTransformer": "one causal and one image call over packed indices, of its own inputs",
    "Kandinsky6SRTransformer3DModel": "its self-attention is flex_attention, over reordered tiles",
    "PriorTransformer": "it has no image tokens",
    "RFD4ProteinaTransformer": "it makes proteins",
    "SanaWMLTX2RefinerTransformer3DModel": "it needs rotary tables and a cache of its own",
    "SanaWMTransformer3DModel": "most of its attention is linear",
    "T5FilmDecoder": "it is called with pairs of encodings and masks",
    "WanAnimate2Transformer3DModel": "its inputs are lists with a cache of keys",
}
"""Classes without an instance here, and why."""


def transformer_classes() -> list[str]:
    """Every transformer class of diffusers."""
    import pkgutil

    from diffusers import ModelMixin
    from diffusers.models import transformers

    found = set()
    for module in (
        importlib.import_module(f"{transformers.__name__}.{m.name}")
        for m in pkgutil.iter_modules(transformers.__path__)
    ):
        found |= {
            name
            for name, item in vars(module).items()
            if isinstance(item, type) and issubclass(item, ModelMixin) and item.__module__ == module.__name__
        }
    return sorted(found)
