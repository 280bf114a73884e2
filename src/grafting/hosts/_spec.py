"""A model class as data: what the generic host (`_sdpa.py`) needs to know of it, and all that it knows.

A spec is a YAML or JSON file: those of `specs/` come with the library, others are given with `--spec FILE` or as
`SdpaHost(SdpaSpec(...))`, and every graft carries its own. Where a field takes a *fact*, it takes a number, or the place where the
model keeps it, such as `config.num_attention_heads`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, Literal

import torch.nn.functional as F
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    field_serializer,
    model_validator,
)
from torch import Tensor

from ..contract import AttentionCall, Grid, ModuleCall
from ..diffusion import FlowConfig, ProcessConfig

Fact = str | NonNegativeInt
"""A number, or where the model keeps it: a dotted attribute such as `config.num_attention_heads`, an entry of a list such as
`config.caption_channels.0`, the quotient of two, `config.dim / config.n_heads`, or a square root, `config.num_places ** 0.5`."""
Size = str | PositiveInt
"""A fact that is at least 1."""
Activation = Literal["gelu", "gelu-tanh", "silu", "relu"]
ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu-tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


def _has_tokens(grid: Grid) -> Grid:
    if min(grid.rows, grid.cols, grid.frames) < 1:
        raise ValueError(f"{grid} has no tokens: each side is at least 1")
    return grid


def _is_word(name: str) -> str:
    if not name.isprintable() or not name.strip() or name[0] == "." or {"/", "\\"} & set(name):
        raise ValueError("a host's name is a word, and no path")
    return name


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class MlpLayers(_Spec):
    """The layers inside an MLP, down(activation(up(x)))."""

    up: str
    """Module path, inside the MLP, of its first linear layer."""
    down: str
    activation: Activation = "gelu-tanh"
    gated: bool = False
    """True if more stands between them than this function, such as a gate: there is then nothing to inherit."""


class BlockList(_Spec):
    """Some of the model's blocks, in the order in which they run."""

    path: str
    """Module path of the list."""
    attention: str
    """Module path, inside a block, of the attention whose kernel may be replaced; empty where the block itself is it."""
    order: tuple[str, ...] | None = None
    """As the spec's own `order`, where these blocks have another."""
    image_queries: bool = False
    """True if the queries are those of the image alone, and the keys are all tokens."""
    turn: tuple[Literal["image", "other"], ...] = ("image",)
    """Calls of `scaled_dot_product_attention` in a pass of the attention, in order: kernels answer those marked `image`, and
    those marked `other`, such as of text alone, go through as they are. Empty where it makes none, as linear attention: mixers
    alone may then replace it."""
    masked: bool = False
    """True if its calls may have a key mask, as for padded prompts: operators that cannot honour one are then refused."""
    num_heads: Size | None = None
    """Heads, where these blocks have other heads than the spec says."""
    mixers: ModuleCall | None = None
    """How the block calls its attention, if tokens come and go as one tensor: mixers may then replace it."""
    mlp: str | None = None
    """Module path, inside a block, of its MLP, if tokens come and go as one tensor: mixers may then replace it."""
    mlp_call: ModuleCall = ModuleCall()
    """How the block calls it."""
    image_alone: tuple[Literal["attention", "mlp"], ...] = ()
    """Which of the two see the image's tokens alone, where others of the model see all: the MLP of a block of two streams, or
    both in a refiner of the image."""
    arguments: tuple[str, ...] = ()
    """A block's first arguments, in their places, up to the last of its token tensors."""
    returns: tuple[str, ...] = ()
    """Names of the updated inputs it returns, in order; if omitted, these blocks cannot be merged or dropped."""
    fixed: dict[int, str] = {}
    """Blocks of this list, by number from 0 (-1 is the last), that cannot be merged or dropped, and why."""
    apart: dict[int, str] = {}
    """Blocks of this list, by number from 0, that can be dropped and not merged, and why."""

    @model_validator(mode="after")
    def _apart(self) -> "BlockList":
        if not self.attention and (self.mlp or self.mixers or self.returns):
            raise ValueError(
                "where the block itself is the `attention`, it takes kernels alone: no `mlp`, `mixers` or `returns`"
            )
        if self.mlp is not None and f"{self.mlp}.".startswith(f"{self.attention}."):
            raise ValueError(
                f"`attention` says {self.attention!r}, and `mlp` {self.mlp!r}: they are two modules"
            )
        return self

    def attention_of(self, block: str) -> str:
        """Path of the attention of the block at this path."""
        return f"{block}.{self.attention}" if self.attention else block

    def call(self, order: tuple[str, ...]) -> AttentionCall:
        """What stands in the calls that kernels answer; `order` is the spec's own."""
        return AttentionCall(
            order=self.order or order,
            image_queries=self.image_queries,
            turn=self.turn,
            masked=self.masked,
        )


class LatentTokens(_Spec):
    """Image tokens cut by the model itself from an image or a video."""

    argument: str = "hidden_states"
    axes: str | None = None
    """The argument's axes: `b` sample, `c` channels, `f` frames, `h` height, `w` width, such as `b f c h w`; `n` is frames that
    the attention sees one by one; without `b`, it is a list of such tensors, one a sample. By default `b c h w` or `b c f h w`,
    as many as there are."""
    patch_size: Size | tuple[Size, ...] = "config.patch_size"
    """Side of a patch, or its size along frames, height and width (or the last two)."""
    native_frames: PositiveInt = 1
    """Along `n`."""
    beside: NonNegativeInt = 0
    """Channels of the argument behind those of `channels`: a condition holds them under the argument's name, such as an image to
    start from."""


class PackedTokens(_Spec):
    """Image tokens that reach the model as a sequence [B, L, C]; it returns them so, alone or among all tokens."""

    argument: str = "hidden_states"
    positions: str | None = None
    """Argument [L, n] or [B, L, n] that holds each token's place."""
    after: tuple[str, ...] = ()
    """Arguments whose tokens [B, T, C] stand in `positions` before the image's."""
    width: PositiveInt = 3
    """Entries of a place, n."""
    columns: tuple[int, ...] = (-2, -1)
    """Which of them are the row and the column, or the frame, the row and the column."""
    sizes: str | tuple[str, ...] | None = None
    """Where there are no positions: the arguments that hold frames, rows and columns as numbers, or the one that holds, for
    each sample, a list of them."""
    patch: PositiveInt = 2
    """A token is a square of this side, its channels the slowest: [C, patch, patch]."""
    whole: bool = False
    """True if its axes are those of the argument, [B, L, C, 1, patch, patch]."""

    @model_validator(mode="after")
    def _one_place(self) -> "PackedTokens":
        if (self.positions is None) == (self.sizes is None):
            raise ValueError("the grid of packed tokens is read from `positions` or from `sizes`: name one")
        return self


def _kind_of_image(value: Any) -> str:
    is_packed = (
        value.keys() & {"positions", "sizes"} if isinstance(value, dict) else isinstance(value, PackedTokens)
    )
    return "packed" if is_packed else "latent"


Image = Annotated[
    Annotated[LatentTokens, Tag("latent")] | Annotated[PackedTokens, Tag("packed")],
    Discriminator(_kind_of_image),
]
"""Packed tokens have `positions` or `sizes`; all others are latents."""


class Time(_Spec):
    """The argument that says how noisy the input is."""

    argument: str = "timestep"
    scale: PositiveFloat = 1000.0
    """Its value for pure noise."""
    reversed: bool = False
    """True if it is 0 for pure noise and `scale` for a clean image."""
    whole: bool = False
    """True if it is a whole number."""
    per: Literal["sample", "frame", "token"] = "sample"
    """What has an entry of its own: where each frame or each token of the image has, it is [B, that many]."""


class Output(_Spec):
    """What the model returns."""

    sign: Literal[1, -1] = 1
    """-1 if it is minus what the process is trained to predict."""
    half: bool = False
    """True if its first half of channels is the prediction (the rest a variance)."""


class Input(_Spec):
    """An argument beside image and time: its shape, and its value where that is always the same."""

    shape: tuple[Fact, ...] = ()
    """Numbers, facts, and `batch`, `text` (other tokens), `frames`, `rows`, `cols`, `tokens` (of the image)."""
    value: JsonValue = None
    """A number that fills the shape, or without a shape the argument itself; it is passed where a condition does not hold the
    argument. None for what differs from one prompt to the next."""
    each: bool = False
    """True if it is a list of such tensors, one a sample."""
    dtype: Literal["float", "long", "bool"] = "float"
    needs: Fact = 1
    """Left out where this fact is 0, false or None."""


class SdpaSpec(_Spec):
    """A model class as data."""

    name: Annotated[str, AfterValidator(_is_word)]
    """Of the host; it is part of no path."""
    about: str = ""
    """What these models are, in a sentence or two."""
    model_class: str
    """Import path: `package.module:Class`."""
    blocks: tuple[BlockList, ...] = Field(min_length=1)
    """The lists of blocks, in the order in which they run; blocks are counted through all of them."""
    num_heads: Size = "config.num_attention_heads"
    head_dim: Size = "config.attention_head_dim"
    order: tuple[str, ...] = ("image",)
    """Runs of tokens among the keys, in their order: `image`, `rest` for all others (text, registers, history), and names of
    arguments, each as many tokens as it is long, where there are others on both sides. It ends with `image` and `padding` where
    texts are cut to their own lengths and what is padded stands behind the image."""
    image: Image = LatentTokens()
    native_grid: Annotated[Grid, AfterValidator(_has_tokens)]
    """The image tokens that the model was trained for; a forward pass may have another grid."""
    own_grid: tuple[Size, Size] | tuple[Size, Size, Size] | None = None
    """Where a model's config says that, for models of other sizes than the published: rows and columns, or frames, rows and columns."""
    most: tuple[Size, Size] | tuple[Size, Size, Size] | None = None
    """The most rows and columns, or frames, rows and columns, where positions stand in a table that ends."""
    native_num_text: NonNegativeInt = 0
    """Other tokens beside them."""
    channels: Size = "config.in_channels"
    """Of an input; where it is packed, of a token. Those `beside` them are not counted."""
    projections: tuple[str, str, str, str] | None = None
    """Paths, inside an attention, of its linear layers q, k, v and out, which mixers then start from."""
    mlp: MlpLayers | None = None
    """The layers inside an MLP, which mixers then start from."""
    time: Time = Time()
    output: Output = Output()
    process: ProcessConfig | None = FlowConfig()
    """How inputs are noised, where a recipe does not say; null where grafting does not have that process."""
    distilled: bool = False
    """Distilled for guidance or few steps, as published: stage 2 then trains on the teacher's output."""
    pipeline_fault: str = ""
    """Why no pipeline of the class draws with operators in its transformer: such grafts are refused."""
    inputs: dict[str, Input | tuple[Fact, ...]] = {}
    """The other arguments by name: each an `Input`, or its shape alone."""
    tiny: dict[str, JsonValue] | None = None
    """Settings of a small instance, for tests and trials."""

    @field_serializer("process")
    def _with_name(self, process: ProcessConfig | None) -> dict[str, JsonValue] | None:
        """Whole, also where defaults are left out: its name is one."""
        return None if process is None else process.model_dump(mode="json")

    @model_validator(mode="after")
    def _orders(self) -> "SdpaSpec":
        for order in (self.order, *(blocks.order or ("image",) for blocks in self.blocks)):
            if order.count("image") != 1 or order.count("rest") > 1:
                raise ValueError(f"order {list(order)} needs `image` once, and `rest` at most once")
            if "padding" in order and order[-2:] != ("image", "padding"):
                raise ValueError(f"order {list(order)}: `padding` stands at the end, behind `image`")
        return self
