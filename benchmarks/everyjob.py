"""The commands that `everywrite.py` stops: everything that writes, on models that take a moment."""

import importlib
import json
import pkgutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import yaml
from everywrite import Job, is_temporary
from torch import nn

import grafting
from grafting.cli import app
from grafting.contract import Step
from grafting.editing.plan import Plan, Replace
from grafting.editing.surgery import graft
from grafting.errors import GraftingError
from grafting.hosts import hosts
from grafting.machine.files import hash_json, sha256_of
from grafting.machine.randomness import seeded
from grafting.runs.hub import push_to_hub
from grafting.runs.recipe import Recipe
from grafting.runs.run import run
from grafting.weights.folder import load_model, save_delta, save_model
from grafting.weights.portable import Base

PLAN = Plan(edits=(Replace(role="attention", blocks="odd", operator={"name": "hyena-x", "kernel_size": 3}),))
RECIPE: dict[str, Any] = {
    "name": "every",
    "source": {
        "host": "dit",
        "config": {
            "input_size": 32, "patch_size": 8, "in_channels": 1, "hidden_size": 32, "depth": 2, "num_heads": 2,
            "num_classes": 10,
        },
    },
    "plan": [{"role": "attention", "blocks": "odd", "operator": {"name": "hyena-x", "kernel_size": 3}}],
    "data": {"name": "testbed-subset"},
    "calibrate": {"samples": 8, "batch_size": 8},
    "distill": {"steps": 3, "batch_size": 4, "holdout": 8},
    "finetune": {"steps": 3, "batch_size": 4, "warmup_steps": 0, "ema_decay": 0.9},
    "sample": {"sampler": "ddim", "steps": 1, "num_images": 10, "batch_size": 5, "cfg_scale": 1.0},
    "rows": ["finetuned"],
    "save_every": 2,
}  # fmt: skip
SWEEP = {
    **{key: RECIPE[key] for key in ("source", "data")},
    "name": "every",
    "plan": RECIPE["plan"],
    "sample": RECIPE["sample"],
    "rows": ["inherited"],
    "grids": [{"axes": {"taps": {3: {}, 5: {"plan.0.operator.kernel_size": 5}}}}],
}
STAGES = ("calibrate", "distill", "finetune", "sample", "evaluate", "report")
# of the lines and rows that runs write, what does not tell time
_TIMELESS = ("step", "loss", "r2", "name", "frechet", "kid", "params")


def get_ready() -> None:
    """What the children are to find in the process that they are forked from."""
    torch.set_num_threads(1)
    for module in pkgutil.walk_packages(grafting.__path__, "grafting."):
        # kernels are imported where there is a GPU for them
        if not module.name.endswith("__main__") and "._triton." not in module.name:
            importlib.import_module(module.name)
    model()


@cache
def model(*, is_grafted: bool = True) -> nn.Module:
    with seeded(0):
        made = hosts()["dit"].tiny()
        if is_grafted:
            graft(made, PLAN)
    return made


def results(folder: Path) -> dict[str, str]:
    """Hashes of all files but locks; of those that tell time, of the rest of them."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.endswith(".lock") and not is_temporary(path):
            found[str(path.relative_to(folder))] = _hash(path)
    return found


def _hash(path: Path) -> str:
    if path.suffix in (".csv", ".md", ".html", ".svg") and "runs" in path.parts:
        return ""  # made of the JSON beside them, with times
    if path.name == "manifest.previous.json":
        return ""
    if path.name == "manifest.json":
        stages = json.loads(path.read_text())["stages"]
        return hash_json({name: [entry["inputs"], entry["done"]] for name, entry in stages.items()})
    if path.name in ("metrics.json", "table.json"):
        return hash_json([_timeless(row) for row in json.loads(path.read_text())])
    if path.suffix == ".jsonl":
        return hash_json([_timeless(json.loads(line)) for line in path.read_text().splitlines()])
    return sha256_of(path)


def _timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key.partition("/")[0] in _TIMELESS}


def command(*arguments: str) -> Callable[[Path], None]:
    """A command line; FOLDER stands for the folder that it works in."""

    def work(folder: Path) -> None:
        app([argument.replace("FOLDER", str(folder)) for argument in arguments])

    return work


def _told(work: Callable[[Path], Any]) -> Callable[[Path], None]:
    """A function of the library, which ends as the command line does."""

    def told(folder: Path) -> None:
        try:
            work(folder)
        except GraftingError as error:
            print(f"Error: {error}")
            raise SystemExit(1) from None

    return told


def _nothing(folder: Path) -> None:
    """For commands that need nothing."""


def _save(folder: Path) -> None:
    save_model(folder / "out", model(), PLAN)


def _save_another(folder: Path) -> None:
    """Another model where one is to be saved: ungrafted, and with a file of its own."""
    save_model(folder / "out", model(is_grafted=False), Plan())
    (folder / "out" / "notes.txt").write_text("mine")


def _base(folder: Path) -> None:
    save_model(folder / "base", model(is_grafted=False), Plan())


def _save_delta(folder: Path) -> None:
    grafted, _ = load_model(folder / "base")
    with seeded(0):
        graft(grafted, PLAN)
    save_delta(folder / "delta", grafted, PLAN, Base(id=str(folder / "base")))


def _delta(folder: Path) -> None:
    _base(folder)
    _save_delta(folder)


def _published(folder: Path) -> None:
    torch.save(model(is_grafted=False).state_dict(), folder / "published.pt")


class _Hub:
    """Takes a folder if it is whole."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        pass

    def upload_folder(
        self, *, repo_id: str, folder_path: str, commit_message: str, allow_patterns: list[str]
    ) -> None:
        assert "# out" in Path(folder_path, "README.md").read_text()


def _pushed(folder: Path) -> None:
    push_to_hub(folder / "out", "me/mine", api=_Hub())


def _images(folder: Path) -> None:
    import soak

    soak.write_images(folder / "images", count=6)
    soak.write_vae(folder / "vae")


def _run(folder: Path, *, until: str) -> None:
    run(Recipe.model_validate(RECIPE), folder / "runs" / "every", until=until, on_step=_ignore)


def _ignore(stage: str, step: Step) -> None:
    pass


def _run_before(folder: Path, *, stage: str) -> None:
    place = STAGES.index(stage)
    if place:
        _run(folder, until=STAGES[place - 1])


def _sweep(folder: Path) -> None:
    (folder / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))


_NUMBERS = ("--num", "4", "--batch-size", "2", "--steps", "1")
_LATENTS = ("--images", "FOLDER/images", "--vae", "FOLDER/vae", "--size", "8")

JOBS = {
    job.name: job
    for job in (
        Job("save", _nothing, _told(_save), results),
        Job("save-over", _save_another, _told(_save), results),
        Job("save-delta", _base, _told(_save_delta), results),
        Job("merge", _delta, command("merge", "FOLDER/delta", "FOLDER/whole"), results),
        Job("convert", _published, command("convert", "FOLDER/published.pt", "FOLDER/out", "--num-heads", "4", "--num-classes", "10"), results),
        Job("convert-to-diffusers", _base, command("convert", "FOLDER/base", "FOLDER/out", "--to", "diffusers"), results),
        Job("push", _save, _told(_pushed), results),
        Job("subset", _nothing, command("data", "subset", "testbed", "FOLDER/subset.json", "--per-class", "2"), results),
        Job("latents", _images, command("data", "latents", "FOLDER/latents", *_LATENTS, "--shard-size", "4", "--batch-size", "2"), results),
        Job("sample", _save, command("sample", "FOLDER/out", *_NUMBERS, "--out", "FOLDER/samples.npz", "--png", "FOLDER/png"), results),
        *(
            Job(f"run-{stage}", partial(_run_before, stage=stage), _told(partial(_run, until=stage)), results)
            for stage in STAGES
        ),
        Job("report", partial(_run_before, stage="report"), command("report", "FOLDER/runs/every"), results),
        Job("sweep", _sweep, command("sweep", "FOLDER/sweep.yaml", "--out", "FOLDER/runs"), results),
    )
}  # fmt: skip
