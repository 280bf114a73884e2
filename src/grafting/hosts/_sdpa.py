"""The generic host: any transformer whose attention calls `scaled_dot_product_attention`, described as data (`_spec.py`)."""

import copy
import pkgutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..contract import AttentionWeights, Grid, Kwargs, MlpWeights, NoiseProcess, Site
from ..errors import HostError
from . import _inputs
from ._grids import (
    as_argument,
    fact,
    grid_of_images,
    image_arguments,
    images_of,
    latent_grid,
    packed_grid,
    patch_sizes,
)
from ._host import Host, as_linear, built_of, linear_weights, randomise
from ._sites import blocks_of, check_arguments, grid_faults, native_grid, part_of, sites_of
from ._spec import ACTIVATIONS, LatentTokens, PackedTokens, SdpaSpec


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
        self.pipeline_fault = spec.pipeline_fault

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
        with self._fitting(model):
            check_arguments(self.spec, model)
            return tuple(sites_of(self.spec, model, self._native_grid(model)))

    @contextmanager
    def _fitting(self, module: nn.Module) -> Iterator[None]:
        """Inside, what a module lacks of the spec is one error."""
        try:
            yield
        except (AttributeError, KeyError, IndexError, TypeError) as error:
            raise HostError(
                f"spec {self.name!r} does not fit {type(module).__name__}: {error}; mend the spec, or it is for a class as "
                "another version of its package has it"
            ) from error

    def blocks(self, model: nn.Module) -> tuple[Site, ...]:
        """Lists whose calls the spec describes."""
        with self._fitting(model):
            return tuple(blocks_of(self.spec, model, self._native_grid(model)))

    def _native_grid(self, model: nn.Module) -> Grid:
        with self._fitting(model):
            return self.grid or native_grid(self.spec, model)

    def image_grid(self, model: nn.Module, arguments: Mapping[str, Any]) -> Grid:
        image = self.spec.image
        if isinstance(image, LatentTokens):
            return latent_grid(model, image, arguments[image.argument])
        if image.positions is None or (self.grid is None and not torch.compiler.is_compiling()):
            return packed_grid(image, arguments)
        if self.grid is None:
            raise HostError(
                f"{self.name}: the grid stands in {image.positions}, which a compiled model cannot read: "
                "graft with host=host_of(model).at_grid(Grid(rows, cols)), or compile the blocks alone"
            )
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
        with self._fitting(attention):
            layers = [as_linear(part_of(attention, path, "projections")) for path in self.spec.projections]
        q, k, v, out = map(linear_weights, layers)
        return AttentionWeights(q, k, v, out)

    def output_layer(self, attention: nn.Module) -> nn.Linear | None:
        if self.spec.projections is None:
            return None
        with self._fitting(attention):
            return as_linear(part_of(attention, self.spec.projections[3], "projections"))

    def mlp_weights(self, mlp: nn.Module) -> MlpWeights:
        layers = self.spec.mlp
        if layers is None:
            self._refuse("the layers of its MLPs (`mlp`): use init: random")
        with self._fitting(mlp):
            up = as_linear(part_of(mlp, layers.up, "mlp.up"))
            down = as_linear(part_of(mlp, layers.down, "mlp.down"))
        if layers.gated or up.out_features != down.in_features:
            raise HostError(
                f"an MLP from {up.out_features} to {down.in_features} channels is gated and has no plain two-layer form to "
                "inherit from: use init: random"
            )
        return MlpWeights(linear_weights(up), linear_weights(down), ACTIVATIONS[layers.activation])

    def predict(self, model: nn.Module, x_t: Tensor, t: Tensor, condition: Mapping[str, Any]) -> Tensor:
        """The prediction for images, or videos, with the condition's tensors as keyword arguments."""
        spec, grid = self.spec, grid_of_images(model, self.spec.image, x_t)
        time = spec.time.scale - t if spec.time.reversed else t
        given = self._time_argument(time, grid)
        known = {**_inputs.constants(spec, model, grid, condition, like=x_t), **given, **condition}
        beside = known.pop(spec.image.argument, None) if isinstance(spec.image, LatentTokens) else None
        image = image_arguments(spec.image, x_t, grid, beside)
        # positions of a condition's tokens and the image's may lie in one argument, which the condition then holds
        returned = model(**{**image, **known}, return_dict=False)
        output = returned if isinstance(returned, Tensor) else returned[0]
        output = images_of(spec.image, output, grid, is_video=x_t.ndim == 5, order=spec.order)
        output = output.chunk(2, dim=1)[0] if spec.output.half else output
        return spec.output.sign * output

    def _time_argument(self, time: Tensor, grid: Grid) -> Kwargs:
        """The argument of these times [B]."""
        asked = self.spec.time
        entries = {"frame": grid.frames, "token": grid.num_tokens}
        time = time[:, None].expand(-1, entries[asked.per]) if asked.per in entries else time
        return {asked.argument: time.long() if asked.whole else time}

    def needed(self, model: nn.Module) -> dict[str, int | None]:
        image, needed = self.spec.image, _inputs.needed(self.spec, model)
        if isinstance(image, LatentTokens) and image.beside:
            return {image.argument: image.beside, **needed}
        return needed

    def process(self, model: nn.Module) -> NoiseProcess:
        if self.spec.process is None:
            raise HostError(
                f"host {self.name!r} is trained with a noise process that grafting has not: name one under `process:`, or with "
                "--process"
            )
        return built_of(self, model, self.spec.process)

    def shape(self, model: nn.Module) -> tuple[int, ...]:
        image, grid = self.spec.image, self._native_grid(model)
        sides, channels = patch_sizes(model, image), fact(model, self.spec.channels)
        if isinstance(image, PackedTokens):
            channels //= image.patch**2
        frames, rows, cols = (
            n * side for n, side in zip((grid.frames, grid.rows, grid.cols), sides, strict=True)
        )
        if isinstance(image, LatentTokens) and "n" in (image.axes or ""):
            return channels, image.native_frames, rows, cols
        is_video = self.spec.native_grid.frames > 1
        return (channels, frames, rows, cols) if is_video else (channels, rows, cols)

    def grid_faults(self, model: nn.Module, grid: Grid) -> list[str]:
        return grid_faults(self.spec, model, grid)

    def tiny(self) -> nn.Module:
        if self.spec.tiny is None:
            self._refuse("a small instance (`tiny`)")
        return randomise(self.model_class(**self.spec.tiny))

    def example(
        self, model: nn.Module, *, rows: int, cols: int, batch_size: int, frames: int = 1, num_text: int = 5
    ) -> Kwargs:
        if not self.spec.inputs:
            self._refuse("its other arguments (`inputs`)")
        grid = Grid(rows, cols, frames)
        x, image = torch.randn(batch_size, *self.at_grid(grid).shape(model)), self.spec.image
        beside = None
        if isinstance(image, LatentTokens) and image.beside:
            beside = as_argument(torch.randn(batch_size, image.beside, *x.shape[2:]), image.axes)
        return {
            **image_arguments(image, x, grid, beside),
            **self._time_argument(self.spec.time.scale * torch.rand(batch_size), grid),
            **_inputs.examples(self.spec, model, grid, num_text=num_text, like=x),
        }

    def _refuse(self, what: str) -> NoReturn:
        raise HostError(f"the spec of host {self.name!r} does not declare {what}")
