"""What is said of a file that cannot be read: one sentence, which quotes little of it."""

import pickle
import re
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import yaml
from PIL import UnidentifiedImageError
from pydantic import ValidationError

from ..errors import CheckpointError, GraftingError, SettingsError, did_you_mean

Kind: TypeAlias = type[GraftingError]

PICTURES = ("PNG", "JPEG", "WEBP")
"""Formats of pictures that are read."""

_FAULTS, _QUOTED, _FOREIGN, _LONGEST_MESSAGE = 6, 200, 400, 800

_shortened = reprlib.Repr()
_shortened.maxlevel, _shortened.maxstring, _shortened.maxother, _shortened.maxlong = 3, 160, 160, 60


def shown(value: object) -> str:
    """The beginning of a value's repr, which is not made whole first."""
    return cut(_shortened.repr(value))


def cut(text: str, most: int = _QUOTED) -> str:
    """The beginning of a text, as much as a message quotes."""
    return text if len(text) <= most else f"{text[:most]}..."


def faults_of(error: ValidationError) -> list[str]:
    """What does not fit a model, each with its place; the first few."""
    found = [
        ": ".join(filter(None, [".".join(map(str, e["loc"])), fault_of(e)]))
        for e in error.errors(include_url=False)
    ]
    left = len(found) - _FAULTS
    return [*map(cut, found[:_FAULTS]), *([f"and {left} more"] if left > 0 else [])]


def fault_of(error: Any) -> str:
    """What is wrong with a value, from pydantic's details of it."""
    told = {"extra_forbidden": "unknown key", "missing": "missing"}
    if error["type"] in told:
        return told[error["type"]]
    message = error["msg"].removeprefix("Value error, ")
    # some quote their input; others list all that is allowed
    message = message if len(message) <= _LONGEST_MESSAGE else f"{message[:_LONGEST_MESSAGE]}..."
    # of a mapping or a whole file the message names what is wrong in it, and some name the word that they refuse
    found = error["input"]
    whole = isinstance(found, dict) or error["type"] == "json_invalid"
    is_told = whole or (isinstance(found, str) and shown(found) in message)
    return (message if is_told else f"{message}, found {shown(found)}") + nearest_choice(error)


def nearest_choice(error: Any) -> str:
    """A "did you mean" for a word outside a fixed set of choices, from pydantic's details; empty if nothing is close."""
    context = error.get("ctx", {})
    allowed = context.get("expected_tags") or (
        context["expected"] if error["type"] == "literal_error" else ""
    )
    return did_you_mean(context.get("tag", error["input"]), re.findall(r"'([^']+)'", allowed))


@contextmanager
def damage(name: object, kind: str, *, error: Kind = CheckpointError, advice: str = "") -> Iterator[None]:
    """Inside, whatever a reader raises is one error: `name` is not `kind`, and why. Errors of this library pass.

    Readers of foreign bytes raise what their authors never listed, so that every exception counts as damage.
    """
    try:
        yield
    except Exception as fault:
        # settings that are made of what was read have its faults
        if isinstance(fault, GraftingError) and not isinstance(fault, SettingsError):
            raise
        raise error(f"{cut(str(name))} {_missing_or(fault, kind)}{advice}") from fault


def _missing_or(fault: Exception, kind: str) -> str:
    if isinstance(fault, FileNotFoundError):
        return "is missing"
    return f"is not {kind}: {reason_of(fault)}"


def reason_of(fault: Exception) -> str:
    """Why something could not be read, in few words."""
    match fault:
        case ValidationError():
            return "; ".join(faults_of(fault))
        case RecursionError():
            return "it is nested too deep"
        case OSError(strerror=str(words)):
            return words
        case yaml.MarkedYAMLError(problem=str(words), problem_mark=yaml.Mark(line=line)):
            return cut(f"line {line + 1}: {words}")
        case pickle.UnpicklingError():
            # why torch did not read tensors alone, without its advice to run what the file says
            why = str(fault).rpartition("WeightsUnpickler error:")[2].strip()
            return cut(why.partition("\n")[0].partition(". ")[0])
        case UnidentifiedImageError():
            return f"it is no {', '.join(PICTURES)}"
        case KeyError():
            return f"it has no {shown(fault.args[0]) if fault.args else 'such key'}"
    return cut(" ".join(str(fault).split())) or type(fault).__name__


def failure_of(error: Exception, advice: str) -> str:
    """Why foreign code failed, in its own words but not all of them, and what to do: `advice`, unless a package is missing."""
    words = cut(" ".join(str(error).split()), _FOREIGN) or type(error).__name__
    if isinstance(error, KeyError):
        words = reason_of(error)
    if not isinstance(error, NameError | ImportError) or isinstance(error, UnboundLocalError):
        return f"{words}; {advice}"
    package = (error.name or "").partition(".")[0]
    return (
        f"{words}; {f'the package {package!r}' if package else 'a package'} seems to be missing: install it"
    )
