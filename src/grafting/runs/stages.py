"""The stages of a run. A new stage is a record here and its module; `carry_out` runs any of them.

A stage is skipped where nothing that it depends on has changed, resumes where it was stopped, and records what it made.
"""

import copy
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, NonNegativeInt

from ..contract import Site, Step
from ..cost.count import count_parameters
from ..cost.plan import PlanCost, plan_cost
from ..cost.speed import Work, device_at, measured
from ..editing.placed import Operators
from ..editing.plan import Choice, Merge
from ..editing.surgery import build_operators, place
from ..errors import RunError
from ..evaluation import evaluate
from ..evaluation.influences import save_influences
from ..machine.devices import default_device
from ..machine.files import write_json
from ..machine.processes import barrier, broadcast, is_main, rank, world_size
from ..machine.reading import read_json
from ..runs import identity
from ..sampling.drawing import Drawing, describe_model
from ..sampling.files import open_samples, origin_of
from ..training.calibration import calibrate
from ..training.distillation import distill
from ..training.finetuning import finetune
from ..weights.folder import save_model
from ..weights.portable import Base
from ..weights.tensors import save_operators
from ..words import RowName
from .card import write_model_card
from .folder import RunFolder, read_log
from .folder import Stage as OpenStage
from .job import Job
from .pairing import influences_path, with_pretrained
from .recipe import Recipe
from .record import write_report
from .rows import ROWS, fitted_operators, rows_of, starting_operators

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
    """

    name: str
    parts: Callable[[Job], list[Part]]
    inputs: Callable[[Job, RunFolder, Part], list[Any]] | None
    do: Callable[["Opened"], list[Path]]
    flops: Callable[[Recipe, PlanCost, Mapping[Site, Choice]], int] = lambda recipe, cost, chosen: 0
    is_shared: bool = False


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

    def follow(self, steps: Iterator[Step], *, save_every: int | None = None) -> None:
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
        with run.stage(part.name, stage.inputs(job, run, part)) as opened:
            if not opened.done and (stage.is_shared or is_main()):
                opened.outputs = stage.do(Opened(job, run, part, on_step, opened))


def _calibrate(work: Opened) -> list[Path]:
    job, config = work.job, work.job.recipe.calibrate
    assert config is not None
    operators = build_operators(job.model, job.recipe.edits, seed=job.recipe.seed)
    work.follow(calibrate(job.model, operators, job.data, config, denoiser=job.denoiser))
    return _saved(work, operators)


def _distill(work: Opened) -> list[Path]:
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
        how = {"denoiser": job.denoiser, "cache_folder": work.folder / "cache", "state": state}
        steps = distill(job.model, fitted, job.data, config, **how)
        work.follow(_timed(job, "distill", steps), save_every=job.recipe.save_every)
    barrier()
    if not is_main():
        return []
    shutil.rmtree(work.folder / "cache", ignore_errors=True)
    if job.store is not None:
        for path, operator in fitted.items():
            job.store.save(identity.operator_inputs(job, path), operator)
    return _saved(work, operators)


def _not_in_store(job: Job, operators: Operators) -> set[str]:
    """The sites that are left to fit."""
    store = job.store
    return {p for p in operators if store is None or not store.holds(identity.operator_inputs(job, p))}


def _saved(work: Opened, operators: Operators) -> list[Path]:
    path = work.folder / "operators.safetensors"
    save_operators(path, operators)
    return [path]


def _finetune(work: Opened) -> list[Path]:
    job, config = work.job, work.job.recipe.finetune
    assert config is not None
    model = copy.deepcopy(job.model)
    record = place(model, fitted_operators(job, work.run))
    steps = finetune(
        model,
        job.data,
        config,
        denoiser=job.denoiser,
        blocks=[site.path for site in job.host.blocks(job.model)],
        teacher=job.model if config.output_weight else None,
        new_parameters=record.new_parameters,
        state=work.stage.load_state(),
    )
    work.follow(_timed(job, "finetune", steps), save_every=job.recipe.save_every)
    if not is_main():
        return []
    source = job.recipe.source
    base = Base(id=source) if isinstance(source, str) else None
    files = save_model(work.run.path / "model", model, job.recipe.edits, base=base)
    if job.recipe.edits.edits:
        write_model_card(work.run.path / "model")
    return files


def _sample(work: Opened) -> list[Path]:
    job, row = work.job, _row_of(work.part)
    assert job.recipe.sample is not None
    assert job.decoder is not None
    model = ROWS[row].model(job, work.run)
    inputs = identity.samples_inputs(job, work.run, row)
    drawing = Drawing(
        work.folder / "shards",
        job.recipe.sample,
        denoiser=job.denoiser,
        shape=job.shape,
        decoder=job.decoder.to(default_device()),
        identity=describe_model(model, settings=inputs),
    )
    if is_main():
        for _ in work.stage.follow(drawing.drawn_before(), save_every=None):
            pass
    work.follow(drawing.draw(model, rank=rank(), world_size=world_size()))
    if is_main():
        for step in drawing.wait():
            work.tell(work.part.title, step)
    barrier()
    if not is_main():
        return []
    path, facts = work.run.path / "samples" / f"{row}.safetensors", work.folder / "model.json"
    drawing.write(path)
    write_json(facts, {"params": count_parameters(model)})
    return [path, facts]


def _row_of(part: Part) -> RowName:
    assert part.row is not None
    return part.row


def _evaluate(work: Opened) -> list[Path]:
    """Figures of every row, each beside the pretrained one's; where no suite fits the images, what the rows cost."""
    job, run = work.job, work.run
    assert job.recipe.sample is not None
    metrics, suite = [], job.recipe.suite
    new_evaluator = (
        suite.open(_origin(job), on_step=lambda step: work.tell("reference", step))
        if job.is_measured
        else None
    )
    kept = []
    for row in rows_of(job):
        figures: dict[str, Any] = {"num_images": job.recipe.sample.num_images}
        if new_evaluator is not None:
            samples, evaluator = open_samples(run.path / "samples" / f"{row}.safetensors"), new_evaluator()
            for step in evaluate(samples.batches(suite.batch_size), evaluator):
                work.tell(f"evaluate {row}", step)
            figures = evaluator.result().model_dump(mode="json")
            if (per_image := evaluator.per_image()) is not None:
                kept.append(influences_path(run.path, row))
                save_influences(kept[-1], per_image, figures=figures)
        metrics.append({"name": row} | _cost(job, run, row) | figures)
    write_json(run.path / "metrics.json", with_pretrained(run.path, metrics))
    return [run.path / "metrics.json", *kept]


def _evaluate_inputs(job: Job, run: RunFolder, part: Part) -> list[Any]:
    fingerprints = {row: run.stage_outputs(f"samples/{row}") for row in rows_of(job)}
    suite = job.recipe.suite.inputs(job.suite, _origin(job)) if job.is_measured else None
    return [fingerprints, suite]


def _origin(job: Job) -> dict[str, Any]:
    """Sampling part of the protocol of a job's figures."""
    assert job.recipe.sample is not None
    vae = job.decoder.identity if job.decoder else None
    origin = origin_of(job.recipe.sample, denoiser=job.denoiser, vae=vae)
    return origin | {"num_images": job.recipe.sample.num_images}


class _Facts(BaseModel):
    """What is kept of the model that drew a row's images."""

    params: NonNegativeInt


def _cost(job: Job, run: RunFolder, row: RowName) -> dict[str, Any]:
    """Cost of a row's model: parameters, attention FLOPs per image and forward pass, measured sampling time."""
    folder = run.path / "samples" / row
    log = folder / "log.jsonl"
    said = [line.get("ms_per_image") for line in (read_log(log) if log.is_file() else ())]
    times = sorted(value for value in said if isinstance(value, float) and math.isfinite(value))
    flops = job.attention_flops(is_edited=ROWS[row].is_edited)
    return {
        "params": read_json(folder / "model.json", _Facts, error=RunError).params,
        "attention_flops": flops.total,
        "attention_mixing_flops": flops.mixing,
        # a log may be lost: the images are not drawn again for it
        "ms_per_image": round(times[len(times) // 2], 3) if times else None,
    }


def _report(work: Opened) -> list[Path]:
    write_report(work.run.path)
    return []


def _new_flops(cost: PlanCost, chosen: Mapping[Site, Choice]) -> int:
    """FLOPs of one pass through what stage 1 fits."""
    # a merged pair is fitted whole, and pairs are not told from the rest of the model
    if any(isinstance(choice, Merge) for choice in chosen.values()):
        return cost.after.flops
    return sum(site.flops.total for site in cost.after.sites if site.operator is not None)


def _calibrate_flops(recipe: Recipe, cost: PlanCost, chosen: Mapping[Site, Choice]) -> int:
    if recipe.calibrate is None or not chosen:
        return 0
    # an MLP narrower than the host's takes a second pass
    return 2 * recipe.calibrate.samples * (cost.before.flops + _new_flops(cost, chosen))


def _distill_flops(recipe: Recipe, cost: PlanCost, chosen: Mapping[Site, Choice]) -> int:
    if recipe.distill is None or not chosen:
        return 0
    images = recipe.distill.steps * recipe.distill.batch_size
    return images * (cost.before.flops + 3 * _new_flops(cost, chosen))


def _finetune_flops(recipe: Recipe, cost: PlanCost, chosen: Mapping[Site, Choice]) -> int:
    if recipe.finetune is None:
        return 0
    teacher = cost.before.flops if recipe.finetune.output_weight else 0
    return recipe.finetune.steps * recipe.finetune.batch_size * (3 * cost.after.flops + teacher)


def _once(name: str, applies: Callable[[Job], Any]) -> Callable[[Job], list[Part]]:
    """A stage of one part, where it applies."""
    return lambda job: [Part(name, name)] if applies(job) else []


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            name="calibrate",
            parts=_once("calibrate", lambda job: job.recipe.calibrate and job.chosen),
            inputs=lambda job, run, part: identity.calibrate_inputs(job),
            do=_calibrate,
            flops=_calibrate_flops,
        ),
        Stage(
            name="distill",
            parts=_once("distill", lambda job: job.recipe.distill and job.is_fitted),
            inputs=lambda job, run, part: identity.distill_inputs(job),
            do=_distill,
            flops=_distill_flops,
            is_shared=True,
        ),
        Stage(
            name="finetune",
            parts=_once("finetune", lambda job: job.recipe.finetune),
            inputs=lambda job, run, part: identity.finetune_inputs(job, run),
            do=_finetune,
            flops=_finetune_flops,
            is_shared=True,
        ),
        Stage(
            name="sample",
            parts=lambda job: [
                Part(f"samples/{row}", f"sample {row}", row) for row in rows_of(job) if job.recipe.sample
            ],
            inputs=lambda job, run, part: identity.samples_inputs(job, run, _row_of(part)),
            do=_sample,
            is_shared=True,
        ),
        Stage(
            name="evaluate",
            parts=_once("evaluate", lambda job: job.recipe.sample),
            inputs=_evaluate_inputs,
            do=_evaluate,
        ),
        Stage(name="report", parts=_once("report", lambda job: True), inputs=None, do=_report),
    )
}


class TrainingFlops(NamedTuple):
    """FLOPs: of the training that led to a model, and of one image's forward pass through it and through its source."""

    training: int
    model: int
    base: int


def training_flops(job: Job, row: RowName) -> TrainingFlops:
    """Cost of making a row's model. A backward pass counts as two forward passes."""
    cost = plan_cost(job.model, job.recipe.edits, grid=job.grid)
    base, model = cost.before.flops, cost.after.flops
    if not ROWS[row].is_edited:
        return TrainingFlops(0, base, base)
    taken = stage_flops(job.recipe, cost, job.chosen)
    return TrainingFlops(sum(taken.get(stage, 0) for stage in ROWS[row].after), model, base)


def stage_flops(recipe: Recipe, cost: PlanCost, chosen: Mapping[Site, Choice]) -> dict[str, int]:
    """FLOPs of each stage of training that a recipe has, all processes together."""
    return {
        name: stage.flops(recipe, cost, chosen)
        for name, stage in STAGES.items()
        if getattr(recipe, name, None)
    }


def _timed(job: Job, name: str, steps: Iterator[Step]) -> Iterator[Step]:
    """A stage's steps with how fast they are. FLOPs are counted where there is a peak to compare with."""
    config, device = getattr(job.recipe, name), default_device()
    known = device_at(device)
    peak = job.peak_tflops or (known.tflops(config.precision) if known else None)
    flops = 0.0
    if peak is not None and config.steps:
        cost = plan_cost(job.model, job.recipe.edits, grid=job.grid)
        flops = STAGES[name].flops(job.recipe, cost, job.chosen) / config.steps
    work = Work(
        images=config.batch_size,
        tokens=job.grid.num_tokens,
        flops=flops,
        tflops=peak and peak * world_size(),
    )
    return measured(steps, work, device=device)
