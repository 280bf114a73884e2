"""Averaged weights: what training ends with, and a model is sampled with."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..contract import State


class Average:
    """An exponential moving average of parameters, faster at the start: the decay of step s is at most (1 + s) / (10 + s).

    Args:
        device: where it is kept; beside the parameters when left out.

    Source: the default schedule of diffusers' `EMAModel`.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], *, decay: float, device: torch.device | None = None
    ):
        self.parameters, self.decay = parameters, decay
        self.num_steps = 0
        self.shadows = [p.detach().to(device=device, copy=True) for p in parameters]

    @torch.no_grad()
    def step(self) -> None:
        """Take in the parameters as they are now."""
        s, self.num_steps = self.num_steps, self.num_steps + 1
        decay = min((1 + s) / (10 + s), self.decay) if s else 0.0
        pairs = zip(self.shadows, self.parameters, strict=True)
        torch._foreach_lerp_(self.shadows, [p.to(shadow.device) for shadow, p in pairs], 1 - decay)

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        for shadow, parameter in zip(self.shadows, self.parameters, strict=True):
            parameter.copy_(shadow)

    def state_dict(self) -> State:
        return {"optimization_step": self.num_steps, "shadow_params": self.shadows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.num_steps = state["optimization_step"]
        for shadow, saved in zip(self.shadows, state["shadow_params"], strict=True):
            shadow.copy_(saved)
