"""DiT, the class-conditional diffusion transformer with adaLN-Zero, in the published state-dict layout.

One readable file: `DiT.forward` from top to bottom, then its parts. Weights of facebookresearch/DiT load strictly.
The class is a diffusers `ModelMixin` (saving, sharding, Hub, EMA); sampling and losses live elsewhere.

Source: arXiv:2212.09748; layout and initialisation as in facebookresearch/DiT `models.py`.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..functional.modulated_norm import modulated_norm

EPSILON = 1e-6
"""What all norms add to variances."""

# hidden_size, depth, num_heads of the published sizes
_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}

DIT_PRESETS: dict[str, dict[str, int]] = {
    f"DiT-{size}/{patch}": {"hidden_size": hidden, "depth": depth, "num_heads": heads, "patch_size": patch}
    for size, (hidden, depth, heads) in _SIZES.items()
    for patch in (2, 4, 8)
}


class DiTConfig(FrozenDict):
    """Declaration of a DiT's settings, which diffusers keeps untyped."""

    input_size: int
    patch_size: int
    in_channels: int
    hidden_size: int
    depth: int
    num_heads: int
    mlp_ratio: float
    class_dropout_prob: float
    num_classes: int
    learn_sigma: bool


class DiT(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers' own declarations of `config_name` differ
    """Predicts noise (and, with `learn_sigma`, a variance) of a noised image, given its step and class.

    The model takes the labels that it is given, in training too: whoever trains it drops them (`batches.draw`), so
    that which are dropped depends on the step alone, and a teacher sees what its student sees.

    Args:
        input_size: height = width of the image or latent that the positions are made for, in pixels.
        patch_size: side of a patch, in pixels; tokens = (input_size / patch_size)^2.
        in_channels: channels of the image or latent, C.
        hidden_size: channels of a token, D.
        depth: number of blocks.
        num_heads: attention heads, H; must divide `hidden_size`.
        mlp_ratio: hidden width of the MLP over D.
        class_dropout_prob: share of labels that training replaces by the null label; 0 means that there is no null label.
        num_classes: classes; the null label, if any, is `num_classes`.
        learn_sigma: also predict the variance, in C more channels.

    Raises:
        ValueError: a size that does not divide another.
    """

    config: DiTConfig
    _supports_gradient_checkpointing = True
    _no_split_modules = ["DiTBlock"]  # type: ignore[assignment]  # declared as None by diffusers

    @register_to_config
    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
    ):
        super().__init__()
        sizes = {
            "input_size": input_size,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "hidden_size": hidden_size,
            "depth": depth,
            "num_heads": num_heads,
            "num_classes": num_classes,
        }
        if wrong := [f"{name} is {size!r}" for name, size in sizes.items() if not _is_size(size)]:
            raise ValueError(f"{', '.join(wrong)}; sizes are whole numbers above 0")
        if not (0 <= class_dropout_prob <= 1 and 0 < mlp_ratio <= 256):
            raise ValueError(
                f"class_dropout_prob is {class_dropout_prob}, from 0 to 1; mlp_ratio is {mlp_ratio}, above 0 and at most 256"
            )
        if input_size % patch_size:
            raise ValueError(f"input_size {input_size} is not a multiple of patch_size {patch_size}")
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(
                f"hidden_size {hidden_size} must be a multiple of num_heads {num_heads} and of 4"
            )
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.gradient_checkpointing = False

        self.x_embedder = PatchEmbedder(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        side = input_size // patch_size
        self.pos_embed = nn.Parameter(sincos_2d(hidden_size, side, side), requires_grad=False)
        self.blocks = nn.ModuleList([DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth)])
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self._initialise()

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "DiT":
        """A randomly initialised DiT of a published size, such as `DiT-XL/2`."""
        if name not in DIT_PRESETS:
            raise ValueError(f"no preset {name!r}; there are {', '.join(DIT_PRESETS)}")
        return cls(**{**DIT_PRESETS[name], **overrides})

    def forward(
        self, x: Float[Tensor, "b c h w"], t: Float[Tensor, " b"] | Int[Tensor, " b"], y: Int[Tensor, " b"]
    ) -> Float[Tensor, "b out_c h w"]:
        """The model's prediction for noised images x at steps t (0..999, may be fractional) and classes y.

        Any height and width that are multiples of the patch size: positions are made for that grid.
        """
        patch = self.config.patch_size
        rows, cols = x.shape[2] // patch, x.shape[3] // patch
        x = self.x_embedder(x) + self._positions(rows, cols)  # [B, L, D]
        c = self.t_embedder(t, dtype=x.dtype) + self.y_embedder(y)  # [B, D]
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, c)  # type: ignore[misc]  # the same
            else:
                x = block(x, c)
        x = self.final_layer(x, c)  # [B, L, patch * patch * out_c]
        x = x.unflatten(1, (rows, cols)).unflatten(3, (patch, patch, self.out_channels))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def _positions(self, rows: int, cols: int) -> Tensor:
        side = self.config.input_size // self.config.patch_size
        if (rows, cols) == (side, side):
            return self.pos_embed
        return sincos_2d(self.config.hidden_size, rows, cols).to(self.pos_embed)

    def _initialise(self) -> None:
        """Initialise as published: Xavier linears, N(0, 0.02) embedders, zero modulations and head (adaLN-Zero)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.data.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.get_parameter("bias"))
        for embedder in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(embedder.get_parameter("weight"), std=0.02)
        modulations = [b.adaLN_modulation for b in (*self.blocks, self.final_layer)]
        for linear in (*(m[-1] for m in modulations), self.final_layer.linear):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)


def _is_size(size: object) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and size > 0


class DiTBlock(nn.Module):
    """Attention, then MLP, each on a modulated LayerNorm and behind a gate, all six made from the condition."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.attn = Attention(hidden_size, num_heads)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Float[Tensor, "b l d"], c: Float[Tensor, "b d"]) -> Float[Tensor, "b l d"]:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        x = x + gate_1 * self.attn(modulated_norm(x, shift_1, scale_1, EPSILON))
        return x + gate_2 * self.mlp(modulated_norm(x, shift_2, scale_2, EPSILON))


class Attention(nn.Module):
    """Multi-head softmax attention over all tokens, x [B, L, D] -> [B, L, D]."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B, L, 3, H, K]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)  # [B, H, L, K]
        return self.proj(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))), with the tanh form of GELU."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class ParallelBlocks(nn.ModuleList):
    """DiT blocks that get one input: gives what each adds to its tokens, [n, B, L, D] or one by one.

    Without gradients, plain blocks run as one batched pass. It reads the weights of all blocks as one tensor without a
    copy that could grow old: parameters of one name lie side by side in memory, and stay the blocks' own. `eval()` and
    moves to a device or dtype see to that. Where it is not so (a parameter or a layer was replaced since, or has a hook),
    blocks run one after the other.
    """

    def __init__(self, blocks: Iterable[nn.Module]):
        super().__init__(blocks)
        self._prepare()

    def forward(
        self, x: Float[Tensor, "b l d"], c: Float[Tensor, "b d"]
    ) -> Float[Tensor, "n b l d"] | list[Float[Tensor, "b l d"]]:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not self._one_pass:
            return [block(x, c) - x for block in self]
        if not self._one_pass.holds():
            return [block(x, c) - x for block in self]
        return self._one_pass(x, c)

    def train(self, mode: bool = True) -> "ParallelBlocks":
        super().train(mode)
        if not mode:
            self._prepare()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ParallelBlocks":
        super()._apply(fn, recurse)
        self._prepare()
        return self

    def _prepare(self) -> None:
        self._one_pass = _OnePass(list(self)) if all(map(_is_plain, self)) else None

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_one_pass": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        """A copy: its parameters have memory of their own."""
        super().__setstate__(state)
        self._prepare()


class _OnePass:
    """Plain DiT blocks on one input as one batched pass over weights that lie side by side; it lays them so."""

    def __init__(self, blocks: Sequence[Any]):
        self.num_heads = blocks[0].attn.num_heads
        by_name = [
            parameters
            for layers in zip(*map(_linears, blocks), strict=True)
            for parameters in (tuple(x.weight for x in layers), tuple(x.bias for x in layers))
        ]
        self.weights = [_laid_side_by_side(parameters) for parameters in by_name]
        self._modules = [module for block in blocks for module in block.modules()]
        self._parameters = [p for parameters in by_name for p in parameters]
        self._tables = [table for m in self._modules for table in (m._modules, m._parameters)]
        self._hooks = [hooks for m in self._modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        # modules, parameters and their memory are all held here, so nothing new can have their ids or addresses
        self._contents = self._found()

    def holds(self) -> bool:
        """True if blocks and weights are still those that were laid out, with no hooks that a pass would not call."""
        as_called = not any(self._hooks) and not any("forward" in vars(module) for module in self._modules)
        return as_called and self._found() == self._contents

    def _found(self) -> tuple[list[int], list[int]]:
        """Modules and parameters of the blocks, and the parameters' memory addresses."""
        items = [id(item) for table in self._tables for item in table.values()]
        return items, [p.data_ptr() for p in self._parameters]

    def __call__(self, x: Float[Tensor, "b l d"], c: Float[Tensor, "b d"]) -> Float[Tensor, "n b l d"]:
        """As `DiTBlock.forward` does it one by one, less x."""
        modulation, modulation_bias, qkv, qkv_bias, proj, proj_bias, fc1, fc1_bias, fc2, fc2_bias = (
            self.weights
        )
        n, (b, length, dim) = len(qkv), x.shape
        made = F.linear(F.silu(c), modulation.flatten(0, 1), modulation_bias.flatten())  # [B, n 6 D]
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = made.view(b, n, 6, 1, dim).permute(2, 1, 0, 3, 4)
        y = torch.addcmul(shift_1, F.layer_norm(x, (dim,), eps=EPSILON), 1 + scale_1)  # [n, B, L, D]
        y = torch.baddbmm(qkv_bias[:, None], y.reshape(n, b * length, dim), qkv.mT)
        q, k, v = y.view(n * b, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)  # [n B, L, H, K]
        y = torch.baddbmm(proj_bias[:, None], y.reshape(n, b * length, dim), proj.mT)
        update = gate_1 * y.view(n, b, length, dim)
        y = torch.addcmul(shift_2, F.layer_norm(x + update, (dim,), eps=EPSILON), 1 + scale_2)
        y = torch.baddbmm(fc1_bias[:, None], y.reshape(n, b * length, dim), fc1.mT)
        y = torch.baddbmm(fc2_bias[:, None], F.gelu(y, approximate="tanh"), fc2.mT)
        # a token's updates lie together, to be merged
        updates = y.new_empty(b, length, n, dim).permute(2, 0, 1, 3)
        return torch.addcmul(update, gate_2, y.view(n, b, length, dim), out=updates)


def _linears(block: Any) -> tuple[nn.Linear, ...]:
    return block.adaLN_modulation[1], block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2


def _is_plain(block: Any) -> bool:
    """True if a block is as it was made, in memory of its own."""
    return (
        type(block) is DiTBlock
        and type(block.attn) is Attention
        and type(block.mlp) is Mlp
        and all(type(linear) is nn.Linear for linear in _linears(block))
        and all(type(p) is nn.Parameter and not p.is_meta for p in block.parameters())
        and len(list(block.parameters())) == 2 * len(_linears(block))
    )


@torch.no_grad()
def _laid_side_by_side(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Parameters of one shape as one tensor [n, ...], moved into one memory where they are not yet."""
    together = side_by_side(parameters)
    if together is None:
        together = torch.stack([p.detach() for p in parameters])
        for parameter, row in zip(parameters, together, strict=True):
            parameter.data = row
    return together


def side_by_side(parameters: Sequence[Tensor]) -> Tensor | None:
    """Tensors of one shape that follow each other in one memory, as one tensor [n, ...] of it; None if they do not."""
    first, size = parameters[0], parameters[0].numel()
    addresses = [first.data_ptr() + i * size * first.itemsize for i in range(len(parameters))]
    alike = all(p.shape == first.shape and p.dtype == first.dtype and p.is_contiguous() for p in parameters)
    if not alike or [p.data_ptr() for p in parameters] != addresses:
        return None
    end = (first.storage_offset() + len(parameters) * size) * first.itemsize
    if end > first.untyped_storage().nbytes():
        return None
    return first.detach().as_strided((len(parameters), *first.shape), (size, *first.stride()))


class PatchEmbedder(nn.Module):
    """Cuts an image into patches and projects each: [B, C, H, W] -> [B, L, D], raster order."""

    def __init__(self, patch_size: int, in_channels: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b l d"]:
        patch = self.proj.kernel_size[0]
        if x.shape[2] % patch or x.shape[3] % patch:
            raise ValueError(
                f"an image of {x.shape[2]} x {x.shape[3]} pixels does not divide into patches of {patch} x {patch}"
            )
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of the step (cos first, 256 of them), then a two-layer SiLU network."""

    num_features = 256

    def __init__(self, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.num_features, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor, *, dtype: torch.dtype) -> Float[Tensor, "b d"]:
        half = self.num_features // 2
        steps = torch.arange(half, dtype=torch.float32, device=t.device)
        angles = t[:, None].float() * torch.exp(-math.log(10000) * steps / half)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        # not in that of a weight: layers may be stored in another dtype than they compute in
        return self.mlp(features.to(dtype))


class LabelEmbedder(nn.Module):
    """A vector per class, and one for the null label where labels are dropped in training."""

    def __init__(self, num_classes: int, dim: int, dropout_prob: float):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), dim)

    def forward(self, y: Int[Tensor, " b"]) -> Float[Tensor, "b d"]:
        return self.embedding_table(y)


class FinalLayer(nn.Module):
    """Modulated LayerNorm and a linear map from a token to its patch."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Float[Tensor, "b l d"], c: Float[Tensor, "b d"]) -> Float[Tensor, "b l out"]:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, -1)
        return self.linear(modulated_norm(x, shift, scale, EPSILON))


def sincos_2d(dim: int, rows: int, cols: int) -> Float[Tensor, "1 l d"]:
    """Fixed positions: sin and cos of the column in the first half of the channels, of the row in the second.

    Source: facebookresearch/DiT `get_2d_sincos_pos_embed` ("here w goes first").
    """
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    col_angles = torch.arange(cols, dtype=torch.float64)[:, None] * frequencies
    row_angles = torch.arange(rows, dtype=torch.float64)[:, None] * frequencies
    by_col = torch.cat([col_angles.sin(), col_angles.cos()], -1).expand(rows, cols, -1)
    by_row = torch.cat([row_angles.sin(), row_angles.cos()], -1)[:, None].expand(rows, cols, -1)
    return torch.cat([by_col, by_row], -1).flatten(0, 1)[None].float()
