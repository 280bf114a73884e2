"""One shard of a folder of latents, read row by row.

Rows are read with `preadv` and not through a memory map: a page of a map that cannot be read, because the file was cut short
or the disk failed, ends the process with a bus error, where a read gives an error that can name the shard. It is as fast,
and threads that read do not hold Python's lock.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Int32, UInt8

from ..errors import DataError

# safetensors' own limit
_LONGEST_HEADER = 100_000_000
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class ShardFile:
    """A safetensors file of `latents` [count, *shape] and int32 `labels` [count]."""

    def __init__(self, path: Path, *, count: int, dtype: str, shape: tuple[int, ...]):
        self.path, self.count, self.dtype, self.shape = path, count, dtype, shape

    @cached_property
    def labels(self) -> Int32[np.ndarray, "n"]:
        """The class of every row.

        Raises:
            DataError: the shard is missing or damaged.
        """
        numbers = np.empty(self.count, "<i4")
        self._read([(numbers.view(np.uint8), self._starts["labels"])])
        return numbers

    def read(self, rows: list[int], into: UInt8[np.ndarray, "b n"], places: list[int]) -> None:
        """Copies the bytes of latents `rows` to `places` of `into`.

        Raises:
            DataError: the shard is missing or damaged.
        """
        start, length = self._starts["latents"], into.shape[1]
        places_in_file = [start + row * length for row in rows]
        self._read(zip((into[place] for place in places), places_in_file, strict=True))

    def _read(self, parts: Iterable[tuple[np.ndarray, int]]) -> None:
        """Fills arrays of bytes from offsets of the file, which is opened for it: it may be gone by now."""
        with _faults_named(self.path):
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                for target, start in parts:
                    _read_at(descriptor, target, start)
            finally:
                os.close(descriptor)

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
