"""Forward passes in which no attention mixes tokens, and what each attention call saw in one.

Attention is answered with its values, or with zeros where queries and keys differ in number; attention of another kind, such as
linear, with its input; a group norm, and a convolution over neighbours, which mix too, with what they do at a place alone. So every
token of every layer is a function of its own source alone, and an input that is perturbed at one place shows where that place went.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..contract import Kwargs
from ..errors import HostError
from ..functional.softmax import HIDDEN_SCORE
from ..machine.randomness import generator, restarted
from ..machine.reading import failure_of
from ._host import evaluating

Inputs = Mapping[str, Any]
"""Keyword arguments of a forward pass: tensors, numbers, and lists and mappings of these."""

MaskSeen = Literal["none", "all true", "of keys", "of pairs", "a bias"]
"""A mask of keys hides the same from all queries; one of pairs, such as a causal one, does not; a bias is added to scores."""

_STRENGTH = 3.0
"""Of a perturbation, against inputs that are about 1 in size."""

_SEED = 718281828
"""Of perturbations: one that no example is drawn with, since a norm hides a multiple of the input itself."""


@dataclass(frozen=True, eq=False)
class SdpaCall:
    """One call of `scaled_dot_product_attention`, with the tokens of its heads side by side."""

    path: str
    """Of the innermost module that made it, or of the attention that makes none."""
    execution: int
    """How often that module had run before, in this forward pass."""
    queries: Tensor  # [B, L, H K]
    keys: Tensor  # [B, L, H K]
    values: Tensor  # [B, L, H V]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mask: MaskSeen
    causal: bool
    dropout: float
    scale: float | None
    is_sdpa: bool = True
    """False if a module of attention ran and made no call: queries, keys and values are then the tokens that it took."""


class _Unmixed(TorchFunctionMode):
    """Answers what mixes tokens without mixing them; keeps every call of attention."""

    def __init__(self, where: Callable[[], tuple[str, int]]):
        super().__init__()
        self.where = where
        self.calls: list[SdpaCall] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is F.group_norm:
            return _channelwise(*args, **kwargs)
        if func in (F.conv1d, F.conv2d, F.conv3d):
            return _in_place(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        path, execution = self.where()
        self.calls.append(
            SdpaCall(
                path=path,
                execution=execution,
                queries=_tokens(query),
                keys=_tokens(key),
                values=_tokens(value),
                num_heads=query.shape[-3],
                num_kv_heads=key.shape[-3],
                head_dim=query.shape[-1],
                mask=_mask_seen(attn_mask),
                causal=is_causal,
                dropout=dropout_p,
                scale=scale,
            )
        )
        if query.shape[-2] != key.shape[-2]:
            return query.new_zeros(*query.shape[:-1], value.shape[-1])
        repeats = query.shape[-3] // value.shape[-3]
        return value.repeat_interleave(repeats, dim=-3).expand(*query.shape[:-1], -1).clone()


def _tokens(heads: Tensor) -> Tensor:
    """[..., H, L, K] -> [B, L, H K]."""
    return heads.detach().movedim(-3, -2).flatten(-2).flatten(0, -3).clone()


def _channelwise(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    shape = (-1, *[1] * (x.ndim - 2))
    x = x if weight is None else x * weight.reshape(shape)
    return x if bias is None else x + bias.reshape(shape)


def _in_place(conv: Any, x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A convolution; of one that gives as many places as it takes, over their neighbours, what each place adds to its own."""
    output = conv(x, weight, *args, **kwargs)
    sides = weight.shape[2:]
    axis = -1 - len(sides)  # of channels; what is not of a batch has one axis less
    if (
        output.shape[axis + 1 :] != x.shape[axis + 1 :]
        or max(sides) == 1
        or any(side % 2 == 0 for side in sides)
    ):
        return output
    for i, side in enumerate(sides, 2):
        weight = weight.narrow(i, side // 2, 1)
    bias = kwargs.get("bias", args[0] if args else None)
    return conv(x, weight, bias, groups=x.shape[axis] // weight.shape[1])


def _mask_seen(mask: Tensor | None) -> MaskSeen:
    if mask is None:
        return "none"
    seen = mask if mask.dtype == torch.bool else mask > HIDDEN_SCORE
    if mask.dtype != torch.bool and ((mask != 0) & seen).any():
        return "a bias"
    if seen.all():
        return "all true"
    rows = seen.reshape(-1, *seen.shape[-2:])  # [B H, M or 1, L]
    # what most is seen from; padding may see itself alone
    most = rows.sum(-1).argmax(1)
    keys = rows[torch.arange(len(rows), device=rows.device), most][:, None]
    unlike = rows != keys
    if rows.shape[1] == rows.shape[2]:
        unlike = unlike & keys.transpose(1, 2)
    return "of pairs" if unlike.any() else "of keys"


@dataclass(frozen=True)
class Forward:
    """What a forward pass without mixing did."""

    calls: list[SdpaCall]
    """Of attention."""
    modules: dict[str, set[tuple[str, ...]]]
    """Paths of the modules that ran, each with the paths of those within which it ran."""


def unmixed_forward(model: nn.Module, inputs: Inputs) -> Forward:
    """A forward pass without mixing; the model and random numbers stay as they were."""
    with _watching(model) as watch:
        unmixed = _Unmixed(watch.where)
        watch.calls = unmixed.calls
        with unmixed:
            run(model, inputs)
    return Forward(unmixed.calls, watch.modules)


def run(model: nn.Module, inputs: Inputs) -> Any:
    """The output of a model for keyword arguments, in evaluation mode and always with the same random numbers.

    Raises:
        HostError: the model does not run on these inputs.
    """
    try:
        with evaluating(model), torch.no_grad(), restarted(0):
            return model(**inputs)
    except Exception as error:
        raise HostError(
            f"{type(model).__name__} does not run on the example inputs {_described(inputs)}: "
            f"{failure_of(error, 'give the keyword arguments of its forward')}"
        ) from error


def _described(inputs: Inputs) -> str:
    words = (
        f"{name} {list(value.shape) if isinstance(value, Tensor) else type(value).__name__}"
        for name, value in inputs.items()
    )
    return ", ".join(words)


@dataclass
class _Watch:
    """Which modules run."""

    stack: list[str] = field(default_factory=list)
    executions: Counter[str] = field(default_factory=Counter)
    modules: dict[str, set[tuple[str, ...]]] = field(default_factory=dict)
    calls: list[SdpaCall] = field(default_factory=list)

    def where(self) -> tuple[str, int]:
        """The module that runs now, by its path, and how often it had run before."""
        return (self.stack[-1], self.executions[self.stack[-1]] - 1) if self.stack else ("", 0)

    def entering(self, path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.modules.setdefault(path, set()).add(tuple(self.stack))
            self.stack.append(path)
            self.executions[path] += 1

        return hook

    def leave(self, module: nn.Module, args: tuple, kwargs: Kwargs, output: Any) -> Tensor | None:
        """Answers attention of another kind than SDPA with the tokens that it took."""
        path, execution = self.where()
        self.stack.pop()
        if any(call.path == path or call.path.startswith(f"{path}.") for call in self.calls):
            return None
        call = _other_attention(module, Execution(args, kwargs, output))
        if call is None:
            return None
        self.calls.append(replace(call, path=path, execution=execution))
        return call.values.clone()


@contextmanager
def _watching(model: nn.Module) -> Iterator[_Watch]:
    watch = _Watch()
    with ExitStack() as hooks:
        for path, module in model.named_modules():
            if path:
                hooks.enter_context(module.register_forward_pre_hook(watch.entering(path)))
                hooks.enter_context(module.register_forward_hook(watch.leave, with_kwargs=True))
        yield watch


def perturbed(inputs: Inputs, name: str, *, axis: int | None = None, chosen: Sequence[int] = ()) -> Kwargs:
    """Copies of inputs, of which one argument has changed: whole, or at the `chosen` places along an axis of its tensors."""
    new = {key: copied(value) for key, value in inputs.items()}
    new[name] = tree_map_only(Tensor, lambda tensor: _moved(tensor, axis, chosen), new[name])
    return new


def cut_short(inputs: Inputs) -> Kwargs:
    """Copies of inputs in which every mask [B, T] of ones hides its last place of the first sample, as where a prompt is padded."""

    def cut(tensor: Tensor) -> Tensor:
        if is_mask(tensor):
            tensor[0, ..., -1] = 0
        return tensor

    return {name: tree_map_only(Tensor, cut, copied(value)) for name, value in inputs.items()}


def is_mask(tensor: Tensor) -> bool:
    """Whether a tensor is of the form of a mask that hides nothing: ones, a row for each sample."""
    return tensor.ndim > 1 and tensor.shape[-1] > 1 and bool((tensor == 1).all())


def _moved(tensor: Tensor, axis: int | None, chosen: Sequence[int]) -> Tensor:
    """Floats get noise, whole numbers become others among those that the tensor holds; booleans stay."""
    if tensor.dtype == torch.bool or tensor.is_complex() or not tensor.numel():
        return tensor
    if tensor.is_floating_point():
        noise = torch.randn(tensor.shape, generator=generator(_SEED))
        moved = tensor + _STRENGTH * noise.to(tensor)
    else:
        values, places = tensor.unique(return_inverse=True)
        moved = values.roll(-1)[places]
    if axis is None:
        return moved
    if axis >= tensor.ndim:
        return tensor
    is_chosen = torch.zeros(tensor.shape[axis], dtype=torch.bool, device=tensor.device)
    is_chosen[[place for place in chosen if place < tensor.shape[axis]]] = True
    shape = [1] * tensor.ndim
    shape[axis] = -1
    return torch.where(is_chosen.view(shape), moved, tensor)


def copied(value: Any) -> Any:
    """Copies of the tensors in a structure of lists, tuples and mappings."""
    return tree_map_only(Tensor, Tensor.clone, value)


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor in a structure of lists, tuples and mappings."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def has_changed(before: Tensor, after: Tensor) -> Tensor:
    """Which tokens of the first of a batch [B, L, D] are no longer the same, [L]."""
    assert before.shape == after.shape
    first, second = before[0].float(), after[0].float()
    return (first - second).abs().amax(-1) > 1e-5 * (1 + first.abs().amax(-1))


@dataclass(frozen=True)
class Execution:
    """One call of a module: its arguments and its output, as they were."""

    args: tuple
    kwargs: Kwargs
    output: Any

    def arguments(self, module: nn.Module) -> Kwargs:
        """By name; those that were left out have their default."""
        signature = inspect.signature(module.forward)
        try:
            bound = signature.bind(*self.args, **self.kwargs)
        except TypeError:
            return dict(self.kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)


def executions(model: nn.Module, inputs: Inputs, paths: Iterable[str]) -> dict[str, list[Execution]]:
    """Every call of some modules in a forward pass without mixing."""
    found: dict[str, list[Execution]] = {path: [] for path in paths}
    with _recording({path: model.get_submodule(path) for path in found}, found):
        unmixed_forward(model, inputs)
    return found


@contextmanager
def _recording(modules: Mapping[str, nn.Module], found: dict[str, list[Execution]]) -> Iterator[None]:
    """Adds each call of these modules to the list of its name."""
    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_hook(_adding(found[name]), with_kwargs=True))
        yield


def _adding(found: list[Execution]) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple, kwargs: Kwargs, output: Any) -> None:
        found.append(Execution(copied(args), copied(kwargs), copied(output)))

    return hook


def again(
    module: nn.Module,
    execution: Execution,
    *,
    moved: nn.Module | None = None,
    change: Callable[[Tensor], Tensor] = lambda output: _moved(output, None, ()),
) -> tuple[list[SdpaCall], Any, dict[str, list[Execution]]]:
    """A module called once more without mixing: its calls of attention, its output, and what its linear layers did.

    Args:
        moved: a layer inside it whose output is changed.
        change: by default a perturbation.
    """
    linears = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    found: dict[str, list[Execution]] = {name: [] for name in linears}
    hook = moved.register_forward_hook(lambda *call: change(call[-1])) if moved is not None else nullcontext()
    unmixed = _Unmixed(lambda: ("", 0))
    with hook, _recording(linears, found), unmixed, torch.no_grad():
        output = module(*copied(execution.args), **copied(execution.kwargs))
    return unmixed.calls, output, found


def is_attention(module: nn.Module) -> bool:
    """Whether a module's class is called attention."""
    return any(word in type(module).__name__ for word in ("Attention", "Attn"))


def _is_elsewhere(module: nn.Module) -> bool:
    """Whether it runs on a backend of diffusers' that was chosen, and is not torch's."""
    backend = getattr(getattr(module, "processor", None), "_attention_backend", None)
    return backend not in (None, "native")


def _other_attention(module: nn.Module, seen: Execution) -> SdpaCall | None:
    """What a module of attention took that made no call of SDPA: tokens [B, L, D], alone and in and out; None of any other module."""
    if not is_attention(module) or any(map(_is_elsewhere, module.modules())):
        return None
    arguments = seen.arguments(module)
    tokens = next(iter(arguments.values()), None)
    others = [n for n, value in arguments.items() if value is not None and value is not tokens]
    is_alone = not any(word in name for name in others for word in ("encoder", "context", "mask"))
    if not (is_alone and isinstance(tokens, Tensor) and isinstance(seen.output, Tensor) and tokens.ndim == 3):
        return None
    if seen.output.shape != tokens.shape:
        return None
    taken, dim = tokens.detach().clone(), tokens.shape[-1]
    return SdpaCall(
        "", 0, taken, taken, taken, 1, 1, dim, "none", causal=False, dropout=0.0, scale=None, is_sdpa=False
    )
