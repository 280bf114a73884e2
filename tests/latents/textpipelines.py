"""Tiny pipelines with text encoders and tokenizers of their own, random weights, as users hold them in folders."""

from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler as Euler
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

from grafting.hosts._host import randomise

WORDS = "a red blue green cat dog on the mat house tall with hat and of in big small sun sea beside under three trees"
VOCABULARY = {
    word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "<s>", *dict.fromkeys(WORDS.split())])
}
DIM = 24


def tokenizer(length: int = 16, *, chats: bool = False) -> Any:
    """Words to numbers, by spaces; as long as `length`."""
    table = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    table.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    table.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>"}
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=table, model_max_length=length, **names)
    made.padding_side = "right"
    if chats:
        made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return made


def t5(kind: str = "T5") -> nn.Module:
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=40, d_model=DIM, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return getattr(transformers, f"{kind}EncoderModel")(config).eval()


def clip(*, projects: bool = False) -> nn.Module:
    torch.manual_seed(2)
    sizes = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"eos_token_id": 1, "bos_token_id": 3, "pad_token_id": 0}
    config = transformers.CLIPTextConfig(
        vocab_size=40, max_position_embeddings=80, projection_dim=12, **sizes, **ids
    )
    kind = transformers.CLIPTextModelWithProjection if projects else transformers.CLIPTextModel
    return kind(config).eval()


def language_model(kind: str, *, heads: bool = False) -> nn.Module:
    """A small one; with `heads` it says the next word."""
    torch.manual_seed(3)
    sizes = {"hidden_size": DIM, "intermediate_size": 32, "num_hidden_layers": 3, "head_dim": 12}
    places = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512}
    ids = {"pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 1}
    config = getattr(transformers, f"{kind}Config")(vocab_size=40, **sizes, **places, **ids)
    return getattr(transformers, f"{kind}ForCausalLM" if heads else f"{kind}Model")(config).eval()


def vae() -> nn.Module:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 8), "latent_channels": 4, "norm_num_groups": 4, "sample_size": 32}
    return diffusers.AutoencoderKL(**blocks, **sizes, scaling_factor=0.18, shift_factor=0.1).eval()


def video_vae() -> nn.Module:
    means = {"latents_mean": [0.1] * 4, "latents_std": [1.5] * 4}
    sizes = {
        "base_dim": 4,
        "z_dim": 4,
        "dim_mult": [1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [True],
    }
    return diffusers.AutoencoderKLWan(**sizes, **means).eval()


def transformer(name: str, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    return randomise(getattr(diffusers, name)(**config), std=0.1).eval()


def pixart() -> Any:
    sizes = {"sample_size": 16, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
    model = transformer(
        "PixArtTransformer2DModel",
        in_channels=4,
        out_channels=8,
        cross_attention_dim=32,
        caption_channels=DIM,
        **sizes,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_start=0.0001, beta_end=0.02, beta_schedule="linear"
    )
    return diffusers.PixArtSigmaPipeline(tokenizer(), t5(), vae(), model, scheduler)


def sd3() -> Any:
    sizes = {"sample_size": 16, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
    dims = {"joint_attention_dim": DIM, "caption_projection_dim": 32, "pooled_projection_dim": 24}
    model = transformer(
        "SD3Transformer2DModel", in_channels=4, out_channels=4, pos_embed_max_size=16, **sizes, **dims
    )
    encoders = [clip(projects=True), tokenizer(), clip(projects=True), tokenizer(), t5(), tokenizer()]
    return diffusers.StableDiffusion3Pipeline(model, Euler(shift=3.0), vae(), *encoders)


def flux() -> Any:
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    model = transformer(
        "FluxTransformer2DModel",
        in_channels=16,
        joint_attention_dim=DIM,
        pooled_projection_dim=12,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=True,
        **sizes,
    )
    scheduler = Euler(shift=3.0, use_dynamic_shifting=True)
    return diffusers.FluxPipeline(scheduler, vae(), clip(), tokenizer(), t5(), tokenizer(), model)


def wan() -> Any:
    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "ffn_dim": 64,
        "freq_dim": 16,
    }
    model = transformer(
        "WanTransformer3DModel", in_channels=4, out_channels=4, text_dim=DIM, rope_max_seq_len=32, **sizes
    )
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return diffusers.WanPipeline(tokenizer(), t5("UMT5"), video_vae(), scheduler, model)


def lumina2() -> Any:
    sizes = {"hidden_size": 32, "num_layers": 2, "num_refiner_layers": 1, "num_attention_heads": 2}
    model = transformer(
        "Lumina2Transformer2DModel",
        sample_size=16,
        in_channels=4,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(64, 64, 64),
        cap_feat_dim=DIM,
        **sizes,
    )
    return diffusers.Lumina2Pipeline(model, Euler(shift=6.0), vae(), language_model("Gemma2"), tokenizer(64))


def zimage() -> Any:
    sizes = {"dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    axes = {"axes_dims": [4, 6, 6], "axes_lens": [128, 64, 64]}
    model = transformer("ZImageTransformer2DModel", in_channels=4, cap_feat_dim=DIM, **sizes, **axes)
    text = language_model("Qwen3")
    return diffusers.ZImagePipeline(Euler(shift=6.0), vae(), text, tokenizer(64, chats=True), model)


ALL: dict[str, Callable[[], Any]] = {
    "pixart": pixart, "sd3": sd3, "flux": flux, "wan": wan, "lumina2": lumina2, "zimage": zimage
}  # fmt: skip
