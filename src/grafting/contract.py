"""The words of the project as types: what a site is, what tokens are, what an operator is, what a stage yields.

Letters for shapes, used everywhere: B batch, L tokens, D channels, H heads, K head dim of q and k, V head dim of v;
images are `b c h w`. This file holds no behaviour of its own.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float, Int
from pydantic import JsonValue
from torch import Generator, Tensor, nn

from .machine.settings import Settings
from .tokens import Grid as Grid
from .tokens import TokenLayout as TokenLayout

Kwargs: TypeAlias = dict[str, Any]
"""Keyword arguments of a call of a model or its modules, of which each model has its own."""

Role = Literal["attention", "mlp", "block"]
Honoured = Literal["key mask", "image queries"]
ANY_CALL: frozenset[Honoured] = frozenset({"key mask", "image queries"})


@dataclass(frozen=True)
class BlockCall:
    """Calling convention of a block, as data, so that another module can take its place.

    `arguments` are the names of its first arguments, in their places, up to the last token tensor. A block that returns
    one tensor, the tokens after it, names it in `returns`; one that returns a tuple names all of them.
    """

    arguments: tuple[str, ...]
    returns: tuple[str, ...]
    apart: str = ""
    """Why the block cannot be merged, though it can be dropped: it is called with other arguments than its neighbours."""

    @property
    def merges(self) -> bool:
        """Whether two such blocks can run side by side: they give one tensor of tokens, and are called alike."""
        return len(self.returns) == 1 and not self.apart

    def argument(self, name: str, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """The argument of this name in a call."""
        place = self.arguments.index(name)
        return args[place] if place < len(args) else kwargs[name]


@dataclass(frozen=True, kw_only=True)
class ModuleCall:
    """Calling convention of an attention or MLP that a mixer may replace, as data.

    Arguments named in `must_be_none` change what attention means; a mixer refuses them when they are given. All others are
    ignored.
    """

    tokens: str = "hidden_states"
    """Keyword of the token tensor [B, L, D], where it is not the first argument."""
    must_be_none: tuple[str, ...] = ()
    returns: int = 1
    """Number of values returned: the tokens, then None for each other; 1 is the tensor alone."""


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """The calls of `scaled_dot_product_attention` in an attention, as data: what stands in them."""

    order: tuple[str, ...] = ("image",)
    """Runs of tokens among the keys: `image`, `rest` (as many as there are), arguments of the model by their length; `padding`
    at the end, where it stands behind the image, whose place then differs from sample to sample."""
    image_queries: bool = False
    """True if the queries are those of the image alone."""
    turn: tuple[Literal["image", "other"], ...] = ("image",)
    """Calls in a pass, in order: a kernel answers those marked `image`, and those marked `other`, such as of text alone, go
    through as they are. If there are more turns than one, each is of one sample. Empty where the attention makes no call."""
    masked: bool = False
    """True if calls may have a key mask, as for padded prompts."""

    def layout(self, grid: Grid, num_keys: int, lengths: Mapping[str, int]) -> TokenLayout:
        """The layout of a call with this many keys; `lengths` are those of the arguments that `order` names."""
        named = {
            "image": grid.num_tokens,
            "padding": 0,
            **{name: lengths[name] for name in self.order if name in lengths},
        }
        rest = num_keys - sum(named.get(name, 0) for name in self.order)
        runs = [named.get(name, rest) for name in self.order]
        place = self.order.index("image")
        return TokenLayout(grid, sum(runs[:place]), sum(runs[place + 1 :]), image_queries=self.image_queries)


@dataclass(frozen=True, kw_only=True)
class Site:
    """A replaceable place in a model, with the facts that operators are sized from.

    `num_tokens` and `grid` are those of the model's native input; an operator that runs on any grid ignores them.
    """

    role: Role
    block: int
    path: str  # module path inside the model
    dim: int  # D, channels in and out
    grid: Grid
    num_text: int = 0  # tokens beside the image's
    num_heads: int = 0  # attention only
    hidden_dim: int = 0  # MLP only
    num_weights: int = 0  # MLP only: of all its linear layers; 0 where these are two of `hidden_dim`
    attention: AttentionCall = field(default_factory=AttentionCall)  # what a kernel's calls hold
    module: ModuleCall | None = None  # attention and MLP: how a mixer is called there; None if it cannot be
    call: BlockCall | None = None  # block only
    fixed: str = ""  # block only: why it cannot be merged or dropped; empty if it can

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def num_tokens(self) -> int:
        return self.grid.num_tokens + self.num_text


class AttentionWeights(NamedTuple):
    """An attention module's projections as plain tensors (weights [out, in]), for operators that inherit them."""

    q: tuple[Tensor, Tensor | None]
    k: tuple[Tensor, Tensor | None]
    v: tuple[Tensor, Tensor | None]
    out: tuple[Tensor, Tensor | None]


class MlpWeights(NamedTuple):
    """A two-layer MLP's weights as plain tensors, and the function between them."""

    up: tuple[Tensor, Tensor | None]
    down: tuple[Tensor, Tensor | None]
    activation: Callable[[Tensor], Tensor]


class Kernel(nn.Module, ABC):
    """Replacement for softmax(QK^T)V inside an attention module; the host's projections, norms and RoPE stay."""

    @abstractmethod
    def forward(
        self,
        q: Float[Tensor, "b heads m k"],
        k: Float[Tensor, "b heads l k"],
        v: Float[Tensor, "b heads l v"],
        layout: TokenLayout,
        *,
        scale: float | None = None,
    ) -> Float[Tensor, "b heads m v"]:
        """Mixed values for the M queries of `layout`; `scale` multiplies q k^T and is 1/sqrt(K) when None."""


class Mixer(nn.Module, ABC):
    """Replacement for a whole attention or MLP module."""

    @abstractmethod
    def forward(self, x: Float[Tensor, "b l d"], layout: TokenLayout) -> Float[Tensor, "b l d"]:
        """Mixed tokens, in the dtype of x."""

    def inherit(self, weights: AttentionWeights | MlpWeights) -> None:
        """Start from the weights of the module that is replaced; by default there is nothing to take."""

    @property
    def output_layer(self) -> nn.Linear | None:
        """The linear layer whose output is this mixer's, which has a best fit in closed form; None if there is none."""
        return None


class NeuronMixer(Mixer):
    """Replacement for an MLP that may start from a choice of its neurons."""

    num_inherited_neurons: int = 0
    """Number of the replaced MLP's neurons that `inherit` copied."""

    @abstractmethod
    def inherit_neurons(self, weights: MlpWeights, kept: Int[Tensor, " kept"]) -> None:
        """Take these neurons, by index, in place of those that `inherit` chose."""


_CALLS: Mapping[Honoured, str] = {
    "key mask": "a key mask, which the attention has where prompts are padded",
    "image queries": "queries of the image alone, with more keys",
}


class OperatorConfig(Settings, ABC):
    """An operator as data: its name and settings, no facts of a host; it builds itself for a site.

    Subclass `KernelConfig` or `MixerConfig` in a file of `operators/`, with `name: Literal["my-operator"]`.
    """

    roles: ClassVar[frozenset[Role]]
    honours: ClassVar[frozenset[Honoured]] = frozenset()
    """What its operator honours of a call beside the image and other tokens: key masks, queries that are the image alone."""
    version: ClassVar[int] = 1  # raised when the same weights come to mean something else
    name: str

    def parts(self) -> "tuple[OperatorConfig, ...]":
        """The operators that it is made of, beside itself."""
        return ()

    def call_faults(self, call: AttentionCall) -> list[str]:
        """Reasons why it cannot answer such calls; empty if it can."""
        lacking: list[Honoured] = []
        lacking += ["key mask"] * (call.masked and "key mask" not in self.honours)
        lacking += ["image queries"] * (call.image_queries and "image queries" not in self.honours)
        return [f"{self.name} does not honour {_CALLS[lack]}" for lack in lacking]

    def faults(self, site: Site) -> list[str]:
        """Reasons why this operator cannot be used at this site; empty if it can."""
        return []

    @abstractmethod
    def build(self, site: Site) -> "Kernel | Mixer":
        """The operator for this site, randomly initialised."""

    @abstractmethod
    def mixing_flops(self, site: Site) -> int:
        """FLOPs per image and forward pass of the replacement for softmax(QK^T)V (or the MLP's own work).

        A multiply-accumulate is 2, a multiplication of two activations 1, a softmax 2 for each score. Biases, norms and
        pointwise activations are not counted.
        """

    @abstractmethod
    def projection_flops(self, site: Site) -> int:
        """FLOPs per image of the projections and featurizers around it, counted in the same way."""

    def table4_flops(self, site: Site) -> tuple[int, int]:
        """Mixing and projection FLOPs by the rules of arXiv:2506.05340 Table 4, which leaves out some work."""
        return self.mixing_flops(site), self.projection_flops(site)

    @abstractmethod
    def randomised(self) -> "OperatorConfig":
        """The same operator with nothing taken from the host: the control experiment."""


class KernelConfig(OperatorConfig):
    """Settings of a kernel. The host's projections around it are kept, or initialised randomly."""

    roles: ClassVar[frozenset[Role]] = frozenset({"attention"})
    projections: Literal["kept", "random"] = "kept"
    """Keep the host's trained q, k, v and output projections, or initialise them randomly."""

    def call_faults(self, call: AttentionCall) -> list[str]:
        none = "the attention makes no call of scaled_dot_product_attention that a kernel could answer: use a mixer"
        return super().call_faults(call) if call.turn else [none]

    @abstractmethod
    def build(self, site: Site) -> Kernel: ...

    def projection_flops(self, site: Site) -> int:
        return 8 * site.num_tokens * site.dim**2

    def randomised(self) -> "KernelConfig":
        return self.model_copy(update={"projections": "random"})


class MixerConfig(OperatorConfig):
    """Settings of a mixer. Its own weights start from the host's where that has a meaning, or at random."""

    kernel: ClassVar[str | None] = None
    """The kernel operator that is nearest to it, for hosts that take no mixer here."""
    init: Literal["inherit", "random"] = "inherit"
    """Start from the replaced module's weights where that has a meaning, or at random."""

    @abstractmethod
    def build(self, site: Site) -> Mixer: ...

    def randomised(self) -> "MixerConfig":
        return self.model_copy(update={"init": "random"})


def softmax_attention_flops(site: Site, num_pairs: int, *, num_heads: int | None = None) -> int:
    """FLOPs of softmax attention over `num_pairs` pairs of a query and a key: 4 D a pair, and 2 H for the softmax."""
    return num_pairs * (4 * site.dim + 2 * (site.num_heads if num_heads is None else num_heads))


# calls a model, of the class that it is made for, on noised inputs [B, ...], steps [B] and a condition: what `Conditions.at` gives
Predict = Callable[[Any, Tensor, Tensor, Any], Tensor]

# x_t's successor, from the model's prediction at x_t and x_t
Update = Callable[[Tensor, Tensor], Tensor]


@runtime_checkable
class Conditions(Protocol):
    """Table of a model's conditions: classes, or prompts; a condition is its number in the table.

    So dropout, image i's condition, shards, sample files and guidance are arithmetic on integers for every kind of model.
    """

    dropout: float
    """Share of items whose condition training replaces by the null one."""

    @property
    def identity(self) -> dict[str, JsonValue]:
        """Identity by content, on which figures depend: part of protocols and of a stage's inputs."""
        ...

    def __len__(self) -> int: ...

    def nulls(self, numbers: Int[Tensor, " b"]) -> Int[Tensor, " b"] | None:
        """For each condition, the number of what asks for nothing; None if the model has no such thing."""
        ...

    def at(
        self,
        numbers: Int[Tensor, " b"],
        *,
        shape: tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype,
    ) -> Any:
        """Inputs of the host's `predict` for these conditions: labels [B], or keyword arguments by name.

        Args:
            shape: of one input; sizes that a model is told come from it.
            dtype: of floating-point tensors.
        """
        ...

    def words(self, number: int) -> str:
        """Text of the condition: `sandal`, `a red ring left of a blue cross`."""
        ...


@runtime_checkable
class NoiseProcess(Protocol):
    """Noising of a model's inputs, the target of its prediction, and the steps of a sampler."""

    samplers: tuple[str, ...]
    """The samplers that can run it, the usual one first."""

    @property
    def identity(self) -> dict[str, JsonValue]: ...

    def at(self, shape: tuple[int, ...]) -> "NoiseProcess":
        """The process for inputs [B, *shape]: what draws steps, and what is sampled."""
        ...

    def draw_steps(self, count: int, draw: Generator) -> Tensor:
        """Random steps [count], in the host's unit."""
        ...

    def steps_at(self, shares: Tensor) -> Tensor:
        """The steps at these shares, in 0..1, of the way from clean to noise."""
        ...

    def share_of(self, step: int | float) -> float:
        """The share, in 0..1, of the way from clean to noise at a step."""
        ...

    def add_noise(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t for clean x [B, ...], standard normal noise and steps t [B]."""
        ...

    def loss(self, prediction: Tensor, *, x: Tensor, x_t: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Per-sample training loss [B]."""
        ...

    def chain(
        self, sampler: str, *, steps: int, clip: bool, streams: list[Generator]
    ) -> Iterator[tuple[int | float, Update]]:
        """The steps of a sampling chain, from the noisiest, each with the update to make there.

        Args:
            clip: clip the predicted clean image to [-1, 1].
            streams: one generator per image, for samplers that add noise.
        """
        ...

    def sampling_faults(self, sampler: str, *, steps: int, clip: bool) -> list[str]:
        """Why this process cannot be sampled in this way; empty if it can."""
        ...


@dataclass(frozen=True)
class Denoiser:
    """A model as every stage sees it: how it is called, its noise process, and what it may be asked for.

    It holds no model, so a teacher, its student, their averages and compiled copies share one.
    """

    predict: Predict
    process: NoiseProcess
    conditions: Conditions
    distilled: bool = False
    """Distilled for guidance or few steps: such a model is trained on its teacher's output, not on the process's loss."""

    @property
    def identity(self) -> dict[str, JsonValue]:
        """Process and conditions, by content.

        Predicted noise and a model's own classes are left out: records of the time when there was nothing else name neither.
        """
        parts = {"process": self.process.identity, "conditions": self.conditions.identity}
        return {key: value for key, value in parts.items() if value["name"] not in ("diffusion", "classes")}

    def __call__(self, model: nn.Module, x_t: Tensor, t: Tensor, numbers: Int[Tensor, " b"]) -> Tensor:
        """The model's raw prediction for noised inputs x_t [B, ...] at steps t [B] under these conditions."""
        shape = tuple(x_t.shape[1:])
        condition = self.conditions.at(numbers, shape=shape, device=x_t.device, dtype=x_t.dtype)
        return self.predict(model, x_t, t, condition)


@runtime_checkable
class TrainingData(Protocol):
    """Training data: items by index, as model inputs."""

    @property
    def num_classes(self) -> int:
        """Number of conditions that items may have: 0 to `num_classes` - 1."""
        ...

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> tuple[Float[Tensor, " b *shape"], Tensor]:
        """Images, videos or latents in the model's range, and the numbers of their conditions [B]."""
        ...


State: TypeAlias = dict[str, Any]
"""What a stage saves to resume from: tensors, numbers and the states of its parts, by name."""


@runtime_checkable
class FolderState(Protocol):
    """A state that writes itself into a folder, such as one whose tensors lie on several processes."""

    def save(self, folder: Path) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Step:
    """A stage's report after each step; `state()` is all it needs to resume from here."""

    done: int
    total: int
    values: dict[str, float] = field(default_factory=dict)
    state: Callable[[], State | FolderState] = dict
    seconds_waited: float | None = None  # for data; None where the stage does not count it
