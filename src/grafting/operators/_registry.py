"""Finds every operator: the config classes in this folder's files, and those of installed packages' entry points."""

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from ..contract import OperatorConfig
from ..errors import did_you_mean
from ..machine.reading import shown
from ._presets import PRESETS


@cache
def operator_configs() -> dict[str, type[OperatorConfig]]:
    """Every operator's config class by the operator's name, in alphabetical order.

    Raises:
        ValueError: two classes have one name.
    """
    found: dict[str, type[OperatorConfig]] = {}
    for config in (*_own_configs(), *(e.load() for e in entry_points(group="grafting.operators"))):
        name = config.model_fields["name"].default
        if name in found:
            raise ValueError(f"operator {name!r} is defined twice: {found[name]} and {config}")
        found[name] = config
    return dict(sorted(found.items()))


def parse_operator(value: Any) -> OperatorConfig:
    """An operator's config from what a recipe says of it: a name, or a mapping with `name` and its settings.

    A name alone may also be that of a preset.

    Raises:
        ValueError: no such operator, or (pydantic's subclass of it) settings that do not fit; names what is allowed.
    """
    if isinstance(value, OperatorConfig):
        return value
    settings = PRESETS.get(value, {"name": value}) if isinstance(value, str) else value
    if not isinstance(settings, dict) or not isinstance(settings.get("name"), str):
        raise ValueError(f"an operator is a name, or a mapping with a name; found {shown(value)}")
    configs, name = operator_configs(), settings["name"]
    if name in PRESETS:
        raise ValueError(f"{name!r} is a preset, which takes no settings: it stands for {PRESETS[name]}")
    if name not in configs:
        raise ValueError(unknown_operator(name))
    return configs[name].model_validate(settings)


def unknown_operator(name: object) -> str:
    """The message that refuses a name of no operator and of no preset."""
    configs = operator_configs()
    near = did_you_mean(name, [*configs, *PRESETS])
    return f"no operator {name!r}{near or ';'} there are {', '.join(configs)}, and the presets {', '.join(PRESETS)}"


def _own_configs() -> list[type[OperatorConfig]]:
    modules = [m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if m.name[0] != "_"]
    return [
        item
        for module in (importlib.import_module(f"{__package__}.{name}") for name in modules)
        for item in vars(module).values()
        if isinstance(item, type)
        and issubclass(item, OperatorConfig)
        and item.__module__ == module.__name__
        and isinstance(item.model_fields["name"].default, str)
    ]
