"""The stages of a run that train: what each does in its folder, and what it costs."""

import math
import shutil
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ..contract import Site, Step
from ..cost.plan import PlanCost, plan_cost
from ..cost.speed import Work, device_at, measured
from ..editing.adapters import adapters_of
from ..editing.placed import Operators
from ..editing.plan import Choice, Merge
from ..editing.surgery import build_operators, place, sharing_copy
from ..errors import TrainingWarning
from ..machine.devices import default_device
from ..machine.processes import barrier, broadcast, is_main, world_size
from ..runs import identity
from ..sampling.taught import TaughtConfig
from ..sampling.trajectories import TrajectoriesConfig
from ..training.calibration import calibrate
from ..training.distillation import DistillConfig, distill
from ..training.finetuning import finetune
from ..training.phases import FinetuneConfig
from ..weights.folder import save_delta, save_model
from ..weights.portable import Base
from ..weights.tensors import save_operators
from ..words import is_number
from .card import write_model_card
from .folder import read_log
from .job import Job
from .recipe import Recipe
from .rows import fitted_operators, starting_operators
from .stage import Opened


def calibrate_operators(work: Opened) -> list[Path]:
    """The closed-form start; the operators' file."""
    job, config = work.job, work.job.recipe.calibrate
    assert config is not None
    operators = build_operators(job.model, job.recipe.edits, seed=job.recipe.seed)
    work.follow(calibrate(job.model, operators, job.data, config, denoiser=job.denoiser))
    return _saved(work, operators)


def distill_operators(work: Opened) -> list[Path]:
    """Stage 1, of the sites that no store holds; the operators' file."""
    job, config = work.job, work.job.recipe.distill
    assert config is not None
    operators, state = starting_operators(job, work.run), work.stage.load_state()
    # what another run has added to the store since this stage began is fitted here all the same
    to_fit = broadcast(set(state["operators"]) if state else _not_in_store(job, operators))
    fitted = {path: operator for path, operator in operators.items() if path in to_fit}
    if job.store is not None:
        for path in operators.keys() - to_fit:
            job.store.load(identity.operator_inputs(job, path), operators[path])
    if fitted:

        def of_distill(config: DistillConfig, cost: PlanCost) -> int:
            return distill_flops(job.recipe, cost, job.chosen)

        how = {"denoiser": job.denoiser, "cache_folder": work.folder / "cache", "state": state}
        steps = distill(job.model, fitted, job.data, config, **how)
        work.follow(_timed(job, (config,), of_distill, steps), save_every=job.recipe.saving)
    barrier()
    if not is_main():
        return []
    if fitted:
        _warn_of_harm(work.folder / "log.jsonl")
    shutil.rmtree(work.folder / "cache", ignore_errors=True)
    if job.store is not None:
        for path, operator in fitted.items():
            job.store.save(identity.operator_inputs(job, path), operator)
    return _saved(work, operators)


_HARM = 0.1
"""R² that training may lose without being told of it."""


def _warn_of_harm(log: Path) -> None:
    """Warn of operators that stage 1 left worse than it found them, and worse than the mean of what they replace."""
    if not log.is_file():
        return
    r2 = defaultdict[str, list[float]](list)
    for line in read_log(log):
        for name, value in line.items():
            if name.startswith("r2/"):
                r2[name.removeprefix("r2/")].append(value if is_number(value) else -math.inf)
    harmed = {path: found for path, found in r2.items() if found[-1] < min(found[0], 0.0) - _HARM}
    if harmed:
        path, found = next(iter(harmed.items()))
        warnings.warn(
            f"stage 1 left {len(harmed)} of {len(r2)} operators further from what they replace than it found them: R² of {path} "
            f"went from {found[0]:.3g} to {found[-1]:.3g}; lower `distill.lr`",
            TrainingWarning,
            stacklevel=2,
        )


def _not_in_store(job: Job, operators: Operators) -> set[str]:
    """The sites that are left to fit."""
    store = job.store
    return {p for p in operators if store is None or not store.holds(identity.operator_inputs(job, p))}


def _saved(work: Opened, operators: Operators) -> list[Path]:
    path = work.folder / "operators.safetensors"
    save_operators(path, operators)
    return [path]


def finetune_model(work: Opened) -> list[Path]:
    """Stage 2, all its phases; the model's files."""
    job, phases = work.job, work.job.recipe.phases
    # what is trained gets memory of its own; the rest lies in the pretrained model's
    model = sharing_copy(job.model)
    record = place(model, fitted_operators(job, work.run))
    steps = finetune(
        model,
        job.data,
        phases,
        denoiser=job.denoiser,
        blocks=[site.path for site in job.host.blocks(job.model)],
        teacher=job.model,
        new_parameters=record.new_parameters,
        state=work.stage.load_state(),
    )
    flops_of = partial(phase_flops, data=job.recipe.data)
    work.follow(_timed(job, phases, flops_of, steps), save_every=job.recipe.saving)
    if not is_main():
        return []
    source = job.recipe.source
    base = Base(id=source) if isinstance(source, str) else None
    folder, plan = work.run.path / "model", job.recipe.edits
    # an adapter that is kept apart is small, and so is what it goes with
    if base is not None and plan.edits and adapters_of(model):
        files = save_delta(folder, model, plan, base)
    else:
        files = save_model(folder, model, plan, base=base)
    if plan.edits:
        write_model_card(folder)
    return files


def _timed(
    job: Job, configs: Sequence[Any], flops_of: Callable[[Any, PlanCost], int], steps: Iterator[Step]
) -> Iterator[Step]:
    """A stage's steps with how fast they are. FLOPs are counted where there is a peak to compare with.

    Args:
        configs: of the stage, or of each of its phases.
        flops_of: of all steps of one of them.
    """
    device = default_device()
    known = device_at(device)
    peaks = [job.peak_tflops or (known.tflops(config.precision) if known else None) for config in configs]
    cost = plan_cost(job.model, job.recipe.edits, grid=job.grid) if any(peaks) else None
    works = [
        Work(
            steps=config.steps,
            images=config.batch_size,
            tokens=job.grid.num_tokens,
            flops=flops_of(config, cost) / config.steps if cost and config.steps else 0.0,
            tflops=peak and peak * world_size(),
        )
        for config, peak in zip(configs, peaks, strict=True)
    ]
    return measured(steps, works, device=device)


def _new_flops(cost: PlanCost, chosen: Mapping[Site, Choice]) -> int:
    """FLOPs of one pass through what stage 1 fits."""
    # a merged pair is fitted whole, and pairs are not told from the rest of the model
    if any(isinstance(choice, Merge) for choice in chosen.values()):
        return cost.after.flops
    return sum(site.flops.total for site in cost.after.sites if site.operator is not None)


def teach_flops(recipe: Recipe, cost: PlanCost, chosen: Mapping[Site, Choice]) -> int:
    data = recipe.data
    if not isinstance(data, TaughtConfig) or not recipe.trains:
        return 0
    return data.num_images * data.passes * cost.before.flops


def calibrate_flops(recipe: Recipe, cost: PlanCost, chosen: Mapping[Site, Choice]) -> int:
    if recipe.calibrate is None or not chosen:
        return 0
    # an MLP narrower than the host's takes a second pass
    samples = recipe.calibrate.samples
    passes = samples * (cost.before.flops + _new_flops(cost, chosen))
    if isinstance(recipe.data, TrajectoriesConfig):
        walked = recipe.data.walked(samples, batch_size=recipe.calibrate.batch_size)
        passes += walked * cost.before.flops
    return 2 * passes


def distill_flops(recipe: Recipe, cost: PlanCost, chosen: Mapping[Site, Choice]) -> int:
    if recipe.distill is None or not chosen:
        return 0
    images = recipe.distill.steps * recipe.distill.batch_size
    return images * ((1 + state_passes(recipe.data)) * cost.before.flops + 3 * _new_flops(cost, chosen))


def finetune_flops(recipe: Recipe, cost: PlanCost, chosen: Mapping[Site, Choice]) -> int:
    return sum(phase_flops(phase, cost, data=recipe.data) for phase in recipe.phases)


def phase_flops(config: FinetuneConfig, cost: PlanCost, *, data: BaseModel) -> int:
    """FLOPs of one phase of stage 2; where not all is trained this is more than it takes."""
    teacher = teacher_passes(config, data) * cost.before.flops
    return config.steps * config.batch_size * (3 * cost.after.flops + teacher)


def teacher_passes(config: FinetuneConfig, data: BaseModel) -> int:
    """Passes of the teacher for each image of stage 2: a pass that visits a state gives its target too."""
    return state_passes(data) or int(config.output_weight > 0)


def state_passes(data: BaseModel) -> int:
    """Passes of the source for each input that data are; none where they are stored."""
    return data.passes if isinstance(data, TrajectoriesConfig) else 0
