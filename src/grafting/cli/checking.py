"""The command that checks a recipe, or all of a sweep, before any work."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import RecipeError
from ..words import ABSENT, FIGURES, amount
from ._shared import Json, RecipeFile, Settings, Spec, open_recipe, out, print_json, uncollected
from .display import plain_table, say
from .inspection import site_facts

if TYPE_CHECKING:
    from ..contract import Role
    from ..runs.job import Job

_COSTS = ("params", "attention_flops", "mlp_flops")

app = typer.Typer()


@app.command()
@uncollected()
def check(recipe: RecipeFile, settings: Settings = None, as_json: Json = False, spec: Spec = None) -> None:
    """Check a recipe or a sweep, and show what it would do.

    [dim]$ grafting check my-recipe.yaml[/]
    """
    from ..runs.file import read_settings
    from ..runs.job import prepare

    if "grids" in read_settings(recipe):
        _check_sweep(recipe, settings, as_json=as_json)
        return
    summary = _summary(prepare(open_recipe(recipe, settings)))
    if as_json:
        print_json(summary)
        return
    edits = [[e["block"], e["role"], e["path"], e["operator"]["name"]] for e in summary["edits"]]
    if edits:
        out.print(plain_table(["block", "role", "path", "operator"], edits))
    num_blocks = sum(edit["role"] == "block" for edit in summary["edits"])
    say(out, f"{len(edits) - num_blocks} of {summary['num_sites']} sites are edited")
    if num_blocks:
        say(out, f"{num_blocks} blocks are merged or dropped")
    for what in filter(summary.get, _COSTS):
        before, after = summary[what]["before"], summary[what]["after"]
        change = f" ({after / before - 1:+.1%})" if before else ""
        say(out, f"{FIGURES[what].inline}: {before:,} to {after:,}{change}")
    for stage, words in summary["stages"].items():
        say(out, f"{stage}: {words}")
    for note in summary["notes"]:
        say(out, f"Note: {note}")
    say(out, "The recipe is valid.")


def _check_sweep(file: Path, settings: list[str] | None, *, as_json: bool) -> None:
    from ..runs.job import prepare
    from ..runs.sweep import each, load_sweep, points

    if settings:
        raise RecipeError(f"--set changes one recipe, and {file} holds many: change the file")
    sweep = load_sweep(file)
    found = each(points(sweep), lambda point: _summary(prepare(point.recipe)))
    if as_json:
        print_json([{"labels": point.labels, **summary} for point, summary in found])
        return
    columns = list(dict.fromkeys(column for point, _ in found for column in point.labels))
    costs = [what for what in _COSTS if any(what in summary for _, summary in found)]
    rows = [
        [
            *map(point.labels.get, columns),
            len(summary["edits"]),
            *(amount(summary[what]["after"]) if what in summary else ABSENT for what in costs),
        ]
        for point, summary in found
    ]
    heads = ["edited", *(FIGURES[what].inline for what in costs)]
    out.print(plain_table([*columns, *heads], rows))
    for note in dict.fromkeys(note for _, summary in found for note in summary["notes"]):
        say(out, f"Note: {note}")
    say(out, f"The {len(found)} recipes of the sweep are valid.")


def _summary(job: "Job") -> dict[str, Any]:
    """Summarise what a recipe does to its model, as JSON data."""
    from ..cost.count import count_parameters
    from ..editing.surgery import build_operators, grafted
    from ..runs.remarks import remarks

    sites = job.host.sites(job.model)
    before = count_parameters(job.model)
    operators = build_operators(job.model, job.recipe.edits, seed=job.recipe.seed)
    notes = remarks(job, operators)
    with grafted(job.model, operators) as model:
        after = count_parameters(model)
    return {
        "recipe": job.recipe.name,
        "host": job.host.name,
        "num_sites": len(sites),
        "edits": [site_facts(site, choice) for site, choice in job.chosen.items()],
        "params": {"before": before, "after": after},
        "attention_flops": _flops(job, "attention"),
        **({"mlp_flops": _flops(job, "mlp")} if job.edits_mlps else {}),
        "stages": _stages_in_words(job),
        "notes": notes,
    }


def _flops(job: "Job", role: "Role") -> dict[str, int]:
    return {
        "before": job.flops_of(role, is_edited=False).total,
        "after": job.flops_of(role, is_edited=True).total,
    }


def _stages_in_words(job: "Job") -> dict[str, str]:
    from ..data import Prompts
    from ..latents.prompting import PlannedPrompts
    from ..sampling.taught import TaughtConfig
    from ..sampling.trajectories import Trajectories

    recipe, words = job.recipe, {}
    if isinstance(conditions := job.denoiser.conditions, Prompts | PlannedPrompts):
        how = "to encode" if isinstance(conditions, PlannedPrompts) else "encoded already"
        words["prompts"] = f"{len(conditions):,} {how}"
    if isinstance(recipe.data, TaughtConfig):
        made = recipe.data
        words["teach"] = f"{made.num_images} latents of the source, {made.sampler} with {made.steps} steps"
    if recipe.calibrate and job.chosen:
        of = "" if isinstance(job.data, Trajectories) else f" of {len(job.data)}"
        words["calibrate"] = f"{recipe.calibrate.samples} noised images{of}, in one or two passes"
    if recipe.distill and job.chosen:
        held_out = recipe.distill.holdout
        images = (
            f"{job.data}; {held_out} held out"
            if isinstance(job.data, Trajectories)
            else f"images, {len(job.data) - held_out} to train on and {held_out} held out"
        )
        words["distill"] = f"{recipe.distill.steps} steps of {recipe.distill.batch_size} {images}"
    for number, phase in enumerate(recipe.phases, start=1):
        name = "finetune" if len(recipe.phases) == 1 else f"finetune, phase {number}"
        trained = "" if phase.trainable == "all" else f", which train {phase.trained_in_words}"
        images = f"{job.data}" if isinstance(job.data, Trajectories) else f"of {len(job.data)} images"
        words[name] = f"{phase.steps} steps of {phase.batch_size} {images}{trained}"
    if recipe.sample:
        config = recipe.sample
        words["sample"] = (
            f"{config.num_images} images of each model, {config.sampler} with {config.steps} steps, "
            f"cfg scale {config.cfg_scale:g}"
        )
    return words
