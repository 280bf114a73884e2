"""Parameters trained together: their part of an optimizer, learning rate and guard, and the state a rollback returns to.

Stage 1 has one for each site, stage 2 one for the whole model. Gradients are the stages' own.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from ..contract import State
from ..functional.schedule import learning_rate_factor
from ..machine.sharding import is_spread, kept_copy, whole
from .guard import Guard, GuardConfig

# devices on which torch steps all parameters in one kernel
_FUSED = {"cpu", "cuda", "mps", "xpu"}


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


def adamw(
    sets: Sequence[Sequence[nn.Parameter]],
    config: TrainingConfig,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
) -> AdamW | None:
    """One optimizer of these parameters, with a group for each set of them that is not empty; None where all are."""
    groups = [{"params": list(parameters)} for parameters in sets if parameters]
    if not groups:
        return None
    is_fused = {p.device.type for parameters in sets for p in parameters} <= _FUSED
    return AdamW(
        groups, lr=config.lr, betas=betas, weight_decay=config.weight_decay, fused=True if is_fused else None
    )


def take_step(optimizer: AdamW | None) -> None:
    """Step all parameters that have a gradient, and drop the gradients."""
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


class Trainee:
    """Parameters in training.

    Args:
        parts: what a rollback returns and a state holds, by its name there; the moments of `optimizer` are added.
        parameters: what is trained; where there are none, steps do nothing.
        optimizer: has a group of these parameters, and perhaps others.
    """

    def __init__(
        self,
        parts: Mapping[str, Any],
        parameters: Sequence[nn.Parameter],
        config: TrainingConfig,
        *,
        optimizer: AdamW | None,
        halve_at: Sequence[int] = (),
    ):
        self.parts, self.parameters, self.config, self.halve_at = parts, parameters, config, halve_at
        self.optimizer = optimizer
        self.group: dict[str, Any] = {}
        if optimizer is not None and parameters:
            self.group = next(g for g in optimizer.param_groups if g["params"][0] is parameters[0])
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

    def launch(self, step: int, figures: Tensor) -> bool:
        """Take the step before anyone has read its figures, if that can be: where one is not finite nothing changes.

        False if it is left to be taken: a guard may find more than that, or the optimizer cannot tell by itself.
        """
        if self.optimizer is None or self.config.guard is not None:
            return False
        if not self.group["fused"] or is_spread(self.parameters[0]):
            return False
        self.group["lr"] = self.learning_rate(step)
        # as torch's GradScaler tells an optimizer
        self.optimizer.found_inf = (~figures.isfinite().all()).float()  # type: ignore[attr-defined]
        take_step(self.optimizer)
        return True

    def settle(self, step: int, finding: Mapping[str, float]) -> dict[str, float]:
        """Make ready for the optimizer's step, which passes over these parameters if the guard found something.

        Returns what was found and done.
        """
        if not finding:
            self.group["lr"] = self.learning_rate(step)
            return {}
        for parameter in self.parameters:
            parameter.grad = None
        if self.guard.rolls_back and self.kept is not None:
            self._restore(self.kept)
        return dict(finding) | self.guard.done(step)

    def weights(self) -> State:
        return {name: part.state_dict() for name, part in self.parts.items()} | {"optimizer": self._moments()}

    def state(self, step: int) -> State:
        """State to resume from after `step` steps; with the rollback state, if that is not this state itself."""
        kept = {} if self.kept is None or self.guard.keeps_at(step) else {"kept": self.kept}
        return self.weights() | kept

    def load(self, state: Mapping[str, Any]) -> None:
        self._restore(state)
        self.kept = state.get("kept")

    def _moments(self) -> State:
        """What the optimizer holds of these parameters, in the form of an optimizer's state of these alone."""
        if self.optimizer is None or not self.parameters:
            return {}
        moments = self.optimizer.state
        held = {i: moments[p] for i, p in enumerate(self.parameters) if p in moments}
        group = self.group | {"params": list(range(len(self.parameters)))}
        return {"state": held, "param_groups": [group]}

    def _restore(self, weights: Mapping[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(weights[name])
        if self.optimizer is None:
            return
        saved = weights["optimizer"].get("state", {})
        for number, parameter in enumerate(self.parameters):
            self.optimizer.state.pop(parameter, None)
            if number in saved:
                # its settings are the config's; its tensors are copied, and lie where its kernel wants them
                self.optimizer.state[parameter] = {
                    name: value.detach().clone().to(parameter.device) for name, value in saved[number].items()
                }
