"""A model whose weights are there only while their own module runs, as where they are offloaded or cast layer by layer."""

from functools import partial

import torch
from torch import Tensor, nn


def hide_weights(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Make every parameter NaN, of another dtype if one is given, but while the module runs that has it."""
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if own:
            kept = {name: parameter.data for name, parameter in own.items()}
            hidden = {name: torch.full_like(data, torch.nan, dtype=dtype) for name, data in kept.items()}
            module.register_forward_pre_hook(partial(_set, own, kept))
            module.register_forward_hook(partial(_set, own, hidden))
            _set(own, hidden)


def _set(parameters: dict[str, nn.Parameter], data: dict[str, Tensor], *_: object) -> None:
    for name, parameter in parameters.items():
        parameter.data = data[name]
