"""From what was observed of a model to a spec of it, with the questions that the observation leaves open."""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..contract import Grid, ModuleCall
from ..diffusion import FlowConfig, ProcessConfig
from ..errors import HostError
from ._conventions import attention_convention, block_convention
from ._forwards import Inputs, executions, tensors_of
from ._grids import patch_sizes
from ._host import config_of
from ._observing import AttentionCall, Axis, Observation, Run, is_raster
from ._spec import BlockList, Fact, Input, LatentTokens, MlpLayers, Output, PackedTokens, SdpaSpec, Time

Image = LatentTokens | PackedTokens


@dataclass(frozen=True)
class Knowledge:
    """What only a pipeline tells: how its scheduler noises inputs, and what it calls the model with."""

    time: Time | None = None
    output: Output | None = None
    process: ProcessConfig | None = None
    latent_size: int | None = None
    """Side of a native latent."""
    latent_channels: int | None = None
    """Of the autoencoder."""


@dataclass
class Proposal:
    """A spec, and what a person should look at before it is used."""

    spec: SdpaSpec
    questions: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _List:
    """Calls of the attention that stands at one path inside the blocks of one list."""

    path: str
    attention: str
    blocks: tuple[str, ...]
    calls: tuple[AttentionCall, ...]

    @property
    def image_calls(self) -> list[AttentionCall]:
        """Over image tokens, which a kernel may answer."""
        return [call for call in self.calls if call.kind in ("self", "joint", "mixed")]

    @property
    def usual(self) -> AttentionCall:
        return self.image_calls[0]


def propose(
    model: nn.Module, inputs: Inputs, seen: Observation, *, known: Knowledge, native_grid: Grid | None = None
) -> Proposal:
    """The spec that follows from an observation.

    Raises:
        HostError: no attention over image tokens stands in a list of blocks.
    """
    questions: list[str] = []
    lists = list(_usable(_lists(model, seen), questions))
    if not lists:
        raise HostError(
            f"{type(model).__name__} has no attention over the tokens of {seen.image} that a kernel could take the place "
            f"of: {'; '.join(questions) or _seen_instead(seen)}"
        )
    usual = lists[0].usual
    image, grid = _image_rule(model, inputs, seen.image, usual, known, questions)
    if native_grid is None:
        native_grid = _native_grid(model, image, grid, known, questions)
    orders = [_order(found, inputs) for found in lists]
    conventions = list(_conventions(model, inputs, seen, lists, orders))
    spec = SdpaSpec(
        name=_name(type(model)),
        model_class=_import_path(type(model)),
        blocks=tuple(blocks for blocks, _, _ in conventions),
        num_heads=_fact(model, usual.num_heads, "heads", "num_attention_heads"),
        head_dim=_fact(model, usual.head_dim, "head_dim", "attention_head_dim"),
        order=orders[0],
        image=image,
        native_grid=native_grid,
        native_num_text=_num_keys(usual) - usual.num_image,
        channels=_channels(model, inputs[seen.image], image),
        projections=next((found for _, found, _ in conventions if found), None),
        mlp=next((found for _, _, found in conventions if found), None),
        time=known.time or _time(inputs, questions),
        output=known.output or _output(model, inputs, questions),
        process=known.process or _process(questions),
        distilled=bool(config_of(model).get("guidance_embeds")),
        inputs=dict(_other_inputs(model, inputs, seen, image, usual)),
    )
    questions += [f"{path}: its class is called attention, and it makes no call" for path in seen.silent]
    return Proposal(_with_heads(model, spec, lists), questions)


def _lists(model: nn.Module, seen: Observation) -> Iterator[_List]:
    """Attentions by their list of blocks, in the order in which they run first."""
    found: dict[tuple[str, str], dict[str, list[AttentionCall]]] = {}
    for call in seen.calls:
        place = re.fullmatch(r"(.*?)\.(\d+)\.(.+)", call.path)
        if place and isinstance(model.get_submodule(place[1]), nn.ModuleList | nn.Sequential):
            found.setdefault((place[1], place[3]), {}).setdefault(place[2], []).append(call)
    for (path, attention), blocks in found.items():
        calls = tuple(call for calls in blocks.values() for call in calls)
        yield _List(path, attention, tuple(blocks), calls)


def _usable(lists: Iterator[_List], questions: list[str]) -> Iterator[_List]:
    """Those over image tokens that a spec can describe; at most one attention of a list of blocks."""
    taken: dict[str, _List] = {}
    for found in lists:
        if not found.image_calls:
            continue
        where, usual = f"{found.path}.*.{found.attention}", found.image_calls[0]
        if reason := _hindrance(found):
            questions.append(f"{where} is left out: {reason}")
        elif found.path in taken:
            questions.append(
                f"{where} is left out: {found.path}.*.{taken[found.path].attention} is the attention of these blocks"
            )
        elif taken and usual.head_dim != (first := next(iter(taken.values())).usual).head_dim:
            questions.append(f"{where} is left out: heads of {usual.head_dim} channels, others of {first.head_dim}")
        elif taken and usual.num_image != first.num_image:
            questions.append(
                f"{where} is left out: {usual.num_image} image tokens in a call, others {first.num_image}"
            )
        else:
            taken[found.path] = found
            if odd := sorted({c.path for c in found.image_calls if "of pairs" in (c.mask, c.mask_padded) or c.causal}):
                questions.append(f"{', '.join(odd)}: sees some keys from some queries alone; leave it out of plans")
            yield found


def _hindrance(found: _List) -> str:
    """Why a spec cannot describe an attention; empty if it can."""
    usual = found.usual
    if any((c.queries, c.keys) != (usual.queries, usual.keys) for c in found.image_calls):
        return "its calls have several layouts"
    if sum(run.kind == "image" for run in usual.keys) != 1 or not usual.raster:
        return "its image tokens do not stand side by side in raster order"
    if usual.kind == "mixed" and {run.kind for run in usual.queries} != {"image"}:
        return "its queries are neither all tokens nor those of the image"
    if all("of pairs" in (call.mask, call.mask_padded) or call.causal for call in found.image_calls):
        return "it sees some keys from some queries alone"
    if usual.num_image < 2:
        return "it sees a single image token"
    return ""


def _seen_instead(seen: Observation) -> str:
    kinds = ", ".join(sorted({f"{call.path} ({call.kind})" for call in seen.calls})[:4])
    silent = f"; no call was made by {', '.join(seen.silent[:2])}" if seen.silent else ""
    return f"found {kinds}{silent}"


def _num_keys(call: AttentionCall) -> int:
    return sum(run.length for run in call.keys)


def _order(found: _List, inputs: Inputs) -> tuple[str, ...]:
    """The runs of tokens among the keys; where others stand on both sides, those of one side by their arguments."""
    keys = found.usual.keys
    place = next(i for i, run in enumerate(keys) if run.kind == "image")
    before, after = keys[:place], keys[place + 1 :]
    if not (before and after):
        return tuple("image" if run.kind == "image" else "rest" for run in _merged(keys))
    for named, order in ((after, ("rest", "image", *(run.argument for run in after))),
                         (before, (*(run.argument for run in before), "image", "rest"))):  # fmt: skip
        if all(_length(inputs, run.argument) == run.length for run in named):
            return order
    raise HostError(
        f"{found.path}.*.{found.attention}: tokens stand on both sides of the image, and neither side is as long as "
        f"arguments are: {', '.join(map(str, keys))}"
    )


def _merged(keys: Sequence[Run]) -> list[Run]:
    """With runs that are not the image's, side by side, as one."""
    groups = itertools.groupby(keys, key=lambda run: run.kind == "image")
    return [next(iter(runs)) for _, runs in groups]


def _length(inputs: Inputs, argument: str) -> int | None:
    value = inputs.get(argument)
    return value.shape[1] if isinstance(value, Tensor) and value.ndim > 1 else None


def _image_rule(
    model: nn.Module,
    inputs: Inputs,
    name: str,
    usual: AttentionCall,
    known: Knowledge,
    questions: list[str],
) -> tuple[Image, Grid]:
    """Where the model keeps the grid of its image tokens, and which it is in the example."""
    if len(usual.axes) > 1:
        counts = [axis.count for axis in usual.axes]
        return _latent_rule(model, inputs[name], name, usual.axes), Grid(counts[-2], counts[-1], *counts[:-2])
    packed = _positions(inputs, name, usual) or _sizes(inputs, name, usual.num_image)
    if packed is not None:
        rule, grid = packed
        return rule.model_copy(update={"patch": _packing(model, inputs[name], known, questions)}), grid
    questions.append(
        f"the grid of the {usual.num_image} image tokens stands in no argument: they are taken as one row, which is right for "
        "sound; else name what says it in `image`"
    )
    return _latent_rule(model, inputs[name], name, usual.axes), Grid(1, usual.num_image)


def _latent_rule(model: nn.Module, value: Any, name: str, axes: Sequence[Axis]) -> LatentTokens:
    latent = tensors_of(value)[0]
    letters = dict(zip((axis.index for axis in axes), "fhw"[-len(axes) :], strict=True))
    batch = {0} if isinstance(value, Tensor) else set()
    others = [i for i in range(latent.ndim) if i not in letters and i not in batch]
    channels = next((i for i in others if latent.shape[i] == config_of(model).get("in_channels")), others[0])
    for i in others:
        one_frame = latent.shape[i] == 1 and "f" not in letters.values()
        letters[i] = "c" if i == channels else "f" if one_frame else "n"
    letters |= dict.fromkeys(batch, "b")
    written = " ".join(letters[i] for i in range(latent.ndim))
    sides = {letters[axis.index]: axis.size // axis.count for axis in axes}
    rule = LatentTokens(argument=name, axes=None if written in ("b c h w", "b c f h w") else written)
    return rule.model_copy(update={"patch_size": _patch(model, rule, [sides.get(a, 1) for a in "fhw"])})


def _patch(model: nn.Module, rule: LatentTokens, sides: list[int]) -> Fact | tuple[Fact, ...]:
    """A patch's sides by where the model keeps them, if it does."""
    kept = [("config.patch_size",), ("config.patch_size_t", "config.patch_size", "config.patch_size")]
    for paths in kept:
        candidate = paths[0] if len(paths) == 1 else paths
        try:
            if list(patch_sizes(model, rule.model_copy(update={"patch_size": candidate}))) == sides:
                return candidate
        except (AttributeError, TypeError):
            continue
    return sides[1] if sides[0] == 1 and sides[1] == sides[2] else tuple(sides)


def _positions(inputs: Inputs, name: str, usual: AttentionCall) -> tuple[PackedTokens, Grid] | None:
    """The argument whose entries are the places of the image tokens."""
    place = next(i for i, run in enumerate(usual.keys) if run.kind == "image")
    before = usual.keys[:place]
    for positions, value in inputs.items():
        if positions == name or not isinstance(value, Tensor) or value.ndim not in (2, 3) or not 2 <= value.shape[-1] <= 8:
            continue
        rows = value[0] if value.ndim == 3 else value
        starts = {0: (), sum(run.length for run in before): tuple(run.argument for run in before)}
        for start, after in starts.items():
            if any(_length(inputs, argument) is None for argument in after):
                continue
            found = _columns(rows[start : start + usual.num_image], usual.num_image)
            if found:
                columns, grid = found
                rule = PackedTokens(argument=name, positions=positions, after=after, width=value.shape[-1], columns=columns)
                return rule, grid
    return None


def _columns(rows: Tensor, num_tokens: int) -> tuple[tuple[int, ...], Grid] | None:
    """Which entries of places [L, n] count rows and columns (and frames before), and the grid; None if none do."""
    if len(rows) != num_tokens:
        return None
    counted = {i: column.unique(return_inverse=True) for i, column in enumerate(rows.cpu().float().unbind(-1))}
    varied = {i: (values, places) for i, (values, places) in counted.items() if len(values) > 1}
    steady = all(torch.equal(values, values[0] + torch.arange(len(values))) for values, _ in varied.values())
    if len(varied) not in (2, 3) or not steady:
        return None
    sizes = [len(values) for values, _ in varied.values()]
    if math.prod(sizes) != num_tokens or not is_raster([places for _, places in varied.values()], sizes):
        return None
    return tuple(varied), Grid(sizes[-2], sizes[-1], *sizes[:-2])


def _sizes(inputs: Inputs, name: str, num_tokens: int) -> tuple[PackedTokens, Grid] | None:
    """The arguments that say frames, rows and columns as numbers."""
    words = ("frame", "height", "width")
    named = [next((n for n, v in inputs.items() if word in n and type(v) is int and "audio" not in n), None) for word in words]
    names = tuple(n for n in named if n is not None)
    if len(names) > 1 and math.prod(inputs[n] for n in names) == num_tokens:
        return PackedTokens(argument=name, sizes=names), _grid([inputs[n] for n in names])
    for argument, value in inputs.items():
        while isinstance(value, list | tuple) and value and isinstance(value[0], list | tuple):
            value = value[0]
        if (
            isinstance(value, list | tuple)
            and len(value) in (2, 3)
            and all(type(v) is int for v in value)
            and math.prod(value) == num_tokens
        ):
            return PackedTokens(argument=name, sizes=argument), _grid(value)
    return None


def _grid(sizes: Sequence[int]) -> Grid:
    return Grid(sizes[-2], sizes[-1], *sizes[:-2])


def _packing(model: nn.Module, value: Tensor, known: Knowledge, questions: list[str]) -> int:
    """Side of the square of latents that a packed token holds."""
    config = config_of(model)
    own = known.latent_channels or config.get("out_channels") or 0
    side = math.isqrt(value.shape[2] // own) if own and value.shape[2] % own == 0 else 0
    if side and side**2 * own == value.shape[2] and (known.latent_channels or side > 1):
        return side
    questions.append("how many latents a packed token holds is not told by the example: `image.patch` is taken as 2")
    return 2


def _native_grid(model: nn.Module, image: Image, grid: Grid, known: Knowledge, questions: list[str]) -> Grid:
    """The grid that the model was trained for, if it says so; else the example's."""
    size = known.latent_size or config_of(model).get("sample_size")
    if isinstance(size, int) and grid.frames == 1 and grid.rows > 1:
        sides = patch_sizes(model, image) if isinstance(image, LatentTokens) else (1, image.patch, image.patch)
        return Grid(size // sides[1], size // sides[2])
    questions.append(
        f"native_grid is the example's, {grid}: set it to the one that the model was trained for, which costs are counted at"
    )
    return grid


def _name(model_class: type) -> str:
    """Of the host: its class's, without what all classes are called."""
    short = re.sub(r"(Transformer|DiT)?(\d?D)?(Transformer|DiT)?(Model)?$", "", model_class.__name__)
    return re.sub(r"\W", "", short or model_class.__name__).lower()


def _import_path(model_class: type) -> str:
    package = model_class.__module__.partition(".")[0]
    if package == "diffusers":
        import diffusers

        if getattr(diffusers, model_class.__name__, None) is model_class:
            return f"diffusers:{model_class.__name__}"
    return f"{model_class.__module__}:{model_class.__qualname__}"


def _fact(model: nn.Module, value: int, word: str, first: str) -> Fact:
    """Where the model's config keeps a number, under a name with this word; else the number."""
    config = config_of(model)
    names = [first, *(name for name in config if word in name and "kv" not in name and "key_value" not in name)]
    return next((f"config.{name}" for name in names if config.get(name) == value), value)


def _channels(model: nn.Module, value: Any, image: Image) -> Fact:
    tensor = tensors_of(value)[0]
    if isinstance(image, PackedTokens):
        count = tensor.shape[2]
    else:
        axes = (image.axes or ("b c h w" if tensor.ndim == 4 else "b c f h w")).split()
        count = tensor.shape[axes.index("c")]
    return _fact(model, count, "channels", "in_channels")


def _time(inputs: Inputs, questions: list[str]) -> Time:
    """The argument of the step, by its name; its scale by its value."""
    names = [name for name, value in inputs.items() if name == "t" or name.startswith("time")]
    name = next(iter(names), "timestep")
    value = inputs.get(name)
    is_whole = isinstance(value, Tensor) and not value.is_floating_point()
    largest = float(torch.as_tensor(value).max()) if name in inputs else 1000.0
    scale = 1000.0 if largest > 1 else 1.0
    questions.append(f"time: {name} is taken as 0 to {scale:g} from a clean image to noise")
    return Time(argument=name, scale=scale, whole=is_whole)


def _output(model: nn.Module, inputs: Inputs, questions: list[str]) -> Output:
    config = config_of(model)
    questions.append("output: the sign of what the model returns is not told by an example")
    ins, outs = config.get("in_channels"), config.get("out_channels")
    return Output(half=isinstance(ins, int) and outs == 2 * ins)


def _process(questions: list[str]) -> ProcessConfig:
    questions.append("process: how inputs are noised is not told by an example; taken as flow matching without shift")
    return FlowConfig()


def _conventions(
    model: nn.Module, inputs: Inputs, seen: Observation, lists: Sequence[_List], orders: Sequence[tuple[str, ...]]
) -> Iterator[tuple[BlockList, tuple[str, str, str, str] | None, MlpLayers | None]]:
    """Each list as the spec says it, with what is said once for all lists."""
    projections: tuple[str, str, str, str] | None = None
    layers: MlpLayers | None = None
    for found, order in zip(lists, orders, strict=True):
        usual = found.usual
        dim = usual.num_heads * usual.head_dim
        block = block_convention(model, inputs, found.path, num_image=usual.num_image, dim=dim, modules=seen.modules)
        path = f"{found.path}.{found.blocks[0]}.{found.attention}"
        masked = any("of keys" in (call.mask, call.mask_padded) for call in found.image_calls)
        attention = None
        if usual.kind != "mixed" and not masked and _turn(found) == ("image",):
            attention = attention_convention(
                model.get_submodule(path), executions(model, inputs, [path])[path], num_tokens=_num_keys(usual), dim=dim
            )
        if attention and attention.projections and projections in (None, attention.projections):
            projections = attention.projections
        has_mlp = block.mlp is not None and layers in (None, block.mlp_layers)
        layers = layers or block.mlp_layers
        blocks = BlockList(
            path=found.path,
            attention=found.attention,
            order=None if order == orders[0] else order,
            image_queries=usual.kind == "mixed",
            turn=_turn(found),
            masked=masked,
            mixers=attention.call if attention else None,
            mlp=block.mlp if has_mlp else None,
            mlp_call=block.mlp_call if has_mlp else ModuleCall(),
            arguments=block.arguments,
            returns=block.returns,
            fixed=block.fixed,
        )
        yield blocks, projections, layers


def _turn(found: _List) -> tuple[Any, ...]:
    """What the calls of a pass of the attention are over, in order; calls of one sample each count once."""
    first = [c for c in found.calls if c.path == found.usual.path and c.execution == found.usual.execution]
    turn = tuple("image" if call in found.image_calls else "other" for call in first)
    if len(turn) > 1 and set(turn) == {"image"} and all(call.batch_size == 1 for call in first):
        return ("image",)
    return turn


def _with_heads(model: nn.Module, spec: SdpaSpec, lists: Sequence[_List]) -> SdpaSpec:
    """With the heads of lists that have other heads than the first."""
    blocks = tuple(
        blocks
        if found.usual.num_heads == lists[0].usual.num_heads
        else blocks.model_copy(update={"num_heads": _fact(model, found.usual.num_heads, "heads", "num_attention_heads")})
        for blocks, found in zip(spec.blocks, lists, strict=True)
    )
    return spec.model_copy(update={"blocks": blocks})


def _other_inputs(
    model: nn.Module, inputs: Inputs, seen: Observation, image: Image, usual: AttentionCall
) -> Iterator[tuple[str, Input]]:
    """The other arguments by their shapes; those that are no tensors, or depend on the grid, are left out."""
    own = {seen.image, "t"} | {name for name in inputs if name.startswith("time")}
    if isinstance(image, PackedTokens):
        own |= {image.positions or "", *([image.sizes] if isinstance(image.sizes, str) else image.sizes or ())}
    first = tensors_of(inputs[seen.image])
    batch = len(first) if not isinstance(inputs[seen.image], Tensor) else first[0].shape[0]
    texts = {run.length for call in seen.calls for run in call.keys if run.kind == "text"}
    for name, value in inputs.items():
        if name in own or not isinstance(value, Tensor):
            continue
        shape = [
            "batch" if size == batch and i == 0 else "text" if size in texts and i < 2 else _width(model, size)
            for i, size in enumerate(value.shape)
        ]
        same = value.numel() > 0 and bool((value == value.flatten()[0]).all())
        kind = "float" if value.is_floating_point() else "bool" if value.dtype == torch.bool else "long"
        yield name, Input(shape=tuple(shape), value=value.flatten()[0].item() if same else None, dtype=kind)


def _width(model: nn.Module, size: int) -> Fact:
    names = [n for n, v in config_of(model).items() if v == size and type(v) is int and ("dim" in n or "channels" in n)]
    return f"config.{names[0]}" if len(names) == 1 else size
