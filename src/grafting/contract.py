"""The words of the project as types: what a site is, what tokens are, what an operator is, what a stage yields.

Letters for shapes, used everywhere: B batch, L tokens, D channels, H heads, K head dim of q and k, V head dim of v;
images are `b c h w`. This file holds no behaviour of its own.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict
from torch import Generator, Tensor, nn

Role = Literal["attention", "mlp", "block"]


@dataclass(frozen=True)
class Grid:
    """Image tokens in raster order: frames, then rows, then columns."""

    rows: int
    cols: int
    frames: int = 1

    @property
    def num_tokens(self) -> int:
        return self.frames * self.rows * self.cols


@dataclass(frozen=True)
class TokenLayout:
    """What a sequence's tokens are: a grid of image tokens, and text tokens before or after them."""

    grid: Grid
    num_text: int = 0
    text_first: bool = True

    @property
    def num_tokens(self) -> int:
        return self.grid.num_tokens + self.num_text

    @property
    def image_slice(self) -> slice:
        start = self.num_text if self.text_first else 0
        return slice(start, start + self.grid.num_tokens)


@dataclass(frozen=True)
class BlockCall:
    """How a model calls a block, as data, so that another module can stand in its place.

    `arguments` are the names of its first arguments, in their places, up to the last token tensor. A block that returns
    one tensor, the tokens after it, names it in `returns`; one that returns a tuple names all of them.
    """

    arguments: tuple[str, ...]
    returns: tuple[str, ...]

    def argument(self, name: str, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """The argument of this name in a call."""
        place = self.arguments.index(name)
        return args[place] if place < len(args) else kwargs[name]


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
    num_text: int = 0
    num_heads: int = 0  # attention only
    hidden_dim: int = 0  # MLP only
    call: BlockCall | None = None  # block only
    fixed: str = ""  # block only: why it cannot be merged or dropped; empty if it can

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def num_tokens(self) -> int:
        return self.grid.num_tokens + self.num_text

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout(self.grid, self.num_text)


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
    """What replaces softmax(QK^T)V inside an attention module; the host's projections, norms and RoPE stay."""

    @abstractmethod
    def forward(
        self,
        q: Float[Tensor, "b heads l k"],
        k: Float[Tensor, "b heads l k"],
        v: Float[Tensor, "b heads l v"],
        layout: TokenLayout,
        *,
        scale: float | None = None,
    ) -> Float[Tensor, "b heads l v"]:
        """Mixed values; `scale` multiplies q k^T and is 1/sqrt(K) when None."""


class Mixer(nn.Module, ABC):
    """What replaces a whole attention or MLP module."""

    @abstractmethod
    def forward(self, x: Float[Tensor, "b l d"], layout: TokenLayout) -> Float[Tensor, "b l d"]:
        """Mixed tokens, in the dtype of x."""

    def inherit(self, weights: AttentionWeights | MlpWeights) -> None:
        """Start from the weights of the module that is replaced; by default there is nothing to take."""

    @property
    def output_layer(self) -> nn.Linear | None:
        """The linear layer whose output is this mixer's, which has a best fit in closed form; None if there is none."""
        return None

    num_inherited_neurons: int = 0
    """How many neurons of the replaced MLP `inherit` took one by one; 0 if it took none, or the mixer has none."""

    def inherit_neurons(self, weights: MlpWeights, kept: Int[Tensor, "kept"]) -> None:
        """Take these neurons, by index, in the place of those that `inherit` chose.

        Asked only of mixers whose `num_inherited_neurons` is positive, which have this method.
        """
        raise NotImplementedError(f"{type(self).__name__} takes no neurons one by one")


class OperatorConfig(BaseModel, ABC):
    """An operator as data: its name and settings, no facts of a host; it builds itself for a site.

    Subclass `KernelConfig` or `MixerConfig` in a file of `operators/`, with `name: Literal["my-operator"]`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    roles: ClassVar[frozenset[Role]]
    version: ClassVar[int] = 1  # raised when the same weights come to mean something else
    name: str

    def parts(self) -> "tuple[OperatorConfig, ...]":
        """The operators that it is made of, beside itself."""
        return ()

    def faults(self, site: Site) -> list[str]:
        """Why this operator cannot stand at this site, in words; empty if it can."""
        return []

    @abstractmethod
    def build(self, site: Site) -> "Kernel | Mixer":
        """The operator for this site, randomly initialised."""

    @abstractmethod
    def mixing_flops(self, site: Site) -> int:
        """FLOPs an image and forward pass of what replaces softmax(QK^T)V (or the MLP's own work).

        A multiply-accumulate is 2, a multiplication of two activations 1, a softmax 2 for each score. Biases, norms and
        pointwise activations are not counted.
        """

    @abstractmethod
    def projection_flops(self, site: Site) -> int:
        """FLOPs an image of the projections and featurizers around it, counted in the same way."""

    def table4_flops(self, site: Site) -> tuple[int, int]:
        """Mixing and projection FLOPs by the rules of arXiv:2506.05340 Table 4, which leaves out some work."""
        return self.mixing_flops(site), self.projection_flops(site)

    @abstractmethod
    def randomised(self) -> "OperatorConfig":
        """The same operator with nothing taken from the host: the control experiment."""


class KernelConfig(OperatorConfig):
    """Settings of a kernel. The host's projections around it are kept, or drawn anew."""

    roles: ClassVar[frozenset[Role]] = frozenset({"attention"})
    projections: Literal["kept", "random"] = "kept"
    """Keep the host's trained q, k, v and output projections, or draw them anew."""

    @abstractmethod
    def build(self, site: Site) -> Kernel: ...

    def projection_flops(self, site: Site) -> int:
        return 8 * site.num_tokens * site.dim**2

    def randomised(self) -> "KernelConfig":
        return self.model_copy(update={"projections": "random"})


class MixerConfig(OperatorConfig):
    """Settings of a mixer. Its own weights start from the host's where that has a meaning, or at random."""

    init: Literal["inherit", "random"] = "inherit"
    """Start from the replaced module's weights where that has a meaning, or at random."""

    @abstractmethod
    def build(self, site: Site) -> Mixer: ...

    def randomised(self) -> "MixerConfig":
        return self.model_copy(update={"init": "random"})


def softmax_attention_flops(site: Site, num_pairs: int, *, num_heads: int | None = None) -> int:
    """FLOPs of softmax attention over `num_pairs` pairs of a query and a key: 4 D a pair, and 2 H for the softmax."""
    return num_pairs * (4 * site.dim + 2 * (site.num_heads if num_heads is None else num_heads))


class ClassConditional(NamedTuple):
    """What a class-conditional model makes, and of which classes."""

    shape: tuple[int, int, int]  # channels, height, width of an image or latent
    num_classes: int
    null_label: int | None  # the label that stands for no class; None if the model was trained without one
    label_dropout: float = 0.0  # share of labels that training replaces by the null label


# calls a model on noised inputs [B, C, H, W], steps [B] and a condition (for a class-conditional host: labels [B])
Predict = Callable[[nn.Module, Tensor, Tensor, Any], Tensor]


@runtime_checkable
class NoiseProcess(Protocol):
    """How a model's inputs are noised in training, and what its prediction is trained to be."""

    def draw_steps(self, count: int, draw: Generator) -> Tensor:
        """Random steps [count], in the host's unit."""
        ...

    def steps_at(self, shares: Tensor) -> Tensor:
        """The steps at these shares, in 0..1, of the way from clean to noise."""
        ...

    def add_noise(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t for clean x [B, ...], standard normal noise and steps t [B]."""
        ...

    def loss(self, prediction: Tensor, *, x: Tensor, x_t: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Per-sample training loss [B]."""
        ...


@runtime_checkable
class TrainingData(Protocol):
    """What training reads: items by index, as model inputs."""

    @property
    def num_classes(self) -> int: ...

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> tuple[Float[Tensor, "b c h w"], Tensor]:
        """Images or latents in the model's range, and their labels [B]."""
        ...


@runtime_checkable
class FolderState(Protocol):
    """A state that writes itself into a folder, such as one whose tensors lie on several processes."""

    def save(self, folder: Path) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a stage tells its caller after each step; `state()` is all that it needs to go on from here."""

    done: int
    total: int
    values: dict[str, float] = field(default_factory=dict)
    state: Callable[[], dict[str, Any] | FolderState] = dict
    seconds_waited: float | None = None  # for data; None where the stage does not count it
