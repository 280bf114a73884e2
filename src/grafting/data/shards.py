"""The files of a folder of data: named in its index by size and hash, their tensors read row by row.

Rows are read with `preadv` and not through a memory map: a page of a map that cannot be read, because the file was cut short
or the disk failed, ends the process with a bus error, where a read gives an error that can name the shard. It is as fast,
and threads that read do not hold Python's lock.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Int, Int32, UInt8
from pydantic import AfterValidator, BaseModel, ConfigDict, PositiveInt
from torch import Tensor

from ..errors import DataError
from ..machine.files import sha256_of

# before a column's name: the lengths of its rows
LENGTHS = "lengths:"
# safetensors' own limit
_LONGEST_HEADER = 100_000_000
# torch's names of dtypes, and safetensors'
DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name} leads out of the folder")
    return name


class StoredFile(BaseModel):
    """A file of an index."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: Annotated[str, AfterValidator(_inside)]
    bytes: PositiveInt
    sha256: str

    def fault(self, folder: Path, *, hashes: bool) -> str | None:
        """Says if the file is missing or not what the index says; None if it is sound."""
        path = folder / self.file
        if not path.is_file():
            return f"{self.file} is missing"
        if (size := path.stat().st_size) != self.bytes:
            return f"{self.file} is cut short or changed: {size} bytes, not {self.bytes}"
        if hashes and sha256_of(path) != self.sha256:
            return f"{self.file} is damaged: its sha256 is not {self.sha256[:12]}"
        return None


def facts_of(path: Path) -> dict[str, Any]:
    """Entry of a folder's index for one of its files."""
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def by_shard(
    ends: Int[Tensor, " shards"], numbers: Int[Tensor, " b"]
) -> Iterator[tuple[int, list[int], list[int]]]:
    """Each shard that holds some of these items: its number, their rows in it, and their places among `numbers`.

    Args:
        ends: the number of the item after each shard's last.
    """
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    shard_of = torch.searchsorted(ends, numbers, right=True)
    rows, order = (numbers - starts[shard_of]).tolist(), shard_of.argsort().tolist()
    for number, group in groupby(order, key=shard_of.tolist().__getitem__):
        places = list(group)
        yield number, [rows[place] for place in places], places


class TensorFile:
    """A safetensors file of known tensors, read in pieces.

    Args:
        tensors: dtype and shape of each, as the index says them.
        sha256: of the file, compared when it is first read; left out, the file is not hashed.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], *, sha256: str | None = None
    ):
        self.path, self.tensors, self.sha256 = path, tensors, sha256

    def read(self, name: str, pieces: Iterable[tuple[UInt8[np.ndarray, " n"], int]]) -> None:
        """Fills arrays of bytes from offsets in a tensor's bytes; the file is opened for it: it may be gone by now.

        Raises:
            DataError: the file is missing or damaged.
        """
        start = self._starts[name]
        with _faults_named(self.path):
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                for target, offset in pieces:
                    _read_at(descriptor, target, start + offset)
            finally:
                os.close(descriptor)

    def integers(self, name: str) -> Int32[np.ndarray, " n"]:
        """A tensor [n] of int32, whole."""
        numbers = np.empty(self.tensors[name][1], "<i4")
        self.read(name, [(numbers.view(np.uint8), 0)])
        return numbers

    @cached_property
    def _starts(self) -> dict[str, int]:
        """Offset of each tensor's bytes in the file, after checking its header against the index."""
        with _faults_named(self.path), self.path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(size, _LONGEST_HEADER)))
            found = {name: (header[name]["dtype"], tuple(header[name]["shape"])) for name in self.tensors}
            starts = {name: 8 + size + header[name]["data_offsets"][0] for name in found}
        expected = {name: (DTYPES.get(dtype, dtype), shape) for name, (dtype, shape) in self.tensors.items()}
        if found != expected:
            raise DataError(f"the shard {self.path} holds {_said(found)}; its index says {_said(expected)}")
        if self.sha256 is not None and sha256_of(self.path) != self.sha256:
            raise DataError(f"the shard {self.path} is damaged: its sha256 is not {self.sha256[:12]}")
        return starts


class ShardFile(TensorFile):
    """A safetensors file of `latents` [count, *shape] and int32 `labels` [count]."""

    def __init__(self, path: Path, *, count: int, dtype: str, shape: tuple[int, ...]):
        super().__init__(path, {"latents": (dtype, (count, *shape)), "labels": ("int32", (count,))})

    @cached_property
    def labels(self) -> Int32[np.ndarray, " n"]:
        """The class of every row.

        Raises:
            DataError: the shard is missing or damaged.
        """
        return self.integers("labels")

    def read_rows(self, rows: list[int], into: UInt8[np.ndarray, "b n"], places: list[int]) -> None:
        """Copies the bytes of latents `rows` to `places` of `into`.

        Raises:
            DataError: the shard is missing or damaged.
        """
        length = into.shape[1]
        self.read("latents", ((into[place], row * length) for place, row in zip(places, rows, strict=True)))


class RaggedFile(TensorFile):
    """A safetensors file of columns: `count` rows each, or, where rows have their own lengths, the rows end to end.

    Args:
        columns: dtype and shape of a row of each; of a ragged one, less the first axis.
        lengths: of all rows of each ragged column together; `lengths:NAME` [count] in the file has them one by one.
    """

    def __init__(
        self,
        path: Path,
        *,
        count: int,
        columns: Mapping[str, tuple[str, tuple[int, ...]]],
        lengths: Mapping[str, int],
        sha256: str | None,
    ):
        tensors = {
            name: (dtype, (lengths.get(name, count), *shape)) for name, (dtype, shape) in columns.items()
        }
        super().__init__(
            path, tensors | {LENGTHS + name: ("int32", (count,)) for name in lengths}, sha256=sha256
        )
        self.count = count
        self._spans: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def spans(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Start of each row along a column's first axis [count], and its length [count]: 1 where they are not ragged.

        Raises:
            DataError: the file is missing or damaged.
        """
        if name not in self._spans:
            lengths = np.ones(self.count, np.int64)
            if LENGTHS + name in self.tensors:
                lengths = self.integers(LENGTHS + name).astype(np.int64)
            if lengths.min() < 0 or lengths.sum() != self.tensors[name][1][0]:
                raise DataError(f"the shard {self.path} is damaged: the lengths of {name} do not add up")
            self._spans[name] = (lengths.cumsum() - lengths, lengths)
        return self._spans[name]

    def read_rows(
        self, name: str, rows: list[int], into: UInt8[np.ndarray, "b n"], places: list[int]
    ) -> None:
        """Copies the bytes of a column's `rows` to the beginnings of `places` of `into`.

        Raises:
            DataError: the file is missing or damaged.
        """
        starts, lengths = self.spans(name)
        dtype, (_, *shape) = self.tensors[name]
        size = getattr(torch, dtype).itemsize * math.prod(shape)
        targets = (into[place, : lengths[row] * size] for place, row in zip(places, rows, strict=True))
        self.read(name, zip(targets, (int(starts[row]) * size for row in rows), strict=True))


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
