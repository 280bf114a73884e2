"""Commands about grafting itself: its operators, the schema of its recipes, and what it can do on this machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import PlanError
from ._shared import Json, out, print_json
from .display import plain_table, say, show_diagnosis

if TYPE_CHECKING:
    from ..contract import OperatorConfig

app = typer.Typer()


@app.command()
def operators(
    name: Annotated[str | None, typer.Argument(help="Operator whose settings to show.")] = None,
    as_json: Json = False,
) -> None:
    """List operators and presets, or show one operator's settings.

    [dim]$ grafting operators hyena-x[/]
    """
    from ..operators import PRESETS, operator_configs, unknown_operator

    configs = operator_configs()
    if name is None:
        listed = [
            {"name": n, "roles": sorted(c.roles), "summary": (c.__doc__ or "").strip().partition("\n")[0]}
            for n, c in configs.items()
        ]
        if as_json:
            print_json(listed)
        else:
            rows = [[entry["name"], ", ".join(entry["roles"]), entry["summary"]] for entry in listed]
            out.print(plain_table(["operator", "replaces", "what it is"], rows))
            presets = [[preset, _settings_in_words(settings)] for preset, settings in PRESETS.items()]
            out.print(plain_table(["preset", "stands for"], presets))
        return
    if name in PRESETS:
        if as_json:
            print_json(PRESETS[name])
        else:
            say(out, f"{name}: {_settings_in_words(PRESETS[name])}")
        return
    if name not in configs:
        raise PlanError(unknown_operator(name))
    schema = configs[name].model_json_schema()
    if as_json:
        print_json(schema)
        return
    say(out, f"{name}: {schema['description']}\nReplaces: {', '.join(sorted(configs[name].roles))}\n")
    out.print(plain_table(["setting", "type", "default", "what it is"], setting_rows(configs[name])))


def setting_rows(config: "type[OperatorConfig]") -> list[list[str]]:
    """Settings of an operator, each with its type, default and meaning."""
    settings = config.model_json_schema()["properties"]
    return [
        [key, _type_of(s), str(s.get("default", "required")), s.get("description", "")]
        for key, s in settings.items()
        if key != "name"
    ]


def _settings_in_words(operator: dict[str, Any]) -> str:
    return ", ".join([operator["name"], *(f"{k}: {v}" for k, v in operator.items() if k != "name")])


def _type_of(setting: dict[str, Any]) -> str:
    """Describe a setting's type and bounds, from its JSON Schema."""
    if "enum" in setting:
        return " | ".join(map(str, setting["enum"]))
    if "anyOf" in setting:
        return " | ".join(_type_of(choice) for choice in setting["anyOf"])
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {setting[key]:g}" for key, sign in signs.items() if key in setting]
    return " ".join([setting.get("type", "any"), *bounds])


@app.command()
def schema(
    out_file: Annotated[
        Path | None, typer.Option("--out", help="Output file. [dim]Default: print to stdout.[/]")
    ] = None,
) -> None:
    """Write the JSON Schema of recipes, for editors.

    [dim]$ grafting schema --out recipe.schema.json[/]

    Then begin a recipe with [dim]# yaml-language-server: $schema=recipe.schema.json[/]
    """
    from ..machine.files import write_json

    if out_file is None:
        print_json(recipe_schema())
        return
    write_json(out_file, recipe_schema())
    say(out, f"Schema: {out_file}")


def recipe_schema() -> dict[str, Any]:
    """JSON Schema of a recipe file, which may also name a `base` recipe to inherit from."""
    from ..runs.recipe import Recipe

    schema = Recipe.model_json_schema()
    required = schema.pop("required")
    schema["properties"]["base"] = {
        "type": "string",
        "description": "A recipe file whose settings this one changes; relative to this file.",
    }
    return schema | {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "anyOf": [{"required": required}, {"required": ["base"]}],
    }


@app.command()
def doctor(
    full: Annotated[bool, typer.Option("--full", help="Also try torch.compile (can take a minute).")] = False,
    as_json: Json = False,
) -> None:
    """Check this machine: what it can do, and what is missing.

    [dim]$ grafting doctor[/]
    """
    from .doctor import examine

    found = examine(full=full)
    if as_json:
        print_json(found.to_json())
    else:
        show_diagnosis(out, found)
    if found.problems:
        raise typer.Exit(1)
