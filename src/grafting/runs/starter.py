"""A first recipe for a model at hand, and a short one that shows in a minute that everything fits together.

Lengths and rates are those of the quickstarts for the bundled models, and the published ones of arXiv:2506.05340 for any other model.
Written as text, because a person goes on from here: each choice has its reason beside it.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ..data import ImageFolderConfig
from ..data.bundled import bundled_model_folder
from ..diffusion import Diffusion
from ..editing.surgery import resolve
from ..errors import HostError, RecipeError
from ..hosts import Host, hosts
from ..latents.decoding import makes_pixels
from ..machine.files import write_bytes
from ..machine.reading import JsonObject, parse_yaml
from ..operators import parse_operator
from ..weights.folder import read_config
from ..weights.locate import find_model
from .file import load_recipe, parse_recipe
from .job import skeleton
from .recipe import FreshModel


class _Quickstart(NamedTuple):
    """What a bundled model's quickstart edits, and the rest of its recipe."""

    operator: str
    blocks: str
    rest: str


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
rows: [pretrained, distilled, finetuned]
""",
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
    ),
}
_SMOKE = """\
# A minute: two steps of each stage, few images. Its figures mean nothing.
#     grafting run {smoke}
base: {base}
name: {name}-smoke
calibrate: {{samples: 4, batch_size: 4}}
distill: {{steps: 2, batch_size: 4, holdout: 4{cooldown}}}
finetune: {{steps: 2, batch_size: 4, warmup_steps: 0{cooldown}}}
"""
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
    data: Path = Path("latents")
    """Folder of latents, or of images for a model of pixels."""
    prompts: Path = Path("prompts")
    """Folder of encoded prompts, for a model that is asked by them."""


def write_recipes(path: Path, start: Start) -> tuple[Path, Path]:
    """Write a recipe, and a short one beside it, which are valid; returns both files. Neither may exist.

    Raises:
        RecipeError: a file is there already, its name does not end in .yaml, the operator or the blocks cannot be read, or
            the model is already grafted.
        PlanError: the model has not got these blocks, or does not take this operator.
        CheckpointError, HostError: there is no model, or it is of no known host.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise RecipeError(f"a recipe's file ends in .yaml, found {path}")
    smoke = path.with_name(f"{path.stem}-smoke{path.suffix}")
    if there := [str(file) for file in (path, smoke) if file.exists()]:
        raise RecipeError(f"{' and '.join(there)}: there already; name another file, or remove it")
    folder, host, model = _open(start.source)
    text = _recipe(path, start, folder, host, model)
    cooldown = ", cooldown_steps: 0" if start.source in _BUNDLED else ""
    short = _SMOKE.format(smoke=smoke.name, base=path.name, name=path.stem, cooldown=cooldown)
    short += _SMOKE_SAMPLES if "\nsample:" in text else ""
    resolve(model, parse_recipe(_settings(text), source=f"the recipe for {path}").edits)
    for file, content in ((path, text), (smoke, short)):
        write_bytes(file, content.encode())
    return path, smoke


def _settings(text: str) -> JsonObject:
    settings = parse_yaml(text, name="the recipe", error=RecipeError)
    assert isinstance(settings, dict)
    return settings


def missing_parts(path: Path) -> list[str]:
    """Folders that a first recipe names and that have to be made, each with what makes it."""
    recipe = load_recipe(path)
    is_of_images = isinstance(recipe.data, ImageFolderConfig)
    ways = {
        "data": "images, a folder for each class"
        if is_of_images
        else "`grafting data latents` encodes images",
        "conditions": "`grafting data prompts` encodes a file of prompts, see docs/text-to-image.md",
    }
    folders = {key: getattr(getattr(recipe, key), "folder", None) for key in ways}
    return [
        f"{folder}: {ways[key]}" for key, folder in folders.items() if folder and not Path(folder).exists()
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


def _recipe(path: Path, start: Start, folder: Path | None, host: Host[Any], model: nn.Module) -> str:
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
        f"source: {start.source if folder is None else near(folder)}",
        f"plan:\n  - {{role: {role}, blocks: {blocks!r}, operator: {operator}}}",
    ]
    if quickstart:
        return "\n".join([*lines, quickstart.rest])
    kind = "image-folder" if makes_pixels(host.shape(model)) else "latents"
    size = (
        f", size: {host.shape(model)[-1]}, channels: {host.shape(model)[0]}" if kind == "image-folder" else ""
    )
    lines.append(f"data: {{name: {kind}, folder: {near(start.data)}{size}}}")
    if host.conditions(model) is None:
        lines.append(f"conditions: {{name: prompts, folder: {near(start.prompts)}}}")
    vae = folder.parent / "vae" if folder is not None else None
    lines += _stages(host, model, vae=near(vae) if vae and vae.is_dir() else None, kind=kind)
    return "\n".join(lines) + "\n"


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


def _stages(host: Host[Any], model: nn.Module, *, vae: str | None, kind: str) -> Iterator[str]:
    yield "# operators start from a fit in closed form: docs/initialisation.md"
    yield "calibrate: {}"
    yield "# as published for DiT-XL/2 (arXiv:2506.05340, section 5); other models may want other rates"
    yield "distill: {steps: 25000, batch_size: 64, lr: 1.0e-4}"
    # a distilled model's own loss would break it
    follow = ", diffusion_weight: 0, output_weight: 1" if host.distilled else ""
    yield f"finetune: {{steps: 50000, batch_size: 256, lr: 1.0e-4, warmup_steps: 1000, ema_decay: 0.9999{follow}}}"
    yield "save_every: 1000"
    is_video = len(host.shape(model)) == 4
    if kind == "latents" and (vae is None or is_video):
        yield "# to draw images, name an autoencoder: `vae: {source: ...}`, and `sample: {steps: 20, num_images: 1000}`"
        return
    if kind == "latents":
        yield f"vae: {{source: {vae}}}"
    sampler = "dpm-solver++" if isinstance(host.process(model), Diffusion) else "euler"
    guidance = 1.0 if host.distilled else 4.5 if host.conditions(model) is None else 1.5
    yield f"sample: {{sampler: {sampler}, steps: 20, cfg_scale: {guidance}, num_images: 1000}}"
