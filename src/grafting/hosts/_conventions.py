"""How a model calls its blocks, attentions and MLPs, read off one forward pass: what mixers and restructuring need.

A convention is stated only where the calls that were seen prove it; elsewhere a reason is given instead.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..contract import ModuleCall
from ._forwards import Execution, Inputs, again, executions, is_attention, tensors_of
from ._spec import ACTIVATIONS, MlpLayers


@dataclass(frozen=True)
class BlockConvention:
    """Of the blocks of a list."""

    arguments: tuple[str, ...] = ()
    returns: tuple[str, ...] = ()
    fixed: dict[int, str] = field(default_factory=dict)
    apart: dict[int, str] = field(default_factory=dict)
    mlp: str | None = None
    mlp_call: ModuleCall = field(default_factory=ModuleCall)
    mlp_layers: MlpLayers | None = None
    mlp_of_image: bool = False
    """True if the MLP takes the image's tokens alone."""


@dataclass(frozen=True)
class AttentionConvention:
    """Of an attention whose tokens come and go as one tensor."""

    call: ModuleCall
    projections: tuple[str, str, str, str] | None = None


def block_convention(
    model: nn.Module,
    inputs: Inputs,
    path: str,
    *,
    num_image: int,
    dim: int,
    modules: Mapping[str, set[tuple[str, ...]]],
) -> BlockConvention:
    """How the blocks of a list are called.

    Args:
        num_image: image tokens in the example.
        dim: channels of a token.
        modules: those that ran, with those within which they ran.
    """
    blocks = dict(model.get_submodule(path).named_children())
    seen = executions(model, inputs, [f"{path}.{i}" for i in blocks])
    calls = [_block_call(block, seen[f"{path}.{i}"]) for i, block in blocks.items()]
    usual = next((call for call in calls if call is not None), None)
    fixed = {
        i: "it takes or returns other tensors than the rest" for i, call in enumerate(calls) if call != usual
    }
    fixed |= {i: reason for i in range(len(blocks)) if (reason := _used_outside(f"{path}.{i}", modules))}
    if usual is None or len(fixed) == len(blocks):
        usual, fixed = ((), ()), {}
    if set(fixed) == {len(blocks) - 1} and len(blocks) > 1:
        fixed = {-1: fixed[len(blocks) - 1]}
    given = [_given(block, seen[f"{path}.{i}"]) for i, block in blocks.items()]
    most = max(given, key=given.count)
    apart = {i: _OTHER_ARGUMENTS for i, arguments in enumerate(given) if usual[1] and arguments != most}
    mlp, call, layers, of_image = _mlp(
        model, inputs, [f"{path}.{i}" for i in blocks], num_image=num_image, dim=dim
    )
    return BlockConvention(*usual, fixed, apart, mlp, call, layers, of_image)


_OTHER_ARGUMENTS = "it is called with other arguments than most of these blocks"


def _given(block: nn.Module, seen: Sequence[Execution]) -> list[tuple[str, str]]:
    """The arguments of a block's calls, and their shapes."""
    named = [item for ran in seen for item in ran.arguments(block).items()]
    return [(name, str([list(t.shape) for t in tensors_of(value)])) for name, value in named]


def _block_call(
    block: nn.Module, seen: Sequence[Execution]
) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """A block's first arguments up to its last tokens, and the names of what it returns; None if that is not proved."""
    if len(seen) != 1:
        return None
    arguments, output = seen[0].arguments(block), seen[0].output
    outputs = [output] if isinstance(output, Tensor) else output
    if not isinstance(outputs, list | tuple) or (len(outputs) < 2 and not isinstance(output, Tensor)):
        return None
    returns = []
    for i, tensor in enumerate(outputs):
        if not isinstance(tensor, Tensor) or tensor.ndim != 3:
            return None
        alike = [n for n, v in arguments.items() if isinstance(v, Tensor) and v.shape == tensor.shape]
        if len(alike) > 1:
            alike = [name for name in alike if _is_source(block, seen[0], name, i)]
        if len(alike) != 1:
            return None
        returns.append(alike[0])
    if len(set(returns)) != len(returns):
        return None
    names = list(arguments)
    return tuple(names[: 1 + max(map(names.index, returns))]), tuple(returns)


def _is_source(block: nn.Module, seen: Execution, name: str, i: int) -> bool:
    """Whether the i-th output differs from its tokens by residuals: it moves with them one for one where nothing is mixed."""
    arguments = seen.arguments(block)
    halves = []
    for chosen in (slice(0, 1), slice(1, None)):
        moved = arguments[name].clone()
        moved[:, chosen] += torch.randn(moved[:, chosen].shape).to(moved)
        output = again(block, Execution((), {**arguments, name: moved}, None))[1]
        tensors = [output] if isinstance(output, Tensor) else output
        before = [seen.output] if isinstance(seen.output, Tensor) else seen.output
        halves.append((tensors[i] != before[i]).any(-1)[0])
    return bool((halves[0] ^ halves[1]).all())


def _used_outside(block: str, modules: Mapping[str, set[tuple[str, ...]]]) -> str:
    """Why a block cannot be taken out, if a part of it runs when it does not; else empty."""
    parts = [
        path.removeprefix(f"{block}.")
        for path, stacks in modules.items()
        if path.startswith(f"{block}.") and any(block not in stack for stack in stacks)
    ]
    return f"the model uses its {parts[0]} outside of it" if parts else ""


def attention_convention(
    model: nn.Module, inputs: Inputs, paths: Sequence[str], *, num_tokens: int, dim: int
) -> AttentionConvention | None:
    """How attentions are called, if the tokens [B, L, D] of each come and go as one tensor; None otherwise.

    Args:
        paths: of the attentions of a list of blocks.
        num_tokens: that they attend to, L.
        dim: channels, D.
    """
    seen = executions(model, inputs, paths)
    calls = [
        _module_call(model.get_submodule(path), ran, num_tokens=num_tokens, dim=dim)
        for path, runs in seen.items()
        for ran in runs
    ]
    call = calls[0] if calls else None
    if call is None or any(other != call for other in calls):
        return None
    first = paths[0]
    return AttentionConvention(call, _projections(model.get_submodule(first), seen[first][0], dim))


def _module_call(module: nn.Module, seen: Execution, *, num_tokens: int, dim: int) -> ModuleCall | None:
    outputs = [seen.output] if isinstance(seen.output, Tensor) else seen.output
    if not isinstance(outputs, list | tuple) or not outputs or any(more is not None for more in outputs[1:]):
        return None
    arguments = seen.arguments(module)
    names = list(arguments)
    name = (
        names[0]
        if seen.args
        else next((n for n in names if _is_tokens(seen.kwargs.get(n), num_tokens, dim)), "")
    )
    tokens = arguments.get(name)
    if tokens is None or not _is_tokens(tokens, num_tokens, dim):
        return None
    if not isinstance(outputs[0], Tensor) or outputs[0].shape != tokens.shape:
        return None
    changing = [n for n, value in arguments.items() if value is None and ("mask" in n or "encoder" in n)]
    return ModuleCall(tokens=name, must_be_none=tuple(changing), returns=len(outputs))


def _is_tokens(value: Any, num_tokens: int, dim: int) -> bool:
    return isinstance(value, Tensor) and value.ndim == 3 and value.shape[1:] == (num_tokens, dim)


def _projections(module: nn.Module, seen: Execution, dim: int) -> tuple[str, str, str, str] | None:
    """Paths of the linear layers q, k, v and out: which of these tensors moves when a layer's output does."""
    calls, output, layers = again(module, seen)
    if not calls:
        return _projections_of_other(module, seen, layers, dim)
    if len(calls) != 1:
        return None
    found: dict[tuple[bool, bool, bool], list[str]] = {}
    for name, used in layers.items():
        layer = module.get_submodule(name)
        if len(used) != 1 or not isinstance(layer, nn.Linear) or layer.weight.shape != (dim, dim):
            continue
        (after,) = again(module, seen, moved=layer)[0]
        moved = tuple(
            not torch.equal(getattr(calls[0], part), getattr(after, part))
            for part in ("queries", "keys", "values")
        )
        found.setdefault(moved, []).append(name)  # type: ignore[arg-type]  # three of them
    result = output if isinstance(output, Tensor) else output[0]
    ends = [n for n in found.get((False, False, False), []) if torch.equal(layers[n][0].output, result)]
    parts = [*(found.get(moved, []) for moved in _ONE_EACH), ends]
    if any(len(part) != 1 for part in parts):
        return None
    q, k, v, out = (part[0] for part in parts)
    return q, k, v, out


def _projections_of_other(
    module: nn.Module, seen: Execution, layers: Mapping[str, Sequence[Execution]], dim: int
) -> tuple[str, str, str, str] | None:
    """The same of attention that makes no call: what a query does stays at its token, and what comes out is linear in the values."""
    names = [n for n, used in layers.items() if len(used) == 1 and used[0].output.shape[-1] == dim]
    outs = [n for n in names if torch.equal(layers[n][0].output, seen.output)]
    if len(names) != 4 or len(outs) != 1:
        return None
    mixed = layers[outs[0]][0].args[0]

    def after(name: str, change: Callable[[Tensor], Tensor]) -> Tensor:
        moved = module.get_submodule(name)
        return again(module, seen, moved=moved, change=change)[2][outs[0]][0].args[0]

    others = [name for name in names if name not in outs]
    alone = {n: (after(n, _first_doubled) != mixed).any(-1)[:, 1:].any() for n in others}
    queries = [n for n in others if not alone[n]]
    values = [
        n for n in others if alone[n] and torch.allclose(after(n, lambda v: 2 * v), 2 * mixed, rtol=1e-4)
    ]
    keys = [n for n in others if n not in (*queries, *values)]
    if [len(queries), len(keys), len(values)] != [1, 1, 1]:
        return None
    return queries[0], keys[0], values[0], outs[0]


def _first_doubled(tokens: Tensor) -> Tensor:
    return torch.cat([2 * tokens[:, :1], tokens[:, 1:]], dim=1)


_ONE_EACH = ((True, False, False), (False, True, False), (False, False, True))


def _mlp(
    model: nn.Module, inputs: Inputs, paths: Sequence[str], *, num_image: int, dim: int
) -> tuple[str | None, ModuleCall, MlpLayers | None, bool]:
    """The MLP of the image tokens in the blocks of a list: its path inside a block, its call, its layers, and whether it takes
    no others.

    An MLP is a module that takes and returns all of them, begins and ends with linear layers, and makes no call of attention.
    """
    parts = {
        name: part
        for name, part in model.get_submodule(paths[0]).named_modules()
        if name and not is_attention(part) and sum(isinstance(m, nn.Linear) for m in part.modules()) > 1
    }
    seen = executions(model, inputs, [f"{paths[0]}.{name}" for name in parts])
    found: list[tuple[str, ModuleCall, MlpLayers]] = []
    for name, part in parts.items():
        ran = seen[f"{paths[0]}.{name}"]
        if len(ran) != 1 or any(name.startswith(f"{other}.") for other, *_ in found):
            continue
        call = _image_call(part, ran[0], num_image, dim)
        layers = _mlp_layers(part, ran[0], call) if call else None
        if call and layers:
            found.append((name, call, layers))
    of_image = [part for part in found if seen[f"{paths[0]}.{part[0]}"][0].output.shape[1] == num_image]
    if len(found) > 1:  # the text's own, which may be longer than the image
        found = of_image
    if len(found) == 1 and _in_all(model, inputs, paths, found[0], num_image=num_image, dim=dim):
        return *found[0], bool(of_image)
    return None, ModuleCall(), None, False


def _in_all(
    model: nn.Module,
    inputs: Inputs,
    paths: Sequence[str],
    found: tuple[str, ModuleCall, MlpLayers],
    *,
    num_image: int,
    dim: int,
) -> bool:
    """Whether an MLP is called so once in each of these blocks."""
    mlp, call, _ = found
    if not all(mlp in dict(model.get_submodule(path).named_modules()) for path in paths):
        return False
    seen = executions(model, inputs, [f"{path}.{mlp}" for path in paths])
    return all(
        len(ran) == 1 and _image_call(model.get_submodule(path), ran[0], num_image, dim) == call
        for path, ran in seen.items()
    )


def _image_call(module: nn.Module, seen: Execution, num_image: int, dim: int) -> ModuleCall | None:
    """How a module is called whose tokens hold all of the image's."""
    if not isinstance(seen.output, Tensor) or seen.output.ndim != 3 or seen.output.shape[1] < num_image:
        return None
    return _module_call(module, seen, num_tokens=seen.output.shape[1], dim=dim)


def _mlp_layers(module: nn.Module, seen: Execution, call: ModuleCall) -> MlpLayers | None:
    """The first and the last linear layer, and what is between them; None if these are not what it begins and ends with."""
    calls, output, layers = again(module, seen)
    x = seen.arguments(module)[call.tokens]
    used = {name: ran[0] for name, ran in layers.items() if len(ran) == 1}
    ups = [name for name, ran in used.items() if ran.args and torch.equal(ran.args[0], x)]
    downs = [name for name, ran in used.items() if torch.equal(ran.output, output)]
    if calls or not ups or len(downs) != 1 or downs[0] in ups:
        return None
    hidden, inner = used[ups[0]].output, used[downs[0]].args[0]
    if len(ups) == 1 and hidden.shape == inner.shape:
        for activation, apply in ACTIVATIONS.items():
            if torch.allclose(apply(hidden), inner, rtol=1e-4, atol=1e-5):
                return MlpLayers(up=ups[0], down=downs[0], activation=activation)
    return MlpLayers(up=ups[0], down=downs[0], gated=True)
