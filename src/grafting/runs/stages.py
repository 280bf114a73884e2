"""The stages of a run, as a table: a new stage is a record here and its module."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, NonNegativeInt

from ..contract import Site
from ..cost.count import count_parameters
from ..cost.plan import PlanCost, plan_cost
from ..data.bundled import bundled_model_folder
from ..editing.plan import Choice
from ..errors import RunError
from ..evaluation import evaluate
from ..evaluation.influences import save_influences
from ..machine.devices import default_device
from ..machine.files import hash_json, write_json
from ..machine.processes import barrier, is_main, share
from ..machine.reading import JsonObject, read_json
from ..runs import identity
from ..sampling.drawing import Drawing, describe_model
from ..sampling.files import open_samples, origin_of
from ..sampling.taught import Taught, TaughtConfig, teach
from ..weights.pipelinefolder import pipeline_in, write_pipeline
from ..words import PRETRAINED, RowName
from .folder import RunFolder, read_log
from .job import Job
from .pairing import influences_path, with_pretrained
from .recipe import Recipe
from .record import write_report
from .rows import ROWS, rows_of
from .stage import Opened, Part, Stage
from .training import (
    calibrate_flops,
    calibrate_operators,
    distill_flops,
    distill_operators,
    finetune_flops,
    finetune_model,
    teach_flops,
)


def _teach(work: Opened) -> list[Path]:
    """The source's own latents; the files of their folder."""
    job, config = work.job, work.job.recipe.data
    assert isinstance(job.data, Taught)
    assert isinstance(config, TaughtConfig)
    folder = job.data.folder
    assert folder is not None
    steps = teach(
        job.model,
        config,
        folder,
        denoiser=job.denoiser,
        shape=job.shape,
        identity={"inputs": hash_json(identity.teach_inputs(job))},
        source=f"made by {job.recipe.name}'s source",
        share=share(),
    )
    work.follow(steps)
    barrier()
    return sorted(path for path in folder.glob("*") if path.is_file() and path.suffix != ".lock")


def _assemble(work: Opened) -> list[Path]:
    """The source's pipeline with the run's model in it."""
    run, source = work.run.path, _weights(work.job.recipe)
    assert source is not None
    return write_pipeline(run / "pipeline", source, run / "model")


def ends_in_pipeline(recipe: Recipe) -> bool:
    """True if the recipe's run leaves a pipeline's folder, as far as its source is here."""
    source = _weights(recipe)
    if not recipe.finetune or source is None:
        return False
    is_here = bundled_model_folder(source) is not None or Path(source).exists()
    return is_here and pipeline_in(source) is not None


def _weights(recipe: Recipe) -> str | None:
    """Where the source's weights are, if they are anywhere."""
    return recipe.source if isinstance(recipe.source, str) else recipe.source.weights


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
    work.follow(drawing.draw(model, share()))
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
        figures: JsonObject = {"num_images": job.recipe.sample.num_images}
        if new_evaluator is not None:
            samples, evaluator = open_samples(run.path / "samples" / f"{row}.safetensors"), new_evaluator()
            for step in evaluate(samples.batches(suite.batch_size), evaluator):
                work.tell(f"evaluate {row}", step)
            figures = evaluator.result().model_dump(mode="json")
            if (per_image := evaluator.per_image()) is not None:
                kept.append(influences_path(run.path, row))
                save_influences(kept[-1], per_image, figures=figures)
        metrics.append({"name": row, **_cost(job, run, row), **figures})
    write_json(run.path / "metrics.json", with_pretrained(run.path, metrics))
    return [run.path / "metrics.json", *kept]


def _evaluate_inputs(job: Job, run: RunFolder, part: Part) -> list[Any]:
    fingerprints = {row: run.stage_outputs(f"samples/{row}") for row in rows_of(job)}
    suite = job.recipe.suite.inputs(job.suite, _origin(job)) if job.is_measured else None
    return [fingerprints, suite]


def _origin(job: Job) -> dict[str, object]:
    """Sampling part of the protocol of a job's figures."""
    assert job.recipe.sample is not None
    vae = job.decoder.identity if job.decoder else None
    origin = origin_of(job.recipe.sample, denoiser=job.denoiser, vae=vae)
    return origin | {"num_images": job.recipe.sample.num_images}


class _Facts(BaseModel):
    """What is kept of the model that drew a row's images."""

    params: NonNegativeInt


def _cost(job: Job, run: RunFolder, row: RowName) -> dict[str, int | float | None]:
    """Cost of a row's model: parameters, FLOPs per image and forward pass of attention, and of MLPs where the plan edits some,
    measured sampling time."""
    folder = run.path / "samples" / row
    log = folder / "log.jsonl"
    said = [line.get("ms_per_image") for line in (read_log(log) if log.is_file() else ())]
    times = sorted(value for value in said if isinstance(value, float) and math.isfinite(value))
    is_edited = ROWS[row].is_edited
    flops = job.flops_of("attention", is_edited=is_edited)
    of_mlps = {"mlp_flops": job.flops_of("mlp", is_edited=is_edited).total} if job.edits_mlps else {}
    return {
        "params": read_json(folder / "model.json", _Facts, error=RunError).params,
        "attention_flops": flops.total,
        "attention_mixing_flops": flops.mixing,
        **of_mlps,
        # a log may be lost: the images are not drawn again for it
        "ms_per_image": round(times[len(times) // 2], 3) if times else None,
    }


def _report(work: Opened) -> list[Path]:
    write_report(work.run.path)
    return []


def _once(name: str, applies: Callable[[Job], Any]) -> Callable[[Job], list[Part]]:
    """A stage of one part, where it applies."""
    return lambda job: [Part(name, name)] if applies(job) else []


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            name="teach",
            parts=_once("teach", lambda job: isinstance(job.data, Taught) and job.recipe.trains),
            inputs=lambda job, run, part: identity.teach_inputs(job),
            do=_teach,
            flops=teach_flops,
            is_shared=True,
            of_source=lambda part: True,
        ),
        Stage(
            name="calibrate",
            parts=_once("calibrate", lambda job: job.recipe.calibrate and job.chosen),
            inputs=lambda job, run, part: identity.calibrate_inputs(job),
            do=calibrate_operators,
            flops=calibrate_flops,
        ),
        Stage(
            name="distill",
            parts=_once("distill", lambda job: job.recipe.distill and job.is_fitted),
            inputs=lambda job, run, part: identity.distill_inputs(job),
            do=distill_operators,
            flops=distill_flops,
            is_shared=True,
        ),
        Stage(
            name="finetune",
            parts=_once("finetune", lambda job: job.recipe.finetune),
            inputs=lambda job, run, part: identity.finetune_inputs(job, run),
            do=finetune_model,
            flops=finetune_flops,
            is_shared=True,
        ),
        Stage(
            name="pipeline",
            parts=_once("pipeline", lambda job: ends_in_pipeline(job.recipe)),
            inputs=lambda job, run, part: [_weights(job.recipe), run.stage_outputs("finetune")],
            do=_assemble,
        ),
        Stage(
            name="sample",
            parts=lambda job: [
                Part(f"samples/{row}", f"sample {row}", row) for row in rows_of(job) if job.recipe.sample
            ],
            inputs=lambda job, run, part: identity.samples_inputs(job, run, _row_of(part)),
            do=_sample,
            is_shared=True,
            of_source=lambda part: part.row == PRETRAINED,
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
    taken, stages = stage_flops(job.recipe, cost, job.chosen), ROWS[row].after
    return TrainingFlops(
        sum(taken[stage] for stage in (*stages, *(("teach",) if stages else ()))), model, base
    )


def stage_flops(recipe: Recipe, cost: PlanCost, chosen: Mapping[Site, Choice]) -> dict[str, int]:
    """FLOPs of each stage, all processes together; none where nothing is trained."""
    return {name: stage.flops(recipe, cost, chosen) for name, stage in STAGES.items()}
