"""Declarations required of a host, so that every other part is written once against them.

A host is a stateless description of one model class. Nothing is guessed from a model's attributes.
"""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..contract import (
    AttentionWeights,
    BlockCall,
    Conditions,
    Denoiser,
    Grid,
    Kwargs,
    MlpWeights,
    NoiseProcess,
    Site,
    TokenLayout,
)
from ..diffusion import Diffusion, DiffusionConfig, FlowConfig, ProcessConfig
from ..errors import HostError

Model = TypeVar("Model", bound=nn.Module)


class Branches(nn.ModuleList):
    """Blocks that get one input, run one after the other: gives what each adds to the tokens, [B, L, D] each.

    Args:
        blocks: each takes the same arguments and returns one tensor of tokens.
        call: how the model calls each.
    """

    def __init__(self, blocks: Iterable[nn.Module], call: BlockCall):
        super().__init__(blocks)
        self.call = call

    def forward(self, *args: Any, **kwargs: Any) -> Sequence[Tensor]:
        x = self.call.argument(self.call.returns[0], args, kwargs)
        return [block(*args, **kwargs) - x for block in self]


class LayoutTracker:
    """Knows what the layouts of a model's current forward pass are made from; its operators read it.

    It is the model's forward pre-hook, one per model, and is copied with it; a forward hook, `end`, ends the pass. A backward
    pass that recomputes blocks (gradient checkpointing) must run before the next forward pass on another grid.
    """

    def __init__(self, host: "Host[Any]"):
        self.host = host
        self.stays = False
        """True if operators outside the model read it, after its pass too, so that it stays when the model holds none."""
        self._grid: Grid | None = None
        self._lengths: Mapping[str, int] = {}
        self._in_pass = False
        self.masks: dict[int, tuple[Tensor, Tensor | None]] = {}
        """Masks of this pass by identity, with the key masks that they amount to."""

    @staticmethod
    def of(model: nn.Module) -> "LayoutTracker | None":
        """The model's tracker, if it has one."""
        return next((h for h in model._forward_pre_hooks.values() if isinstance(h, LayoutTracker)), None)

    @staticmethod
    def remove_from(model: nn.Module) -> None:
        """Remove the model's tracker, if it has one."""
        for key, hook in list(model._forward_pre_hooks.items()):
            if isinstance(hook, LayoutTracker):
                hook._grid = None
                del model._forward_pre_hooks[key]
                model._forward_pre_hooks_with_kwargs.pop(key, None)
        for key, end in list(model._forward_hooks.items()):
            if isinstance(getattr(end, "__self__", None), LayoutTracker):
                del model._forward_hooks[key]

    @property
    def grid(self) -> Grid:
        """The image tokens of the model's last forward pass.

        Raises:
            HostError: there was none yet.
        """
        if self._grid is None:
            raise HostError("no forward pass of its model has set the token layout that an operator reads")
        return self._grid

    def layout(self, site: Site, num_tokens: int) -> TokenLayout:
        """The layout of a call at this site with this many keys, or tokens.

        Raises:
            HostError: the site's layouts have another number of tokens, or there was no forward pass yet.
        """
        layout = site.attention.layout(self.grid, num_tokens, self._lengths)
        if layout.num_tokens != num_tokens or min(layout.before, layout.after) < 0:
            raise HostError(
                f"the attention of block {site.block} is over {num_tokens} tokens, of which {self.grid.num_tokens} are the "
                f"image's ({self.grid}): its order is {', '.join(site.attention.order)}"
            )
        return layout

    def check(self) -> None:
        """Raise a HostError where `forward` was called and the model was not: its layout may be another than the last one."""
        if self._grid is not None and not (self._in_pass or self.stays):
            raise HostError(
                "an operator runs outside of a forward pass of its model, which sets its token layout: call model(...), "
                "not model.forward(...)"
            )

    def __call__(self, model: nn.Module, args: tuple, kwargs: Kwargs) -> None:
        names = inspect.signature(model.forward).parameters
        arguments = dict(zip(names, args, strict=False)) | kwargs
        self._grid, self._lengths = (
            self.host.image_grid(model, arguments),
            self.host.lengths(model, arguments),
        )
        self.masks = {}
        self._in_pass = True

    def end(self, model: nn.Module, args: tuple, output: Any) -> None:
        """End the pass, unless its backward pass is to come, which may run parts of it again."""
        self._in_pass = torch.is_grad_enabled()


class Host(ABC, Generic[Model]):
    """A pretrained model family that can be edited. Subclasses are final."""

    name: str
    class_name: str
    """Name of the model class, known without importing it."""
    time_scale: float = 1000.0
    """Time value that the model receives for pure noise."""
    distilled: bool = False
    """Distilled for guidance or few steps, as published: trained on a teacher's output, not on the process's loss."""
    pipeline_fault: str = ""
    """Why no pipeline of the family draws with operators in its transformer."""

    @property
    @abstractmethod
    def model_class(self) -> type[Model]:
        """The class; imported when it is asked for, where that takes long."""

    @abstractmethod
    def sites(self, model: Model) -> tuple[Site, ...]:
        """Every replaceable place, by block, attention before MLP."""

    @abstractmethod
    def image_grid(self, model: Model, arguments: Mapping[str, Any]) -> Grid:
        """The image tokens of a forward pass with these arguments, by name."""

    def lengths(self, model: Model, arguments: Mapping[str, Any]) -> Mapping[str, int]:
        """Lengths of the token arguments that sites' orders name."""
        return {}

    @abstractmethod
    def attention_weights(self, attention: nn.Module) -> AttentionWeights:
        """The projections of one of its attention modules; views, not copies."""

    @abstractmethod
    def mlp_weights(self, mlp: nn.Module) -> MlpWeights:
        """The layers of one of its MLP modules; views, not copies."""

    @abstractmethod
    def predict(self, model: Model, x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        """The model's raw prediction for noised inputs x_t [B, C, H, W], or videos [B, C, F, H, W], at steps t [B].

        Args:
            condition: what the conditions' `at` gave: labels, or keyword arguments by name.
        """

    @abstractmethod
    def shape(self, model: Model) -> tuple[int, ...]:
        """The native shape of one input: channels, then frames of a video, then height and width."""

    def initialised(self, model: nn.Module) -> nn.Module:
        """A new model with random weights for pretraining; by default those that its class draws."""
        return model

    @abstractmethod
    def tiny(self) -> Model:
        """A small random model of this class, for tests and trials; its output is not zero."""

    @abstractmethod
    def example(
        self, model: Model, *, rows: int, cols: int, batch_size: int, frames: int = 1, num_text: int = 5
    ) -> Kwargs:
        """Random keyword arguments of a forward pass whose image tokens form this grid.

        Args:
            frames: of a video model's grid; others have one.
            num_text: text tokens, where the model has any.
        """

    def at_grid(self, grid: Grid) -> "Host[Model]":
        """This host, for a model that sees this grid alone; itself where it reads the grid from the input's shape."""
        return self

    def blocks(self, model: Model) -> tuple[Site, ...]:
        """The blocks that can be merged or dropped, or why one cannot; by default the host declares none."""
        return ()

    def branches(self, blocks: Sequence[nn.Module], call: BlockCall) -> nn.ModuleList:
        """Blocks that get one input, as a list that is called as one of them and gives what each adds to the tokens.

        A host that can run them as one pass returns a list of its own.
        """
        return Branches(blocks, call)

    def grid_faults(self, model: Model, grid: Grid) -> list[str]:
        """Why the model has no positions for a grid; empty if it has."""
        return []

    def shape_faults(self, model: Model, shape: tuple[int, ...]) -> list[str]:
        """Why the model takes no inputs of this shape; empty if it does."""
        native = self.shape(model)
        if len(shape) != len(native) or shape[0] != native[0]:
            return [f"{self.name} takes inputs such as {list(native)}; found {list(shape)}"]
        grid = self.sites(model)[0].grid
        sides = (native[-2] // grid.rows, native[-1] // grid.cols)
        if any(size % side for size, side in zip(shape[-2:], sides, strict=True)) or 0 in shape:
            return [
                f"{self.name} cuts images into patches of {sides[0]} x {sides[1]}, which {shape[-2]} x {shape[-1]} are not a multiple of"
            ]
        return self.grid_faults(model, self.grid_of(model, shape))

    def needed(self, model: Model) -> Mapping[str, int | None]:
        """Arguments that each condition must hold, and their channels; None where they have none."""
        return {}

    def condition_faults(self, model: Model, given: Mapping[str, int | None]) -> list[str]:
        """Why the model cannot be asked by such arguments; empty if it can.

        Args:
            given: the channels of each, by name as the model takes it; None where they are not known.
        """
        takes = inspect.signature(model.forward).parameters
        is_open = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
        faults = [f"it takes no {name}" for name in given if not is_open and name not in takes]
        for name, channels in self.needed(model).items():
            if name not in given:
                faults.append(f"it needs {name}")
            elif channels is not None and given[name] not in (None, channels):
                faults.append(f"it takes {name} of {channels} channels, not {given[name]}")
        return faults

    def grid_of(self, model: Model, shape: tuple[int, ...]) -> Grid:
        """The image tokens of an input of this shape: as many as those of the native one, in proportion."""
        native, grid = self.shape(model), self.sites(model)[0].grid
        rows, cols = grid.rows * shape[-2] // native[-2], grid.cols * shape[-1] // native[-1]
        frames = grid.frames * shape[1] // native[1] if len(shape) == 4 else grid.frames
        return Grid(rows, cols, frames)

    def conditions(self, model: Model) -> Conditions | None:
        """Conditions of the model, if it defines them itself, such as classes."""
        return None

    def process(self, model: Model) -> NoiseProcess:
        """The noise process that the family is trained with."""
        return Diffusion()

    def built(self, model: Model, config: ProcessConfig) -> NoiseProcess:
        """The process of a config, in this host's unit of time; what it leaves open is as of the family."""
        if isinstance(config, FlowConfig):
            with suppress(HostError):
                config = config.like(self.process(model))
        return built_of(self, model, config)

    def denoiser(
        self,
        model: Model,
        conditions: Conditions | None = None,
        process: NoiseProcess | None = None,
    ) -> Denoiser:
        """A model of this family as every stage sees it.

        Args:
            conditions: what it may be asked for; by default what the model knows by itself.
            process: how its inputs are noised; by default as its family's are.

        Raises:
            HostError: conditions are left out, and the model knows none by itself; or they are of another kind than its own.
        """
        own = self.conditions(model)
        if own is not None and conditions is not None and own.identity["name"] != conditions.identity["name"]:
            raise HostError(
                f"host {self.name!r} is asked for {own.identity['name']}, which the model defines itself; "
                f"found conditions by {conditions.identity['name']}: leave them out"
            )
        found = own if conditions is None else conditions
        if found is None:
            raise HostError(
                f"host {self.name!r} is asked for what prompts say, and none are given: name them in the recipe, "
                "`conditions: {name: prompts, folder: ./prompts}` (or `{name: scenes}`), with --prompts on the "
                "command line, or as `conditions=Prompts(folder)` to `host.denoiser`"
            )
        return Denoiser(self.predict, process or self.process(model), found, distilled=self.distilled)

    def output_layer(self, attention: nn.Module) -> nn.Linear | None:
        """The linear layer whose output is that of one of its attention modules; None if there is no single one."""
        return None

    def redraw(self, module: nn.Module) -> None:
        """Reinitialise a module's linear layers like the paper's random initialisation: Xavier weights, zero biases.

        The weights are the same on every device.
        """
        for linear in module.modules():
            if isinstance(linear, nn.Linear):
                if not linear.weight.is_meta:
                    drawn = torch.empty_like(linear.weight, device="cpu")
                    linear.weight.data.copy_(nn.init.xavier_uniform_(drawn))
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)

    def track_layout(self, model: nn.Module) -> LayoutTracker:
        """The model's tracker, which from now on reads layouts as this host does; adds it at the first call."""
        tracker = LayoutTracker.of(model)
        if tracker is None:
            tracker = LayoutTracker(self)
            model.register_forward_pre_hook(tracker, with_kwargs=True)
            model.register_forward_hook(tracker.end)
        tracker.host = self
        return tracker


def built_of(host: Host[Model], model: Model, config: ProcessConfig) -> NoiseProcess:
    """The process of a config, which knows how large a token is where its shift follows the size."""
    if isinstance(config, DiffusionConfig) or config.shift_by_size is None:
        return config.build(scale=host.time_scale)
    shape = host.shape(model)
    token_size = math.prod(shape[1:]) // host.grid_of(model, shape).num_tokens
    return config.build(scale=host.time_scale, token_size=token_size)


def config_of(model: nn.Module) -> Mapping[str, Any]:
    """The settings that diffusers keeps of a model; none of a model that is not of diffusers."""
    config = getattr(model, "config", None)
    return config if isinstance(config, Mapping) else {}


def linear_weights(linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """A linear layer's weight and bias, detached."""
    return linear.weight.detach(), None if linear.bias is None else linear.bias.detach()


def as_linear(layer: nn.Module) -> nn.Linear:
    """This layer.

    Raises:
        HostError: it is of another kind.
    """
    if not isinstance(layer, nn.Linear):
        raise HostError(
            f"a {type(layer).__name__} is no linear layer, and cannot be inherited from: use init: random"
        )
    return layer


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; outside, each module's mode is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def randomise(model: Model, std: float = 0.05) -> Model:
    """Add noise to every parameter, so that zero-initialised gates and heads of a fresh model let signals through."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=std)
    return model
