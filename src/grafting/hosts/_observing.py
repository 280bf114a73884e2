"""What each attention of a transformer sees: whose tokens, in what order, and where on the image each of them lies.

All of it is found by perturbing the inputs of forward passes without mixing (`_forwards`), none of it by names or by
comparing shapes. A spec is proposed from it elsewhere.
"""

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import HostError
from ._forwards import (
    Forward,
    Inputs,
    MaskSeen,
    SdpaCall,
    cut_short,
    has_changed,
    is_attention,
    perturbed,
    tensors_of,
    unmixed_forward,
)

Kind = Literal["image", "text", "other"]


@dataclass(frozen=True)
class Run:
    """Tokens of one origin, side by side.

    Image tokens depend on the image; text tokens each on one place of another argument; all others are of the model's own
    (registers, gist, time) or of an argument without places.
    """

    kind: Kind
    length: int
    argument: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.length}"


@dataclass(frozen=True)
class Axis:
    """An axis of the image argument along which tokens lie: its size, and the number of tokens along it."""

    index: int
    size: int
    count: int


@dataclass(frozen=True)
class AttentionCall:
    """What one call of attention saw."""

    path: str
    execution: int
    queries: tuple[Run, ...]
    keys: tuple[Run, ...]
    axes: tuple[Axis, ...]
    """Along which the image tokens lie, the outermost first."""
    raster: bool
    """Whether the image tokens stand in the order of these axes, each once."""
    batch_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mask: MaskSeen
    mask_padded: MaskSeen
    """Its mask when prompts are padded: when the masks among the example's arguments hide a place."""
    causal: bool
    dropout: float
    is_sdpa: bool = True
    """False if the module made no call of `scaled_dot_product_attention`."""

    @property
    def kind(self) -> str:
        """`self` over the image, `joint` over all, `cross` to text, `mixed` where keys hold more than queries, or `text`."""
        queries, keys = {run.kind for run in self.queries}, {run.kind for run in self.keys}
        if "image" not in queries:
            return "text"
        if "image" not in keys:
            return "cross"
        if self.queries != self.keys:
            return "mixed"
        return "self" if queries == {"image"} else "joint"

    @property
    def num_image(self) -> int:
        return sum(run.length for run in self.queries if run.kind == "image")


@dataclass(frozen=True)
class Observation:
    """What was seen of a model."""

    image: str
    """The argument whose places are image tokens."""
    calls: tuple[AttentionCall, ...]
    silent: tuple[str, ...]
    """Modules that are called attention by their class, ran, and made no call."""
    modules: Mapping[str, set[tuple[str, ...]]]
    """Paths of the modules that ran, each with the paths of those within which it ran."""


@dataclass
class _Trials:
    """Forward passes without mixing on variations of one example, compared with the first."""

    model: nn.Module
    inputs: Inputs
    first: Forward = field(init=False)

    def __post_init__(self) -> None:
        self.first = unmixed_forward(self.model, self.inputs)

    def touched(self, name: str, *, axis: int | None = None, chosen: Sequence[int] = ()) -> "_Touched | None":
        """Which tokens of each call depend on an argument, or on places of it; None if the model does not take the change."""
        try:
            calls = unmixed_forward(self.model, perturbed(self.inputs, name, axis=axis, chosen=chosen)).calls
        except HostError:
            return None
        if [c.queries.shape for c in calls] != [c.queries.shape for c in self.first.calls]:
            return None
        pairs = list(zip(self.first.calls, calls, strict=True))
        return _Touched(
            [has_changed(a.queries, b.queries) for a, b in pairs],
            [has_changed(a.values, b.values) for a, b in pairs],
        )

    def padded(self) -> list[SdpaCall]:
        """The calls where prompts are padded; the first ones if the model does not run so, or calls otherwise."""
        try:
            calls = unmixed_forward(self.model, cut_short(self.inputs)).calls
        except HostError:
            return self.first.calls
        return calls if len(calls) == len(self.first.calls) else self.first.calls


@dataclass(frozen=True)
class _Touched:
    """Tokens of each call that have changed: queries [L] and values [L]."""

    queries: list[Tensor]
    values: list[Tensor]

    def exactly_one(self, other: "_Touched") -> "_Touched":
        """Tokens that changed in one of two trials, in calls where each changed some."""

        def combine(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
            return [a ^ b if a.any() and b.any() else a & False for a, b in zip(first, second, strict=True)]

        return _Touched(combine(self.queries, other.queries), combine(self.values, other.values))

    def __or__(self, other: "_Touched") -> "_Touched":
        return _Touched(
            [a | b for a, b in zip(self.queries, other.queries, strict=True)],
            [a | b for a, b in zip(self.values, other.values, strict=True)],
        )

    @property
    def any_value(self) -> bool:
        return any(bool(values.any()) for values in self.values)


def observe(model: nn.Module, inputs: Inputs, *, image: str | None = None) -> Observation:
    """What every attention of a model sees on an example.

    Args:
        inputs: keyword arguments of a forward pass.
        image: the argument that holds the image; by default the first that reaches any attention's queries.

    Raises:
        HostError: no call of `scaled_dot_product_attention`, or no image among the inputs.
    """
    trials = _Trials(model, inputs)
    if not trials.first.calls:
        raise HostError(_no_attention(model))
    touched = {
        name: found for name in _perturbable(model, inputs) if (found := trials.touched(name)) is not None
    }
    name = image or _image_argument(touched)
    if name not in touched:
        raise HostError(
            f"none of the inputs reaches the attention of {type(model).__name__} as an image; found {sorted(inputs)}: "
            "name the argument that holds it with image="
        )
    others = sorted((other for other in touched if other != name), key=lambda other: -_size(inputs[other]))
    claims = {
        other: claimed
        for other in others
        if (claimed := _claimed(trials, other, touched[other], touched[name])) is not None
    }
    streams = [*claims.items(), *((other, touched[other]) for other in claims)]
    places = list(_places(trials, name, touched[name]))
    padded = trials.padded()
    calls = tuple(
        _attention_call(i, call, padded[i].mask, touched[name], streams, places)
        for i, call in enumerate(trials.first.calls)
    )
    return Observation(name, calls, _silent(model, trials.first), trials.first.modules)


def _size(value: Any) -> int:
    """Number of entries of an argument's tensors; a stream of tokens has more than a mask of it."""
    return sum(tensor.numel() for tensor in tensors_of(value))


def _perturbable(model: nn.Module, inputs: Inputs) -> list[str]:
    """Arguments that hold tensors, in the order of the model's signature."""
    order = list(inspect.signature(model.forward).parameters)
    names = [name for name, value in inputs.items() if tensors_of(value)]
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order))


def _image_argument(touched: dict[str, _Touched]) -> str:
    return next(
        (name for name, found in touched.items() if any(bool(q.any()) for q in found.queries)), "no image"
    )


def _no_attention(model: nn.Module) -> str:
    return (
        f"{type(model).__name__} made no call of scaled_dot_product_attention: its attention is of another kind, or runs "
        "on another backend (choose the native one, `model.set_attention_backend('native')`)"
    )


def _claimed(trials: _Trials, name: str, whole: _Touched, image: _Touched) -> _Touched | None:
    """Tokens that each come from one place of an argument; None if there are none.

    Such a token changes with one half of the places and not with the other. What acts on every token, such as the timestep,
    has no axis of which that is true, and what acts on queries and keys alone, such as positions, moves no value.
    """
    if not any(bool((values & ~seen).any()) for values, seen in zip(whole.values, image.values, strict=True)):
        return None
    found: _Touched | None = None
    largest = max(tensors_of(trials.inputs[name]), key=Tensor.numel)
    for axis, size in enumerate(largest.shape):
        if size < 2:
            continue
        halves = [
            trials.touched(name, axis=axis, chosen=chosen)
            for chosen in (range(size // 2), range(size // 2, size))
        ]
        if halves[0] is not None and halves[1] is not None:
            here = halves[0].exactly_one(halves[1])
            found = here if found is None else found | here
    return found if found is not None and found.any_value else None


def _places(trials: _Trials, name: str, image: _Touched) -> Iterator[tuple[int, int, list[Tensor]]]:
    """For each axis of the image along which tokens lie: its index, its size, and the first place of each token [L].

    A perturbation at all places whose number has a certain bit gives that bit of every token.
    """
    largest = max(tensors_of(trials.inputs[name]), key=Tensor.numel)
    for axis, size in enumerate(largest.shape):
        codes = [torch.zeros(len(q), dtype=torch.long) for q in image.queries]
        for bit in reversed(range((size - 1).bit_length())):
            found = trials.touched(name, axis=axis, chosen=[i for i in range(size) if i >> bit & 1])
            if found is None:
                break
            codes = [code + (q.cpu().long() << bit) for code, q in zip(codes, found.queries, strict=True)]
            if not any(_splits(code, q) for code, q in zip(codes, image.queries, strict=True)):
                break
        else:
            if any(_splits(code, q) for code, q in zip(codes, image.queries, strict=True)):
                yield axis, size, codes


def _splits(codes: Tensor, image: Tensor) -> bool:
    """Whether an axis tells image tokens apart."""
    return len(codes[image.cpu()].unique()) > 1


def _attention_call(
    i: int,
    call: SdpaCall,
    mask_padded: MaskSeen,
    image: _Touched,
    streams: list[tuple[str, _Touched]],
    places: list[tuple[int, int, list[Tensor]]],
) -> AttentionCall:
    values = _origins(image.values[i], [(name, found.values[i]) for name, found in streams])
    queries = _origins(image.queries[i], [(name, found.queries[i]) for name, found in streams])
    if len(queries) == len(values):
        queries = [
            q if q[0] == "image" else v if v[0] != "image" else q
            for q, v in zip(queries, values, strict=True)
        ]
    is_image = torch.tensor([kind == "image" for kind, _ in queries])
    axes, raster = _axes([(axis, size, codes[i][is_image]) for axis, size, codes in places])
    return AttentionCall(
        path=call.path,
        execution=call.execution,
        queries=_runs(queries),
        keys=_runs(values),
        axes=axes,
        raster=raster,
        batch_size=len(call.queries),
        num_heads=call.num_heads,
        num_kv_heads=call.num_kv_heads,
        head_dim=call.head_dim,
        mask=call.mask,
        mask_padded=mask_padded,
        causal=call.causal,
        dropout=call.dropout,
        is_sdpa=call.is_sdpa,
    )


def _origins(image: Tensor, streams: Sequence[tuple[str, Tensor]]) -> list[tuple[Kind, str]]:
    """Each token's kind, and the argument that it comes from: the first that claims it."""
    found: list[tuple[Kind, str]] = []
    for j, is_image in enumerate(image.tolist()):
        name = next((name for name, claimed in streams if bool(claimed[j])), "")
        found.append(("image", "") if is_image else ("text", name) if name else ("other", ""))
    return found


def _runs(origins: Sequence[tuple[Kind, str]]) -> tuple[Run, ...]:
    return tuple(Run(kind, len(list(tokens)), name) for (kind, name), tokens in itertools.groupby(origins))


def _axes(places: list[tuple[int, int, Tensor]]) -> tuple[tuple[Axis, ...], bool]:
    """The axes along which tokens lie, outermost first, and whether the tokens stand in their raster order."""
    axes, coordinates = [], []
    for index, size, codes in places:
        distinct, place = codes.unique(return_inverse=True)
        if len(distinct) > 1:
            axes.append(Axis(index, size, len(distinct)))
            coordinates.append(place)
    num_tokens = len(places[0][2]) if places else 0
    for order in itertools.permutations(range(len(axes))):
        if order and is_raster([coordinates[i] for i in order], [axes[i].count for i in order]):
            return tuple(axes[i] for i in order), True
    return tuple(axes), num_tokens == 1


def is_raster(coordinates: Sequence[Tensor], counts: Sequence[int]) -> bool:
    """Whether tokens, by their coordinates [L] along each axis, stand in the raster order of a full grid."""
    grid = torch.cartesian_prod(*map(torch.arange, counts)).reshape(-1, len(counts))
    return torch.equal(grid, torch.stack(list(coordinates), dim=-1))


def _silent(model: nn.Module, first: Forward) -> tuple[str, ...]:
    """Modules that are called attention, ran, and neither made a call nor stand within or around one that did."""
    makers = {call.path for call in first.calls}
    return tuple(
        path
        for path in first.modules
        if is_attention(model.get_submodule(path))
        and not any(f"{maker}.".startswith(f"{path}.") or path.startswith(f"{maker}.") for maker in makers)
    )
