"""Operators that stage 1 has fitted, kept by what they depend on, so that runs which have sites in common share them.

Fitted to the teacher's activations, an operator depends on its own site alone: a plan's sites may be fitted in one run or
in several, with the same result.
"""

from pathlib import Path
from typing import Any

from torch import nn

from .checkpoint import load_strictly, load_tensors, save_tensors
from .files import hash_json


class OperatorStore:
    """A folder of fitted operators, one file each, named by the hash of their key."""

    def __init__(self, folder: Path):
        self.folder = folder

    def holds(self, key: Any) -> bool:
        """Whether an operator was saved under this key (JSON)."""
        return self._path(key).is_file()

    def load(self, key: Any, operator: nn.Module) -> None:
        """Fill an operator with what was saved under a key.

        Raises:
            CheckpointError: there is no such file, or it is damaged or holds another operator.
        """
        path = self._path(key)
        load_strictly(operator, load_tensors(path), source=str(path))

    def save(self, key: Any, operator: nn.Module) -> None:
        """Keep an operator; of two runs that save the same one the later wins, and they are equal."""
        save_tensors(self._path(key), operator.state_dict())

    def _path(self, key: Any) -> Path:
        return self.folder / f"{hash_json(key)}.safetensors"
