"""What a spec says of a model's arguments: where the grid of image tokens stands, the step, and the shapes of the others."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..contract import Grid
from ..diffusion import FlowConfig, ProcessConfig
from ..errors import HostError
from ._forwards import Inputs, tensors_of
from ._grids import Image, channel_axis, patch_sizes
from ._host import config_of
from ._observing import AttentionCall, Axis, Observation, is_raster
from ._spec import Fact, Input, LatentTokens, Output, PackedTokens, Time


@dataclass(frozen=True)
class Knowledge:
    """What only a pipeline tells: how its scheduler noises inputs, and what it calls the model with."""

    time: Time | None = None
    output: Output | None = None
    process: ProcessConfig | None = None
    scheduler: str = ""
    """Class of a scheduler whose noise process grafting does not have."""
    latent_size: int | None = None
    """Side of a native latent."""
    latent_channels: int | None = None
    """Of the autoencoder."""


def image_rule(
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
        if (count := length_of(inputs, name)) != usual.num_image:
            raise HostError(
                f"{name} has {count} tokens, of which {usual.num_image} are the image's: others stand in the same argument, and nothing in "
                "a spec says how many"
            )
        if inputs[name].ndim == 6:
            return rule.model_copy(update={"patch": inputs[name].shape[-1], "whole": True}), grid
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
    frames = [latent.shape[i] for i, letter in letters.items() if letter == "n"]
    rule = rule.model_copy(update={"native_frames": frames[0]}) if len(frames) == 1 else rule
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
    place = next(i for i, tokens in enumerate(usual.keys) if tokens.kind == "image")
    before = usual.keys[:place]
    for positions, value in inputs.items():
        if (
            positions == name
            or not isinstance(value, Tensor)
            or value.ndim not in (2, 3)
            or not 2 <= value.shape[-1] <= 8
        ):
            continue
        rows = value[0] if value.ndim == 3 else value
        starts = {0: (), sum(tokens.length for tokens in before): tuple(tokens.argument for tokens in before)}
        for start, after in starts.items():
            if any(length_of(inputs, argument) is None for argument in after):
                continue
            found = _columns(rows[start : start + usual.num_image], usual.num_image)
            if found:
                columns, grid = found
                rule = PackedTokens(
                    argument=name, positions=positions, after=after, width=value.shape[-1], columns=columns
                )
                return rule, grid
    return None


def _columns(rows: Tensor, num_tokens: int) -> tuple[tuple[int, ...], Grid] | None:
    """Which entries of places [L, n] count rows and columns (and frames before), and the grid; None if none do."""
    if len(rows) != num_tokens:
        return None
    counted = {
        i: column.unique(return_inverse=True) for i, column in enumerate(rows.cpu().float().unbind(-1))
    }
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
    named = [
        next((n for n, v in inputs.items() if word in n and type(v) is int and "audio" not in n), None)
        for word in words
    ]
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
    questions.append(
        "how many latents a packed token holds is not told by the example: `image.patch` is taken as 2"
    )
    return 2


def native_grid_of(
    model: nn.Module, image: Image, grid: Grid, known: Knowledge, questions: list[str]
) -> Grid:
    """The grid that the model was trained for, if it says so; else the example's."""
    size = known.latent_size or config_of(model).get("sample_size")
    if isinstance(size, int) and grid.frames == 1 and grid.rows > 1:
        sides = patch_sizes(model, image)
        return Grid(size // sides[1], size // sides[2])
    questions.append(
        f"native_grid is the example's, {grid}: set it to the one that the model was trained for, which costs are counted at"
    )
    return grid


def length_of(inputs: Inputs, argument: str) -> int | None:
    value = inputs.get(argument)
    return value.shape[1] if isinstance(value, Tensor) and value.ndim > 1 else None


def channels_of(model: nn.Module, value: Any, image: Image) -> Fact:
    tensor = tensors_of(value)[0]
    if isinstance(image, PackedTokens):
        count = tensor[0, 0].numel()
    else:
        count = tensor.shape[channel_axis(image, tensor)] - image.beside
    return fact_of(model, count, "channels", "in_channels")


def beside_of(inputs: Inputs, returned: Sequence[Tensor], image: Image) -> int:
    """Channels of the image's argument that the model does not return: they stand behind those that it does."""
    taken = inputs[image.argument]
    if isinstance(image, PackedTokens) or not isinstance(taken, Tensor) or not returned:
        return 0
    axis = channel_axis(image, taken)
    same = returned[0].ndim == taken.ndim and all(
        i == axis or m == n for i, (m, n) in enumerate(zip(returned[0].shape, taken.shape, strict=True))
    )
    return max(0, taken.shape[axis] - returned[0].shape[axis]) if same else 0


def time_of(inputs: Inputs, questions: list[str]) -> Time:
    """The argument of the step, by its name; its scale by its value."""
    names = [name for name, value in inputs.items() if name == "t" or name.startswith("time")]
    name = next(iter(names), "timestep")
    value = inputs.get(name)
    is_whole = isinstance(value, Tensor) and not value.is_floating_point()
    largest = float(torch.as_tensor(value).max()) if name in inputs else 1000.0
    scale = 1000.0 if largest > 1 else 1.0
    questions.append(f"time: {name} is taken as 0 to {scale:g} from a clean image to noise")
    return Time(argument=name, scale=scale, whole=is_whole)


def with_entries(time: Time, inputs: Inputs, grid: Grid) -> Time:
    """With what has an entry of its own in the argument of the step."""
    count = length_of(inputs, time.argument)
    per = {grid.num_tokens: "token", grid.frames: "frame"}
    return time.model_copy(update={"per": per.get(count, "sample")}) if count else time


def output_of(inputs: Inputs, returned: Sequence[Tensor], image: Image, questions: list[str]) -> Output:
    """Whether the model returns twice as many channels as it takes; its sign is a question."""
    questions.append("output: the sign of what the model returns is not told by an example")
    taken = tensors_of(inputs[image.argument])
    return Output(half=bool(returned) and returned[0].numel() == 2 * taken[0].numel())


def process_of(known: Knowledge, questions: list[str]) -> ProcessConfig | None:
    if known.process is not None:
        return known.process
    if known.scheduler:
        questions.append(
            f"process: grafting does not have that of {known.scheduler}: name one as `process` in the recipe"
        )
        return None
    questions.append(
        "process: how inputs are noised is not told by an example; taken as flow matching without shift"
    )
    return FlowConfig()


def fact_of(model: nn.Module, value: int, word: str, first: str) -> Fact:
    """Where the model's config keeps a number, under a name with this word; else the number."""
    config = config_of(model)
    names = [
        first,
        *(name for name in config if word in name and "kv" not in name and "key_value" not in name),
    ]
    return next((f"config.{name}" for name in names if config.get(name) == value), value)


def other_inputs(
    model: nn.Module, inputs: Inputs, seen: Observation, image: Image, usual: AttentionCall
) -> Iterator[tuple[str, Input]]:
    """The other arguments by their shapes; those that are no tensors, or depend on the grid, are left out."""
    own = {seen.image, "t"} | {name for name in inputs if name.startswith("time")}
    if isinstance(image, PackedTokens):
        own |= {
            image.positions or "",
            *([image.sizes] if isinstance(image.sizes, str) else image.sizes or ()),
        }
    first = tensors_of(inputs[seen.image])
    batch = len(first) if not isinstance(inputs[seen.image], Tensor) else first[0].shape[0]
    texts = {tokens.length for call in seen.calls for tokens in call.keys if tokens.kind == "text"}
    for name, value in inputs.items():
        if name in own or not isinstance(value, Tensor):
            continue
        shape = [
            "batch"
            if size == batch and i == 0
            else "text"
            if size in texts and i < 2
            else _width(model, size)
            for i, size in enumerate(value.shape)
        ]
        same = value.numel() > 0 and bool((value == value.flatten()[0]).all())
        kind: Literal["float", "long", "bool"] = (
            "float" if value.is_floating_point() else "bool" if value.dtype == torch.bool else "long"
        )
        yield name, Input(shape=tuple(shape), value=value.flatten()[0].item() if same else None, dtype=kind)


def _width(model: nn.Module, size: int) -> Fact:
    names = [
        n
        for n, v in config_of(model).items()
        if v == size and type(v) is int and ("dim" in n or "channels" in n)
    ]
    return f"config.{names[0]}" if len(names) == 1 else size
