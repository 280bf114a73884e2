"""A first recipe for a model at hand, and a short one that shows in a minute that everything fits together.

Lengths and rates are those of the quickstarts for the bundled models, the published ones of arXiv:2506.05340 for other models of classes,
and for models that are asked by prompts, which are large, short ones that train the new operators and adapters.
Written as text, because a person goes on from here: each choice has its reason beside it.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ..data import ImageFolderConfig
from ..data.bundled import bundled_model_folder
from ..diffusion import Diffusion
from ..editing.surgery import can_adapt, resolve
from ..errors import HostError, RecipeError
from ..hosts import Host, hosts
from ..latents.decoding import makes_pixels
from ..latents.prompting import read_words
from ..machine.files import write_bytes
from ..machine.packages import install_line
from ..machine.reading import JsonObject, parse_yaml
from ..operators import parse_operator
from ..weights.folder import read_config
from ..weights.locate import PIPELINE_NAME, find_model
from ..words import DISTILLED, FINETUNED, PRETRAINED, ROW_TITLES, RowName
from .file import load_recipe, parse_recipe
from .job import skeleton
from .recipe import FreshModel


class _Quickstart(NamedTuple):
    """What a bundled model's quickstart edits, and the rest of its recipe."""

    operator: str
    blocks: str
    rest: str
    rows: tuple[RowName, ...]


_BUNDLED = {
    "testbed": _Quickstart(
        "{name: window-2d, radius: 1}",
        "4-7",
        """\
data: {name: testbed-subset}
calibrate: {samples: 256}
distill: {steps: 60, batch_size: 64, lr: 2.0e-3, cooldown_steps: 50, holdout_every: 20}
finetune: {steps: 100, batch_size: 64, lr: 1.0e-4, warmup_steps: 10, cooldown_steps: 80, ema_decay: 0.95, clip_norm: 1.0, output_weight: 1.0}
sample: {sampler: dpm-solver++, steps: 8, cfg_scale: 2.0, cfg_interval: [0.0, 0.7], clip: true, num_images: 1000, batch_size: 250}
""",
        (PRETRAINED, DISTILLED, FINETUNED),
    ),
    "scenes": _Quickstart(
        "{name: hyena-x, geometry: 2d, kernel_size: 3}",
        "odd",
        """\
data: {name: scenes, seeds: 10000000-10999999}
calibrate: {samples: 64}
distill: {steps: 100, batch_size: 16, lr: 2.0e-3, cooldown_steps: 80, holdout_every: 50}
finetune: {steps: 150, batch_size: 16, lr: 5.0e-4, warmup_steps: 10, cooldown_steps: 100, ema_decay: 0.97, clip_norm: 1.0, output_weight: 1.0}
sample: {sampler: dpm-solver++, steps: 10, cfg_scale: 3.0, clip: true, num_images: 300, batch_size: 60}
""",
        (PRETRAINED, FINETUNED),
    ),
}
_SMOKE = """\
# A minute: two steps of each stage, few images. Its figures mean nothing.
#     grafting run {smoke}
base: {base}
name: {name}-smoke
trial: true
calibrate: {{samples: 4, batch_size: 4}}
distill: {{steps: 2, batch_size: 4, holdout: 4{cooldown}}}
finetune: {{steps: 2, batch_size: 4, warmup_steps: 0{cooldown}{how}}}
"""
_SMOKE_LATENTS = "data: {num_images: 12, batch_size: 4, steps: 2}\n"
_SMOKE_SAMPLES = """\
sample: {num_images: 12, batch_size: 4, steps: 2}
rows: [pretrained, finetuned]
"""


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a first recipe is made from."""

    source: str = "testbed"
    """`testbed`, `scenes`, or the folder of a model or a pipeline."""
    operator: str | None = None
    """By default the quickstart's for a bundled model; else Hyena-X where the host takes mixers, or a window over rows and columns."""
    blocks: str | None = None
    """By default the quickstart's for a bundled model, else `odd`."""
    data: Path | None = None
    """Folder of latents, or of images for a model of pixels. If omitted, a model that is asked by prompts makes its own latents; for
    others `latents`."""
    prompts: Path | None = None
    """For a model that is asked by them: a file of prompts (.txt, .jsonl), which the pipeline's text encoders read, or a folder of
    encoded ones. If omitted `prompts.txt` for a pipeline, and `prompts` for a transformer alone."""


def write_recipes(path: Path, start: Start) -> tuple[Path, Path]:
    """Write a recipe, and a short one beside it, which are valid; returns both files. Neither may exist.

    Raises:
        RecipeError: a file is there already, its name does not end in .yaml, the operator or the blocks cannot be read, or
            the model is already grafted.
        PlanError: the model has not got these blocks, or does not take this operator.
        CheckpointError, HostError: there is no model, or it is of no known host.
        DataError: the file of prompts is there, and cannot be read or holds none.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise RecipeError(f"a recipe's file ends in .yaml, found {path}")
    smoke = path.with_name(f"{path.stem}-smoke{path.suffix}")
    if there := [str(file) for file in (path, smoke) if file.exists()]:
        raise RecipeError(f"{' and '.join(there)}: there already; name another file, or remove it")
    folder, host, model = _open(start.source)
    for phases in (_WITH_ADAPTERS, _ALONE):
        text = _recipe(path, start, folder, host, model, phases)
        settings = _settings(text)
        chosen = resolve(model, parse_recipe(settings, source=f"the recipe for {path}").edits)
        if any(site.role != "block" and site not in chosen for site in host.sites(model)):
            break  # else no site keeps linear layers that an adapter could stand at
    short = _SMOKE.format(
        smoke=smoke.name,
        base=path.name,
        name=path.stem,
        cooldown=", cooldown_steps: 0" if "cooldown_steps" in text else "",
        # one phase in the place of several has nothing of them by itself
        how=f", {phases[-1][1]}, {_how(host, model, start)}"
        if isinstance(settings["finetune"], list)
        else "",
    )
    short += _SMOKE_LATENTS if "{name: teacher" in text else ""
    short += _SMOKE_SAMPLES if "sample" in settings else ""
    for file, content in ((path, text), (smoke, short)):
        write_bytes(file, content.encode())
    return path, smoke


def _settings(text: str) -> JsonObject:
    settings = parse_yaml(text, name="the recipe", error=RecipeError)
    assert isinstance(settings, dict)
    return settings


def missing_parts(path: Path) -> list[str]:
    """Files and folders that a first recipe names and that have to be made, each with what makes it."""
    recipe = load_recipe(path)
    is_of_images = isinstance(recipe.data, ImageFolderConfig)
    ways = {
        ("data", "folder"): "images, a folder for each class"
        if is_of_images
        else "`grafting data latents` encodes images",
        (
            "conditions",
            "folder",
        ): "`grafting data prompts` encodes a file of prompts, see docs/text-to-image.md",
        ("conditions", "file"): "a prompt a line, some hundreds, like those that the model will be asked",
    }
    named = {keys: getattr(getattr(recipe, keys[0]), keys[1], None) for keys in ways}
    missing = [f"{part}: {ways[keys]}" for keys, part in named.items() if part and not Path(part).exists()]
    uses_lora = any(phase.lora for phase in recipe.phases)
    return [
        *missing,
        *([f"peft, for `lora`: {install_line('peft')}"] if uses_lora and not can_adapt() else []),
    ]


def _open(source: str) -> tuple[Path | None, Host[Any], nn.Module]:
    """The folder of a model (None of a bundled one), its host, and the model without values."""
    folder = find_model(source)
    config = read_config(folder)
    if isinstance(graft := config.get("grafting"), dict):
        base = graft.get("base")
        made_of = f", {base.get('id')}" if isinstance(base, dict) else ""
        raise RecipeError(
            f"{source} is already grafted, and a recipe starts from a model without a plan: name the one that it was made of{made_of}"
        )
    name = str(config.get("_class_name"))
    host = next((host for host in hosts().values() if host.class_name == name), None)
    if host is None:
        known = ", ".join(host.class_name for host in hosts().values())
        raise HostError(
            f"{folder} holds a {name}, and a recipe needs a known host: {known}; `grafting convert` makes one of diffusers' DiT, and "
            "`grafting sites --trace` describes any other class"
        )
    settings = {key: value for key, value in config.items() if key[0] != "_"}
    return (
        (None if bundled_model_folder(source) else folder),
        host,
        skeleton(FreshModel(host=host.name, config=settings)),
    )


def _recipe(
    path: Path, start: Start, folder: Path | None, host: Host[Any], model: nn.Module, phases: "_Phases"
) -> str:
    def near(target: Path) -> str:
        """A path as the recipe's file says it."""
        relative = os.path.relpath(target, path.parent)
        return relative if relative.startswith("../") else f"./{relative}"

    quickstart = _BUNDLED.get(start.source)
    operator, blocks = start.operator, start.blocks
    if operator is None:
        operator = quickstart.operator if quickstart else _first_operator(host, model)
    if blocks is None:
        blocks = quickstart.blocks if quickstart else "odd"
    role, operator = _edit(operator, host, model)
    lines = [
        f"# Check it, then run it; a run resumes where it was stopped.\n#     grafting check {path.name}\n#     grafting run {path.name}",
        f"name: {path.stem}",
        f"source: {start.source if folder is None else near(_pipeline_of(folder) or folder)}",
        f"plan:\n  - {{role: {role}, blocks: {blocks!r}, operator: {operator}}}",
    ]
    if quickstart:
        return "\n".join([*lines, quickstart.rest + _rows(*quickstart.rows)]) + "\n"
    assert folder is not None  # bundled models have quickstarts
    pipeline = _pipeline_of(folder)
    asked_by_prompts = host.conditions(model) is None
    if asked_by_prompts:
        prompts = start.prompts or Path("prompts.txt" if pipeline else "prompts")
        lines.append(f"conditions: {_conditions(prompts, near, pipeline)}")
    shape, data = host.shape(model), start.data
    if asked_by_prompts and data is None:
        size = f", shape: {list(shape)}" if len(shape) == 4 else ""
        lines.append(
            f"# no data: the model makes latents for these prompts first, and is trained on them\n"
            f"data: {{name: teacher, num_images: 1000, sampler: {_sampler(host, model)}, steps: 20{size}}}"
        )
    else:
        kind = f"image-folder, size: {shape[-1]}, channels: {shape[0]}" if makes_pixels(shape) else "latents"
        lines.append(f"data: {{name: {kind}, folder: {near(data or Path('latents'))}}}")
    lines += _short_stages(host, model, start, phases) if asked_by_prompts else _PUBLISHED_STAGES
    vae = None if pipeline is None or not (pipeline / "vae").is_dir() else near(pipeline / "vae")
    lines += [*_samples(host, model, vae=vae), _rows(PRETRAINED, FINETUNED)]
    return "\n".join(lines) + "\n"


def _pipeline_of(folder: Path) -> Path | None:
    """The pipeline's folder that a transformer's stands in."""
    return folder.parent if (folder.parent / PIPELINE_NAME).is_file() else None


def _conditions(prompts: Path, near: Callable[[Path], str], pipeline: Path | None) -> str:
    if prompts.suffix not in (".txt", ".jsonl"):
        return f"{{name: prompts, folder: {near(prompts)}}}"
    if pipeline is None:
        raise RecipeError(
            f"{prompts} is a file of prompts, which a pipeline's text encoders read, and the source is a transformer alone: name the "
            "pipeline's folder, or a folder of encoded prompts (`grafting data prompts`)"
        )
    if prompts.is_file():
        read_words(prompts)  # raises where it holds none
    return f"{{name: words, file: {near(prompts)}}}"


def _first_operator(host: Host[Any], model: nn.Module) -> str:
    takes_mixers = any(site.module for site in host.sites(model) if site.role == "attention")
    return "hyena-x" if takes_mixers else "window-2d"


def _edit(operator: str, host: Host[Any], model: nn.Module) -> tuple[str, str]:
    """The role that an operator replaces, its first, and the operator, as a recipe writes them.

    Faults of its settings are found when the recipe is read. An MLP of no stated width gets three quarters of the host's neurons,
    as the paper's r = 3 of 4: with all of them it would be the host's.
    """
    value = parse_yaml(operator, name="--operator", error=RecipeError)
    try:
        role = sorted(parse_operator(value.get("name") if isinstance(value, dict) else value).roles)[0]
    except ValueError as error:
        raise RecipeError(str(error)) from error
    replaced = next((site for site in host.sites(model) if site.role == role), None)
    if value in ("mlp", {"name": "mlp"}) and replaced:
        operator = f"{{name: mlp, ratio: {0.75 * replaced.hidden_dim / replaced.dim:g}}}"
    return role, operator


_PUBLISHED_STAGES = """\
# operators start from a fit in closed form: docs/initialisation.md
calibrate: {}
# as published for DiT-XL/2 (arXiv:2506.05340, section 5); other models may want other rates
distill: {steps: 25000, batch_size: 64, lr: 1.0e-4}
finetune: {steps: 50000, batch_size: 256, lr: 1.0e-4, warmup_steps: 1000, ema_decay: 0.9999}
save_every: 1000""".splitlines()
# steps of each phase, and what it trains
_Phases = tuple[tuple[int, str], ...]
_WITH_ADAPTERS: _Phases = ((500, "trainable: new"), (2000, "trainable: [new, {lora: {rank: 16}}]"))
_ALONE: _Phases = ((2500, "trainable: new"),)
_HELD = "precision: bf16, frozen: bf16"
_LARGE = 1e9  # parameters, from which on memory is thought of


def _is_large(model: nn.Module) -> bool:
    return sum(p.numel() for p in model.parameters()) > _LARGE


def _how(host: Host[Any], model: nn.Module, start: Start) -> str:
    """The objective of stage 2, and how its memory is spared."""
    # a distilled model's own loss would break it; latents of the model's own making are no data to learn from
    own = start.data is not None and not host.distilled
    objective = f"objective: {'{process: 1, output: 1}' if own else 'output'}"
    return objective + (f", {_HELD}, gradient_checkpointing: true" if _is_large(model) else "")


def _short_stages(host: Host[Any], model: nn.Module, start: Start, phases: _Phases) -> Iterator[str]:
    batch, held = 8, ""
    if _is_large(model):
        batch, held = 2 if len(host.shape(model)) == 3 else 1, f", {_HELD}"
        yield "# weights that are not trained are held in half precision; `grafting run --dry-run --device h100` says what a card has to hold"
    yield "# operators start from a fit in closed form: docs/initialisation.md"
    yield "calibrate: {}"
    yield f"distill: {{steps: 200, batch_size: {batch}, lr: 5.0e-4, cooldown_steps: 100, holdout: 64{held}}}"
    yield f"# the new operators{', alone, then with adapters' * (len(phases) > 1)}; longer is better: docs/text-to-image.md, section 5"
    yield "finetune:"
    for steps, trained in phases:
        how = f"{trained}, {_how(host, model, start)}"
        yield f"  - {{steps: {steps}, batch_size: {batch}, warmup_steps: 50, {how}}}"
    yield "save_every: 15 min"


def _rows(*names: RowName) -> str:
    others = ", ".join(name for name in ROW_TITLES if name not in names)
    return f"# images are drawn of each of these; there are also {others}\nrows: [{', '.join(names)}]"


def _sampler(host: Host[Any], model: nn.Module) -> str:
    return "dpm-solver++" if isinstance(host.process(model), Diffusion) else "euler"


def _samples(host: Host[Any], model: nn.Module, *, vae: str | None) -> Iterator[str]:
    shape = host.shape(model)
    if not makes_pixels(shape):
        if vae is None or len(shape) == 4:
            yield "# to draw images, name an autoencoder: `vae: {source: ...}`, and `sample: {steps: 20, num_images: 1000}`"
            return
        yield f"vae: {{source: {vae}}}"
    guidance = 1.0 if host.distilled else 4.5 if host.conditions(model) is None else 1.5
    yield f"sample: {{sampler: {_sampler(host, model)}, steps: 20, cfg_scale: {guidance}, num_images: 1000}}"
