"""Module where diffusers looks for the classes that saved pipelines name; they are in `weights/portable.py`, imported when asked for."""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        # who looks through all modules asks for these, and wants nothing imported
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".weights.portable", __package__), name)
