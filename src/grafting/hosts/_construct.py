"""Models made from their class and config, whose sizes are looked at before anything is allocated."""

import math
import os
from collections.abc import Iterator, Mapping

import torch
from torch import nn

_DEEPEST, _WIDEST = 1000, 1 << 24
# bytes that are allocated without looking twice
_SMALL = 1 << 33


def constructed(model_class: type[nn.Module], config: Mapping[str, object]) -> nn.Module:
    """A model of a class, made from its config.

    Raises:
        ValueError: a number in the config is not finite, or the model is deeper than 1,000 blocks or larger than the memory.
        Whatever the class raises at other settings.
    """
    numbers = list(_numbers(config))
    if wrong := [f"{key} is {value:g}" for key, value in numbers if not abs(value) <= _most(key)]:
        raise ValueError(f"{', '.join(wrong)}: too large, or no number")
    depth = math.prod(max(1, value) for key, value in numbers if _is_depth(key))
    width = max((abs(value) for _, value in numbers), default=0)
    if 4 * depth * width**2 > _SMALL:
        with torch.device("meta"):
            _check_memory(model_class(**config))
    return model_class(**config)


def _check_memory(model: nn.Module) -> None:
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise ValueError(f"the model takes {size / 1e9:.3g} GB, and the machine has {memory / 1e9:.3g} GB")


def _numbers(value: object, key: str = "") -> Iterator[tuple[str, float]]:
    """All numbers of a config with the names that they stand under."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _numbers(item, str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item, key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value


def _is_depth(key: str) -> bool:
    return "depth" in key or "layers" in key


def _most(key: str) -> int:
    return _DEEPEST if _is_depth(key) else _WIDEST
