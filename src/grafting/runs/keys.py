"""The keys that a place of a recipe may have, for messages that refuse one which is not among them."""

from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from ..contract import OperatorConfig
from ..operators import operator_configs
from .recipe import Recipe

Model = type[BaseModel]


def known_keys(location: Sequence[int | str]) -> list[str]:
    """Keys beside the last one of a fault's location, as pydantic gives it: names of fields and kinds, and places in lists."""
    models: list[Model] = [Recipe]
    for part in location[:-1]:
        inner = [
            found
            for model in models
            if part in model.model_fields
            for found in _within(model.model_fields[str(part)].annotation)
        ]
        models = inner or _of_kind(models, part)
    return sorted({key for model in models for key in model.model_fields})


def _within(annotation: Any) -> Iterator[Model]:
    """Every model in a type, those that unions and lists hold included."""
    if annotation is OperatorConfig:
        yield from operator_configs().values()
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _within(part)


def _of_kind(models: list[Model], kind: int | str) -> list[Model]:
    """Those of the models whose `name` or `edit` is this; all of them if it is none of these."""
    named = [
        model
        for model in models
        for key in ("name", "edit")
        if key in model.model_fields and model.model_fields[key].default == kind
    ]
    return named or [model for model in models if model.__name__ == kind] or models
