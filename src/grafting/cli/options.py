"""Options of commands, derived from the settings that they fill: a field of a config is an option of its command.

Name, type, default and help come from the field; a command changes what is its own. Configs import torch, so options are made when
their command is used, not for the list of commands.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, Union, get_args, get_origin

import typer
from rich.markup import escape
from typer.core import TyperCommand
from typer.main import get_command

from ..errors import DataError, listed

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError
    from pydantic.fields import FieldInfo


class Own(TypedDict, total=False):
    """What a command changes of an option. A default of None is that of the command's own code."""

    names: tuple[str, ...]
    default: Any
    help: str
    metavar: str


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options for the fields of a config."""

    config: "type[BaseModel]"
    title: str
    """Title above the options on the help page."""
    prefix: str = ""
    """Put before the name of each option."""
    own: Mapping[str, Own] = field(default_factory=dict)
    """Field -> what the command changes of its option."""
    without: frozenset[str] = frozenset()
    """Fields that the command sets itself."""

    @cached_property
    def options(self) -> dict[str, "Option"]:
        """The option of each field, by the field's name."""
        fields = self.config.model_fields
        if unknown := (self.own.keys() | self.without) - fields.keys():
            raise TypeError(f"{self.config.__name__} has no {', '.join(sorted(unknown))}")
        return {
            name: Option(name, found, self.own.get(name, {}), prefix=self.prefix, panel=self.title)
            for name, found in fields.items()
            if name not in self.without
        }

    def filled(self, given: Mapping[str, Any]) -> "BaseModel | None":
        """The config with the values given on the command line, or None without those that it requires.

        Raises:
            DataError: lists the options with faults.
        """
        from pydantic import ValidationError

        options = self.options
        required = [name for name, option in options.items() if option.field.is_required()]
        if missing := [name for name in required if name not in given]:
            if given:
                raise DataError(f"{_said(options, given)}: only with {_said(options, missing)}")
            return None
        defaults = {name: option.default for name, option in options.items() if "default" in option.own}
        values = {name: value for name, value in defaults.items() if value is not None}
        values |= {name: options[name].parse(value) for name, value in given.items()}
        try:
            return self.config.model_validate(values)
        except ValidationError as error:
            raise DataError(listed("these options cannot be used:", self._faults(error, given))) from error

    def _faults(self, error: "ValidationError", given: Mapping[str, Any]) -> list[str]:
        """One line per option; a list has many faults, whose places do not help."""
        lines = {}
        for fault in error.errors():
            name = str(fault["loc"][0]) if fault["loc"] else ""
            message = fault["msg"].removeprefix("Value error, ")
            option = self.options.get(name)
            if option is None:
                lines[name] = message
            elif option.is_list:
                lines[name] = f"{option.names[0]} is {option.words}; found {given[name]!r}"
            else:
                lines.setdefault(name, f"{option.names[0]}: {message}, found {given[name]!r}")
        return list(lines.values())


def _said(options: Mapping[str, "Option"], names: Iterable[str]) -> str:
    return " and ".join(options[name].names[0] for name in names)


@dataclass(frozen=True)
class Option:
    """The option of one field."""

    name: str
    field: "FieldInfo"
    own: Own
    prefix: str
    panel: str

    @property
    def names(self) -> tuple[str, ...]:
        return self.own.get("names") or (f"--{self.prefix}{self.name}".replace("_", "-"),)

    @property
    def default(self) -> Any:
        if "default" in self.own:
            return self.own["default"]
        return None if self.field.is_required() else self.field.get_default(call_default_factory=True)

    @cached_property
    def _types(self) -> tuple[Any, ...]:
        return tuple(_alternatives(self.field.annotation))

    @property
    def choices(self) -> tuple[str, ...]:
        return tuple(choice for t in self._types if get_origin(t) is Literal for choice in get_args(t))

    @property
    def is_list(self) -> bool:
        return any(get_origin(t) is tuple for t in self._types)

    @property
    def type(self) -> type:
        """Type on the command line: what has no type of its own there is text, which the config reads."""
        return self._types[0] if self._types in ((int,), (float,), (bool,)) else str

    @property
    def words(self) -> str:
        """Allowed values of a list, as text."""
        examples = [_text(example) for example in self.field.examples or ()]
        numbers = "numbers" + "".join(f" such as {example}" for example in examples[:1])
        return " or ".join([*filter(None, [", ".join(self.choices)]), numbers])

    def parse(self, value: Any) -> Any:
        """The value for the config: a list is separated by commas."""
        return value.split(",") if self.is_list and value not in self.choices else value

    def parameter(self, name: str) -> inspect.Parameter:
        """Parameter of a command's function, as typer reads it."""
        names, default = self.names, self.default
        if self.type is bool and default is not False:
            names = tuple(f"{option}/--no-{option.removeprefix('--')}" for option in names)
        shown = typer.Option(*names, help=self._help, metavar=self._metavar, rich_help_panel=self.panel)
        return inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=_text(default) if self.type is str and default is not None else default,
            annotation=Annotated[self.type | None if default is None else self.type, shown],
        )

    @property
    def _help(self) -> str:
        if "help" in self.own:
            return self.own["help"]
        described = escape(" ".join((self.field.description or "").split()))
        return re.sub("`([^`]+)`", r"[cyan]\1[/]", described)

    @property
    def _metavar(self) -> str | None:
        lengths = [get_args(t) for t in self._types if get_origin(t) is tuple]
        numbers = [",".join("..." if part is ... else "N" for part in parts) for parts in lengths]
        return self.own.get("metavar") or (None if self.choices or not numbers else numbers[0])


def _alternatives(annotation: Any) -> list[Any]:
    """Types that a value may have, without constraints and None."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [found for part in get_args(annotation) for found in _alternatives(part)]
    return [] if annotation is NoneType else [annotation]


def _text(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, list | tuple):
        return ",".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


Group = Callable[[], Options]


def command(app: typer.Typer, **groups: Group) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator that adds a function to `app` as a command; the parameters in `groups` are configs filled by options."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        class WithOptions(TyperCommand):
            """Command whose options are made when they are first needed."""

            _is_made = False

            def get_params(self, ctx: Any) -> Any:
                if not self._is_made:
                    made = get_command(_app_of(function, {name: group() for name, group in groups.items()}))
                    self.params, self.callback, self._is_made = made.params, made.callback, True
                return super().get_params(ctx)

        def bare() -> None:
            """The command's name and help, until it is used."""

        bare.__name__, bare.__doc__ = function.__name__, function.__doc__
        app.command(cls=WithOptions)(bare)
        return function

    return add


def _app_of(function: Callable[..., None], groups: Mapping[str, Options]) -> typer.Typer:
    """Application of one command, with all of its options."""
    places = {
        f"{group}_{name}": (group, name) for group, options in groups.items() for name in options.options
    }

    def run(ctx: Any, **values: Any) -> None:
        given: dict[str, dict[str, Any]] = {group: {} for group in groups}
        for key, (group, name) in places.items():
            value = values.pop(key)
            source = ctx.get_parameter_source(key)
            if source is not None and source.name != "DEFAULT":
                given[group][name] = value
        function(**values, **{group: options.filled(given[group]) for group, options in groups.items()})

    own = [p for p in inspect.signature(function).parameters.values() if p.name not in groups]
    derived = [groups[group].options[name].parameter(key) for key, (group, name) in places.items()]
    context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    parameters = [*keyword_only, *derived, context]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    app = typer.Typer(add_completion=False, rich_markup_mode="rich")
    app.command()(run)
    return app
