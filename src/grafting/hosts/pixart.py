"""Host: PixArt-alpha and PixArt-Sigma, diffusers' `PixArtTransformer2DModel`. Attention to the text stays as it is."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..contract import AttentionWeights, BlockCall, Grid, Kwargs, MlpWeights, ModuleCall, Site
from ..errors import HostError
from ._host import Host, linear_weights, randomise

# diffusers' class, imported late: that takes seconds, and a DiT does not need it
PixArt = Any

_VAE_FACTOR = 8


class PixArtHost(Host[PixArt]):
    """Blocks of self-attention, attention to the text, and MLP.

    The condition is a mapping of `encoder_hidden_states` [B, T, C], `encoder_attention_mask` [B, T] and, for models
    that need them, `added_cond_kwargs`.
    """

    name = "pixart"
    class_name = "PixArtTransformer2DModel"

    @property
    def model_class(self) -> type[PixArt]:
        from diffusers import PixArtTransformer2DModel

        return PixArtTransformer2DModel

    def sites(self, model: PixArt) -> tuple[Site, ...]:
        config = model.config
        side = config.sample_size // config.patch_size
        dim, grid = config.num_attention_heads * config.attention_head_dim, Grid(side, side)
        call = ModuleCall(must_be_none=("encoder_hidden_states", "attention_mask"))
        attention = {"role": "attention", "num_heads": config.num_attention_heads, "module": call}
        # the class leaves its MLPs at diffusers' default width
        mlp = {"role": "mlp", "hidden_dim": 4 * dim, "module": ModuleCall()}
        return tuple(
            Site(block=i, path=f"transformer_blocks.{i}.{path}", dim=dim, grid=grid, **facts)
            for i in range(config.num_layers)
            for path, facts in (("attn1", attention), ("ff", mlp))
        )

    def blocks(self, model: PixArt) -> tuple[Site, ...]:
        """All of them: the step's embedding stands outside of the blocks."""
        config = model.config
        side = config.sample_size // config.patch_size
        dim, grid = config.num_attention_heads * config.attention_head_dim, Grid(side, side)
        call = BlockCall(arguments=("hidden_states",), returns=("hidden_states",))
        return tuple(
            Site(role="block", block=i, path=f"transformer_blocks.{i}", dim=dim, grid=grid, call=call)
            for i in range(config.num_layers)
        )

    def image_grid(self, model: PixArt, arguments: Mapping[str, Any]) -> Grid:
        patch, (rows, cols) = model.config.patch_size, arguments["hidden_states"].shape[2:]
        return Grid(rows // patch, cols // patch)

    def attention_weights(self, attention: Any) -> AttentionWeights:
        layers = (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0])
        return AttentionWeights(*map(linear_weights, layers))

    def mlp_weights(self, mlp: Any) -> MlpWeights:
        from diffusers.models.activations import GELU

        up, _, down = mlp.net
        if not isinstance(up, GELU):
            raise HostError(
                f"an MLP of {type(up).__name__} has no plain two-layer form to inherit from: use init: random"
            )
        gelu = partial(F.gelu, approximate=up.approximate)
        return MlpWeights(linear_weights(up.proj), linear_weights(down), gelu)

    def output_layer(self, attention: Any) -> nn.Linear:
        return attention.to_out[0]

    def predict(self, model: PixArt, x_t: Tensor, t: Tensor, condition: Mapping[str, Any]) -> Tensor:
        sizes = {} if "added_cond_kwargs" in condition else self._sizes(model, x_t)
        return model(x_t, timestep=t, return_dict=False, **condition, **sizes)[0]

    def shape(self, model: PixArt) -> tuple[int, ...]:
        return (model.config.in_channels, model.config.sample_size, model.config.sample_size)

    def initialised(self, model: PixArt) -> PixArt:
        """Xavier's weights, and zeros where attention to the text and the head end: the model begins as blocks without text.

        Source: after PixArt-alpha `diffusion/model/nets/PixArt.py::initialize_weights`, whose embeddings are smaller.
        """
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(model.pos_embed.proj.weight.flatten(1))
        nn.init.normal_(model.adaln_single.linear.weight, std=0.02)
        for layer in (*(block.attn2.to_out[0] for block in model.transformer_blocks), model.proj_out):
            nn.init.zeros_(layer.weight)
        return model

    def tiny(self) -> PixArt:
        model = self.model_class(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=24,
        )
        return randomise(model)

    def needed(self, model: PixArt) -> dict[str, int | None]:
        return {"encoder_hidden_states": model.config.caption_channels}

    def example(
        self, model: PixArt, *, rows: int, cols: int, batch_size: int, frames: int = 1, num_text: int = 5
    ) -> Kwargs:
        config = model.config
        mask = torch.ones(batch_size, num_text)
        mask[0, -2:] = 0
        return {
            "hidden_states": torch.randn(
                batch_size, config.in_channels, rows * config.patch_size, cols * config.patch_size
            ),
            "timestep": torch.randint(0, 1000, (batch_size,)),
            "encoder_hidden_states": torch.randn(batch_size, num_text, config.caption_channels),
            "encoder_attention_mask": mask,
            **self._sizes(model, torch.zeros(batch_size, 1, rows, cols)),
        }

    def _sizes(self, model: PixArt, x: Tensor) -> Kwargs:
        """The size in pixels of latents x, and its height over width, for models that are told.

        Source: diffusers `PixArtAlphaPipeline.__call__`; the autoencoder of PixArt divides sizes by 8.
        """
        if not model.use_additional_conditions:
            return {}
        height, width = (_VAE_FACTOR * size for size in x.shape[2:])
        pixels = torch.tensor([height, width]).to(x).expand(len(x), 2)
        ratio = torch.tensor([height / width]).to(x).expand(len(x), 1)
        return {"added_cond_kwargs": {"resolution": pixels, "aspect_ratio": ratio}}
