"""Host: the native class-conditional DiT (`models/dit.py`)."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..conditions import ClassLabels
from ..contract import AttentionWeights, BlockCall, Grid, Kwargs, MlpWeights, ModuleCall, Site
from ..models.dit import Attention, DiT, Mlp, ParallelBlocks
from ._host import Host, linear_weights, randomise


class DiTHost(Host[DiT]):
    """Blocks of attention and MLP; the condition is a class label [B]."""

    name = "dit"
    class_name = "DiT"
    model_class = DiT

    def sites(self, model: DiT) -> tuple[Site, ...]:
        side = model.config.input_size // model.config.patch_size
        call = ModuleCall(tokens="x")
        at = partial(Site, dim=model.config.hidden_size, grid=Grid(side, side), module=call)
        num_heads, hidden_dim = model.config.num_heads, int(model.config.hidden_size * model.config.mlp_ratio)
        return tuple(
            site
            for i in range(model.config.depth)
            for site in (
                at(role="attention", block=i, path=f"blocks.{i}.attn", num_heads=num_heads),
                at(role="mlp", block=i, path=f"blocks.{i}.mlp", hidden_dim=hidden_dim),
            )
        )

    def blocks(self, model: DiT) -> tuple[Site, ...]:
        """All of them: the head reads no block."""
        side = model.config.input_size // model.config.patch_size
        dim, grid = model.config.hidden_size, Grid(side, side)
        call = BlockCall(arguments=("x",), returns=("x",))
        return tuple(
            Site(role="block", block=i, path=f"blocks.{i}", dim=dim, grid=grid, call=call)
            for i in range(model.config.depth)
        )

    def branches(self, blocks: Sequence[nn.Module], call: BlockCall) -> nn.ModuleList:
        return ParallelBlocks(blocks)

    def image_grid(self, model: DiT, arguments: Mapping[str, Any]) -> Grid:
        patch, (rows, cols) = model.config.patch_size, arguments["x"].shape[2:]
        return Grid(rows // patch, cols // patch)

    def attention_weights(self, attention: nn.Module) -> AttentionWeights:
        assert isinstance(attention, Attention)
        weight, bias = linear_weights(attention.qkv)
        assert bias is not None
        q, k, v = zip(weight.chunk(3), bias.chunk(3), strict=True)
        return AttentionWeights(q, k, v, linear_weights(attention.proj))

    def mlp_weights(self, mlp: nn.Module) -> MlpWeights:
        assert isinstance(mlp, Mlp)
        gelu = partial(F.gelu, approximate="tanh")
        return MlpWeights(linear_weights(mlp.fc1), linear_weights(mlp.fc2), gelu)

    def output_layer(self, attention: nn.Module) -> nn.Linear:
        assert isinstance(attention, Attention)
        return attention.proj

    def predict(self, model: DiT, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return model(x_t, t, condition)

    def shape(self, model: DiT) -> tuple[int, ...]:
        return (model.config.in_channels, model.config.input_size, model.config.input_size)

    def shape_faults(self, model: DiT, shape: tuple[int, ...]) -> list[str]:
        """Its positions are those of one size."""
        native = self.shape(model)
        return [] if shape == native else [f"dit makes inputs of {list(native)} alone; found {list(shape)}"]

    def conditions(self, model: DiT) -> ClassLabels:
        config = model.config
        null_label = config.num_classes if config.class_dropout_prob > 0 else None
        return ClassLabels(config.num_classes, null_label=null_label, dropout=config.class_dropout_prob)

    def tiny(self) -> DiT:
        model = DiT(input_size=16, in_channels=1, hidden_size=32, depth=3, num_heads=2, num_classes=10)
        return randomise(model)

    def example(
        self, model: DiT, *, rows: int, cols: int, batch_size: int, frames: int = 1, num_text: int = 5
    ) -> Kwargs:
        patch = model.config.patch_size
        return {
            "x": torch.randn(batch_size, model.config.in_channels, rows * patch, cols * patch),
            "t": torch.randint(0, 1000, (batch_size,)),
            "y": torch.randint(0, model.config.num_classes, (batch_size,)),
        }
