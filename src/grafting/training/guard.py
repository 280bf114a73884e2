"""A guard of training: what is done with a step whose loss or gradient is not finite, or far above what is usual.

The same steps are judged in the same way after a resume: what the guard remembers is part of a stage's state.
"""

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Literal

from pydantic import Field, PositiveInt
from torch import Tensor, nn
from typing_extensions import TypedDict

from ..errors import TrainingError
from ..machine.settings import Settings
from ..machine.sharding import whole

# figures that a median is first taken of
_FEWEST = 10

NEVER = 2.0**62
"""Times the median: as good as none."""


class GuardState(TypedDict):
    """Memory of a guard, as it is saved."""

    lr_factor: float
    events: int
    history: dict[str, list[float]]


class GuardConfig(Settings):
    """Criteria for a bad step, and its handling."""

    spike: float = Field(default=10.0, gt=1)
    """A loss or gradient norm above this many times its running median is bad, as is one that is not finite."""
    window: PositiveInt = 100
    """Good steps that the median is taken of; also the steps between the states that `rollback` returns to."""
    policy: Literal["stop", "skip", "rollback"] = "skip"
    """stop: an error. skip: that batch changes nothing. rollback: weights, optimizer and averages return to those kept at
    the last multiple of `window` steps (a copy in memory), and the learning rate is multiplied by `lr_factor`; the batches
    since then are not seen again."""
    lr_factor: float = Field(default=0.5, gt=0, le=1)
    max: PositiveInt = 3
    """Bad steps in a stage (in stage 1, of a site) after which the next one is an error."""


class Guard:
    """Judges steps by their figures. Without a config, a figure that is not finite stops."""

    def __init__(self, config: GuardConfig | None):
        self.config = config or GuardConfig(spike=NEVER, policy="stop")
        self.lr_factor = 1.0
        self._events = 0
        self._history: dict[str, deque[float]] = {}

    def judge(self, figures: Mapping[str, float]) -> dict[str, float]:
        """Faults of a step with these figures: `not_finite`, or `spike`, times the median. Empty if it is good."""
        if not all(math.isfinite(value) for value in figures.values()):
            return self._noted({"not_finite": 1.0})
        spikes = [value / self._usual(name) for name, value in figures.items()]
        if max(spikes) > self.config.spike:
            return self._noted({"spike": max(spikes)})
        for name, value in figures.items():
            self._history.setdefault(name, deque(maxlen=self.config.window)).append(value)
        return {}

    @property
    def stops(self) -> bool:
        """True if the bad step that was just judged is an error."""
        return self.config.policy == "stop" or self._events > self.config.max

    @property
    def rolls_back(self) -> bool:
        return self.config.policy == "rollback"

    def keeps_at(self, step: int) -> bool:
        """True if the state before this step is kept for a rollback."""
        return self.rolls_back and step % self.config.window == 0

    def returns_to(self, step: int) -> int:
        """The last step up to this one before which the state was kept."""
        return step - step % self.config.window

    def done(self, step: int) -> dict[str, float]:
        """Handling of a bad step that is not an error, as figures."""
        if not self.rolls_back:
            return {"skipped": 1.0}
        return {"rolled_back_to": float(self.returns_to(step)), "lr_factor": self.lr_factor}

    def why(self) -> str:
        """The end of the sentence that says why it stopped."""
        over = self._events > self.config.max and self.config.policy != "stop"
        return f"; {self._events} bad steps are more than guard.max: {self.config.max}" if over else ""

    def state(self) -> GuardState:
        history = {name: list(values) for name, values in self._history.items()}
        return {"lr_factor": self.lr_factor, "events": self._events, "history": history}

    def load(self, state: GuardState) -> None:
        self.lr_factor, self._events = state["lr_factor"], state["events"]
        self._history = {
            name: deque(values, maxlen=self.config.window) for name, values in state["history"].items()
        }

    def _noted(self, finding: dict[str, float]) -> dict[str, float]:
        self._events += 1
        if self.rolls_back:
            self.lr_factor *= self.config.lr_factor
        return finding

    def _usual(self, name: str) -> float:
        """The running median of a figure; infinite before there are enough of them."""
        history = self._history.get(name, ())
        enough = len(history) >= min(_FEWEST, self.config.window)
        return max(median(history), 1e-12) if enough else math.inf


def check_weights(model: nn.Module, stage: str) -> None:
    """Raise a TrainingError if a model's weights are not finite, which no learning rate would mend; names the first."""
    for name, tensor in model.state_dict().items():
        values = whole(tensor.detach())
        if type(values) is not Tensor or values.is_meta or not values.is_floating_point():
            continue  # quantised or offloaded
        finite = (values.float() if values.itemsize == 1 else values).isfinite()
        if not finite.all():
            row = int((~finite).nonzero()[0, 0]) if finite.ndim else 0
            raise TrainingError(
                f"{stage}: the model's own weights are not finite: {name}, row {row} ({int((~finite).sum())} of "
                f"{finite.numel()} values); load a sound checkpoint"
            )
