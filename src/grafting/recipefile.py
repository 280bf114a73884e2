"""Recipes as YAML files: read safely, merged with their base, and every fault listed with its path in the file."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from .errors import GraftingError, RecipeError
from .plan import fault_list
from .recipe import Recipe


def load_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file; `base:` names another file whose settings it changes.

    Raises:
        RecipeError: the file is missing, empty, not YAML, not a mapping, or has faults (all are listed).
    """
    settings = _read_yaml(path)
    try:
        return Recipe.model_validate(settings)
    except ValidationError as error:
        faults = [f"{_where(e['loc'])}: {_what(e)}" for e in error.errors()]
        raise RecipeError(fault_list(faults, str(path))) from error
    except GraftingError as error:
        raise RecipeError(f"{path}: {error}") from error


def _read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    if not path.is_file():
        raise RecipeError(f"no recipe file {path}")
    if path.resolve() in seen:
        raise RecipeError(f"{path} is its own base: {' -> '.join(map(str, seen))}")
    try:
        settings = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        found = "is empty" if settings is None else f"holds a {type(settings).__name__}"
        raise RecipeError(f"{path} {found}; a recipe is a mapping such as `name: my-run`")
    if "base" not in settings:
        return settings
    base = settings.pop("base")
    if not isinstance(base, str):
        raise RecipeError(f"{path}: base names one file, found {base!r}")
    return _merge(_read_yaml(path.parent / base, (*seen, path.resolve())), settings)


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes`; mappings merge, everything else is replaced."""
    nested = {
        key: _merge(base[key], value)
        for key, value in changes.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict)
    }
    return base | changes | nested


def _where(location: tuple[int | str, ...]) -> str:
    return ".".join(map(str, location)) or "recipe"


def _what(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "unknown key"
    return f"{error['msg'].removeprefix('Value error, ')}, found {error['input']!r}"
