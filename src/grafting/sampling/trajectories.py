"""States along a model's own trajectories, as data to train its grafts on: noised inputs as its sampler meets them.

They are drawn while a stage trains and are never stored (see `training/dealing.py`). No clean image belongs to one, so
there is no loss of the process: what a model learns from them is its teacher's output.
"""

from math import ceil
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat, PositiveInt

from .chain import ChainConfig


class TrajectoriesConfig(ChainConfig):
    """States that the source's sampler visits from pure noise, drawn as they are needed and never stored."""

    name: Literal["trajectories"] = "trajectories"
    sampler: Literal["ddpm", "ddim", "dpm-solver++", "euler", "heun"] = "dpm-solver++"
    """Sampler, as of `sample`."""
    steps: Annotated[PositiveInt, Field(le=1000)] = 20
    """Steps per trajectory: for a few-step model as many as it is sampled with."""
    cfg_scale: FiniteFloat = 1.0
    """Guidance scale of the states that are visited; what is learnt there is the source's output without guidance. 1 = off."""

    @property
    def passes(self) -> int:
        """Passes of the source for each state."""
        return 1 if self.guidance is None else 2

    def walked(self, count: int, *, batch_size: int) -> int:
        """Passes of the source for `count` fixed states, of which each row of a batch has a trajectory of its own."""
        batches = ceil(count / batch_size)
        blocks = ceil(batches / min(batches, self.calls))
        return self.passes * blocks * self.calls * batch_size

    def pinned(self) -> "TrajectoriesConfig":
        """This config: it names no file."""
        return self

    def describe(self) -> dict[str, Any]:
        """Identity of the data in a run's manifest, beside the source's."""
        return self.model_dump(mode="json")


class Trajectories:
    """Training data without items: a stage's teacher is walked through its sampler's states, with each condition at random."""

    def __init__(self, config: TrajectoriesConfig, *, shape: tuple[int, ...]):
        self.config = config
        self.shape = config.shape or shape

    def __str__(self) -> str:
        return f"states along the source's trajectories, {self.config.sampler} with {self.config.steps} steps"
