"""The rows of a run: each a model that is sampled and measured. A new row is a record here, and its words in `words.py`."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from ..contract import Site
from ..editing.placed import Operators
from ..editing.plan import Choice, Drop
from ..editing.surgery import build_operators, graft, place
from ..machine.devices import default_device
from ..weights.folder import load_model
from ..weights.tensors import load_operators
from ..words import RowName
from .folder import RunFolder
from .job import Job
from .recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model that a run measures.

    Args:
        exists: whether a recipe with this plan has it.
        model: makes it, in eval mode and on the model's device, from the source and what stages left in the folder.
        after: the stages of training that led to it.
        read_from: the stage whose outputs it is read from, if it is.
    """

    name: RowName
    exists: Callable[[Recipe, Mapping[Site, Choice]], bool]
    model: Callable[[Job, RunFolder], nn.Module]
    after: tuple[str, ...] = ()
    read_from: Callable[[Recipe], str | None] = lambda recipe: None
    is_edited: bool = True


def rows_of(job: Job) -> list[RowName]:
    """The recipe's rows that exist: a row needs its stage."""
    return rows_in(job.recipe, job.chosen)


def rows_in(recipe: Recipe, chosen: Mapping[Site, Choice]) -> list[RowName]:
    """The same, from what the plan does to the model."""
    return [name for name in recipe.rows if ROWS[name].exists(recipe, chosen)]


def starting_operators(job: Job, folder: RunFolder) -> Operators:
    """The operators before any step: as they are built, or as calibration left them."""
    operators = build_operators(job.model, job.recipe.edits, seed=job.recipe.seed)
    if job.recipe.calibrate and operators:
        load_operators(folder.path / "calibrate" / "operators.safetensors", operators)
    return operators


def fitted_operators(job: Job, folder: RunFolder) -> Operators:
    """The operators that stage 2 begins with: as stage 1 left them, or as they start when there is no stage 1."""
    operators = starting_operators(job, folder)
    if job.recipe.distill and job.is_fitted:
        load_operators(folder.path / "distill" / "operators.safetensors", operators)
    return operators


def _placed(job: Job, operators: Operators) -> nn.Module:
    model = copy.deepcopy(job.model)
    place(model, operators)
    return model.eval()


def _random(job: Job, folder: RunFolder) -> nn.Module:
    model = copy.deepcopy(job.model)
    graft(model, job.recipe.edits.randomised(), seed=job.recipe.seed)
    return model.eval()


def _is_edited(recipe: Recipe, chosen: Mapping[Site, Choice]) -> bool:
    return bool(chosen)


def _is_distilled(recipe: Recipe, chosen: Mapping[Site, Choice]) -> bool:
    return recipe.distill is not None and any(not isinstance(choice, Drop) for choice in chosen.values())


ROWS: dict[RowName, Row] = {
    row.name: row
    for row in (
        Row(
            name="pretrained",
            exists=lambda recipe, chosen: True,
            model=lambda job, folder: job.model,
            is_edited=False,
        ),
        Row(name="random", exists=_is_edited, model=_random),
        Row(
            name="inherited",
            exists=_is_edited,
            model=lambda job, folder: _placed(job, starting_operators(job, folder)),
            after=("calibrate",),
            read_from=lambda recipe: "calibrate" if recipe.calibrate else None,
        ),
        Row(
            name="distilled",
            exists=_is_distilled,
            model=lambda job, folder: _placed(job, fitted_operators(job, folder)),
            after=("calibrate", "distill"),
            read_from=lambda recipe: "distill",
        ),
        Row(
            name="finetuned",
            exists=lambda recipe, chosen: recipe.finetune is not None,
            model=lambda job, folder: load_model(folder.path / "model")[0].to(default_device()),
            after=("calibrate", "distill", "finetune"),
            read_from=lambda recipe: "finetune",
        ),
    )
}
