"""Write the pages of docs/ that come from the code: operators with their settings and costs, and the known hosts.

    python tools/make_pages.py [docs]

`tests/test_docs.py` fails when a page is not what this writes.
"""

import inspect
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grafting.cli.about import setting_rows
from grafting.contract import Grid, KernelConfig, OperatorConfig, Role, Site
from grafting.diffusion import FlowMatching
from grafting.editing.plan import Drop, Merge, Plan
from grafting.errors import PlanError
from grafting.hosts import Host, SdpaHost, hosts
from grafting.operators import PRESETS, operator_configs, parse_operator

# the sizes of DiT-XL/2: what costs are said of
_WIDTH, _HEADS, _RATIO = 1152, 16, 4
_GRIDS = (Grid(16, 16), Grid(64, 64))


def operators_page() -> str:
    configs = operator_configs()
    parts = [
        "# Operators\n\nThis page is written from the code by `python tools/make_pages.py`. `grafting operators NAME` shows the same.",
        "Costs are counted at the sizes of DiT-XL/2 (width 1,152, 16 heads), with default settings, over those of the "
        "module that is replaced: the whole attention, projections included, or an MLP of ratio 4. They are not times: "
        "`grafting cost RECIPE --measure` measures these on your machine.",
        _table(
            ["operator", "kind", "FLOPs, 256 tokens", "FLOPs, 4,096 tokens", "parameters"],
            [[f"[`{name}`](#{name})", _kind(config), *_costs(config)] for name, config in configs.items()],
        ),
        "A kernel stands inside the host's attention; a mixer stands in place of the whole attention or MLP. Attention mixers do not fit "
        "hosts of two streams, image and text, such as SD3 and the double blocks of FLUX: put kernels there.",
        *(_operator(name, config) for name, config in configs.items()),
        "## Presets\n\nThe designs of arXiv:2506.05340, by name. A preset takes no settings.",
        _table(
            ["preset", "stands for"],
            [[f"`{n}`", f"`{_inline(settings)}`"] for n, settings in PRESETS.items()],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _operator(name: str, config: type[OperatorConfig]) -> str:
    module = type(_defaults(config).build(_site(config, _GRIDS[0])))
    sections = [f"## {name}", _prose(config), *([_prose(module)] if _prose(module) != _prose(config) else [])]
    rows = [[f"`{key}`", *(_cell(text) for text in row)] for key, *row in setting_rows(config)]
    return "\n\n".join([*sections, _table(["setting", "type", "default", "what it is"], rows)])


def _prose(documented: type) -> str:
    """A docstring without its arguments, which are settings here."""
    paragraphs = inspect.cleandoc(documented.__doc__ or "").split("\n\n")
    kept = [p for p in paragraphs if not p.startswith(("Args:", "Raises:", "Returns:"))]
    return "\n\n".join(_section(paragraph) for paragraph in kept)


def _section(paragraph: str) -> str:
    head, *rest = paragraph.splitlines()
    if head not in ("Shapes:", "Source:", "Definition:"):
        return paragraph
    return f"*{head}* " + " ".join(line.strip() for line in rest)


def _costs(config: type[OperatorConfig]) -> list[str]:
    operator, role = _defaults(config), _role(config)
    host = parse_operator("mha" if role == "attention" else {"name": "mlp", "ratio": _RATIO})
    flops = [_flops(operator, grid) / _flops(host, grid) for grid in _GRIDS]
    return [f"{value:.2f}x" for value in (*flops, _parameters(operator) / _parameters(host))]


def _flops(operator: OperatorConfig, grid: Grid) -> int:
    site = _site(type(operator), grid)
    return operator.mixing_flops(site) + operator.projection_flops(site)


def _parameters(operator: OperatorConfig) -> int:
    """Of the place: a kernel keeps the host's projections, four linears with biases."""
    with torch.device("meta"):
        built = operator.build(_site(type(operator), _GRIDS[0]))
    own = sum(p.numel() for p in built.parameters())
    return own + (4 * _WIDTH * (_WIDTH + 1) if isinstance(operator, KernelConfig) else 0)


def _site(config: type[OperatorConfig], grid: Grid) -> Site:
    site = Site(role=_role(config), block=0, path="", dim=_WIDTH, grid=grid)
    is_attention = site.role == "attention"
    return replace(site, **({"num_heads": _HEADS} if is_attention else {"hidden_dim": _RATIO * _WIDTH}))


def _role(config: type[OperatorConfig]) -> Role:
    return "attention" if "attention" in config.roles else "mlp"


def _kind(config: type[OperatorConfig]) -> str:
    return "kernel" if issubclass(config, KernelConfig) else "mixer"


def _defaults(config: type[OperatorConfig]) -> OperatorConfig:
    return parse_operator(config.model_fields["name"].default)


def hosts_page() -> str:
    rows = [
        [
            f"`{name}`",
            f"`{host.class_name}`",
            ", ".join(_operators_of(host)),
            ", ".join(_depth_of(host)) or "none",
            _process_of(host) + (", distilled" if host.distilled else ""),
            "classes" if host.conditions(host.tiny()) else "prompts",
        ]
        for name, host in hosts().items()
    ]
    headings = ["host", "model class", "operators", "depth", "process", "asked by"]
    return (
        "\n\n".join(
            [
                "# Known hosts\n\nThis page is written from the code by `python tools/make_pages.py`.",
                "These families have a file of their own in `src/grafting/hosts/`: `grafting.load`, recipes and pipelines know "
                "them by class. Any other transformer whose attention calls `scaled_dot_product_attention` is described by a "
                "spec: [extending](extending.md#add-a-host).",
                _table(headings, rows),
                "In stage 2, *distilled* hosts follow the teacher's output, unless a recipe names the process's loss. A host that is asked by prompts takes a folder of encoded "
                "ones: [text to image](text-to-image.md). Videos are not decoded yet. Only `dit` and `pixart` have a "
                "testbed that measures their images; the others are tested on tiny random models.",
                *(f"## {name}\n\n{_about(host)}" for name, host in hosts().items()),
            ]
        )
        + "\n"
    )


def _about(host: Host[Any]) -> str:
    return host.spec.about if isinstance(host, SdpaHost) else _prose(type(host))


def _operators_of(host: Host[Any]) -> Iterable[str]:
    yield "kernels"
    replaceable = {site.role for site in host.sites(host.tiny()) if site.module}
    if "attention" in replaceable:
        yield "mixers"
    if "mlp" in replaceable:
        yield "MLPs"


def _depth_of(host: Host[Any]) -> Iterable[str]:
    model: nn.Module = host.tiny()
    for name, edit in {"merge": Merge(blocks="0-1"), "drop": Drop(blocks=(1,))}.items():
        try:
            Plan(edits=(edit,)).resolve(host.sites(model), blocks=host.blocks(model), host=host.name)
        except PlanError:
            continue
        yield name


def _process_of(host: Host[Any]) -> str:
    if isinstance(host, SdpaHost) and host.spec.process is None:
        return "none of grafting's"
    return "flow" if isinstance(host.process(host.tiny()), FlowMatching) else "predicted noise"


def _inline(settings: dict[str, Any]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in settings.items()) + "}"


def _table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _cell(text: object) -> str:
    return " ".join(str(text).replace("|", "\\|").split())


PAGES = {"operators.md": operators_page, "known-hosts.md": hosts_page}

if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs")
    for name, make in PAGES.items():
        (folder / name).write_text(make())
        print(folder / name)
