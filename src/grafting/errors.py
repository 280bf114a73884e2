"""Errors in a user's input, one class per kind; raised before any work begins.

A message says what was asked, what was found, what is allowed and what to do. `assert` is for our own invariants. What a
function inside the library only passes on is told where it is raised, not by each of its callers.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


def listed(head: str, faults: Sequence[str], *, most: int | None = None) -> str:
    """A message and its faults, one per line, of which `most` are shown."""
    left = 0 if most is None else len(faults) - most
    return "\n  ".join([head, *faults[:most], *([f"and {left} more"] if left > 0 else [])])


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """The end of a message that refuses a word: the known one that it is nearest to, or nothing if none is near."""
    near = get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


class GraftingError(Exception):
    """Base of every error that a user's input can cause; the command line prints it without a traceback."""


class SettingsError(GraftingError, ValueError):
    """Settings of any class are invalid: lists every fault."""


class PlanError(GraftingError):
    """A plan is malformed, or does not fit its model: lists every fault."""


class HostError(GraftingError):
    """A model is not one of the known hosts, or does not behave as its host declares."""


class RecipeError(GraftingError):
    """A recipe file is missing, unreadable or has faults: lists every fault with its path in the file."""


class CheckpointError(GraftingError):
    """A model folder, weights file or training state is missing, damaged or belongs to something else."""


class DataError(GraftingError):
    """A data set or subset is missing, damaged or does not fit the model."""


class ProtocolError(GraftingError):
    """Two figures were measured differently and cannot be compared, or a protocol cannot be carried out."""


class RunError(GraftingError):
    """A run folder belongs to another recipe, or a stage cannot continue (no disk, read-only)."""


class TrainingError(GraftingError):
    """Training produced a loss that is not finite, or cannot start."""


class MissingBackend(GraftingError):
    """An optional package is needed: names it and the line that installs it."""


class FaultWarning(UserWarning):
    """Something on disk is damaged and an older good state is used; the command line prints it as one line."""


class TrainingWarning(UserWarning):
    """Training did harm, as far as its own figures tell; shown as a `FaultWarning` is."""


class ResumeWarning(UserWarning):
    """A resumed run meets other circumstances than it began in, or its data were seen before; shown as a `FaultWarning` is."""
