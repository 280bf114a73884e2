"""Operators that stage 1 has fitted, kept by what they depend on, so that runs which have sites in common share them.

Fitted to the teacher's activations, an operator depends on its own site alone: a plan's sites may be fitted in one run or
in several, with the same result.
"""

import warnings
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import CheckpointError, FaultWarning, ResumeWarning
from ..machine.files import clear_partial, hash_json
from ..machine.reading import cut, read_safetensors
from ..weights.tensors import load_strictly, save_tensors, tensor_hash


class OperatorStore:
    """A folder of fitted operators, one file each, named by the hash of their key, with that hash and a checksum inside."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._has_told = False

    def holds(self, key: Any) -> bool:
        """True if an operator was saved under this key (JSON). A damaged one is named in a warning and does not count."""
        path = self._path(key)
        clear_partial(path)
        if not path.is_file():
            return False
        try:
            self._read(path)
        except CheckpointError as error:
            warnings.warn(f"{error}; fitting it again", FaultWarning, stacklevel=2)
            return False
        return True

    def load(self, key: Any, operator: nn.Module) -> None:
        """Fill an operator with what was saved under a key.

        Raises:
            CheckpointError: there is no such file, or it is damaged or holds another operator.
        """
        path = self._path(key)
        load_strictly(operator, self._read(path), source=str(path))

    def save(self, key: Any, operator: nn.Module) -> None:
        """Keep an operator; of two runs that save the same one the later wins, and they are equal."""
        tensors, path = operator.state_dict(), self._path(key)
        save_tensors(path, tensors, metadata={"key": path.stem, "sha256": _digest(tensors)})

    def _path(self, key: Any) -> Path:
        return self.folder / f"{hash_json(key)}.safetensors"

    def _read(self, path: Path) -> dict[str, Tensor]:
        tensors, recorded = read_safetensors(path)
        # an operator of before there were checksums has none
        if recorded.get("sha256") not in (None, _digest(tensors)):
            raise CheckpointError(f"{path} is damaged: it does not agree with its checksum")
        if recorded.get("key") not in (None, path.stem):
            raise CheckpointError(f"{path} holds another operator: it was saved as {cut(recorded['key'])}")
        if "key" not in recorded and not self._has_told:
            self._has_told = True
            told = f"{self.folder} holds operators of an earlier version, which did not note whose they are: taken as named"
            warnings.warn(told, ResumeWarning, stacklevel=4)
        return tensors


def _digest(tensors: dict[str, Tensor]) -> str:
    return hash_json({name: tensor_hash(tensor) for name, tensor in tensors.items()})
