"""Model classes that `grafting` owns; every other host is its own library's class."""

from .dit import DIT_PRESETS as DIT_PRESETS
from .dit import DiT as DiT
