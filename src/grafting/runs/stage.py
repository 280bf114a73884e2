"""A stage of a run as a record, and `carry_out`, which runs any of them.

A stage is skipped where nothing that it depends on has changed, resumes where it was stopped, and records what it made.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..contract import Site, Step
from ..cost.plan import PlanCost
from ..editing.plan import Choice
from ..machine.processes import is_main
from ..words import RowName
from .folder import RunFolder
from .folder import Stage as OpenStage
from .job import Job
from .recipe import Recipe
from .states import Every

OnStep = Callable[[str, Step], None]

Tell = Callable[[Step], None]


@dataclass(frozen=True)
class Part:
    """A part of a stage: what its folder is called, what people read meanwhile, and the row that it is of, if it is of one."""

    name: str
    title: str
    row: RowName | None = None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of a run.

    Args:
        parts: what it does for a job, each in a folder of its own; empty where the recipe has no such stage.
        inputs: all that a part's result depends on; None for what shows what lies there, each time, and is not recorded.
        do: does a part and returns the files that it made, on the main process.
        flops: of training, for a recipe, what its plan costs, and what becomes of its sites; all processes together.
        is_shared: whether all processes take part; others leave it to the main one.
        of_source: whether a part's result is of the source alone, so that runs of a sweep have it from one another.
    """

    name: str
    parts: Callable[[Job], list[Part]]
    inputs: Callable[[Job, RunFolder, Part], list[Any]] | None
    do: Callable[["Opened"], list[Path]]
    flops: Callable[[Recipe, PlanCost, Mapping[Site, Choice]], int] = lambda recipe, cost, chosen: 0
    is_shared: bool = False
    of_source: Callable[[Part], bool] = lambda part: False


@dataclass(frozen=True)
class Opened:
    """A part of a stage at work."""

    job: Job
    run: RunFolder
    part: Part
    tell: OnStep
    recorded: OpenStage | None = None

    @property
    def stage(self) -> OpenStage:
        assert self.recorded is not None
        return self.recorded

    @property
    def folder(self) -> Path:
        return self.stage.folder

    def follow(self, steps: Iterator[Step], *, save_every: Every | None = None) -> None:
        """Log each step and tell it, with the state saved now and then."""
        for step in self.stage.follow(steps, save_every=save_every):
            self.tell(self.part.title, step)


def carry_out(stage: Stage, job: Job, run: RunFolder, on_step: OnStep) -> None:
    """Run a stage's parts: skip what nothing has changed for, resume what was stopped, record what was made."""
    for part in stage.parts(job):
        if stage.inputs is None:
            if is_main():
                stage.do(Opened(job, run, part, on_step))
            continue
        inputs = stage.inputs(job, run, part)
        how = {"of_source": stage.of_source(part), "is_long": stage.is_shared}
        with run.stage(part.name, inputs, **how) as opened:
            if not opened.done and (stage.is_shared or is_main()):
                opened.outputs = stage.do(Opened(job, run, part, on_step, opened))
