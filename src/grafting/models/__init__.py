"""Model classes that `grafting` owns; every other host is its own library's class.

DiT is imported when it is asked for: it is a class of diffusers, which takes seconds, and data and metrics want the classifier alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dit import DIT_PRESETS as DIT_PRESETS
    from .dit import DiT as DiT


def __getattr__(name: str) -> Any:
    if name not in ("DIT_PRESETS", "DiT"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.dit"), name)
