"""The open set of operators: one file each, found by `_registry`. Add a file to add an operator."""

from ._presets import PRESETS as PRESETS
from ._registry import operator_configs as operator_configs
from ._registry import parse_operator as parse_operator
from ._registry import unknown_operator as unknown_operator
