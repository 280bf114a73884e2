"""Parameters trained together: their optimizer, learning rate and guard, and the state a rollback returns to.

Stage 1 has one for each site, stage 2 one for the whole model. Gradients are the stages' own.
"""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..contract import State
from ..functional.schedule import learning_rate_factor
from ..machine.sharding import kept_copy, whole
from .guard import Guard, GuardConfig


@runtime_checkable
class TrainingConfig(Protocol):
    """Settings of a stage that concern its steps."""

    steps: int
    lr: float
    warmup_steps: int
    cooldown_steps: int
    weight_decay: float
    clip_norm: float
    guard: GuardConfig | None


class Trainee:
    """Parameters in training.

    Args:
        parts: what a rollback returns and a state holds, by its name there; the optimizer is added.
        parameters: what is trained; where there are none, steps do nothing.
    """

    def __init__(
        self,
        parts: Mapping[str, Any],
        parameters: Sequence[nn.Parameter],
        config: TrainingConfig,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        halve_at: Sequence[int] = (),
    ):
        self.parts, self.parameters, self.config, self.halve_at = parts, parameters, config, halve_at
        adam = partial(torch.optim.AdamW, lr=config.lr, betas=betas, weight_decay=config.weight_decay)
        self.optimizer = adam(parameters) if parameters else None
        self.guard = Guard(config.guard)
        self.kept: State | None = None

    def keep(self, step: int) -> None:
        """Remember this moment before a step, if it is one to return to."""
        if self.guard.keeps_at(step):
            self.kept = kept_copy(self.weights())

    def learning_rate(self, step: int) -> float:
        """The scheduled rate, as far as the guard has not lowered it."""
        config = self.config
        factor = learning_rate_factor(
            step,
            steps=config.steps,
            warmup_steps=config.warmup_steps,
            cooldown_steps=config.cooldown_steps,
            halve_at=self.halve_at,
        )
        return self.guard.lr_factor * config.lr * factor

    def clip(self) -> Tensor:
        """Clip the gradient; its norm before."""
        if not self.parameters:
            return torch.zeros(())
        return whole(nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm))

    def settle(self, step: int, finding: Mapping[str, float]) -> dict[str, float]:
        """Take a step, or pass over one in which the guard found something; what was found and done."""
        if not finding:
            self._update(self.learning_rate(step))
        elif self.guard.rolls_back and self.kept is not None:
            self._restore(self.kept)
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        return dict(finding) | self.guard.done(step) if finding else {}

    def weights(self) -> State:
        optimizer = self.optimizer.state_dict() if self.optimizer is not None else {}
        return {name: part.state_dict() for name, part in self.parts.items()} | {"optimizer": optimizer}

    def state(self, step: int) -> State:
        """State to resume from after `step` steps; with the rollback state, if that is not this state itself."""
        kept = {} if self.kept is None or self.guard.keeps_at(step) else {"kept": self.kept}
        return self.weights() | kept

    def load(self, state: Mapping[str, Any]) -> None:
        self._restore(state)
        self.kept = state.get("kept")

    def _update(self, lr: float) -> None:
        if self.optimizer is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()

    def _restore(self, weights: Mapping[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(weights[name])
        if self.optimizer is not None:
            # an optimizer takes tensors over as they are
            self.optimizer.load_state_dict(copy.deepcopy(weights["optimizer"]))
