"""Explore new architectures of pretrained diffusion transformers by editing them: plan, graft, distill, finetune, measure.

The public names are listed in `__init__.pyi` beside this file. A name's module is imported when the name is first used:
importing all of them takes seconds, most of it in diffusers, which `grafting --help` need not wait for.
"""

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

# diffusers takes a pipeline's classes of modules that were imported alone
from . import portable as portable


def _homes() -> dict[str, str]:
    """The module of every public name, as the stub says."""
    stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text())
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: f".{node.module}" for node in imports for alias in node.names}


_HOMES = _homes()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
