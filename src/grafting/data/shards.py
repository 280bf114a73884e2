"""The files of a folder of data: named in its index by size and hash, their tensors read row by row.

Rows are read with `preadv` and not through a memory map: a page of a map that cannot be read, because the file was cut short
or the disk failed, ends the process with a bus error, where a read gives an error that can name the shard. It is as fast,
and threads that read do not hold Python's lock.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Int, Int32, UInt8
from pydantic import PositiveInt
from torch import Tensor

from ..errors import DataError, listed
from ..machine.files import sha256_of
from ..machine.reading import DTYPES as SAFETENSORS_DTYPES
from ..machine.reading import Inside, read_header, read_stretches
from ..machine.settings import Stored

# before a column's name: the lengths of its rows
LENGTHS = "lengths:"
# torch's names of dtypes, and safetensors'
DTYPES = {str(dtype).removeprefix("torch."): name for name, dtype in SAFETENSORS_DTYPES.items()}


F = TypeVar("F", bound="StoredFile")


class StoredFile(Stored):
    """A file of an index."""

    file: Inside
    bytes: PositiveInt
    sha256: str

    @classmethod
    def of(cls: type[F], path: Path, **more: Any) -> F:
        """Entry of a folder's index for one of its files."""
        return cls(file=path.name, bytes=path.stat().st_size, sha256=sha256_of(path), **more)

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


def check_files(folder: Path, files: Iterable[StoredFile], *, what: str, hashes: bool) -> None:
    """Raises a DataError that names every file that is missing or not what the folder's index says."""
    found = (file.fault(folder, hashes=hashes) for file in files)
    if faults := [fault for fault in found if fault]:
        raise DataError(listed(f"the {what} in {folder} are incomplete or damaged:", faults))


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


class ShardFile:
    """A safetensors file of columns: `count` rows each, or, where rows have their own lengths, the rows end to end.

    Args:
        columns: dtype and shape of a row of each; of a ragged one, less the first axis.
        lengths: of all rows of each ragged column together; `lengths:NAME` [count] in the file has them one by one.
        sha256: of the file, compared when it is first read; left out, the file is not hashed.
    """

    def __init__(
        self,
        path: Path,
        *,
        count: int,
        columns: Mapping[str, tuple[str, tuple[int, ...]]],
        lengths: Mapping[str, int] = {},
        sha256: str | None = None,
    ):
        self.path, self.count, self.sha256 = path, count, sha256
        self.tensors = {
            name: (dtype, (lengths.get(name, count), *shape)) for name, (dtype, shape) in columns.items()
        } | {LENGTHS + name: ("int32", (count,)) for name in lengths}
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
        """Copies the bytes of a column's `rows` to the beginnings of `places` of `into`."""
        starts, lengths = self.spans(name)
        dtype, (_, *shape) = self.tensors[name]
        size = getattr(torch, dtype).itemsize * math.prod(shape)
        targets = (into[place, : lengths[row] * size] for place, row in zip(places, rows, strict=True))
        self._read(name, zip(targets, (int(starts[row]) * size for row in rows), strict=True))

    def integers(self, name: str) -> Int32[np.ndarray, " n"]:
        """A tensor [n] of int32, whole."""
        numbers = np.empty(self.tensors[name][1], "<i4")
        self._read(name, [(numbers.view(np.uint8), 0)])
        return numbers

    def _read(self, name: str, pieces: Iterable[tuple[UInt8[np.ndarray, " n"], int]]) -> None:
        """Fills arrays of bytes from offsets in a tensor's bytes; the file is opened for it: it may be gone by now."""
        start = self._starts[name]
        read_stretches(self.path, ((target, start + offset) for target, offset in pieces))

    @cached_property
    def _starts(self) -> dict[str, int]:
        """Offset of each tensor's bytes in the file, after checking its header against the index."""
        places = read_header(self.path)
        found = {name: (place.dtype, place.shape) for name, place in places.items() if name in self.tensors}
        expected = {name: (DTYPES.get(dtype, dtype), shape) for name, (dtype, shape) in self.tensors.items()}
        if found != expected:
            raise DataError(f"the shard {self.path} holds {_said(found)}; its index says {_said(expected)}")
        if self.sha256 is not None and sha256_of(self.path) != self.sha256:
            raise DataError(f"the shard {self.path} is damaged: its sha256 is not {self.sha256[:12]}")
        return {name: places[name].start for name in found}


def _said(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> str:
    return ", ".join(f"{name} {dtype} {shape}" for name, (dtype, shape) in tensors.items())
