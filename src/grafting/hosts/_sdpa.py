"""The generic host: any transformer whose attention calls `scaled_dot_product_attention`, described as data.

It takes kernels only: those need no knowledge of how the model calls its attention. A model that is used often deserves
a file of its own beside this one, as Flux has; for any other, pass `SdpaHost(SdpaSpec(...))` to `graft`.
"""

import copy
import inspect
import math
import pkgutil
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any, Literal, NoReturn

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from ..contract import AttentionWeights, BlockCall, Grid, Kwargs, MlpWeights, Site, TokenLayout
from ..diffusion import FlowMatching
from ..errors import HostError
from ..machine.settings import Settings
from ._host import Host

Fact = str | int | tuple[int, ...]
"""A number, or where the model keeps it: a dotted attribute such as `config.num_attention_heads`."""


class BlockList(Settings):
    """Some of the model's blocks, in the order in which they run."""

    path: str
    """Module path of the list."""
    attention: str
    """Module path, inside a block, of the attention whose kernel may be replaced."""
    arguments: tuple[str, ...] = ()
    """A block's first arguments, in their places, up to the last of its token tensors."""
    returns: tuple[str, ...] = ()
    """Names of the updated inputs it returns, in order; if omitted, these blocks cannot be merged or dropped."""


class LatentTokens(Settings):
    """Image tokens cut by the model itself from an image [B, C, H, W] or video [B, C, F, H, W]."""

    kind: Literal["latent"] = "latent"
    argument: str = "hidden_states"
    patch_size: Fact = "config.patch_size"
    """Side of a patch, or its size along each axis."""


class PackedTokens(Settings):
    """Image tokens that reach the model as a sequence [B, L, C], with their places beside them."""

    kind: Literal["packed"] = "packed"
    argument: str = "hidden_states"
    positions: str
    """Argument [L, n] or [B, L, n] that holds each token's place; row and column are its last two entries."""


class SdpaSpec(Settings):
    """A model class as data."""

    name: str
    model_class: str
    """Import path: `package.module:Class`."""
    blocks: tuple[BlockList, ...] = Field(min_length=1)
    """The lists of blocks, in the order in which they run; blocks are counted through all of them."""
    num_heads: Fact = "config.num_attention_heads"
    head_dim: Fact = "config.attention_head_dim"
    image: LatentTokens | PackedTokens = Field(discriminator="kind")
    text: str | None = None
    """Argument [B, T, C] of the text tokens that take part in the attention, if any do."""
    text_first: bool = True
    native_grid: Grid
    """The grid that the model was trained for; a forward pass may have another."""
    native_num_text: int = 0
    channels: Fact = "config.in_channels"
    """Of an input, as the noise process sees it."""
    time_scale: PositiveFloat = 1000.0
    """Time value that the model receives for pure noise."""
    shift: PositiveFloat = 1.0
    """Of its steps towards noise; 1 leaves them as they are."""
    distilled: bool = False
    """Distilled for guidance or few steps, as published."""


class SdpaHost(Host[nn.Module]):
    """The host that a spec describes.

    Args:
        spec: the model class.
        grid: the one grid that the model will see. Packed image tokens need it under `torch.compile` of the whole
            model, where positions cannot be read; other models are told the grid by their input's shape.
    """

    calls = {}

    def __init__(self, spec: SdpaSpec, *, grid: Grid | None = None):
        self.name = spec.name
        self.spec = spec
        self.grid = grid
        self.time_scale, self.distilled = spec.time_scale, spec.distilled

    def at_grid(self, grid: Grid) -> "SdpaHost":
        host = copy.copy(self)
        host.grid = grid
        return host

    @property
    def model_class(self) -> type[nn.Module]:
        return pkgutil.resolve_name(self.spec.model_class)

    def sites(self, model: nn.Module) -> tuple[Site, ...]:
        """Every attention that the spec names.

        Raises:
            HostError: the spec names a module or a fact that the model does not have.
        """
        try:
            num_heads, head_dim = _fact(model, self.spec.num_heads), _fact(model, self.spec.head_dim)
            paths = [f"{path}.{blocks.attention}" for path, blocks in self._block_paths(model)]
            for path in paths:
                model.get_submodule(path)
        except AttributeError as error:
            raise HostError(f"spec {self.name!r} does not fit {type(model).__name__}: {error}") from error
        facts = {
            "role": "attention",
            "dim": num_heads * head_dim,
            "num_heads": num_heads,
            "grid": self.grid or self.spec.native_grid,
            "num_text": self.spec.native_num_text,
        }
        return tuple(Site(block=i, path=path, **facts) for i, path in enumerate(paths))

    def blocks(self, model: nn.Module) -> tuple[Site, ...]:
        """Lists whose calls the spec describes."""
        facts = {
            "role": "block",
            "dim": _fact(model, self.spec.num_heads) * _fact(model, self.spec.head_dim),
            "grid": self.grid or self.spec.native_grid,
            "num_text": self.spec.native_num_text,
        }
        return tuple(
            Site(block=i, path=path, call=BlockCall(blocks.arguments, blocks.returns), **facts)
            for i, (path, blocks) in enumerate(self._block_paths(model))
            if blocks.returns
        )

    def _block_paths(self, model: nn.Module) -> list[tuple[str, BlockList]]:
        return [
            (f"{blocks.path}.{i}", blocks)
            for blocks in self.spec.blocks
            for i, _ in enumerate(model.get_submodule(blocks.path).children())
        ]

    def layout(self, model: nn.Module, *args: Any, **kwargs: Any) -> TokenLayout:
        arguments = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | kwargs
        num_text = arguments[self.spec.text].shape[1] if self.spec.text else 0
        return TokenLayout(self._grid(model, arguments), num_text, self.spec.text_first)

    def _grid(self, model: nn.Module, arguments: Mapping[str, Any]) -> Grid:
        image = self.spec.image
        if isinstance(image, LatentTokens):
            return _latent_grid(arguments[image.argument], _fact(model, image.patch_size))
        num_tokens = arguments[image.argument].shape[1]
        if self.grid is None:
            if torch.compiler.is_compiling():
                raise HostError(
                    f"{self.name}: the grid stands in {image.positions}, which a compiled model cannot read: "
                    "graft with host=...(grid=Grid(rows, cols)), or compile the blocks alone"
                )
            return _read_grid(arguments[image.positions], num_tokens, image.positions)
        if self.grid.num_tokens != num_tokens:
            raise HostError(f"{self.name}: {num_tokens} image tokens, but its host was made for {self.grid}")
        return self.grid

    def attention_weights(self, attention: nn.Module) -> AttentionWeights:
        self._refuse("projections that a mixer could inherit")

    def mlp_weights(self, mlp: nn.Module) -> MlpWeights:
        self._refuse("MLPs")

    def predict(self, model: nn.Module, x_t: Tensor, t: Tensor, condition: Mapping[str, Any]) -> Tensor:
        """For models that take the image as it is; the condition holds all other keyword arguments."""
        if self.spec.image.kind == "packed":
            self._refuse("how to pack an image")
        return model(**{self.spec.image.argument: x_t}, timestep=t, return_dict=False, **condition)[0]

    def process(self, model: nn.Module) -> FlowMatching:
        return FlowMatching(scale=self.spec.time_scale, shift=self.spec.shift)

    def shape(self, model: nn.Module) -> tuple[int, ...]:
        image, grid = self.spec.image, self.grid or self.spec.native_grid
        if isinstance(image, PackedTokens):
            self._refuse("the shape of an image before it is packed")
        patch = _fact(model, image.patch_size)
        sides = (patch, patch) if isinstance(patch, int) else patch
        places = (grid.frames, grid.rows, grid.cols)[-len(sides) :]
        return (_fact(model, self.spec.channels), *(n * side for n, side in zip(places, sides, strict=True)))

    def tiny(self) -> nn.Module:
        self._refuse("a tiny instance")

    def example(
        self, model: nn.Module, *, rows: int, cols: int, batch_size: int, frames: int = 1, num_text: int = 5
    ) -> Kwargs:
        self._refuse("example inputs")

    def _refuse(self, what: str) -> NoReturn:
        raise HostError(f"host {self.name!r} is described for kernels only and does not declare {what}")


def _fact(model: nn.Module, fact: Fact) -> Any:
    return attrgetter(fact)(model) if isinstance(fact, str) else fact


def _latent_grid(latent: Tensor, patch_size: int | Sequence[int]) -> Grid:
    sizes = latent.shape[2:]
    patches = (patch_size,) * len(sizes) if isinstance(patch_size, int) else patch_size
    *frames, rows, cols = (size // patch for size, patch in zip(sizes, patches, strict=True))
    return Grid(rows, cols, *frames)


def _read_grid(positions: Tensor, num_tokens: int, argument: str) -> Grid:
    """The grid that positions [(B,) L, n] form; they must be one frame in raster order."""
    places = positions.reshape(-1, positions.shape[-1])[:num_tokens, -2:].round().long()  # [L, 2]
    rows, cols = (places.amax(0) - places.amin(0) + 1).tolist()
    raster = torch.cartesian_prod(torch.arange(rows), torch.arange(cols)).to(places.device)
    if math.prod((rows, cols)) != num_tokens or not torch.equal(places - places.amin(0), raster):
        raise HostError(
            f"{argument} is not one grid in raster order: {num_tokens} image tokens, {rows} rows and {cols} columns"
        )
    return Grid(rows, cols)
