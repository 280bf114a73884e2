"""Recipes as YAML files: read safely, merged with their base, and every fault listed with its place in the file.

Paths are made absolute as each file is read (`paths`), before it is merged with its base.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..editing.plan import fault_list
from ..errors import GraftingError, RecipeError, did_you_mean
from ..machine.reading import cut, fault_of, nearest_choice, read_yaml, shown
from .keys import known_keys
from .paths import WrittenPath, absolute, with_paths, written_in
from .recipe import Recipe

_MOST_BASES = 32

Changes = dict[str, Any]
"""Changes to settings; keys may be dotted paths: `plan.0.blocks`."""


def load_recipe(path: str | Path, *, changes: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe in a YAML file; `base:` names another file whose settings it changes.

    Args:
        changes: to its settings; keys may be dotted paths, such as `finetune.steps`. Paths among the values are relative to the
            working directory.

    Raises:
        RecipeError: the file is missing, empty, not YAML, not a mapping, or has faults (all are listed).
    """
    path = Path(path)
    settings = read_settings(path)
    if "grids" in settings:
        raise RecipeError(
            f"{path} holds many recipes: `grafting check {path}` checks them, `grafting sweep {path} --dry-run` says what they take, "
            f"and `grafting sweep {path}` runs them"
        )
    return parse_recipe(changed(settings, with_paths(changes or {})), source=str(path))


def parse_recipe(settings: dict[str, Any], *, source: str) -> Recipe:
    """The recipe that settings describe.

    Raises:
        RecipeError: they have faults (all are listed); `source` says where they stand.
    """
    try:
        recipe = Recipe.model_validate(settings)
    except ValidationError as error:
        raise RecipeError(fault_list(faults_of(error), source)) from error
    except GraftingError as error:
        raise RecipeError(f"{source}: {error}") from error
    recipe.written.update(written_in(settings))
    return recipe


def faults_of(error: ValidationError) -> list[str]:
    """Each fault with its path in the file."""
    return [f"{cut(_where(e['loc']))}: {_what(e)}" for e in error.errors()]


def read_settings(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The settings in a YAML file, those of its `base:` included. Raises as `load_recipe`, unchecked otherwise."""
    if not path.is_file():
        raise RecipeError(f"no recipe file {path}" + ": it is a folder" * path.is_dir())
    if path.resolve() in seen:
        raise RecipeError(f"{path} is its own base: {' -> '.join(map(str, seen))}")
    if len(seen) > _MOST_BASES:
        raise RecipeError(f"{path}: more than {_MOST_BASES} files are the base of one another")
    settings = read_yaml(path, error=RecipeError)
    if not isinstance(settings, dict):
        found = "is empty" if settings is None else f"holds a {type(settings).__name__}"
        raise RecipeError(f"{path} {found}; a recipe is a mapping such as `name: my-run`")
    if odd := [key for key in settings if not isinstance(key, str)]:
        raise RecipeError(f"{path}: the key {shown(odd[0])} is no name of a setting")
    has_base, base = "base" in settings, settings.pop("base", None)
    settings = with_paths(settings, file=path)
    if not has_base:
        return settings
    if not isinstance(base, str):
        raise RecipeError(f"{path}: base names one file, found {shown(base)}")
    below = Path(absolute(base, path.parent.resolve()))
    if not below.is_file():
        raise RecipeError(f"no recipe file {cut(str(below))}, which {path} names by `base: {cut(base)}`")
    return merge(read_settings(below, (*seen, path.resolve())), settings)


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes`; mappings merge, but for one of another `name`; everything else is replaced."""
    nested = {
        key: merge(base[key], value)
        for key, value in changes.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict) and not _is_another(base[key], value)
    }
    return base | changes | nested


def _is_another(base: dict[str, Any], changes: dict[str, Any]) -> bool:
    """Whether these settings are of another kind of data, conditions or process, which has keys of its own."""
    return "name" in base and changes.get("name", base["name"]) != base["name"]


def changed(settings: dict[str, Any], changes: Changes) -> dict[str, Any]:
    """Settings with changes: whole keys merge as a recipe does with its base, dotted paths change what they name.

    Raises:
        RecipeError: a path leads to no place of the settings.
    """
    whole = {key: value for key, value in changes.items() if "." not in key}
    result = copy.deepcopy(merge(settings, whole))
    for path in changes.keys() - whole.keys():
        *parents, last = path.split(".")
        place: Any = result
        try:
            for key in parents:
                place = place[_key(place, key)]
            place[_key(place, last)] = changes[path]
        except (KeyError, IndexError, TypeError, ValueError):
            raise RecipeError(_no_such_setting(path, result)) from None
    return result


def _key(place: Any, key: str) -> str | int:
    return int(key) if isinstance(place, list) else key


def _where(location: tuple[int | str, ...]) -> str:
    if location[:1] == ("plan",):
        # after an edit's number pydantic names its kind, which is no key of the file
        location = (*location[:2], *location[3:])
    elif location[:1] in (("data",), ("evaluate",)):
        # and after the word, the name of the data or suite
        location = (*location[:1], *location[2:])
    # and in angle brackets, what kind of settings was read
    return ".".join(str(part) for part in location if not str(part).startswith("<")) or "recipe"


def _what(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "unknown key" + did_you_mean(error["loc"][-1], known_keys(error["loc"]))
    found = error["input"]
    if isinstance(found, WrittenPath):
        message = error["msg"].removeprefix("Value error, ")
        return f"{message}, found {cut(found.written)}, which is {cut(found)}{nearest_choice(error)}"
    return fault_of(error)


def _no_such_setting(path: str, settings: Mapping[str, Any]) -> str:
    """Why a change leads nowhere: what the recipe leaves out is to be set as a whole."""
    first, _, rest = path.partition(".")
    if first in Recipe.model_fields and settings.get(first) is None and "." not in rest:
        return f"{path}: this recipe has no `{first}`; set it as a whole, --set '{first}={{{rest}: ...}}'"
    if short := _short_list(path, settings):
        return f"{path}: {short}"
    near = "" if first in Recipe.model_fields else did_you_mean(first, Recipe.model_fields)
    return f"{path}: there is no such setting{near}"


def _short_list(path: str, settings: Mapping[str, Any]) -> str:
    """What a path says of a list that has no such place; empty if it leads through none."""
    place: Any = settings
    parts = path.split(".")
    for depth, key in enumerate(parts):
        if isinstance(place, list) and not (key.isdecimal() and int(key) < len(place)):
            kind = "edit" if parts[0] == "plan" else "item"
            head, rest = ".".join(parts[:depth]), parts[depth + key.isdecimal() :]
            meant = f"; {'.'.join([head, '0', *rest])} is of the first" if place and rest else ""
            return f"{head} has {len(place)} {kind}{'s' * (len(place) != 1)}, numbered from 0{meant}"
        try:
            place = place[_key(place, key)]
        except (KeyError, TypeError):
            break
    return ""
