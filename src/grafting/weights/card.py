"""The card of a grafted model's folder, `README.md`: its plan, base, recipe and figures, and how to load it.

The card is made from what the folder holds (`config.json`, `metrics.json`, `recipe.yaml`) and what it is handed, and says
nothing that is not recorded.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..machine.reading import JsonObject, read_json, read_text
from ..words import FIGURES, Row, fenced, in_markdown, markdown_table

CARD_NAME = "README.md"


def card_of(
    folder: Path, config: Mapping[str, Any], *, metrics: Sequence[Mapping[str, Any]] = (), recipe: str = ""
) -> str:
    """The card of a folder whose config this is, as Markdown. `metrics` and `recipe` are for a folder without its own."""
    return model_card(
        config,
        name=folder.parent.name if folder.name == "model" else folder.name,
        metrics=rows_of(folder) or metrics,
        recipe=recipe_of(folder) or recipe,
    )


def model_card(
    config: Mapping[str, Any], *, name: str, metrics: Sequence[Mapping[str, Any]] = (), recipe: str = ""
) -> str:
    """The card as Markdown, with the header that the Hub reads.

    Args:
        config: of the folder; its key `grafting` holds plan and base.
        name: the card's title.
        metrics: rows of figures, each with a name and the protocol that they hold under, as a run writes them.
        recipe: the run's recipe, as YAML.
    """
    grafting = config["grafting"]
    sections = [
        _header(grafting),
        f"# {in_markdown(name)}\n\nA `{in_markdown(config['_class_name'])}`: a pretrained diffusion transformer, edited "
        "with [grafting](https://arxiv.org/abs/2506.05340).",
        f"## Plan\n\n{_plan(grafting)}",
        f"## Base\n\n{_base(grafting)}",
        f"## Load\n\n{_usage(grafting)}",
        f"## Figures\n\n{_metrics(metrics)}" if metrics else "",
        f"## Recipe\n\n{fenced(recipe, 'yaml')}" if recipe else "",
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def rows_of(folder: Path) -> list[Row]:
    """The rows of figures in a folder; none if it has none."""
    path = folder / "metrics.json"
    return read_json(path, list[Row], kind="a list of rows, each with a name") if path.is_file() else []


def recipe_of(folder: Path) -> str:
    """The recipe in a folder, as YAML; empty if it has none."""
    path = folder / "recipe.yaml"
    return read_text(path) if path.is_file() else ""


def _header(grafting: Mapping[str, Any]) -> str:
    base = grafting.get("base") or {}
    header: JsonObject = {"library_name": "grafting", "tags": ["grafting", "diffusion", "transformer"]}
    if base.get("licence"):
        header["license"] = base["licence"].lower()
    if base.get("id", "").count("/") == 1 and not Path(base["id"]).exists():
        header["base_model"] = base["id"]
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---"


def _plan(grafting: Mapping[str, Any]) -> str:
    rows = []
    for edit in grafting["plan"]["edits"]:
        operator = edit.get("operator") or {}
        other = {k: v for k, v in edit.items() if k not in ("edit", "role", "blocks", "operator")}
        settings = {k: v for k, v in operator.items() if k != "name"} | other
        version = grafting.get("operator_versions", {}).get(operator.get("name"))
        rows.append(
            [
                edit["edit"],
                edit.get("role", ""),
                _written(edit.get("blocks", "")),
                operator.get("name", "") + (f" (version {version})" if version else ""),
                ", ".join(f"{k}: {_written(v)}" for k, v in settings.items() if v is not None),
            ]
        )
    return markdown_table(["edit", "role", "blocks, from 0", "operator", "settings"], rows)


def _base(grafting: Mapping[str, Any]) -> str:
    base = grafting.get("base")
    if base is None:
        return "Not recorded."
    facts = [base["id"], base["revision"] and f"revision `{base['revision']}`"]
    licence = (
        f"licence of its weights: {base['licence']}" if base["licence"] else "its licence is not recorded"
    )
    return in_markdown(", ".join(filter(None, [*facts, licence]))) + "."


def _usage(grafting: Mapping[str, Any]) -> str:
    code = '```python\nimport grafting\n\nmodel = grafting.load("this folder, or owner/name on the Hub")\n```'
    if "adapter_sha256" in grafting:
        code += (
            "\n\nA low-rank adapter (LoRA) lies beside the weights, in peft's format; `grafting.load` adds it to them. "
            "`PeftModel.from_pretrained` takes it too, on a model without it."
        )
    if "delta" in grafting:
        return f"{code}\n\nThis is a delta: its base is loaded too, and checked. `grafting merge` makes it whole."
    return (
        f"{code}\n\nA pipeline takes the model as it is: `Pipeline.from_pretrained(..., transformer=model)`."
    )


def _metrics(rows: Sequence[Mapping[str, Any]]) -> str:
    figures = [f for f in FIGURES.values() if f.judges and any(row.get(f.key) is not None for row in rows)]
    cells = [[str(row["name"]), *(_number(row.get(figure.key)) for figure in figures)] for row in rows]
    parts = [markdown_table(["model", *(figure.name(rows) for figure in figures)], cells)]
    protocols = {json.dumps(_protocol(row), sort_keys=True): _protocol(row) for row in rows}
    for protocol in protocols.values():
        measured = ", ".join(str(row["name"]) for row in rows if _protocol(row) == protocol)
        facts = [[key, _written(value)] for key, value in protocol.items()]
        parts.append(f"Measured so ({in_markdown(measured)}):\n\n{markdown_table(['protocol', ''], facts)}")
    return "\n\n".join(parts)


def _protocol(row: Mapping[str, Any]) -> JsonObject:
    return {key: value for key, value in (row.get("protocol") or {}).items() if key != "recorded"}


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}"


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
