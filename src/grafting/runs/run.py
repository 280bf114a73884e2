"""A run: a recipe carried out in one folder, stage by stage.

Each stage reads what came before from the folder, is skipped where nothing that it depends on has changed, and resumes where a
killed run stopped. Everything that can be wrong with a recipe is found before any work begins.
"""

import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from ..contract import Step
from ..data.subset import PartialData
from ..editing.plan import describe_choice
from ..errors import RunError
from ..latents.prompting import WordsConfig, encode_words
from ..machine.devices import default_device
from ..machine.files import differing, flatten, write_bytes, write_json
from ..machine.precision import settled_run
from ..machine.processes import any_process, barrier, is_main, together, world_size
from ..machine.reading import JsonObject, read_bytes, read_yaml, shown
from ..sampling.taught import Taught
from .folder import RunFolder, refuse_strangers
from .job import Job, prepare
from .operator_cache import OperatorStore
from .recipe import Recipe
from .remarks import seen_before
from .stage import OnStep, carry_out
from .stages import STAGES

_MOST_CHANGES = 5
_UNSET = "unset"


def run(
    recipe: Recipe,
    folder: str | Path,
    *,
    until: str = "report",
    on_step: OnStep | None = None,
    store: OperatorStore | None = None,
    others: Sequence[str | Path] = (),
    peak_tflops: float | None = None,
) -> Path:
    """Run a recipe in `folder`, up to stage `until`, and return the folder; finished stages are skipped.

    Several processes (see `machine.processes`) share the work; the main one writes. `on_step` is called, in that one, with the
    stage's name and each of its steps. Operators that another run with the same store has
    fitted, at the same site from the same start, are taken from there; encoded words, the source's own latents and the pretrained
    model's samples are taken from `others`, folders of runs that had the same to do. `peak_tflops` is of one device, for the share of it
    that training reaches; by default that of the device where it is a known one.

    Raises:
        GraftingError: anything wrong with the recipe, before any work; or what a stage could not do.
    """
    folder = Path(folder)
    siblings = [Path(other) for other in others]
    with together():
        recipe, told = settled_run(recipe, default_device(), folder=folder)
        recipe = _with_prompts(recipe, folder, siblings, on_step or _ignore)
        job = replace(prepare(recipe, store=store), peak_tflops=peak_tflops)
        if isinstance(job.data, Taught):
            job.data.folder = folder / "teach" / "latents"
        with _open(job, folder, siblings) as run_folder:
            for what in (told, *seen_before(job)):
                run_folder.tell(what)
            for name, stage in STAGES.items():
                carry_out(stage, job, run_folder, on_step if on_step and is_main() else _ignore)
                if name == until:
                    break
    return folder


def _with_prompts(recipe: Recipe, folder: Path, others: Sequence[Path], on_step: OnStep) -> Recipe:
    """The recipe with its words encoded, in the run's folder; all else in it was found right before."""
    if not isinstance(recipe.conditions, WordsConfig):
        return recipe
    prepare(recipe)
    refuse_strangers(folder)
    source = recipe.source if isinstance(recipe.source, str) else None
    encoded = encode_words(
        recipe.conditions,
        folder / "prompts",
        source=source,
        others=[other / "prompts" for other in others],
        tell=lambda step: on_step("prompts", step) if is_main() else None,
    )
    return recipe.model_copy(update={"conditions": encoded})


def _ignore(stage: str, step: Step) -> None:
    """Default step callback of `run`: does nothing."""


def _open(job: Job, folder: Path, others: Sequence[Path]) -> RunFolder:
    _check_subset(job.recipe, folder / "recipe.yaml")
    run_folder = RunFolder(
        folder,
        recipe_name=job.recipe.name,
        writes=is_main(),
        barrier=barrier,
        anyone=any_process,
        others=others,
    )
    if run_folder.writes:
        _describe(job, run_folder)
    return run_folder


def _changes(before: JsonObject, now: JsonObject) -> str:
    """Say which settings differ between two recipes; empty if none does."""
    old, new = (flatten(recipe, lists=True) for recipe in (before, now))
    changed = [
        f"{key} ({shown(old.get(key, _UNSET))}, now {shown(new.get(key, _UNSET))})"
        for key in differing(old, new)
    ]
    more = f" and {len(changed) - _MOST_CHANGES} more" if len(changed) > _MOST_CHANGES else ""
    return ", ".join(changed[:_MOST_CHANGES]) + more


def _check_subset(recipe: Recipe, written: Path) -> None:
    """Raises a RunError if the run began on another subset under the same name, unless the recipe says which it wants."""
    data = recipe.data
    if not isinstance(data, PartialData) or data.subset_sha256 is not None:
        return
    if data.subset is None or not written.is_file():
        return
    recipe_before = read_yaml(written, error=RunError)
    before = recipe_before.get("data") if isinstance(recipe_before, dict) else None
    found = data.pinned().subset_sha256
    if not isinstance(before, dict):
        return
    if before.get("subset") == str(data.subset) and before.get("subset_sha256") not in (None, found):
        raise RunError(
            f"{data.subset} has sha256 {found}, the run in {written.parent} began with "
            f"{before['subset_sha256']}: name another folder with --out, or write `subset_sha256: {found}` in the "
            "recipe's data to start over here"
        )


def _describe(job: Job, run_folder: RunFolder) -> None:
    """Write down the recipe, the plan and the machine."""
    folder = run_folder.path
    restructured = any(site.role == "block" for site in job.chosen)
    sites = [
        {
            "block": site.block,
            "role": site.role,
            "path": site.path,
            "operator": describe_choice(job.chosen.get(site)),
        }
        for site in (*job.host.sites(job.model), *(job.host.blocks(job.model) if restructured else ()))
    ]
    plan = job.recipe.edits.model_dump(mode="json")
    recipe = job.recipe.model_copy(update={"data": job.recipe.data.pinned()})
    settings = recipe.model_dump(mode="json", exclude_none=True)
    described = yaml.safe_dump(settings, sort_keys=False).encode()
    written = folder / "recipe.yaml"
    if written.is_file() and read_bytes(written, error=RunError) != described:
        run_folder.mark_stale()
        with suppress(RunError):  # a damaged one says nothing, and is written again
            before = read_yaml(written, error=RunError)
            run_folder.changes = _changes(before, settings) if isinstance(before, dict) else ""
    write_bytes(folder / "recipe.yaml", described)
    write_json(folder / "plan.json", {"host": job.host.name, "plan": plan, "sites": sites})
    run_folder.describe_machine(
        {
            "processor": platform.processor() or platform.machine(),
            "device": str(default_device()),
            "processes": world_size(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
    )
