"""Published DiT weights, recognised by what they hold: which tensors each block has, and their shapes, never by a file's name.

Read are facebookresearch/DiT files, the grafted models of arXiv:2506.05340 (the same layout, with operators in some
blocks), diffusers folders of `DiTTransformer2DModel` (`diffusers.py`) and pipelines; written are folders that `load` opens.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field
from torch import Tensor, nn

from ..contract import Kwargs
from ..editing.plan import Plan, Replace
from ..editing.surgery import graft
from ..errors import CheckpointError, HostError, PlanError, listed
from ..hosts import hosts, unknown_class
from ..machine.files import sha256_of
from ..machine.reading import JsonObject, cut, read_json
from ..machine.settings import Settings
from ..models.dit import DIT_PRESETS, DiT
from .checkpoints import state_dict_of
from .diffusers import diffusers_folder, read_diffusers
from .folder import load_model, save_model
from .locate import CONFIG_NAME, find_folder, model_in
from .portable import PREFIX, Base
from .tensors import filled, load_tensors, read_pickle

Shapes = Mapping[str, tuple[int, ...]]

# what the published grafts, all of DiT-XL/2, have and their tensors do not show
PUBLISHED_WIDTH = 1152
PUBLISHED_WINDOW = 4
PUBLISHED_NUM_CLASSES = 1000

# what is downloaded of a repository: a torch file, or diffusers' transformer alone
PUBLISHED_FILES = ("*.pt", "config.json", "model_index.json", "diffusion_pytorch_model*", "transformer/*")

_PUBLISHED_HEADS = {preset["hidden_size"]: preset["num_heads"] for preset in DIT_PRESETS.values()}
_MODULES: dict[str, Literal["attention", "mlp"]] = {"attn": "attention", "mlp": "mlp"}
_PLACE = re.compile(r"blocks\.([0-9]{1,12})\.(attn|mlp)\.(.+)")


class PublishedFacts(Settings):
    """Facts that tensors do not reveal. Those left out are known for published widths, and required for others."""

    num_heads: int | None = Field(default=None, ge=1)
    """Attention heads; known for the widths of DiT-S, -B, -L and -XL."""
    num_classes: int | None = Field(default=None, ge=1)
    """Classes without the null label; known for ImageNet's table of 1001 labels."""
    window: int | None = Field(default=None, ge=1)
    """Tokens that sliding-window attention sees on each side; 4 in the published grafts of width 1152."""
    mlp_ratio: float = Field(default=4.0, gt=0)
    """Hidden width over width of the base's own MLP: a block of another ratio is a graft."""
    geometry: Literal["causal", "centred"] = "causal"
    """Position of the taps of Hyena's filters; causal in the published grafts."""
    base: Base | None = None
    """The pretrained model that a graft was made from, for the record."""


class Published(NamedTuple):
    """A model read from a published format."""

    model: nn.Module
    plan: Plan
    origin: JsonObject
    """Provenance, for the folder's config."""


@dataclass(frozen=True)
class Layout:
    """Published form of a module: its tensors, their names in a grafted model, and how they show its settings.

    `settings` are those of the operator's config, or None where the module is the host's own.
    """

    role: Literal["attention", "mlp"]
    operator: str
    tensors: Mapping[str, str]
    settings: Callable[["Shapes", PublishedFacts], JsonObject | None]


def convert_weights(
    source: str | Path,
    folder: str | Path,
    facts: PublishedFacts | None = None,
    *,
    revision: str | None = None,
) -> Published:
    """Write published weights as a folder that `load` opens; returns what was read.

    Args:
        source: a file, a folder, or `owner/name` on the Hub.
        revision: branch, tag or commit on the Hub.

    Raises:
        CheckpointError: they are of no known layout; lists what was expected, what was found and which option to give.
    """
    folder = Path(folder)
    facts = facts or PublishedFacts()
    found = find_folder(source, revision=revision, patterns=PUBLISHED_FILES)
    model, plan, origin = read_published(found, facts)
    if not Path(source).exists():
        origin |= {"hub": str(source), "revision": found.name}
    save_model(folder, model, plan, base=facts.base, origin=origin)
    return Published(model, plan, origin)


def read_published(source: Path, facts: PublishedFacts) -> Published:
    """The model of published weights, in eval mode, its plan and its origin. Raises as `convert_weights`."""
    folder = diffusers_folder(source)
    if folder is not None:
        tensors, config, origin = read_diffusers(folder)
        plan, renamed = Plan(), tensors
    elif (component := model_in(source)) != source:
        model, plan = load_model(component)
        return Published(model, plan, {"format": f"diffusers {type(model).__name__}"})
    else:
        path = _weights_file(source)
        tensors, key = read_file(path)
        config, plan, renamed = recognise(tensors, facts, source=str(path))
        origin = {"format": "facebookresearch/DiT", "file": path.name, "key": key, "sha256": sha256_of(path)}

    def make() -> DiT:
        model = DiT(**config)
        graft(model, plan, inherit=False)
        return model

    try:
        model = filled(make, renamed, source=str(source))
    except (PlanError, ValueError) as error:
        raise CheckpointError(f"{source} was recognised as DiT {config}, which cannot be: {error}") from error
    return Published(model.eval(), plan, origin)


def read_file(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of a torch or safetensors file without a common prefix, and the key that they were under: `ema` first, or none.

    Raises:
        CheckpointError: there is no such file, it holds other objects than tensors, or no state dict.
    """
    content = load_tensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    return state_dict_of(content, source=path)


def recognise(
    tensors: Mapping[str, Tensor], facts: PublishedFacts, *, source: str
) -> tuple[Kwargs, Plan, dict[str, Tensor]]:
    """The arguments of `DiT`, the plan, and the tensors under the names of the grafted model. Raises as `convert_weights`."""
    config, faults = _sizes(tensors, facts, source=source)
    if facts.window is None and config["hidden_size"] == PUBLISHED_WIDTH:
        facts = facts.model_copy(update={"window": PUBLISHED_WINDOW})
    modules, renamed = _by_module(tensors, config["depth"])
    unknown, chosen = defaultdict(list), defaultdict(list)
    for (block, module), own in modules.items():
        layout = next(
            (f for f in LAYOUTS if f.role == _MODULES[module] and f.tensors.keys() == own.keys()), None
        )
        if layout is None:
            unknown[module, tuple(sorted(own))].append(block)
            continue
        settings = layout.settings({name: tuple(t.shape) for name, t in own.items()}, facts)
        names = {name: name for name in own} if settings is None else layout.tensors
        renamed |= {f"blocks.{block}.{module}.{names[name]}": t for name, t in own.items()}
        if settings is not None:
            chosen[layout.role, json.dumps({"name": layout.operator, **settings})].append(block)
    faults += [_unknown_fault(module, names, blocks) for (module, names), blocks in unknown.items()]
    faults += [
        f"blocks {_written(blocks)} have sliding-window attention, whose window is not in its tensors: give --window "
        f"({PUBLISHED_WINDOW} in the published grafts)"
        for (_, operator), blocks in chosen.items()
        if json.loads(operator).get("window", 1) is None
    ]
    if faults:
        head = f"{source} cannot be converted: {len(faults)} fault{'s' * (len(faults) > 1)}"
        raise CheckpointError(listed(head, faults))
    edits = [
        Replace(role=role, blocks=tuple(blocks), operator=json.loads(operator))
        for (role, operator), blocks in chosen.items()
    ]
    return config, Plan(edits=tuple(edits)), renamed


def _by_module(
    tensors: Mapping[str, Tensor], depth: int
) -> tuple[dict[tuple[int, str], dict[str, Tensor]], dict[str, Tensor]]:
    """The tensors of each block's attention and MLP, by (block, module), and all others."""
    modules: dict[tuple[int, str], dict[str, Tensor]] = {
        (i, module): {} for i in range(depth) for module in _MODULES
    }
    others = {}
    for name, tensor in tensors.items():
        if match := _PLACE.fullmatch(name):
            modules[int(match[1]), match[2]][match[3]] = tensor
        else:
            others[name] = tensor
    return modules, others


def _sizes(tensors: Mapping[str, Tensor], facts: PublishedFacts, *, source: str) -> tuple[Kwargs, list[str]]:
    """The arguments of `DiT` as its outer tensors show them, and what is wrong with them; a number that is not known is 0."""
    ranks = {
        "x_embedder.proj.weight": 4,
        "pos_embed": 3,
        "y_embedder.embedding_table.weight": 2,
        "final_layer.linear.weight": 2,
    }
    shapes = {name: tuple(tensors[name].shape) for name in ranks if name in tensors}
    blocks = {int(match[1]) for match in map(_PLACE.fullmatch, tensors) if match}
    if blocks and max(blocks) >= len(blocks):
        raise CheckpointError(
            f"{source} is not a DiT: it has block {max(blocks)}, and tensors of {len(blocks)} blocks alone"
        )
    if {name: len(shape) for name, shape in shapes.items()} != ranks or not blocks:
        raise CheckpointError(
            f"{source} is not a DiT: expected {', '.join(ranks)} and blocks.0.attn..., "
            f"found {len(tensors)} tensors: {', '.join(list(tensors)[:8])} ..."
        )
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    num_labels = shapes["y_embedder.embedding_table.weight"][0]
    out_channels = shapes["final_layer.linear.weight"][0] / patch**2
    side = math.isqrt(shapes["pos_embed"][1])
    num_heads = facts.num_heads or _PUBLISHED_HEADS.get(width)
    num_classes = facts.num_classes or {PUBLISHED_NUM_CLASSES + 1: PUBLISHED_NUM_CLASSES}.get(num_labels)
    faults = []
    if num_heads is None:
        published = ", ".join(f"{w}: {h}" for w, h in _PUBLISHED_HEADS.items())
        faults.append(f"width {width} is not a published width ({published} heads): give --num-heads")
    elif width % num_heads:
        faults.append(f"width {width} is not a multiple of {num_heads} heads: give another --num-heads")
    if num_classes is None:
        faults.append(
            f"the table of {num_labels} labels may or may not hold a null label: give --num-classes "
            f"({num_labels - 1} if it does, {num_labels} if not)"
        )
    elif num_labels - num_classes not in (0, 1):
        faults.append(
            f"a table of {num_labels} labels is not that of {num_classes} classes: give another --num-classes"
        )
    if out_channels not in (channels, 2 * channels):
        faults.append(
            f"the head makes {out_channels:g} channels, expected {channels}, or {2 * channels} with a variance"
        )
    if side**2 != shapes["pos_embed"][1]:
        faults.append(f"pos_embed has {shapes['pos_embed'][1]} tokens, expected a square number")
    config: Kwargs = {
        "input_size": side * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": 1 + max(blocks),
        "num_heads": num_heads or 0,
        "mlp_ratio": facts.mlp_ratio,
        "class_dropout_prob": 0.0 if num_labels == num_classes else 0.1,
        "num_classes": num_classes or 0,
        "learn_sigma": out_channels == 2 * channels,
    }
    return config, faults


def _linears(prefix: str, *names: str, **renamed: str) -> dict[str, str]:
    """Weights and biases of linears or filters, under a prefix, some by another name."""
    pairs = {**{name: name for name in names}, **renamed}
    return {f"{a}.{kind}": f"{prefix}{b}.{kind}" for a, b in pairs.items() for kind in ("weight", "bias")}


def _hyena(shapes: Shapes, facts: PublishedFacts) -> JsonObject:
    filters = (shapes[name] for name in ("short_filter.weight", "inner_filter.weight") if name in shapes)
    return {"kernel_size": next(filters)[-1], "geometry": facts.geometry, "init": "random"}


def _window(shapes: Shapes, facts: PublishedFacts) -> JsonObject:
    return {"window": facts.window, "projections": "random"}


def _mamba2(shapes: Shapes, facts: PublishedFacts) -> JsonObject:
    (width, inner), (heads,) = shapes["out_proj.weight"], shapes["D"]
    filtered, _, taps = shapes["conv1d.weight"]
    return {
        "expand": inner // width,
        "head_dim": inner // heads,
        "state_dim": (filtered - inner) // 2,
        "conv_size": taps,
        "direction": "causal",
        "init": "random",
    }


def _mlp(shapes: Shapes, facts: PublishedFacts) -> JsonObject | None:
    hidden, width = shapes["fc1.weight"]
    if hidden == int(facts.mlp_ratio * width):
        return None
    return {"ratio": _ratio(hidden, width), "init": "random"}


def _mlp_hyena(shapes: Shapes, facts: PublishedFacts) -> JsonObject:
    num_filters, _, taps = shapes["short_filter.weight"]
    return {
        "kernel_size": taps,
        "filters": "shared" if num_filters == 1 else "per-token",
        "init": "random",
    }


def _own(shapes: Shapes, facts: PublishedFacts) -> None:
    """The host's own module: no operator."""


def _ratio(hidden: int, width: int) -> float:
    """The ratio that, times width and rounded down, is this hidden width."""
    ratio = hidden / width
    return ratio if int(ratio * width) == hidden else math.nextafter(ratio, math.inf)


_MAMBA2 = (
    "in_proj.weight",
    "conv1d.weight",
    "conv1d.bias",
    "dt_bias",
    "A_log",
    "D",
    "norm.weight",
    "out_proj.weight",
)

LAYOUTS = (
    Layout("attention", "", _linears("", "qkv", "proj"), _own),
    Layout(
        "attention",
        "hyena-se",
        _linears("mixer.", "in_proj", "short_filter", "inner_filter", "out_proj"),
        _hyena,
    ),
    Layout("attention", "hyena-x", _linears("mixer.", "in_proj", "short_filter", "out_proj"), _hyena),
    Layout("attention", "hyena-y", _linears("mixer.", "in_proj", "inner_filter", "out_proj"), _hyena),
    Layout("attention", "window-1d", _linears("attention.", Wqkv="qkv", out_proj="proj"), _window),
    Layout("attention", "mamba2", {name: f"mixer.{name}" for name in _MAMBA2}, _mamba2),
    Layout("mlp", "mlp", _linears("mixer.", "fc1", "fc2"), _mlp),
    Layout("mlp", "mlp-hyena-x", _linears("mixer.", "in_proj", "short_filter", "out_proj"), _mlp_hyena),
)
"""Every published layout: DiT's own modules, the paper's operators, flash-attn's MHA (SWA), and mamba_ssm's Mamba2."""


def _unknown_fault(module: str, names: tuple[str, ...], blocks: list[int]) -> str:
    known = "; ".join(
        f"{layout.operator or 'the host'}: {', '.join(layout.tensors)}"
        for layout in LAYOUTS
        if layout.role == _MODULES[module]
    )
    found = ", ".join(names) or "no tensors"
    return f"blocks {_written(blocks)}, {module}: found {found}\n    expected one of: {known}"


def _written(blocks: list[int]) -> str:
    return ", ".join(map(str, blocks))


def _weights_file(source: Path) -> Path:
    if not source.is_dir():
        return source
    found = [path for path in sorted(source.iterdir()) if path.suffix in (".pt", ".pth", ".safetensors")]
    if len(found) != 1:
        listed = ", ".join(path.name for path in found) or "none"
        raise CheckpointError(
            f"{source} should hold one weights file (.pt, .pth, .safetensors); found {listed}"
        )
    config = source / CONFIG_NAME
    name = read_json(config, JsonObject).get("_class_name") if config.is_file() else None
    if name is not None:
        if not any(f"{name}".removeprefix(PREFIX) == host.class_name for host in hosts().values()):
            raise HostError(f"{source} holds a {cut(str(name))}; {unknown_class(cut(str(name)))}")
        raise CheckpointError(
            f"{source} is a model folder already, not published weights; `--to diffusers` writes it in diffusers' form"
        )
    return found[0]
