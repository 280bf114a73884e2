"""What all settings of recipes have in common: they are frozen, know their keys, and take no number that is none."""

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from ..errors import GraftingError, SettingsError, did_you_mean, listed
from ._damage import fault_of

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)  # which has no public name

_LARGEST = 2.0**63
_LONGEST_NAME = 255  # bytes, as file systems have it
_TEXTS = {"description", "notes", "licence"}


class _Refusing(ModelMetaclass):
    """Where settings are made in Python their faults are one of our errors; what is read is refused by its reader."""

    refused_as: type[GraftingError]
    __pydantic_fields__: Mapping[str, Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            names = ", ".join(f"{name}=..." for name in self.__pydantic_fields__)
            raise self.refused_as(f"{self.__name__} takes settings by name: {self.__name__}({names})")
        try:
            return super().__call__(*args, **kwargs)
        except ValidationError as error:
            raise self._refused(error) from error

    def _refused(self, error: ValidationError) -> GraftingError:
        lines = [_line(found, self.__pydantic_fields__) for found in error.errors(include_url=False)]
        count = f"{len(lines)} fault{'s' * (len(lines) > 1)}"
        return self.refused_as(listed(f"{count} in {self.__name__}", lines))


def _line(error: Any, known: Mapping[str, Any]) -> str:
    place, fault = error["loc"], fault_of(error)
    if error["type"] == "extra_forbidden" and len(place) == 1:
        fault += did_you_mean(place[0], known)
    return ": ".join(filter(None, [".".join(map(str, place)), fault]))


class Settings(BaseModel, metaclass=_Refusing):
    """Base of all that a recipe or a plan can say. A boolean is no number, and numbers are finite and below 2^63."""

    refused_as: ClassVar[type[GraftingError]] = SettingsError
    """Error of faults in settings that are made in Python."""
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_booleans(cls, values: Any) -> Any:
        fields: Mapping[str, Any] = cls.model_fields
        wrong = [
            f"{name} is {str(value).lower() if isinstance(value, bool) else 'a list with a boolean'}"
            for name, value in (values.items() if isinstance(values, dict) else ())
            if name in fields
            and any(isinstance(part, bool) for part in _parts(value))
            and not _may_hold_booleans(fields[name].annotation)
        ]
        if wrong:
            said = "true and false, in YAML also yes, no, on and off, are no numbers and no names"
            raise ValueError(f"{', '.join(wrong)}: {said}")
        return values

    @field_validator("*", mode="after")
    @classmethod
    def _no_huge_values(cls, value: Any, info: Any) -> Any:
        for part in _parts(value):
            if isinstance(part, int | float) and abs(part) >= _LARGEST:
                raise ValueError("a number is too large: they are below 2^63")
        # mappings hold what others say: of a model's class, of how images were sampled
        names = [] if isinstance(value, dict) or info.field_name in _TEXTS else _parts(value)
        if any(isinstance(name, str | Path) and is_no_name(str(name)) for name in names):
            raise ValueError("a name is too long, or has a zero byte in it")
        return value


class Stored(BaseModel):
    """Base of what files beside data say of them; they have no other keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def is_no_name(text: str) -> bool:
    """True of what no file could be called."""
    return "\0" in text or any(len(os.fsencode(part)) > _LONGEST_NAME for part in text.split("/"))


def _parts(value: object) -> list[object]:
    """A value, or what nested lists and mappings hold."""
    if isinstance(value, dict):
        return [part for pair in value.items() for item in pair for part in _parts(item)]
    return [part for item in value for part in _parts(item)] if isinstance(value, list | tuple) else [value]


@cache
def _may_hold_booleans(annotation: Any) -> bool:
    """True for types with booleans, and for those that say what they hold themselves."""
    parts = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return _may_hold_booleans(parts[0])
    if get_origin(annotation) is Literal:
        return any(isinstance(part, bool) for part in parts)
    if parts:
        return any(map(_may_hold_booleans, parts))
    if isinstance(annotation, type):
        return annotation in (bool, object, Any) or issubclass(annotation, BaseModel)
    return not isinstance(annotation, EllipsisType)
