"""Paths in recipe files: relative to the file that writes them, and named in errors as they are written there.

A value that begins with `./`, `../`, `/` or `~` is a path, except in text and in a model's own config. Every other value is a
name, or a path that is read from the working directory.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import GraftingError

_BEGINNINGS = ("./", "../", "/", "~")


class WrittenPath(str):
    """Absolute path that remembers how it was written, and where."""

    written: str


class WrittenPaths(dict[str, str]):
    """How paths were written, by what they resolve to. All are equal: they make no two recipes differ."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WrittenPaths)


def with_paths(settings: Mapping[str, Any], *, file: Path | None = None) -> dict[str, Any]:
    """Settings of a recipe or sweep with absolute paths.

    Args:
        file: where the settings are written. Paths are relative to its folder; those of a bundled recipe, and those that no
            file writes, are relative to the working directory.
    """
    folder = Path.cwd() if file is None or _is_bundled(file) else file.parent.resolve()
    where = "" if file is None else f" in {file}"

    def resolved(value: Any, place: tuple[str, ...]) -> Any:
        match place:
            case ("description",) | ("source", "config", *_):
                return value
            case ("grids", _, "changes") | ("grids", _, "axes", _, _):
                place = ()  # here begin settings of a recipe
        if isinstance(value, dict):
            return {key: resolved(v, (*place, *_parts(key, place))) for key, v in value.items()}
        if isinstance(value, list):
            return [resolved(v, (*place, str(i))) for i, v in enumerate(value)]
        if isinstance(value, str) and value.startswith(_BEGINNINGS):
            path = WrittenPath(absolute(value, folder))
            path.written = f"{value}{where}"
            return value if path == value else path
        return value

    return {key: resolved(value, tuple(_parts(key, ()))) for key, value in settings.items()}


def _parts(key: Any, place: tuple[str, ...]) -> list[str]:
    """Keys that a key stands for: changes may have dotted ones, labels of a sweep are their own."""
    return [str(key)] if place[:1] == ("grids",) else str(key).split(".")


def absolute(path: str, folder: Path) -> str:
    """Absolute form of a path that is relative to `folder`."""
    return os.path.normpath(folder / os.path.expanduser(path))


def _is_bundled(file: Path) -> bool:
    return file.resolve().is_relative_to(recipes_folder().resolve())


def recipes_folder() -> Path:
    """Folder of the recipes shipped with the package or beside its source."""
    package = Path(__file__).parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parents[1] / "recipes"


def written_in(settings: Any) -> WrittenPaths:
    """How the paths in settings were written; those that were absolute already are left out."""
    if isinstance(settings, WrittenPath):
        return WrittenPaths({str(settings): settings.written})
    parts = settings.values() if isinstance(settings, dict) else settings
    found = WrittenPaths()
    for part in parts if isinstance(settings, dict | list) else ():
        found.update(written_in(part))
    return found


@contextmanager
def naming_paths(written: WrittenPaths) -> Iterator[None]:
    """Errors raised inside also say how the paths that they name were written."""
    try:
        yield
    except GraftingError as error:
        named = [f"{path} is written {written[path]}" for path in _named_in(str(error), written)]
        error.args = ("\n  ".join([str(error), *named]),)
        raise


def _named_in(text: str, paths: Iterable[str]) -> list[str]:
    """Those of the paths that a text names; a folder is not named by the path of something in it that is among them too."""
    found = []
    for path in sorted(paths, key=len, reverse=True):
        text, count = re.subn(rf"{re.escape(path)}(?![\w-])", "", text)
        found += [path] * (count > 0)
    return found
