"""The generic host: any transformer whose attention calls `scaled_dot_product_attention`, described as data (`_spec.py`)."""

import copy
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..contract import AttentionWeights, BlockCall, Grid, Kwargs, MlpWeights, NoiseProcess, Site
from ..errors import HostError
from ._grids import (
    as_argument,
    as_images,
    fact,
    latent_grid,
    pack,
    packed_grid,
    patch_sizes,
    positions_of,
    sizes_of,
    unpack,
)
from ._host import Host, linear_weights, randomise
from ._spec import ACTIVATIONS, BlockList, Input, LatentTokens, SdpaSpec

_DTYPES = {"float": torch.float32, "long": torch.long, "bool": torch.bool}

_COUNTS = frozenset({"batch", "text", "frames", "rows", "cols", "tokens"})
"""Sides of an argument that differ from call to call."""


class SdpaHost(Host[nn.Module]):
    """The host that a spec describes.

    Args:
        spec: the model class.
        grid: the one grid that the model will see. Image tokens with positions need it under `torch.compile` of the whole
            model, where these cannot be read; other models are told the grid by their input's shape.
    """

    def __init__(self, spec: SdpaSpec, *, grid: Grid | None = None):
        self.name = spec.name
        self.class_name = spec.model_class.rpartition(":")[2].rpartition(".")[2]
        self.spec = spec
        self.grid = grid
        self.time_scale, self.distilled = spec.time.scale, spec.distilled

    def at_grid(self, grid: Grid) -> "SdpaHost":
        host = copy.copy(self)
        host.grid = grid
        return host

    @property
    def model_class(self) -> type[nn.Module]:
        """The class.

        Raises:
            HostError: it cannot be imported, or is no model.
        """
        try:
            found = pkgutil.resolve_name(self.spec.model_class)
        except (ImportError, AttributeError, ValueError) as error:
            raise HostError(
                f"host {self.name!r} is of class {self.spec.model_class}, which cannot be imported: {error}; install what has "
                "it, or name another in the spec's model_class, as `package.module:Class`"
            ) from error
        if not (isinstance(found, type) and issubclass(found, nn.Module)):
            raise HostError(
                f"host {self.name!r}: {self.spec.model_class} is no class of models (torch.nn.Module)"
            )
        return found

    def sites(self, model: nn.Module) -> tuple[Site, ...]:
        """Every attention and MLP that the spec names.

        Raises:
            HostError: the spec is of another class, or names a module or a fact that the model does not have.
        """
        if not isinstance(model, self.model_class):
            raise HostError(
                f"spec {self.name!r} is of {self.class_name}, and the model is a {type(model).__name__}"
            )
        try:
            return tuple(
                site
                for number, (path, blocks) in enumerate(self._block_paths(model))
                for site in self._sites_of(model, number, path, blocks)
            )
        except (AttributeError, KeyError, IndexError, TypeError) as error:
            raise HostError(
                f"spec {self.name!r} does not fit {type(model).__name__}: {error}; it is for a class as another version of its "
                "package has it"
            ) from error

    def _sites_of(self, model: nn.Module, number: int, path: str, blocks: BlockList) -> Iterator[Site]:
        facts = self._facts(model, number, blocks)
        attention = f"{path}.{blocks.attention}"
        model.get_submodule(attention)
        num_heads = fact(model, blocks.num_heads or self.spec.num_heads)
        yield Site(role="attention", path=attention, num_heads=num_heads, module=blocks.mixers, **facts)
        if blocks.mlp is not None:
            module = model.get_submodule(f"{path}.{blocks.mlp}")
            layers = self.spec.mlp
            placed = getattr(module, "site", None)  # where an operator stands already, it knows its site
            if placed is not None:
                width = placed.hidden_dim
            else:
                width = _linear(module.get_submodule(layers.down)).in_features if layers else 4 * facts["dim"]
            yield Site(
                role="mlp", path=f"{path}.{blocks.mlp}", hidden_dim=width, module=blocks.mlp_call, **facts
            )

    def _facts(self, model: nn.Module, number: int, blocks: BlockList) -> dict[str, Any]:
        return {
            "block": number,
            "dim": fact(model, blocks.num_heads or self.spec.num_heads) * fact(model, self.spec.head_dim),
            "grid": self.grid or self.spec.native_grid,
            "num_text": self.spec.native_num_text,
            "attention": blocks.call(self.spec.order),
        }

    def blocks(self, model: nn.Module) -> tuple[Site, ...]:
        """Lists whose calls the spec describes."""
        found = []
        first: dict[str, int] = {}
        for number, (path, blocks) in enumerate(self._block_paths(model)):
            place = number - first.setdefault(blocks.path, number)
            count = len(model.get_submodule(blocks.path))  # type: ignore[arg-type]  # a ModuleList
            fixed = blocks.fixed.get(place, blocks.fixed.get(place - count, ""))
            call, facts = BlockCall(blocks.arguments, blocks.returns), self._facts(model, number, blocks)
            if blocks.returns:
                found.append(Site(role="block", path=path, call=call, fixed=fixed, **facts))
        return tuple(found)

    def _block_paths(self, model: nn.Module) -> list[tuple[str, BlockList]]:
        return [
            (f"{blocks.path}.{i}", blocks)
            for blocks in self.spec.blocks
            for i, _ in enumerate(model.get_submodule(blocks.path).children())
        ]

    def image_grid(self, model: nn.Module, arguments: Mapping[str, Any]) -> Grid:
        image = self.spec.image
        if isinstance(image, LatentTokens):
            return latent_grid(model, image, arguments[image.argument])
        if image.positions is None:
            return packed_grid(image, arguments)
        if self.grid is None:
            if torch.compiler.is_compiling():
                raise HostError(
                    f"{self.name}: the grid stands in {image.positions}, which a compiled model cannot read: "
                    "graft with host=host_of(model).at_grid(Grid(rows, cols)), or compile the blocks alone"
                )
            return packed_grid(image, arguments)
        num_tokens = arguments[image.argument].shape[1]
        if self.grid.num_tokens != num_tokens:
            raise HostError(f"{self.name}: {num_tokens} image tokens, but its host was made for {self.grid}")
        return self.grid

    def lengths(self, model: nn.Module, arguments: Mapping[str, Any]) -> dict[str, int]:
        orders = {self.spec.order, *(blocks.order or () for blocks in self.spec.blocks)}
        names = {name for order in orders for name in order} - {"image", "rest", "padding"}
        return {name: arguments[name].shape[1] for name in names if arguments.get(name) is not None}

    def attention_weights(self, attention: nn.Module) -> AttentionWeights:
        if self.spec.projections is None:
            self._refuse("projections that a mixer could inherit (`projections`): use init: random")
        q, k, v, out = (attention.get_submodule(path) for path in self.spec.projections)
        return AttentionWeights(*(linear_weights(_linear(layer)) for layer in (q, k, v, out)))

    def output_layer(self, attention: nn.Module) -> nn.Linear | None:
        if self.spec.projections is None:
            return None
        return _linear(attention.get_submodule(self.spec.projections[3]))

    def mlp_weights(self, mlp: nn.Module) -> MlpWeights:
        layers = self.spec.mlp
        if layers is None:
            self._refuse("the layers of its MLPs (`mlp`): use init: random")
        up, down = (_linear(mlp.get_submodule(path)) for path in (layers.up, layers.down))
        if layers.gated or up.out_features != down.in_features:
            raise HostError(
                f"an MLP from {up.out_features} to {down.in_features} channels is gated and has no plain two-layer form to "
                "inherit from: use init: random"
            )
        return MlpWeights(linear_weights(up), linear_weights(down), ACTIVATIONS[layers.activation])

    def predict(self, model: nn.Module, x_t: Tensor, t: Tensor, condition: Mapping[str, Any]) -> Tensor:
        """The prediction for images, or videos, with the condition's tensors as keyword arguments."""
        spec, grid, is_video = self.spec, self._grid_of(model, x_t), x_t.ndim == 5
        time = spec.time.scale - t if spec.time.reversed else t
        given = {spec.time.argument: time.long() if spec.time.whole else time}
        known = {**self._constants(model, grid, len(x_t), condition, like=x_t), **given, **condition}
        # positions of a condition's tokens and the image's may lie in one argument, which the condition then holds
        returned = model(**{**self._image_arguments(x_t, grid), **known}, return_dict=False)
        output = returned if isinstance(returned, Tensor) else returned[0]
        if isinstance(spec.image, LatentTokens):
            output = as_images(output, spec.image.axes, is_video=is_video)
        else:
            output = unpack(output, grid, spec.image.patch, is_video=is_video)
        output = output.chunk(2, dim=1)[0] if spec.output.half else output
        return spec.output.sign * output

    def _grid_of(self, model: nn.Module, x: Tensor) -> Grid:
        """The image tokens of images [B, C, H, W] or videos [B, C, F, H, W]."""
        image = self.spec.image
        sides = (
            patch_sizes(model, image) if isinstance(image, LatentTokens) else (1, image.patch, image.patch)
        )
        *frames, rows, cols = x.shape[2:]
        return Grid(rows // sides[1], cols // sides[2], *(n // sides[0] for n in frames))

    def _image_arguments(self, x: Tensor, grid: Grid) -> Kwargs:
        """The image as the model takes it, and what says its grid."""
        image = self.spec.image
        if isinstance(image, LatentTokens):
            return {image.argument: as_argument(x, image.axes)}
        places = {image.positions: positions_of(image, grid).to(x)} if image.positions else {}
        return {image.argument: pack(x, image.patch), **places, **sizes_of(image, grid, len(x))}

    def _constants(
        self, model: nn.Module, grid: Grid, batch_size: int, condition: Mapping[str, Any], *, like: Tensor
    ) -> Kwargs:
        """The arguments with one value that a condition leaves out."""
        inputs = self._inputs(model)
        lengths = {
            value.shape[i.shape.index("text")]
            for name, i in inputs.items()
            if "text" in i.shape and isinstance(value := condition.get(name), Tensor)
        }
        sizes = self._sizes(grid, batch_size, max(lengths, default=0))
        return {
            name: _made(model, i, sizes, like=like)
            for name, i in inputs.items()
            if i.value is not None and name not in condition
        }

    def _inputs(self, model: nn.Module) -> dict[str, Input]:
        inputs = {n: i if isinstance(i, Input) else Input(shape=i) for n, i in self.spec.inputs.items()}
        return {name: i for name, i in inputs.items() if fact(model, i.needs)}

    def needed(self, model: nn.Module) -> dict[str, int | None]:
        found = {name: i for name, i in self._inputs(model).items() if i.value is None}
        return {
            name: int(fact(model, i.shape[-1])) if len(i.shape) > 1 and i.shape[-1] not in _COUNTS else None
            for name, i in found.items()
        }

    def _sizes(self, grid: Grid, batch_size: int, num_text: int) -> dict[str, int]:
        return {
            "batch": batch_size,
            "text": num_text,
            "frames": grid.frames,
            "rows": grid.rows,
            "cols": grid.cols,
            "tokens": grid.num_tokens,
        }

    def process(self, model: nn.Module) -> NoiseProcess:
        if self.spec.process is None:
            raise HostError(
                f"host {self.name!r} is trained with a noise process that grafting has not: name one under `process:`, or with "
                "--process"
            )
        return self._build(model, self.spec.process)

    def shape(self, model: nn.Module) -> tuple[int, ...]:
        image, grid = self.spec.image, self.grid or self.spec.native_grid
        channels = fact(model, self.spec.channels)
        if isinstance(image, LatentTokens):
            sides = patch_sizes(model, image)
        else:
            sides, channels = (1, image.patch, image.patch), channels // image.patch**2
        frames, rows, cols = (
            n * side for n, side in zip((grid.frames, grid.rows, grid.cols), sides, strict=True)
        )
        is_video = self.spec.native_grid.frames > 1
        return (channels, frames, rows, cols) if is_video else (channels, rows, cols)

    def tiny(self) -> nn.Module:
        if self.spec.tiny is None:
            self._refuse("a small instance (`tiny`)")
        return randomise(self.model_class(**self.spec.tiny))

    def example(
        self, model: nn.Module, *, rows: int, cols: int, batch_size: int, frames: int = 1, num_text: int = 5
    ) -> Kwargs:
        if not self.spec.inputs:
            self._refuse("its other arguments (`inputs`)")
        host = self.at_grid(Grid(rows, cols, frames))
        x = torch.randn(batch_size, *host.shape(model))
        sizes = self._sizes(Grid(rows, cols, frames), batch_size, num_text)
        time = self.spec.time.scale * torch.rand(batch_size)
        return {
            **self._image_arguments(x, Grid(rows, cols, frames)),
            self.spec.time.argument: time.long() if self.spec.time.whole else time,
            **{name: _made(model, i, sizes, like=x) for name, i in self._inputs(model).items()},
        }

    def _refuse(self, what: str) -> NoReturn:
        raise HostError(f"the spec of host {self.name!r} does not declare {what}")


def _linear(layer: nn.Module) -> nn.Linear:
    if not isinstance(layer, nn.Linear):
        raise HostError(
            f"a {type(layer).__name__} is no linear layer, and cannot be inherited from: use init: random"
        )
    return layer


def _made(model: nn.Module, asked: Input, sizes: Mapping[str, int], *, like: Tensor) -> Any:
    """An argument by its description, with random values where it has none of its own."""
    if not asked.shape and asked.value is not None:
        return asked.value
    shape = [sizes[str(size)] if size in sizes else fact(model, size) for size in asked.shape]
    if asked.each:
        one = asked.model_copy(update={"each": False})
        return [_made(model, one, sizes, like=like) for _ in range(sizes["batch"])]
    dtype = like.dtype if asked.dtype == "float" else _DTYPES[asked.dtype]
    if asked.value is None and asked.dtype == "float":
        return torch.randn(shape).to(like)
    return torch.full(shape, 1 if asked.value is None else asked.value, dtype=dtype, device=like.device)  # type: ignore[arg-type]  # a number
