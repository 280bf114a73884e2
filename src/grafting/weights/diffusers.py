"""Folders of diffusers' `DiTTransformer2DModel`, read as the native DiT and written from it.

diffusers' class computes other time embeddings than the original, with which the published weights were trained: its
frequencies are 10000^(-i/127), the original's 10000^(-i/128), and its norms before the MLP have eps 1e-5, the original's
1e-6. What is read here has the original's. What is written has the eps in its config; the frequencies are no setting of
the class, so `original_embeddings` sets them on a model, and a written folder says so in its config. Other weights cannot
make up for them: the best linear map from one embedding's features to the other's is 26 % off over the 1000 steps.

Measured on the recorded outputs of the original (`tests/golden`), relative error at steps 0, 100, 500, 999: what is read
here, and what is written here with `original_embeddings`, at most 3e-7; diffusers' class as it is 1e-6, 0.12, 0.17, 0.26.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch import Tensor, nn

from ..contract import Kwargs
from ..errors import CheckpointError, listed
from ..machine.files import atomic_files, write_json
from ..machine.reading import JsonObject, read_json, shown
from ..models.dit import DiT, sincos_2d
from .locate import CONFIG_NAME
from .portable import settings_of
from .tensors import load_strictly, read_weights

_DIFFUSERS_CLASS = "DiTTransformer2DModel"

# native module -> diffusers' module; the embedders stand in every block there, and attn.qkv is three linears
_OUTER = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_EMBEDDERS = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
_BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")

# settings of diffusers' class that the native one has built in
_BUILT_IN = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "norm_type": "ada_norm_zero",
}


def export_diffusers(model: nn.Module, folder: str | Path) -> Path:
    """Write a native DiT without a graft as a folder of diffusers' `DiTTransformer2DModel`; returns the folder.

    Its outputs are the original's once `original_embeddings` was called on the loaded model; the config says so.

    Raises:
        CheckpointError: the model has operators in it, for which diffusers' class has no place, or no null label.
    """
    folder = Path(folder)
    exported = to_diffusers(model)
    note = {
        "converted_from": "the native DiT of grafting, whose outputs are those of facebookresearch/DiT",
        "norm_eps": "1e-6, as in the original; this config sets it",
        "time_embedding": (
            "the weights are made for frequencies 10000^(-i/128); the class has 10000^(-i/127), and outputs are up to "
            "tens of percent off at late steps, until block.norm1.emb.time_proj.downscale_freq_shift = 0 is set in "
            "every block (grafting.original_embeddings)"
        ),
    }
    with atomic_files(folder, last=CONFIG_NAME) as made:
        exported.save_pretrained(made)
        path = made / CONFIG_NAME
        write_json(path, read_json(path, JsonObject) | {"_grafting": note})
    return folder


def to_diffusers(model: nn.Module) -> Any:
    """diffusers' `DiTTransformer2DModel` with a native DiT's weights and outputs. Raises as `export_diffusers`."""
    from diffusers import DiTTransformer2DModel

    if not isinstance(model, DiT) or model.state_dict().keys() != _ungrafted_names(model):
        raise CheckpointError(
            f"only a DiT without edits can be a {_DIFFUSERS_CLASS}, which has no place for others; found a "
            f"{type(model).__name__}{' with edits' * isinstance(model, DiT)}"
        )
    config = model.config
    if config.class_dropout_prob == 0:
        raise CheckpointError(
            f"a DiT without a null label cannot be a {_DIFFUSERS_CLASS}, which always has one"
        )
    if int(config.hidden_size * config.mlp_ratio) != 4 * config.hidden_size:
        raise CheckpointError(f"mlp_ratio is {config.mlp_ratio}; {_DIFFUSERS_CLASS} supports only 4")
    made: Any = DiTTransformer2DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.hidden_size // config.num_heads,
        in_channels=config.in_channels,
        out_channels=model.out_channels,
        num_layers=config.depth,
        sample_size=config.input_size,
        patch_size=config.patch_size,
        num_embeds_ada_norm=config.num_classes,
        norm_eps=1e-6,
    )
    load_strictly(made, _to_diffusers_names(model.state_dict(), config.depth), source="the native DiT")
    return original_embeddings(made).eval()


def _ungrafted_names(model: nn.Module) -> set[str]:
    with torch.device("meta"):
        return set(DiT(**settings_of(model)).state_dict())


def original_embeddings(model: nn.Module) -> nn.Module:
    """diffusers' DiT, changed in place to the time embedding that published weights were trained with; returns it."""
    blocks: Any = model.get_submodule("transformer_blocks")
    for block in blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return model


def diffusers_folder(source: Path) -> Path | None:
    """The folder of diffusers' DiT, if that or a pipeline with one is what `source` is."""
    for folder in (source, source / "transformer"):
        config = folder / CONFIG_NAME
        if config.is_file() and read_json(config, JsonObject).get("_class_name") == _DIFFUSERS_CLASS:
            return folder
    return None


class _Config(BaseModel):
    """Settings of diffusers' class, with its defaults."""

    model_config = ConfigDict(extra="allow")

    in_channels: PositiveInt = 4
    out_channels: PositiveInt | None = None
    patch_size: PositiveInt = 2
    sample_size: PositiveInt = 32
    num_attention_heads: PositiveInt = 16
    attention_head_dim: PositiveInt = 72
    num_layers: Annotated[int, Field(ge=1, le=1000)] = 28
    num_embeds_ada_norm: PositiveInt = 1000
    norm_eps: float = 1e-5


def read_diffusers(folder: Path) -> tuple[dict[str, Tensor], Kwargs, JsonObject]:
    """The tensors under native names, the arguments of `DiT`, and the origin."""
    described = read_json(folder / CONFIG_NAME, _Config, kind=f"a config of {_DIFFUSERS_CLASS}")
    settings = described.model_extra or {}
    faults = [
        f"{name} is {shown(settings[name])}, expected {value!r}"
        for name, value in _BUILT_IN.items()
        if settings.get(name, value) != value
    ]
    if faults:
        raise CheckpointError(listed(f"{folder} is not the DiT that was published:", faults))
    tensors = read_weights(folder)
    hidden_size = described.num_attention_heads * described.attention_head_dim
    config: Kwargs = {
        "input_size": described.sample_size,
        "patch_size": described.patch_size,
        "in_channels": described.in_channels,
        "hidden_size": hidden_size,
        "depth": described.num_layers,
        "num_heads": described.num_attention_heads,
        "mlp_ratio": 4.0,
        "class_dropout_prob": 0.1,
        "num_classes": described.num_embeds_ada_norm,
        "learn_sigma": described.out_channels == 2 * described.in_channels,
    }
    native = _from_diffusers_names(tensors, described.num_layers, source=str(folder))
    side = described.sample_size // described.patch_size
    native["pos_embed"] = sincos_2d(hidden_size, side, side)
    origin: JsonObject = {
        "format": f"diffusers {_DIFFUSERS_CLASS}",
        "time_embedding": "read as the original's frequencies, 10000^(-i/128); diffusers computes 10000^(-i/127)",
        "norm_eps": f"read as the original's 1e-6; diffusers' config has {described.norm_eps:g}",
    }
    return native, config, origin


def _to_diffusers_names(tensors: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    named = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        _, block, inner = [*module.split(".", 2), "", ""][:3]
        if module in _OUTER:
            named[f"{_OUTER[module]}.{kind}"] = tensor
        elif module in _EMBEDDERS:
            named |= {f"transformer_blocks.{i}.{_EMBEDDERS[module]}.{kind}": tensor for i in range(depth)}
        elif inner in _BLOCK:
            named[f"transformer_blocks.{block}.{_BLOCK[inner]}.{kind}"] = tensor
        elif inner == "attn.qkv":
            thirds = zip(_QKV, tensor.chunk(3), strict=True)
            named |= {f"transformer_blocks.{block}.{part}.{kind}": third for part, third in thirds}
    return named


def _from_diffusers_names(tensors: Mapping[str, Tensor], depth: int, *, source: str) -> dict[str, Tensor]:
    """The tensors under native names; what has no native name keeps its own, for the strict load to name."""
    left = dict(tensors)
    native: dict[str, Tensor] = {}
    faults = []

    def take(theirs: str, ours: str) -> None:
        for kind in ("weight", "bias"):
            tensor = left.pop(f"{theirs}.{kind}", None)
            if tensor is not None and not torch.equal(native.setdefault(f"{ours}.{kind}", tensor), tensor):
                faults.append(f"{theirs}.{kind} is not that of block 0")

    for ours, theirs in _OUTER.items():
        take(theirs, ours)
    for block in range(depth):
        prefix = f"transformer_blocks.{block}"
        for ours, theirs in _EMBEDDERS.items():
            take(f"{prefix}.{theirs}", ours)
        for ours, theirs in _BLOCK.items():
            take(f"{prefix}.{theirs}", f"blocks.{block}.{ours}")
        for kind in ("weight", "bias"):
            names = [f"{prefix}.{part}.{kind}" for part in _QKV]
            if all(name in left for name in names):
                native[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat([left.pop(name) for name in names])
    if faults:
        head = f"{source}: blocks have embedders of their own, and the original DiT has one"
        raise CheckpointError(listed(head, faults[:12]))
    left.pop("pos_embed.pos_embed", None)
    return native | left
