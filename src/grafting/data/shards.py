"""One shard of a folder of latents, read row by row.

Rows are read with `preadv` and not through a memory map: a page of a map that cannot be read, because the file was cut short
or the disk failed, ends the process with a bus error, where a read gives an error that can name the shard. It is as fast,
and threads that read do not hold Python's lock.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import DataError

# safetensors' own limit
_LONGEST_HEADER = 100_000_000
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class ShardFile:
    """A safetensors file of `latents` [count, *shape] and int32 `labels` [count]."""

    def __init__(self, path: Path, *, count: int, dtype: str, shape: tuple[int, ...]):
        self.path, self.count, self.dtype, self.shape = path, count, dtype, shape

    @cached_property
    def labels(self) -> Int[Tensor, "n"]:
        """The class of every row.

        Raises:
            DataError: the shard is missing or damaged.
        """
        start = self._starts["labels"]
        numbers = np.empty(self.count, "<i4")
        with _faults_named(self.path), self.path.open("rb", buffering=0) as file:
            _read_at(file.fileno(), numbers.view(np.uint8), start)
        return torch.from_numpy(numbers).long()

    def read(self, rows: list[int], into: Tensor, places: list[int]) -> None:
        """Copies latents `rows` to `places` of `into` [B, *shape], which has the shard's dtype and lies in one piece.

        Raises:
            DataError: the shard is missing or damaged.
        """
        target = into.view(len(into), -1).view(torch.uint8).numpy()
        start, length = self._starts["latents"], target.shape[1]
        with _faults_named(self.path), self.path.open("rb", buffering=0) as file:
            for row, place in zip(rows, places, strict=True):
                _read_at(file.fileno(), target[place], start + row * length)

    @cached_property
    def _starts(self) -> dict[str, int]:
        """Where each tensor's bytes begin in the file, after its header was compared with what the index says."""
        with _faults_named(self.path), self.path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(size, _LONGEST_HEADER)))
            found = {
                name: (header[name]["dtype"], tuple(header[name]["shape"])) for name in ("latents", "labels")
            }
            starts = {name: 8 + size + header[name]["data_offsets"][0] for name in found}
        expected = {
            "latents": (_DTYPES.get(self.dtype, self.dtype), (self.count, *self.shape)),
            "labels": ("I32", (self.count,)),
        }
        if found != expected:
            raise DataError(f"the shard {self.path} holds {_said(found)}; its index says {_said(expected)}")
        return starts


def _read_at(descriptor: int, target: np.ndarray, start: int) -> None:
    """Fills `target`, bytes in one piece, from an offset of a file."""
    done = 0
    while done < len(target):
        count = os.preadv(descriptor, [target[done:].data], start + done)
        if count == 0:
            raise OSError(f"it ends {len(target) - done} bytes too early")
        done += count


@contextmanager
def _faults_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"the shard {path} is missing or damaged: {reason}") from error


def _said(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> str:
    return ", ".join(f"{name} {dtype} {shape}" for name, (dtype, shape) in tensors.items())
