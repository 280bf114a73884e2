"""The arguments of a model beside the image and the step, by its spec's descriptions of them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..contract import Grid, Kwargs
from ._grids import fact
from ._spec import Input, SdpaSpec

_DTYPES = {"float": torch.float32, "long": torch.long, "bool": torch.bool}

_COUNTS = frozenset({"batch", "text", "frames", "rows", "cols", "tokens"})
"""Sides of an argument that differ from call to call."""


def needed(spec: SdpaSpec, model: nn.Module) -> dict[str, int | None]:
    """Arguments that a condition must hold, and their channels; None where they have none."""
    found = {name: i for name, i in _inputs(spec, model).items() if i.value is None}
    return {
        name: int(fact(model, i.shape[-1])) if len(i.shape) > 1 and i.shape[-1] not in _COUNTS else None
        for name, i in found.items()
    }


def constants(
    spec: SdpaSpec, model: nn.Module, grid: Grid, condition: Mapping[str, Any], *, like: Tensor
) -> Kwargs:
    """The arguments with one value that a condition leaves out, for inputs such as `like`, [B, ...]."""
    inputs = _inputs(spec, model)
    lengths = {
        value.shape[i.shape.index("text")]
        for name, i in inputs.items()
        if "text" in i.shape and isinstance(value := condition.get(name), Tensor)
    }
    sizes = _sizes(grid, len(like), max(lengths, default=0))
    return {
        name: _made(model, i, sizes, like=like)
        for name, i in inputs.items()
        if i.value is not None and name not in condition
    }


def examples(spec: SdpaSpec, model: nn.Module, grid: Grid, *, num_text: int, like: Tensor) -> Kwargs:
    """Every argument, with random values where it has none of its own, for inputs such as `like`, [B, ...]."""
    sizes = _sizes(grid, len(like), num_text)
    return {name: _made(model, i, sizes, like=like) for name, i in _inputs(spec, model).items()}


def _inputs(spec: SdpaSpec, model: nn.Module) -> dict[str, Input]:
    inputs = {n: i if isinstance(i, Input) else Input(shape=i) for n, i in spec.inputs.items()}
    return {name: i for name, i in inputs.items() if fact(model, i.needs)}


def _sizes(grid: Grid, batch_size: int, num_text: int) -> dict[str, int]:
    return {
        "batch": batch_size,
        "text": num_text,
        "frames": grid.frames,
        "rows": grid.rows,
        "cols": grid.cols,
        "tokens": grid.num_tokens,
    }


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
